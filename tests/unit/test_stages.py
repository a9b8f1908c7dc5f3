"""Stages: their timings, their order, and the time that is left."""

from __future__ import annotations

import pytest

from flatout.search.stages import Stages, Status


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_stages_are_timed_and_add_up() -> None:
    clock = Clock()
    stages = Stages({"a": 10, "b": 10}, clock=clock)
    for name, spent in (("a", 4.0), ("b", 1.5), ("a", 2.0)):
        with stages.stage(name):
            clock.now += spent
    assert stages.timings == pytest.approx({"a": 6.0, "b": 1.5})


def test_a_stage_that_fails_is_timed_too() -> None:
    clock = Clock()
    stages = Stages({"a": 10}, clock=clock)

    def interrupted() -> None:
        with stages.stage("a"):
            clock.now += 3
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert stages.timings == {"a": 3.0}


def test_the_time_left_is_the_plan_until_something_is_known() -> None:
    clock, seen = Clock(), list[Status]()
    stages = Stages({"a": 10, "b": 30, "c": 60}, seen.append, clock)
    with stages.stage("a"):
        stages.step("half", 1, 2)
        assert (seen[0].eta_s, seen[-1].eta_s) == (100, 95)
        assert (seen[-1].number, seen[-1].count, seen[-1].what) == (1, 3, "half")
        clock.now += 10
    with stages.stage("b"):
        assert seen[-1].eta_s == 90
        clock.now += 45  # longer than planned, and no progress was told
        stages.step("", 0, 1)
        assert seen[-1].eta_s == 60


def test_stages_that_take_longer_make_the_rest_longer() -> None:
    clock, seen = Clock(), list[Status]()
    stages = Stages({"a": 100, "b": 100}, seen.append, clock)
    with stages.stage("a"):
        clock.now += 220
    with stages.stage("b"):
        assert seen[-1].eta_s == pytest.approx(100 * 240 / 120)


def test_progress_never_leaves_its_range() -> None:
    seen: list[Status] = []
    stages = Stages({}, seen.append, Clock())
    with stages.stage("unplanned"):
        for done, total in ((5, 3), (0, 0), (1, 1)):
            stages.step("", done, total)
    assert all(0 <= status.fraction <= 1 and status.eta_s >= 0 for status in seen)
