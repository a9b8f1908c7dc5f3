"""CPU load that other processes put on this machine while something is timed.

/proc/stat counts the busy ticks of all cores (1/100 s each), stolen time included; what this process and
its finished children used is subtracted. Where /proc/stat is missing or stands still there is no meter: the
load is None, never 0.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flatout.hardware.detect import available_cores

MAX_FOREIGN = 0.1
"""Share of the cores that others may keep busy before a measurement counts as disturbed."""

_TRIES = 3
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ticks:
    """A reading: busy and total CPU seconds of the machine, CPU seconds of this process, the clock."""

    busy_s: float
    total_s: float
    own_s: float
    clock_s: float


def parse_stat(content: str, ticks_per_s: float) -> tuple[float, float] | None:
    """(busy, total) CPU seconds of the first line of /proc/stat.

    Its fields are user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice; waiting for a
    disk is not busy, and guest time is part of user time already.
    """
    fields = content.partition("\n")[0].split()
    if len(fields) < 5 or fields[0] != "cpu" or not all(field.isdigit() for field in fields[1:]):
        return None
    values = [int(field) for field in fields[1:9]]
    total = sum(values)
    return (total - values[3] - (values[4] if len(values) > 4 else 0)) / ticks_per_s, total / ticks_per_s


def read_ticks(path: Path = Path("/proc/stat")) -> Ticks | None:
    """A reading now, or None without a meter."""
    try:
        content = path.read_text(encoding="ascii")
    except OSError:
        return None
    stat = parse_stat(content, os.sysconf("SC_CLK_TCK"))
    if stat is None:
        return None
    own = os.times()
    own_s = own.user + own.system + own.children_user + own.children_system
    return Ticks(stat[0], stat[1], own_s, time.perf_counter())


def foreign_load(before: Ticks | None, after: Ticks | None) -> float | None:
    """Cores that others kept busy between two readings, on average; None without a meter."""
    if before is None or after is None or after.clock_s <= before.clock_s or after.total_s <= before.total_s:
        return None
    busy = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return max(0.0, busy / (after.clock_s - before.clock_s))


def until_quiet(measure: Callable[[], T], cores: int | None = None) -> list[T]:
    """Results of `measure`, repeated up to three times: the first undisturbed one alone, or all if there is
    none."""
    found: list[T] = []
    for _ in range(_TRIES):
        before = read_ticks()
        result = measure()
        load = foreign_load(before, read_ticks())
        if load is None or load <= MAX_FOREIGN * (cores or available_cores()):
            return [result]
        found.append(result)
    return found
