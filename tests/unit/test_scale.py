"""Factors of expected losses against hand-made posteriors."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatout.search.scale import COMMON, OWN, WIDTHS, Observation, by_width, loss_scale, width_of

PRIOR = math.hypot(COMMON, OWN)


def of(width: int, loss: float) -> tuple[float, ...]:
    return tuple(loss if w == width else 0.0 for w in WIDTHS)


def test_one_width_by_hand() -> None:
    assert loss_scale([]).of(of(5, 0.01)) == (pytest.approx(0.01), pytest.approx(PRIOR * 0.01))
    exact = [Observation(expected=of(5, 0.01), measured=0.02, error=1e-9)]
    assert loss_scale(exact).of(of(5, 0.01)) == (pytest.approx(0.02), pytest.approx(0.0, abs=1e-6))
    # as uncertain as the prior: half way
    even = [Observation(expected=of(5, 0.01), measured=0.02, error=PRIOR * 0.01)]
    mean, deviation = loss_scale(even).of(of(5, 0.01))
    assert mean == pytest.approx(0.015)
    assert deviation == pytest.approx(0.01 * PRIOR / math.sqrt(2))


def test_another_width_takes_the_common_part() -> None:
    """Regression of one factor on another: the covariance over the variance."""
    scale = loss_scale([Observation(expected=of(5, 0.01), measured=0.02, error=1e-9)])
    assert scale.mean[WIDTHS.index(6)] == pytest.approx(1 + COMMON**2 / PRIOR**2)


def test_what_two_candidates_have_and_have_not_in_common_is_told_apart() -> None:
    seen = [
        Observation(expected=(0.001, 0.010, 0.000, 0.0), measured=0.011, error=2e-4),
        Observation(expected=(0.001, 0.005, 0.010, 0.0), measured=0.026, error=2e-4),
    ]
    scale = loss_scale(seen)
    assert scale.mean[WIDTHS.index(6)] == pytest.approx(1.0, abs=0.1)
    assert scale.mean[WIDTHS.index(5)] == pytest.approx(2.0, abs=0.1)


@given(st.lists(st.tuples(*[st.floats(1e-4, 0.05)] * 5), max_size=5))
def test_doubt_shrinks_with_every_observation(drawn: list[tuple[float, ...]]) -> None:
    seen = [Observation(expected=one[:4], measured=one[4], error=0.3 * one[4]) for one in drawn]
    recipe = (0.002, 0.004, 0.003, 0.001)
    deviations = [loss_scale(seen[:i]).of(recipe)[1] for i in range(len(seen) + 1)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(deviations))
    assert np.all(loss_scale(seen).mean >= 0.2)


def test_places_by_width() -> None:
    assert [
        WIDTHS[width_of("layers.0.o", f)] for f in ("w8a8", "bf16", "w6a16", "w5a8", "w4a8-g32", "w3a16-g64")
    ] == [8, 8, 6, 5, 4, 4]
    assert width_of("head", "w4a8-g32") == width_of("kv_cache", "int8") == 0
    losses = {("layers.0.o", "w5a8"): 1.0, ("layers.1.o", "w5a16"): 2.0, ("head", "w8a16"): 4.0}
    assert by_width(losses) == (4.0, 0.0, 3.0, 0.0)
