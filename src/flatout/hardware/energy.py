"""Joules that a piece of work takes above what the idle machine takes, by counters that were seen to move."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flatout.errors import BackendError, EvidenceError
from flatout.hardware.meter import Counter, Meter, nvml_counters, rapl_counters

_TRIED_S = 0.5  # of work, in which every counter has to move
_IDLE_S = 2.0
_WINDOW_S = {"cpu": 0.25, "gpu": 2.0}
"""Least length of a sample: at least 20 updates of the counters (RAPL 1 ms, NVML 20 to 100 ms)."""

_NONE = {
    "cpu": "no package in /sys/class/powercap (RAPL): virtual machines and containers often hide it",
    "gpu": "no GPU that NVML shows (package nvidia-ml-py, and a driver)",
}
_UNREADABLE = {
    "cpu": "sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj, or --objective latency",
    "gpu": "a GPU that counts energy (Volta or later), or --objective latency",
}


@dataclass(frozen=True, slots=True)
class EnergyMeter:
    """Counters that work, and the watts that all of them together show when nothing is done."""

    counters: tuple[Counter, ...]
    idle_watts: float
    window_s: float

    def joules(self, work: Callable[[], object]) -> float:
        """Joules above idle of one `work`, which is repeated until the counters resolve it. Raises
        EvidenceError when a counter stops, or shows no more than idle."""
        meter, done = Meter(self.counters), 0
        meter.start()
        until = time.perf_counter() + self.window_s
        while done == 0 or time.perf_counter() < until:
            work()
            done += 1
        energy = meter.stop()
        if energy.missing:
            raise EvidenceError("energy counters must go on moving", _listed(energy.missing), "measure again")
        used = sum(energy.joules.values()) - self.idle_watts * energy.seconds
        if used <= 0:
            raise EvidenceError(
                "work must take more power than idling",
                f"{used / energy.seconds:.2f} W above {self.idle_watts:.1f} W",
                "a machine that nobody else uses",
            )
        return used / done


def open_meter(
    kind: str, work: Callable[[], object], counters: Sequence[Counter] | None = None
) -> EnergyMeter:
    """The counters of hardware of this kind, "cpu" or "gpu", after `work` has moved every one of them.

    Raises BackendError that names each counter which is missing, may not be read or stands still.
    """
    if counters is None:
        counters = rapl_counters() if kind == "cpu" else nvml_counters()
    if not counters:
        raise BackendError("energy needs a counter", _NONE[kind], "--objective latency")
    meter = Meter(counters)
    meter.start()
    until = time.perf_counter() + _TRIED_S
    while time.perf_counter() < until:
        work()
    missing = meter.stop().missing
    if missing:
        raise BackendError("every energy counter must move", _listed(missing), _UNREADABLE[kind])
    meter.start()
    time.sleep(_IDLE_S)
    idle = meter.stop()
    return EnergyMeter(tuple(counters), sum(idle.joules.values()) / idle.seconds, _WINDOW_S[kind])


def _listed(missing: dict[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in missing.items())
