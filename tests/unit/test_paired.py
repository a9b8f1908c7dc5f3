"""The paired change of a proportion: against scipy, the score test's own definition and exact enumeration."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from flatout.errors import ConfigError, EvidenceError
from flatout.verify.paired import mcnemar_p, needed_items, paired_change

counts = st.tuples(st.integers(1, 400), st.integers(0, 400), st.integers(0, 400)).filter(
    lambda c: c[1] + c[2] <= c[0]
)


@given(st.integers(0, 60), st.integers(0, 60))
@settings(deadline=None, derandomize=True)
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int) -> None:
    expected = stats.binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert mcnemar_p(lost, gained) == pytest.approx(expected, rel=1e-9)


def constrained_score(n: int, lost: int, gained: int, x: float) -> float:
    """Tango's statistic by its definition: the probability of a loss maximises the trinomial likelihood
    numerically, under the hypothesis that gains minus losses have probability x."""

    def negative(q: float) -> float:
        cells = ((lost, q), (gained, q + x), (n - lost - gained, 1 - 2 * q - x))
        return -sum(count * math.log(max(p, 1e-300)) for count, p in cells if count)

    low, high = max(0.0, -x), (1 - x) / 2
    q = optimize.minimize_scalar(negative, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (gained - lost - n * x) / math.sqrt(n * (2 * q + x - x * x))


@pytest.mark.parametrize(("n", "lost", "gained"), [(40, 7, 2), (200, 3, 11), (1000, 25, 25), (60, 0, 4)])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_the_ends_are_where_the_score_test_rejects(n: int, lost: int, gained: int, alpha: float) -> None:
    found = paired_change(n, lost, gained, alpha)
    z = stats.norm.ppf(1 - alpha)
    assert constrained_score(n, lost, gained, found.low) == pytest.approx(z, abs=2e-3)
    assert constrained_score(n, lost, gained, found.high) == pytest.approx(-z, abs=2e-3)


def test_where_nothing_flips_the_interval_is_known() -> None:
    """T(x)^2 = n x / (1 - x) at the likeliest nuisance value, so the ends are +-z^2 / (n + z^2)."""
    z = stats.norm.ppf(0.95)
    found = paired_change(100, 0, 0, 0.05)
    assert found.high == pytest.approx(z * z / (100 + z * z), rel=1e-9)
    assert found.low == -found.high
    assert found.mcnemar_p == 1


@given(counts, st.sampled_from([0.001, 0.05, 0.2]))
@settings(deadline=None, derandomize=True)
def test_swapping_the_models_mirrors_the_interval(cell: tuple[int, int, int], alpha: float) -> None:
    n, lost, gained = cell
    one, other = paired_change(n, lost, gained, alpha), paired_change(n, gained, lost, alpha)
    assert -1 <= one.low <= one.change <= one.high <= 1
    assert (one.low, one.high, one.change) == (-other.high, -other.low, -other.change)
    wider = paired_change(n, lost, gained, alpha / 2)
    assert wider.low <= one.low
    assert wider.high >= one.high


@pytest.mark.parametrize("n", [40, 100])
def test_coverage_by_exact_enumeration(n: int) -> None:
    """Every outcome of n items, weighed by its probability: the lower end lies above the true change in at
    most about alpha of all. The score test is known to exceed its level slightly (Tango 1998): 5.6 % at most
    here, 5.1 % from 200 items on."""
    lost, gained = np.array([(b, c) for b in range(n + 1) for c in range(n + 1 - b)]).T
    low = np.array([paired_change(n, b, c, 0.05).low for b, c in zip(lost, gained, strict=True)])
    errors = []
    for change in (0.0, -0.01, -0.02, -0.05, -0.1):
        for gain in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3):
            loss = gain - change
            chance = stats.multinomial.pmf(
                np.stack([lost, gained, n - lost - gained], -1), n, [loss, gain, 1 - loss - gain]
            )
            errors.append(chance[low > change + 1e-12].sum())
    assert max(errors) < 0.058
    assert np.mean(errors) > 0.03, "not merely wide"


def test_the_stated_number_of_items_decides() -> None:
    """Simulated: with `needed_items` items, 90 % of the comparisons like the one seen pass."""
    seen = paired_change(500, 12, 10, 0.05)
    n = needed_items(seen, 0.02, 0.05)
    assert n is not None
    rng = np.random.default_rng(0)
    draws = rng.multinomial(n, [12 / 500, 10 / 500, 478 / 500], size=1000)
    passed = np.mean([paired_change(n, int(b), int(c), 0.05).low > -0.02 for b, c, _ in draws])
    assert abs(passed - 0.9) < 0.05  # 3 standard errors are 0.03; the rest is the normal approximation
    assert needed_items(paired_change(500, 30, 10, 0.05), 0.02, 0.05) is None, "it loses 4 points"


@pytest.mark.parametrize(("n", "lost", "gained"), [(0, 0, 0), (3, 2, 2), (3, -1, 0)])
def test_impossible_counts_are_refused(n: int, lost: int, gained: int) -> None:
    with pytest.raises(EvidenceError, match="flips are counted among the items"):
        paired_change(n, lost, gained, 0.05)


def test_impossible_levels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"between 0 and 0\.5; found: 0\.5"):
        paired_change(10, 1, 1, 0.5)
