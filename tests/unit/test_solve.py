"""The solver against trying everything, on instances small enough for that."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatout.search.solve import Choice, Solution, frontier, solve

TOLERANCE = 1e-5  # of the objective: the gap at which the solver may stop, and its feasibility tolerance


def instance(seed: int, places: int, formats: int) -> list[list[Choice]]:
    """Random choices; losses over four orders of magnitude, as they are over real layers and formats."""
    rng = np.random.default_rng(seed)
    return [
        [
            Choice(
                place=f"p{p}",
                format=f"f{f}",
                seconds=float(rng.uniform(1e-4, 5e-3)),
                loss=float(10 ** rng.uniform(-7, -3)),
                bytes=float(rng.integers(1, 1000) * 1000),
            )
            for f in range(formats)
        ]
        for p in range(places)
    ]


def brute_force(places: list[list[Choice]], budget: float, memory: float, objective: str) -> float:
    """The least objective of all combinations, infinite where none is allowed."""
    best = math.inf
    for combination in itertools.product(*places):
        solution = Solution(choices=combination)
        if solution.loss <= budget and solution.bytes <= memory:
            best = min(best, getattr(solution, objective))
    return best


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    places=st.integers(1, 5),
    formats=st.integers(1, 4),
    tightness=st.floats(0, 1),
    memory=st.sampled_from([0.3, 0.6, math.inf]),
    objective=st.sampled_from(["seconds", "bytes"]),
)
def test_nothing_allowed_is_better(
    seed: int, places: int, formats: int, tightness: float, memory: float, objective: str
) -> None:
    choices = instance(seed, places, formats)
    least, most = (sum(how(c.loss for c in each) for each in choices) for how in (min, max))
    budget = least * (most / least) ** tightness * (1 + 1e-6)
    limit = memory * sum(max(c.bytes for c in each) for each in choices) if memory < 1 else math.inf
    expected = brute_force(choices, budget, limit, objective)
    found = solve(choices, budget, limit, objective)  # type: ignore[arg-type]
    if found is None:
        assert expected == math.inf
        return
    assert [choice.place for choice in found.choices] == [f"p{p}" for p in range(places)]
    assert found.loss <= budget * (1 + TOLERANCE)
    assert found.bytes <= limit * (1 + TOLERANCE)
    assert getattr(found, objective) <= expected * (1 + TOLERANCE)


def test_no_budget_admits_nothing() -> None:
    choices = instance(1, 4, 3)
    least = sum(min(c.loss for c in each) for each in choices)
    assert solve(choices, 0.9 * least) is None
    assert frontier(choices, memory_bytes=1.0) == []


def test_conflicting_choices_are_not_made_together() -> None:
    fast, slow = 1e-3, 2e-3
    places = [
        [
            Choice(place=place, format=name, seconds=seconds, loss=1e-4, bytes=1.0)
            for name, seconds in (("own", fast), ("other", slow))
        ]
        for place in ("gate_up", "down")
    ]
    assert solve(places, 1.0).formats() == {"gate_up": "own", "down": "own"}  # type: ignore[union-attr]
    found = solve(places, 1.0, conflicts=[(("gate_up", "own"), ("down", "own"))])
    assert found is not None
    assert sorted(found.formats().values()) == ["other", "own"]


@pytest.mark.parametrize("seed", range(3))
def test_the_frontier_is_a_frontier(seed: int) -> None:
    """Losses rise, times fall, and no combination beats a point in both."""
    choices = instance(seed, 5, 4)
    points = frontier(choices, points=8)
    assert len(points) >= 3
    losses, times = [p.loss for p in points], [p.seconds for p in points]
    assert losses == sorted(losses)
    assert times == sorted(times, reverse=True)
    assert times[-1] == pytest.approx(sum(min(c.seconds for c in each) for each in choices))
    for point in points:
        best = brute_force(choices, point.loss, math.inf, "seconds")
        assert point.seconds <= best * (1 + TOLERANCE)


def test_as_many_places_as_a_model_has(capfd: pytest.CaptureFixture[str]) -> None:
    """30 layers of 4 linears, a head and a cache; nothing is written to standard output meanwhile, where
    results go."""
    choices = instance(3, 122, 6)
    budget = sum(float(np.median([c.loss for c in each])) for each in choices)
    found = solve(choices, budget)
    assert found is not None
    assert found.loss <= budget * (1 + TOLERANCE)
    # the bound of Lagrange: at any price of loss, no choice is cheaper than the cheapest of each place
    price = max(
        sum(min(c.seconds + rate * c.loss for c in each) for each in choices) - rate * budget
        for rate in np.geomspace(0.1, 1e5, 200)
    )
    assert price <= found.seconds <= price * 1.01
    assert capfd.readouterr().out == ""
