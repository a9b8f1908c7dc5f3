"""The bounds: against independent formulas, and by simulating whole searches whose candidates must not
pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flatout.errors import ConfigError, EvidenceError
from flatout.verify.statistics import (
    FEWEST_CLUSTERS,
    MOST_OPENINGS,
    alpha_k,
    bootstrap_t_upper,
    cluster_t_upper,
    moments,
    needed_clusters,
    order_statistic_interval,
    power,
    ratio_bound,
    share_bound,
)

MARGIN = 0.01
LIMIT = math.log1p(MARGIN)
KINDS = ("like text", "exponential", "log-normal", "heavy tails", "a rare class")


def effects(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Mean 0 and variance 1: how much more than the average a document suffers."""
    if kind == "like text":  # skewness 0.7; measured on English prose: below 0.4
        half = math.sqrt(0.5)
        return half * rng.standard_normal(shape) + half * (rng.exponential(1, shape) - 1)
    if kind == "exponential":  # skewness 2
        return rng.exponential(1, shape) - 1
    if kind == "log-normal":  # skewness 1.75
        mean, variance = math.exp(0.125), (math.exp(0.25) - 1) * math.exp(0.25)
        return (rng.lognormal(0, 0.5, shape) - mean) / math.sqrt(variance)
    if kind == "heavy tails":
        return rng.standard_t(3, shape) / math.sqrt(3)
    return ((rng.random(shape) < 0.1) - 0.1) / 0.3  # a tenth of the documents suffers


def clusters(
    rng: np.random.Generator, kind: str, searches: int, candidates: int, count: int, delta: float
) -> tuple[np.ndarray, np.ndarray]:
    """(D (searches, candidates, count), n (searches, count)) with E[D] = delta E[n].

    A cluster's tokens share an effect of 1 % (tokens are correlated) beside noise of 0.12 nats each; half
    of the effect's variance is common to all candidates, since the same documents are hard for each.
    Lengths vary sixfold.
    """
    n = np.clip(rng.gamma(8, 56, (searches, count)), 40, 1023).round()
    shared, own = (effects(rng, kind, (searches, k, count)) for k in (1, candidates))
    noise = 0.12 * np.sqrt(n)[:, None] * rng.standard_normal((searches, candidates, count))
    return n[:, None] * (delta + 0.01 * math.sqrt(0.5) * (shared + own)) + noise, n


def passes(D: np.ndarray, n: np.ndarray, alpha: float) -> np.ndarray:
    """Which experiments (rows) `ratio_bound` would let pass; the bootstrap only where it can still decide."""
    passed = cluster_t_upper(D, n, alpha) < LIMIT
    rows = np.flatnonzero(passed)
    if len(rows):
        passed[rows] = bootstrap_t_upper(D[rows], n[rows], alpha, resamples=999) < LIMIT
    return passed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "searches"), [(64, 8000), (130, 6000)])
def test_false_passes_of_whole_searches(kind: str, count: int, searches: int) -> None:
    """Four candidates, each exactly at the margin, judged one after the other until one passes: at most 5 %
    of the searches may pass one. The bound on the rate is Clopper and Pearson's at 95 %, over thousands of
    searches."""
    rng = np.random.default_rng(KINDS.index(kind))
    D, n = clusters(rng, kind, searches, 4, count, LIMIT)
    passed = np.zeros(searches, dtype=bool)
    for k in range(1, 5):
        passed |= passes(D[:, k - 1], n, alpha_k(k, 0.05))
    found = int(passed.sum())
    assert stats.beta.ppf(0.95, found + 1, searches - found) <= 0.05, f"{found / searches:.2%} false passes"
    assert found > 0.01 * searches, "a bound that never passes at the margin is too wide to be of use"


def test_false_passes_with_few_clusters() -> None:
    """At the fewest clusters that get a verdict, text-like losses keep the level and skewed ones stay near
    it."""
    for kind, limit in (("like text", 0.05), ("exponential", 0.06)):
        D, n = clusters(np.random.default_rng(7), kind, 6000, 4, FEWEST_CLUSTERS, LIMIT)
        passed = np.zeros(6000, dtype=bool)
        for k in range(1, 5):
            passed |= passes(D[:, k - 1], n, alpha_k(k, 0.05))
        assert stats.beta.ppf(0.95, passed.sum() + 1, 6000 - passed.sum()) <= limit


def test_the_plain_t_bound_would_not_do() -> None:
    """The reason for the correction: without it, skewed losses pass nearly twice too often."""
    rng = np.random.default_rng(3)
    D, n = np.squeeze(rng.exponential(1, (20000, 64))) - 1 + LIMIT, np.ones((20000, 64))
    plain = D.mean(-1) + D.std(-1, ddof=1) / 8 * stats.t.ppf(0.975, 63)
    assert (plain < LIMIT).mean() > 0.045
    assert passes(D, n, 0.025).mean() < 0.035


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("delta", [0.0, 0.004])
def test_power_is_as_stated(kind: str, delta: float) -> None:
    """With the clusters the plan asks for, a good candidate passes as often as the plan says, within 5
    points."""
    rng = np.random.default_rng(11)
    D, n = clusters(rng, kind, 1, 1, 100_000, delta)
    seen = moments(D[0, 0], n[0])
    alpha = alpha_k(1, 0.05)
    count = needed_clusters(seen, MARGIN, alpha)
    assert count is not None
    stated = float(power(count, seen, MARGIN, alpha))
    D, n = clusters(rng, kind, 1500, 1, count, delta)
    assert passes(D[:, 0], n, alpha).mean() == pytest.approx(stated, abs=0.05)
    if count > FEWEST_CLUSTERS:
        assert 0.9 <= stated < 0.92, "no more clusters than 90 % power takes"
        assert power(count - 1, seen, MARGIN, alpha) < 0.9


def test_power_grows_and_knows_its_limits() -> None:
    D, n = clusters(np.random.default_rng(0), "like text", 1, 1, 500, 0.005)
    seen = moments(D[0, 0], n[0])
    assert np.all(np.diff(power(np.arange(32, 500), seen, MARGIN, 0.025)) > 0)
    assert needed_clusters(moments(D[0, 0] + 0.02 * n[0], n[0]), MARGIN, 0.025) is None
    same = moments(np.zeros(40), np.full(40, 100.0))
    assert needed_clusters(same, MARGIN, 0.025) == FEWEST_CLUSTERS
    assert float(power(40, same, MARGIN, 0.025)) == 1.0
    lost = moments(np.full(40, 2.0), np.full(40, 100.0))
    assert float(power(40, lost, MARGIN, 0.025)) == 0.0


def test_standard_error_agrees_with_the_jackknife() -> None:
    D, n = clusters(np.random.default_rng(5), "like text", 1, 1, 90, 0.003)
    D, n = D[0, 0], n[0]
    bound = ratio_bound(D, n, 0.05)
    left_out = np.array([np.delete(D, i).sum() / np.delete(n, i).sum() for i in range(90)])
    jackknife = math.sqrt(89 / 90 * ((left_out - left_out.mean()) ** 2).sum())
    assert bound.delta == pytest.approx(D.sum() / n.sum(), rel=1e-12)
    assert bound.standard_error == pytest.approx(jackknife, rel=0.05)


def test_cluster_t_is_the_textbook_interval_without_skewness() -> None:
    """Equal lengths, losses leaning to the left: the bound is the one of a one-sample t test."""
    D = -np.random.default_rng(2).exponential(1, 50)
    upper = cluster_t_upper(D, np.ones(50), 0.05)
    textbook = stats.ttest_1samp(D, 0, alternative="less").confidence_interval(0.95).high
    assert upper == pytest.approx(textbook, rel=1e-12)


def test_cluster_t_adds_the_skewness_term() -> None:
    D = np.random.default_rng(2).exponential(1, 50)
    z, t = stats.norm.ppf(0.95), stats.t.ppf(0.95, 49)
    expected = D.mean() + D.std(ddof=1) / math.sqrt(50) * (
        t + stats.skew(D) * (2 * z * z + 1) / (6 * math.sqrt(50))
    )
    assert cluster_t_upper(D, np.ones(50), 0.05) == pytest.approx(expected, rel=1e-12)


def test_bootstrap_t_against_a_plain_loop() -> None:
    """The vectorised resampling is the textbook's, draw by draw, beyond one chunk of draws."""
    D, n = clusters(np.random.default_rng(4), "exponential", 1, 1, 33, 0.003)
    D, n = D[0, 0], n[0]
    stream = np.random.PCG64(0)

    def estimate(D: np.ndarray, n: np.ndarray) -> tuple[float, float]:
        delta = D.sum() / n.sum()
        return delta, math.sqrt(len(D) / (len(D) - 1) * ((D - delta * n) ** 2).sum()) / n.sum()

    delta, se = estimate(D, n)
    statistics = []
    for _ in range(1999):
        drawn = (stream.random_raw(33) % np.uint64(33)).astype(int)
        resampled, own = estimate(D[drawn], n[drawn])
        statistics.append((resampled - delta) / own)
    quantile = sorted(statistics)[math.floor(0.05 * 2000) - 1]
    assert bootstrap_t_upper(D, n, 0.05, resamples=1999) == pytest.approx(delta - quantile * se, rel=1e-9)


def test_bootstrap_t_of_many_experiments_is_that_of_each() -> None:
    D, n = clusters(np.random.default_rng(6), "like text", 3, 2, 40, 0.003)
    together = bootstrap_t_upper(D, np.broadcast_to(n[:, None], D.shape), 0.05, resamples=999)
    for i in range(3):
        for j in range(2):
            alone = bootstrap_t_upper(D[i, j], n[i], 0.05, resamples=999)
            assert together[i, j] == pytest.approx(float(alone), rel=1e-9)


def test_both_bounds_agree_when_losses_are_normal() -> None:
    rng = np.random.default_rng(8)
    n = np.full((400, 100), 400.0)
    D = n * (0.004 + 0.006 * rng.standard_normal((400, 100)))
    t, bootstrap = cluster_t_upper(D, n, 0.025), bootstrap_t_upper(D, n, 0.025, resamples=1999)
    width = np.median(t - D.sum(-1) / n.sum(-1))
    assert abs(np.median(bootstrap - t)) < 0.05 * width
    assert np.abs(bootstrap - t).max() < 0.4 * width


def test_the_larger_bound_counts() -> None:
    for seed in range(6):
        D, n = clusters(np.random.default_rng(seed), "exponential", 1, 1, 40, 0.003)
        D, n = D[0, 0], n[0]
        bound = ratio_bound(D, n, 0.025)
        t, bootstrap = float(cluster_t_upper(D, n, 0.025)), float(bootstrap_t_upper(D, n, 0.025))
        assert bound.upper == max(t, bootstrap)
        assert bound.method == ("bootstrap-t" if bootstrap > t else "cluster-t")


def test_the_bound_is_the_same_everywhere() -> None:
    """A stored certificate is recomputed years later with another numpy: this number must not change."""
    D = np.array([0.3, -0.1, 0.9, 0.2, 1.4, 0.0, 0.5, -0.2, 0.7, 2.6, 0.1, 0.4])
    n = np.array([50.0, 40, 60, 55, 45, 30, 80, 20, 65, 70, 35, 90])
    assert float(bootstrap_t_upper(D, n, 0.05)) == pytest.approx(0.025737429691849133, rel=1e-9)


@given(
    data=st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 1000)), min_size=FEWEST_CLUSTERS, max_size=60),
    shift=st.floats(-0.1, 0.1),
    scale=st.floats(0.1, 10),
)
@settings(deadline=None, derandomize=True, max_examples=20)
def test_bound_moves_with_the_data(data: list[tuple[float, int]], shift: float, scale: float) -> None:
    """Adding a constant loss a token moves the bound by it; scaling losses scales it; order does not
    matter."""
    D, n = np.array([d for d, _ in data]), np.array([float(n) for _, n in data])
    bound = ratio_bound(D, n, 0.05)
    assert bound.upper >= bound.delta
    tolerance = 1e-7 * (1 + abs(bound.upper)) * (1 + scale)
    assert ratio_bound(D + shift * n, n, 0.05).upper == pytest.approx(bound.upper + shift, abs=tolerance)
    assert ratio_bound(scale * D, n, 0.05).upper == pytest.approx(scale * bound.upper, abs=tolerance)
    assert cluster_t_upper(D[::-1], n[::-1], 0.05) == pytest.approx(
        float(cluster_t_upper(D, n, 0.05)), abs=tolerance
    )
    assert ratio_bound(D, n, 0.01).upper >= bound.upper - 1e-12


def test_identical_models_have_no_loss() -> None:
    bound = ratio_bound(np.zeros(40), np.arange(1.0, 41.0), 0.025)
    assert (bound.delta, bound.upper, bound.standard_error) == (0.0, 0.0, 0.0)


def test_one_document_that_suffers_alone_widens_the_bound() -> None:
    D, n = np.zeros(40), np.full(40, 400.0)
    D[7] = 40.0
    bound = ratio_bound(D, n, 0.05)
    assert bound.delta == pytest.approx(0.0025)
    assert bound.upper > 2 * bound.delta


@pytest.mark.parametrize(
    ("D", "n"),
    [
        ([0.1, math.nan], [1.0, 1.0]),
        ([0.1, math.inf], [1.0, 1.0]),
        ([0.1, 0.2], [1.0, 0.0]),
        ([0.1, 0.2], [1.0]),
        ([0.1], [1.0]),
        ([], []),
    ],
)
def test_unusable_numbers_are_refused(D: list[float], n: list[float]) -> None:
    with pytest.raises(EvidenceError):
        ratio_bound(np.array(D), np.array(n), 0.05)


def test_openings_spend_the_error_level() -> None:
    assert alpha_k(1, 0.05) == pytest.approx(0.025)
    total = sum(alpha_k(k, 0.05) for k in range(1, MOST_OPENINGS + 1))
    assert 0.049 < total < 0.05
    with pytest.raises(ConfigError):
        alpha_k(0, 0.05)
    with pytest.raises(EvidenceError, match="at most 100 times"):
        alpha_k(MOST_OPENINGS + 1, 0.05)


def test_late_openings_still_have_a_quantile() -> None:
    D, n = clusters(np.random.default_rng(1), "like text", 1, 1, 64, 0.0)
    early, late = (ratio_bound(D[0, 0], n[0], alpha_k(k, 0.05)).upper for k in (1, 30))
    assert early < late < math.inf


def test_nine_pairs_give_the_second_and_the_eighth() -> None:
    interval = order_statistic_interval([5, 1, 9, 3, 7, 2, 8, 4, 6])
    assert (interval.median, interval.low, interval.high) == (5, 2, 8)
    assert interval.coverage == pytest.approx(1 - 2 * stats.binom.cdf(1, 9, 0.5))


@given(count=st.integers(6, 200), coverage=st.sampled_from([0.5, 0.9, 0.95]))
@settings(deadline=None, derandomize=True)
def test_interval_is_the_narrowest_that_covers(count: int, coverage: float) -> None:
    interval = order_statistic_interval(list(range(1, count + 1)), coverage)
    rank = int(interval.low)
    assert interval.high == count + 1 - rank
    assert interval.coverage == pytest.approx(1 - 2 * stats.binom.cdf(rank - 1, count, 0.5))
    assert interval.coverage >= coverage
    if rank < (count + 1) // 2:
        assert 1 - 2 * stats.binom.cdf(rank, count, 0.5) < coverage, "a narrower pair would cover too"
    assert interval.low <= interval.median <= interval.high


def test_interval_covers_whatever_the_distribution() -> None:
    rng = np.random.default_rng(9)
    samples = rng.lognormal(0, 1.5, (2000, 15))
    intervals = [order_statistic_interval(list(row)) for row in samples]
    covered = sum(i.low <= 1.0 <= i.high for i in intervals)
    assert stats.binomtest(covered, 2000, intervals[0].coverage).pvalue > 0.001


def test_too_few_pairs_have_no_interval() -> None:
    with pytest.raises(EvidenceError, match="more values"):
        order_statistic_interval([1.0] * 5)
    with pytest.raises(EvidenceError, match="finite"):
        order_statistic_interval([1.0] * 8 + [math.nan])


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_few_changes_have_a_bound(changed: int) -> None:
    """Where resamples miss the few passages that changed, bootstrap-t has none: the count's does not depend
    on resampling, and is the exact one of so many events (from chi-squared quantiles here)."""
    D, n = np.zeros(72), np.full(72, 12.0)
    D[:changed] = 1
    D[50] = -1  # a gain, which lowers nothing
    if changed != 1:  # then as many are gained as lost, and resamples without spread agree with that
        assert ratio_bound(D, n, 0.025).upper == math.inf
    found = share_bound(D, n, 0.025)
    assert found.upper == pytest.approx(stats.chi2.ppf(0.975, 2 * (changed + 1)) / 2 / n.sum())
    assert (found.method, found.delta) == ("poisson", (changed - 1) / n.sum())
    D[5:8] = 1
    assert share_bound(D, n, 0.025) == ratio_bound(D, n, 0.025)


@pytest.mark.parametrize("expected", [0.5, 2.0, 4.0, 8.0, 16.0])
def test_bounds_of_rare_changes_hold(expected: float) -> None:
    """Passages that lose one piece, or rarely two: at 2.5 %, the true share may lie above the bound in 2.5 %
    of the texts (Clopper and Pearson at 99 %)."""
    rng, texts, missed = np.random.default_rng(5), 300, 0
    n = np.full(72, 12.0)
    truth = expected * 1.1 / n.sum()
    for _ in range(texts):
        D = (rng.random(72) < expected / 72) * (1.0 + (rng.random(72) < 0.1))
        missed += share_bound(D, n, 0.025).upper < truth
    assert missed == 0 or stats.beta.ppf(0.01, missed, texts - missed + 1) <= 0.025
