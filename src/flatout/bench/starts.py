"""From nothing to the first token: how long a fresh process takes, and how much memory it comes to hold.

The clock runs from the start of the process to the moment when its answer is there: interpreter, imports, the
model's file, the engine's own preparation, 32 prompt tokens and one step. Everyone's interpreter and imports
count, because users wait for them. The peak is VmHWM, the most bytes that were resident at once; pages of a
mapped file count like any others. Every contender starts once untimed, so that all read from the page cache.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flatout.bench.peers import Listener
from flatout.bench.phases import Start
from flatout.bench.worker import Worker
from flatout.verify.foreign_load import MAX_FOREIGN
from flatout.verify.speed import SETTLE_S, time_sample


@dataclass(frozen=True, slots=True)
class Starter:
    """A contender that can be started: `launch` makes its process, which then loads `path`."""

    name: str
    launch: Callable[[], Worker]
    path: str


def take_starts(
    starters: Sequence[Starter],
    prompt: Sequence[int],
    threads: int,
    rounds: int,
    cores: int,
    listen: Listener,
    settle_s: float = SETTLE_S,
) -> dict[int, list[Start]]:
    """Starts by index of the starter, in an order drawn anew every round; as many extra rounds as needed, but
    at most `rounds`, while anyone lacks undisturbed ones. cores: of this machine that we may use."""
    draw = random.Random(0)
    found: dict[int, list[Start]] = defaultdict(list)
    for done, starter in enumerate(starters):
        listen("starting everyone once", done, len(starters))
        time_start(starter, prompt, threads, cores, settle_s)
    for number in range(2 * rounds):
        if min(_clean(found[i]) for i in range(len(starters))) >= rounds:
            break
        for done, i in enumerate(draw.sample(range(len(starters)), len(starters))):
            listen(f"start {number + 1} of {max(rounds, number + 1)}", done, len(starters))
            found[i].append(time_start(starters[i], prompt, threads, cores, settle_s))
    return dict(found)


def time_start(
    starter: Starter, prompt: Sequence[int], threads: int, cores: int, settle_s: float = SETTLE_S
) -> Start:
    """Start a process, have it load its model and give the first token, and end it."""
    peaks: list[int | None] = []

    def run() -> float:
        begin = time.perf_counter()
        with starter.launch() as worker:
            worker.load(starter.path, threads)
            worker.first(prompt)
            seconds = time.perf_counter() - begin
            peaks.append(peak_resident(worker.pid))
        return seconds  # the process has ended: the meter counts what it used as ours

    return Start(time_sample(run, allowed=MAX_FOREIGN * cores, settle_s=settle_s), peaks[0])


def peak_resident(pid: int, root: Path = Path("/proc")) -> int | None:
    """The most bytes of a process that were in memory at once, or None where the system does not say."""
    try:
        lines = (root / str(pid) / "status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    fields = next((line.split() for line in lines if line.startswith("VmHWM:")), [])
    return int(fields[1]) << 10 if len(fields) == 3 and fields[1].isdigit() and fields[2] == "kB" else None


def _clean(starts: Sequence[Start]) -> int:
    return sum(not start.sample.noisy for start in starts)
