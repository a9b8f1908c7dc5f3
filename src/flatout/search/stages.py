"""Stages: what the search is doing, how long each stage took, and when the whole will be done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Where the search stands. number counts stages from 1; eta_s is the time left for all stages."""

    stage: str
    number: int
    count: int
    what: str
    fraction: float
    eta_s: float


_TRUST_S = 20.0  # the plan counts like this many seconds that went as planned

Listener = Callable[[Status], None]


class Stages:
    """The stages of one search, in the order of `planned` (name -> predicted seconds).

    The time left is the plan's, scaled by how the stages so far compared with it.
    """

    def __init__(
        self,
        planned: Mapping[str, float],
        listen: Listener | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.planned = dict(planned)
        self.timings: dict[str, float] = {}
        self._listen = listen or (lambda status: None)
        self._clock = clock
        self._begun = clock()
        self._stage = ""
        self._running = ""
        self._started = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as the stage `name`; a stage entered twice adds up, and one inside another stops its
        clock."""
        outer = self._running
        if outer:
            self._stop()
        self._start(name)
        self.planned.setdefault(name, 0.0)
        self.step("", 0, 1)
        try:
            yield
        finally:
            self._stop()
            if outer:
                self._start(outer)

    def _start(self, name: str) -> None:
        self._stage, self._started, self._running = name, self._clock(), name

    def _stop(self) -> None:
        name, self._running = self._running, ""
        self.timings[name] = self.timings.get(name, 0.0) + self._clock() - self._started

    def elapsed(self) -> float:
        """Seconds since the search began."""
        return self._clock() - self._begun

    def step(self, what: str, done: int, total: int) -> None:
        """Progress inside the current stage."""
        names = list(self.planned)
        fraction = min(done / total, 1.0) if total else 0.0
        self._listen(
            Status(
                stage=self._stage,
                number=names.index(self._stage) + 1 if self._stage in names else 0,
                count=len(names),
                what=what,
                fraction=fraction,
                eta_s=self._eta(fraction),
            )
        )

    def _eta(self, fraction: float) -> float:
        names = list(self.planned)
        place = names.index(self._stage) if self._stage in names else 0
        later = sum(self.planned[name] for name in names[place + 1 :])
        spent = self._clock() - self._started
        planned_here = self.planned.get(self._stage, 0.0)
        here = max(planned_here * (1 - fraction), 0.0) if fraction else max(planned_here - spent, 0.0)
        expected = sum(self.planned[name] for name in self.timings)
        pace = (sum(self.timings.values()) + _TRUST_S) / (expected + _TRUST_S)
        return (here + later) * min(max(pace, 0.5), 3.0)
