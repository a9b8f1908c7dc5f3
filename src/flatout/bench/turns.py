"""Contenders take turns: every round times every phase once per contender, in an order drawn anew.

A sample during which others kept more than a tenth of the cores busy is noisy. Phases that lack clean samples
run again, in up to as many extra rounds; all contenders run again then, so that they stay side by side.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from flatout.bench.peers import Listener
from flatout.bench.phases import Phase
from flatout.core.garbage import without_garbage_collection
from flatout.engine.cpu import CpuRunner
from flatout.engine.score import score_documents
from flatout.verify.drivers import RunnerDriver
from flatout.verify.foreign_load import MAX_FOREIGN, Ticks, read_ticks
from flatout.verify.speed import SETTLE_S, Sample, time_sample

Prompts = Sequence[Sequence[int]]


class Side(Protocol):
    """A contender at work: a `verify.drivers.Driver` that also scores and has a meter of foreign load, on
    which its own CPU time does not count. `bench.worker.Worker` is one."""

    def prefill(self, prompts: Prompts) -> float: ...

    def decode(self, prompts: Prompts, tokens: int) -> float: ...

    def score(self, document: Sequence[int]) -> Sequence[float] | np.ndarray: ...

    def ticks(self) -> Ticks | None: ...


class Ours:
    """Our engine, in this process."""

    def __init__(self, runner: CpuRunner) -> None:
        self._driver, self._runner = RunnerDriver(runner), runner

    def prefill(self, prompts: Prompts) -> float:
        return self._driver.prefill(prompts)

    def decode(self, prompts: Prompts, tokens: int) -> float:
        return self._driver.decode(prompts, tokens)

    def score(self, document: Sequence[int]) -> np.ndarray:
        return score_documents(self._runner, [document])[0]

    def ticks(self) -> Ticks | None:
        return read_ticks()


def take_turns(
    sides: Sequence[Side],
    work: Sequence[tuple[Phase, Prompts]],
    rounds: int,
    cores: int,
    listen: Listener,
    settle_s: float = SETTLE_S,
) -> dict[tuple[int, str], list[Sample]]:
    """Samples by (index of the side, name of the phase), `rounds` of each or more; see the module docstring.

    cores: of this machine that we may use.
    """
    draw = random.Random(0)
    samples: dict[tuple[int, str], list[Sample]] = defaultdict(list)
    for done, (phase, prompts) in enumerate(work):
        listen("warming up", done, len(work))
        for side in sides:
            _run(side, phase, prompts)
    with without_garbage_collection(collect=True):
        for number in range(2 * rounds):
            todo = [item for item in work if _fewest_clean(samples, len(sides), item[0]) < rounds]
            for done, (phase, prompts) in enumerate(todo):
                which = f"of {rounds}" if number < rounds else "because of other load"
                listen(f"round {number + 1} {which}", done, len(todo))
                for i in draw.sample(range(len(sides)), len(sides)):
                    samples[i, phase.name].append(
                        _time(sides[i], phase, prompts, MAX_FOREIGN * cores, settle_s)
                    )
    return dict(samples)


def _run(side: Side, phase: Phase, prompts: Prompts) -> float:
    if phase.kind == "prefill":
        return side.prefill(prompts)
    return side.decode(prompts, phase.workload.output)


def _time(side: Side, phase: Phase, prompts: Prompts, allowed: float, settle_s: float) -> Sample:
    return time_sample(
        lambda: _run(side, phase, prompts), allowed=allowed, settle_s=settle_s, ticks=side.ticks
    )


def _fewest_clean(samples: dict[tuple[int, str], list[Sample]], sides: int, phase: Phase) -> int:
    return min(sum(not sample.noisy for sample in samples[i, phase.name]) for i in range(sides))
