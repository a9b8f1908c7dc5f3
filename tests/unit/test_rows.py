"""Which of several equally fast candidates comes first."""

from __future__ import annotations

import pytest

from flatout.core.fuse import float_recipe
from flatout.search.recipes import Candidate
from flatout.search.rows import Row, by_suitability, regret


def row(name: str, prefill: float, decode: float) -> Row:
    candidate = Candidate(recipe=float_recipe("bf16").renamed(name), why="")
    times = {"prefill_s": prefill, "decode_s": decode, "workload_s": prefill + decode}
    return Row(candidate=candidate, memory_bytes=1, times=times)


def by_cost(*rows: Row) -> list[Row]:
    return sorted(rows, key=lambda r: (r.times or {})["workload_s"])


@pytest.mark.parametrize("noise", [0.97, 1.0, 1.03])
def test_about_equal_regrets_leave_the_choice_to_the_time(noise: float) -> None:
    smooth, groups, native = (
        row("smooth", 0.146, 0.468),
        row("groups", 0.194 * noise, 0.446),
        row("native", 0.298, 0.320),
    )
    found = by_suitability(by_cost(smooth, groups, native), tolerance=1.1)
    assert [r.name for r in found] == ["smooth", "groups", "native"]


def test_clearly_less_regret_comes_first() -> None:
    even, lopsided = row("even", 0.30, 0.34), row("lopsided", 0.60, 0.02)
    found = by_suitability(by_cost(even, lopsided), tolerance=1.1)
    assert regret(even, [even, lopsided]) == pytest.approx(17)
    assert regret(lopsided, [even, lopsided]) == pytest.approx(2)
    assert [r.name for r in found] == ["lopsided", "even"]


def test_no_rows_and_rows_without_times_are_fine() -> None:
    assert by_suitability([], tolerance=1.1) == []
    untimed = Row(candidate=Candidate(recipe=float_recipe("bf16"), why=""), memory_bytes=1)
    assert by_suitability([untimed], tolerance=1.1) == [untimed]
