"""measure_ceilings(): the best rates at which this machine reads memory and multiplies.

The floor of an op is its work over these rates, so a ceiling must be the best that a loop can reach:
several loops compete for each one (kernels/cpu/ceilings.cpp), the whole set is measured more than once,
seconds apart, and the best sample counts. Reading is measured at several working sets, since a step streams
anything between megabytes and gigabytes.

    read_cache                   half of the level 2 caches       byte/s
    read_16mb .. read_256mb      working sets of small models     byte/s
    read_dram                    more than the last cache holds   byte/s
    int8, bf16, fp32             vector instructions              op/s (mul and add count as two)
    int8_amx, bf16_amx           tile instructions, if present    op/s
    clock                        while computing                  Hz

Bandwidth of a shared machine changes from hour to hour; results are kept for one hour and
one boot, and `fresh=True` renews them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from flatout.core.types import Ceiling, Hardware, to_json
from flatout.errors import BackendError, ResourceError
from flatout.hardware import kept
from flatout.hardware.detect import detect, free_memory

Progress = Callable[[str, int, int], None]

_READ_BYTES = {f"read_{mb}mb": mb << 20 for mb in (16, 48, 96, 256)}
_MOST_READ = 1 << 30  # a virtual machine may be told of a cache that it shares with many
_READ_SECONDS = 0.04  # a loop variant; six variants compete
_OP_SECONDS = 0.04
_ROUNDS = 3
_BUDGET_S = 11.0  # a round that would end later than this is not started
_MAX_AGE_S = 3600.0
_VERSION = 2


class Microbenchmarks(Protocol):
    """What the C++ extension offers; tests pass a fake."""

    def read_rates(self, bytes: int, threads: int, seconds: float) -> list[tuple[str, float]]: ...

    def op_kernels(self) -> list[tuple[str, str]]: ...

    def op_rate(self, format: str, instruction: str, threads: int, seconds: float) -> float: ...


def measure_ceilings(
    progress: Progress | None = None,
    *,
    fresh: bool = False,
    native: Microbenchmarks | None = None,
    directory: Path | None = None,
) -> Hardware:
    """This machine with its ceilings, at 1 and all threads: measured in under 20 s, or from the cache file.

    progress(what, done, of) is called before each measurement. directory holds hardware-<fingerprint>.json
    (default: the cache folder). Raises BackendError without the C++ extension and ResourceError without
    memory for the largest read.
    """
    hardware = detect()
    path = (directory or _cache_dir()) / f"hardware-{hardware.fingerprint}.json"
    if not fresh and (ceilings := _load(path)):
        return replace(hardware, ceilings=ceilings)
    needed = 2 * _READ_BYTES["read_256mb"]
    if 0 < (free := free_memory()) < needed:
        raise ResourceError(
            f"measuring memory needs {needed >> 20} MB free", f"{free >> 20} MB", "close other programs"
        )
    ceilings = _measure(hardware, native or _extension(), progress or (lambda what, done, of: None))
    kept.store(path, _VERSION, {"ceilings": to_json(ceilings)})
    return replace(hardware, ceilings=ceilings)


def _measure(hardware: Hardware, native: Microbenchmarks, progress: Progress) -> tuple[Ceiling, ...]:
    thread_counts = sorted({1, hardware.cores})
    reads = ("read_cache", *_READ_BYTES, "read_dram")
    jobs = [(name, "", threads) for name in reads for threads in thread_counts]
    jobs += [
        (form, instruction, threads) for form, instruction in native.op_kernels() for threads in thread_counts
    ]
    best: dict[tuple[str, int], Ceiling] = {}
    start = time.perf_counter()
    for round_number in range(_ROUNDS):
        elapsed = time.perf_counter() - start
        if round_number and elapsed * (round_number + 1) / round_number > _BUDGET_S:
            break
        for done, (name, instruction, threads) in enumerate(jobs):
            progress(f"{name} {instruction}".strip(), round_number * len(jobs) + done, _ROUNDS * len(jobs))
            if instruction:
                found = _op_ceiling(native, name, instruction, threads)
            else:
                found = _read_ceiling(native, name, threads, hardware)
            known = best.get((found.name, threads))
            if known is None or found.value > known.value:
                best[found.name, threads] = found
    progress("done", 1, 1)
    for (
        threads
    ) in thread_counts:  # bf16 values widen to fp32 by a shift, so fp32's rate bounds bf16 from below
        fp32 = best.get(("fp32", threads))
        bf16 = best.get(("bf16", threads))
        if fp32 is not None and (bf16 is None or bf16.value < fp32.value):
            best["bf16", threads] = Ceiling(name="bf16", value=fp32.value, unit=fp32.unit, threads=threads)
    return tuple(best.values())


def _read_ceiling(native: Microbenchmarks, name: str, threads: int, hardware: Hardware) -> Ceiling:
    working_set = _read_bytes(name, threads, hardware)
    rate = max(value for _, value in native.read_rates(working_set, threads, _READ_SECONDS))
    return Ceiling(name=name, value=rate, unit="byte/s", threads=threads, working_set_bytes=working_set)


def _read_bytes(name: str, threads: int, hardware: Hardware) -> int:
    """The working set of a read ceiling."""
    if name == "read_dram":
        affordable = min(free_memory() // 4 or _MOST_READ, _MOST_READ)
        return max(_READ_BYTES["read_256mb"], min(hardware.l3_bytes * 5 // 4, affordable))
    return _READ_BYTES.get(name) or max(hardware.l2_bytes // 2, 64 << 10) * threads


def _op_ceiling(native: Microbenchmarks, form: str, instruction: str, threads: int) -> Ceiling:
    rate = native.op_rate(form, instruction, threads, _OP_SECONDS)
    if form == "clock":
        return Ceiling(name="clock", value=rate / threads, unit="Hz", threads=threads)
    name = f"{form}_amx" if instruction == "amx" else form
    return Ceiling(name=name, value=rate, unit="op/s", threads=threads)


def _extension() -> Microbenchmarks:
    try:
        from flatout import _cpu
    except ImportError as error:
        raise BackendError(
            "ceilings are measured by the C++ extension flatout._cpu",
            str(error),
            "reinstall flatout where g++ is found",
        ) from error
    native: Microbenchmarks = _cpu
    return native


def _cache_dir() -> Path:
    from flatout.core.sources import cache_dir

    return cache_dir()


def _load(path: Path) -> tuple[Ceiling, ...]:
    """The ceilings on file; empty (so measure again) if there are none that hold."""
    record = kept.read(path, _VERSION, _MAX_AGE_S)
    try:
        return () if record is None else tuple(Ceiling(**fields) for fields in record["ceilings"])
    except (KeyError, TypeError):
        return ()
