"""Joules of a stretch of work, from counters the hardware keeps: NVML on Nvidia GPUs, RAPL on processors.

A counter that is missing, may not be read, or does not move while work is done gives no number and a reason,
never zero joules. RAPL counters wrap around; one turn is corrected, so read at least every few minutes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

_STUCK_AFTER_S = 0.3
"""NVML renews its counter every 20 to 100 ms, RAPL every millisecond."""


class Counter(Protocol):
    """An energy counter. name: "gpu0" or "package-0"; wraps_at: joules at which it starts anew, or None."""

    @property
    def name(self) -> str: ...

    @property
    def wraps_at(self) -> float | None: ...

    def joules(self) -> float:
        """What it shows. Raises OSError when it cannot be read."""
        ...


@dataclass(frozen=True, slots=True)
class RaplCounter:
    """A package of processors, a folder below /sys/class/powercap."""

    folder: Path
    name: str
    wraps_at: float | None

    def joules(self) -> float:
        return int((self.folder / "energy_uj").read_text()) / 1e6


class NvmlCounter:
    """One GPU, by its index. `nvml` is the module pynvml, initialised."""

    wraps_at = None

    def __init__(self, nvml: object, index: int) -> None:
        self._nvml = nvml
        self.name = f"gpu{index}"
        self._handle = nvml.nvmlDeviceGetHandleByIndex(index)  # type: ignore[attr-defined]

    def joules(self) -> float:
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3  # type: ignore[attr-defined]
        except self._nvml.NVMLError as error:  # type: ignore[attr-defined]
            raise OSError(str(error)) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """joules by counter; seconds of the stretch; why a counter has none."""

    joules: dict[str, float]
    seconds: float
    missing: dict[str, str] = field(default_factory=dict)


class Meter:
    """`start`, work, `stop`."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self._counters = tuple(counters)
        self._before: dict[str, float | str] = {}
        self._since = 0.0

    def start(self) -> None:
        self._before = {counter.name: _read(counter) for counter in self._counters}
        self._since = time.perf_counter()

    def stop(self) -> Energy:
        """What was used since `start`."""
        seconds = time.perf_counter() - self._since
        joules: dict[str, float] = {}
        missing: dict[str, str] = {}
        for counter in self._counters:
            before, after = self._before[counter.name], _read(counter)
            if isinstance(before, str) or isinstance(after, str):
                missing[counter.name] = before if isinstance(before, str) else str(after)
                continue
            used = after - before
            if used < 0 and counter.wraps_at is not None:
                used += counter.wraps_at
            if used > 0:
                joules[counter.name] = used
            elif used < 0 or seconds > _STUCK_AFTER_S:
                missing[counter.name] = "the counter does not move" if used == 0 else "the counter went back"
            else:
                missing[counter.name] = f"{seconds:.2f} s are too short for it"
        return Energy(joules=joules, seconds=seconds, missing=missing)


def rapl_counters(root: Path = Path("/")) -> list[RaplCounter]:
    """Packages that powercap shows. Their counters may still be readable by the administrator alone."""
    found = []
    for folder in sorted((root / "sys/class/powercap").glob("intel-rapl:?")):
        try:
            wraps_at = int((folder / "max_energy_range_uj").read_text()) / 1e6
            found.append(RaplCounter(folder, (folder / "name").read_text().strip(), wraps_at))
        except (OSError, ValueError):
            continue
    return found


def nvml_counters() -> list[NvmlCounter]:
    """GPUs that NVML shows; none where it is not installed or finds no driver."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        return [NvmlCounter(pynvml, i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _read(counter: Counter) -> float | str:
    try:
        return counter.joules()
    except (OSError, ValueError) as error:
        return str(error)
