"""Bounds on a loss that is averaged over documents, and on a ratio of times.

The sample is the *cluster* (a document or a block of one): tokens inside it are correlated. Cluster d has
n_d scored tokens and D_d = sum over them of NLL_optimised - NLL_original, in nats. The estimate is the
ratio

    delta = sum D_d / sum n_d,    e_d = D_d - delta n_d,    SE^2 = C / (C - 1) * sum e_d^2 / (sum n_d)^2.

Losses lean to the right (a few documents suffer most), where a plain t bound passes too often: at 128
exponentially distributed clusters 4.8 % instead of 2.5 %. So the upper bound is the larger of two that
allow for skewness:

    cluster-t     delta + SE (t + max(g, 0) (2 z^2 + 1) / (6 sqrt C)), g = skewness of e
                  (Cornish-Fisher term of the studentised mean: Hall, "The Bootstrap and Edgeworth
                  Expansion", 1992, section 3)
    bootstrap-t   delta - q SE, q = the alpha quantile of (delta* - delta) / SE* over resampled
                  clusters (Efron 1981)

Where hardly any cluster differs, resamples that miss them all have no spread and bootstrap-t has no bound:
it is infinite, and who shows it says so in words. Counts of rare events have a third one:

    poisson       lambda m / sum n, with lambda the exact upper bound of the mean of as many events as
                  clusters have lost something (Garwood 1936) and m the largest change of one, at least 1

Limits: no bound sees a class of documents of which the text has none, and with fewer than FEWEST_CLUSTERS
clusters neither bound is trustworthy. Arrays here have the clusters on their last axis; leading axes are
separate experiments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from flatout.errors import ConfigError, EvidenceError

FEWEST_CLUSTERS = 32
FEWEST_FOR_SPREAD = 12
MOST_OPENINGS = 100
_RESAMPLES = 4999
_CHUNK = 1024  # resamples handled at once, which bounds memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """An estimate in nats a token, or a share, with its one-sided upper bound, infinite where none can be
    made. method: "cluster-t", "bootstrap-t" or "poisson"."""

    delta: float
    upper: float
    standard_error: float
    method: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """What validation clusters say about one candidate: mean loss (nats a token), spread of one cluster on
    the same scale, skewness and excess kurtosis of the clusters, mean tokens of a cluster."""

    delta: float
    spread: float
    skewness: float
    kurtosis: float
    tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Median of a sample with a distribution-free interval of at least the coverage asked for."""

    median: float
    low: float
    high: float
    coverage: float


def check_clusters(D: np.ndarray, n: np.ndarray) -> None:
    """Raise EvidenceError unless losses and token counts are finite, matching, and every cluster has a
    token."""
    if D.shape != n.shape or D.ndim < 1 or D.shape[-1] == 0:
        raise EvidenceError(
            "each cluster needs a loss and a token count", f"{D.shape} and {n.shape}", "score again"
        )
    if not np.isfinite(D).all():
        bad = int((~np.isfinite(D)).sum())
        raise EvidenceError(
            "every cluster's loss must be finite", f"{bad} are not", "check the model's logits"
        )
    if not (np.isfinite(n).all() and (n > 0).all()):
        raise EvidenceError("every cluster must hold a scored token", f"smallest {n.min()}", "a longer text")


def _estimate(D: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """delta, residuals e (with the cluster axis) and SE."""
    clusters = D.shape[-1]
    total = n.sum(-1)
    delta = D.sum(-1) / total
    e = D - delta[..., None] * n
    return delta, e, np.sqrt(clusters / (clusters - 1) * (e**2).sum(-1)) / total


def _skewness(e: np.ndarray) -> np.ndarray:
    """Third standardised moment; 0 where all residuals are 0."""
    variance = (e**2).mean(-1)
    return np.asarray((e**3).mean(-1) / np.where(variance > 0, variance, 1.0) ** 1.5)


def _quantiles(clusters: int, alpha: float) -> tuple[float, float]:
    """(t, z) at 1 - alpha, with clusters - 1 degrees of freedom."""
    from scipy.special import ndtri, stdtrit

    return float(stdtrit(clusters - 1, 1 - alpha)), float(ndtri(1 - alpha))


def _multiplier(clusters: int, alpha: float, skewness: np.ndarray) -> np.ndarray:
    """Standard errors between the estimate and the cluster-t bound."""
    t, z = _quantiles(clusters, alpha)
    return np.asarray(t + np.maximum(skewness, 0.0) * (2 * z * z + 1) / (6 * math.sqrt(clusters)))


def cluster_t_upper(D: np.ndarray, n: np.ndarray, alpha: float) -> np.ndarray:
    """Skewness-corrected cluster-robust t bound over the last axis."""
    delta, e, se = _estimate(D, n)
    return np.asarray(delta + se * _multiplier(D.shape[-1], alpha, _skewness(e)))


def bootstrap_t_upper(
    D: np.ndarray, n: np.ndarray, alpha: float, resamples: int = _RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Cluster bootstrap-t bound over the last axis; leading axes share the resampling.

    Resampling uses the raw PCG64 stream, which numpy guarantees never to change: the same clusters give the
    same bound on any machine. The number of resamples grows until the alpha quantile rests on at least 20
    of them.
    """
    clusters = D.shape[-1]
    resamples = max(resamples, min(math.ceil(20 / alpha) - 1, 200_000))
    delta, _, se = _estimate(D, n)
    squares = np.stack([D * D, D * n, n * n])
    stream = np.random.PCG64(seed)
    parts = []
    for start in range(0, resamples, _CHUNK):
        rows = min(_CHUNK, resamples - start)
        drawn = (stream.random_raw(rows * clusters) % np.uint64(clusters)).astype(np.int64)
        cells = drawn + np.repeat(np.arange(rows), clusters) * clusters
        weights = np.bincount(cells, minlength=rows * clusters).reshape(rows, clusters).T.astype(np.float64)
        total = n @ weights
        resampled = (D @ weights) / total
        dd, dn, nn = squares @ weights
        variance = np.maximum(dd - 2 * resampled * dn + resampled**2 * nn, 0.0) * clusters / (clusters - 1)
        difference = resampled - delta[..., None]
        with np.errstate(divide="ignore", invalid="ignore"):
            statistic = difference / (np.sqrt(variance) / total)
        # A resample of one repeated cluster has no spread: it counts as evidence for an unbounded loss, or,
        # where nothing differs at all (identical models), for none.
        parts.append(np.where(np.isfinite(statistic), statistic, np.where(difference == 0, 0.0, -np.inf)))
    statistics = np.concatenate(parts, axis=-1)
    rank = max(math.floor(alpha * (resamples + 1)) - 1, 0)
    quantile = np.partition(statistics, rank, axis=-1)[..., rank]
    return np.asarray(np.where(se > 0, delta - quantile * np.where(se > 0, se, 1.0), delta))


def ratio_bound(D: np.ndarray, n: np.ndarray, alpha: float) -> Bound:
    """Estimate of the loss a token and its upper bound at level 1 - alpha: the larger of cluster-t and
    bootstrap-t.

    D, n: (C,) summed loss differences in nats and token counts. Raises EvidenceError for fewer than two
    clusters or numbers that are not finite.
    """
    D, n = np.asarray(D, dtype=np.float64), np.asarray(n, dtype=np.float64)
    check_clusters(D, n)
    if D.ndim != 1 or len(D) < 2:
        raise EvidenceError("a bound needs at least two clusters", str(D.shape), "a longer text")
    if not 0 < alpha < 0.5:
        raise ConfigError("the error level lies between 0 and 0.5", str(alpha), "0.05")
    delta, _, se = _estimate(D, n)
    t_bound, bootstrap = float(cluster_t_upper(D, n, alpha)), float(bootstrap_t_upper(D, n, alpha))
    method = "bootstrap-t" if bootstrap > t_bound else "cluster-t"
    return Bound(delta=float(delta), upper=max(t_bound, bootstrap), standard_error=float(se), method=method)


def share_bound(D: np.ndarray, n: np.ndarray, alpha: float) -> Bound:
    """As ratio_bound, of D that are differences of counts. Where so few clusters differ that more than alpha
    of the resamples miss them all, it is the larger of cluster-t and poisson, which what clusters gained does
    not lower."""
    found = ratio_bound(D, n, alpha)
    D, n = np.asarray(D, dtype=np.float64), np.asarray(n, dtype=np.float64)
    if (1 - np.count_nonzero(D) / len(D)) ** len(D) <= alpha:
        return found
    from scipy.special import gammaincinv

    events = gammaincinv(int((D > 0).sum()) + 1, 1 - alpha)
    poisson = float(events * max(np.abs(D).max(), 1.0) / n.sum())
    t_bound = float(cluster_t_upper(D, n, alpha))
    method = "poisson" if poisson > t_bound else "cluster-t"
    return replace(found, upper=max(poisson, t_bound), method=method)


def alpha_k(k: int, alpha: float) -> float:
    """Error level of the k-th opening of a hold-out: alpha / (k (k + 1)), which sums to alpha over all k.

    Raises EvidenceError after MOST_OPENINGS: the hold-out is worn out.
    """
    if k < 1:
        raise ConfigError("openings count from 1", str(k), "1")
    if k > MOST_OPENINGS:
        raise EvidenceError(
            f"a hold-out is opened at most {MOST_OPENINGS} times", str(k), "fresh text (--text)"
        )
    return alpha / (k * (k + 1))


def moments(D: np.ndarray, n: np.ndarray) -> Moments:
    """Moments of validation clusters, for `power` and `needed_clusters`."""
    D, n = np.asarray(D, dtype=np.float64), np.asarray(n, dtype=np.float64)
    check_clusters(D, n)
    if D.ndim != 1 or len(D) < 2:
        raise EvidenceError("a spread needs at least two clusters", str(D.shape), "more validation text")
    delta, e, se = _estimate(D, n)
    variance = float((e**2).mean())
    return Moments(
        delta=float(delta),
        spread=float(se) * math.sqrt(len(D)),
        skewness=float(_skewness(e)),
        kurtosis=float((e**4).mean()) / variance**2 - 3 if variance > 0 else 0.0,
        tokens=float(n.mean()),
    )


def power(clusters: np.ndarray | int, seen: Moments, margin: float, alpha: float) -> np.ndarray:
    """Chance that `clusters` clusters like those seen give an upper bound below log(1 + margin).

    The bound passes iff delta_hat + q SE < log(1 + m). By the delta method its left side has the variance
    s^2 / C (1 + q g / sqrt C + q^2 (kurtosis + 2) / (4 C)), where g is the skewness.
    """
    from scipy.special import ndtr, ndtri, stdtrit

    count = np.asarray(clusters, dtype=np.float64)
    room = math.log1p(margin) - seen.delta
    if seen.spread == 0:
        return np.full(count.shape, 1.0 if room > 0 else 0.0)
    z = float(ndtri(1 - alpha))
    q = stdtrit(count - 1, 1 - alpha) + max(seen.skewness, 0.0) * (2 * z * z + 1) / (6 * np.sqrt(count))
    inflation = 1 + q * seen.skewness / np.sqrt(count) + q * q * (seen.kurtosis + 2) / (4 * count)
    return np.asarray(ndtr((room * np.sqrt(count) / seen.spread - q) / np.sqrt(np.maximum(inflation, 0.25))))


def needed_clusters(
    seen: Moments, margin: float, alpha: float, wanted: float = 0.9, most: int = 100_000
) -> int | None:
    """Fewest clusters (at least FEWEST_CLUSTERS) that pass with probability `wanted`; None if `most` do not
    suffice."""
    counts = np.arange(FEWEST_CLUSTERS, most + 1)
    enough = np.flatnonzero(power(counts, seen, margin, alpha) >= wanted)
    return int(counts[enough[0]]) if len(enough) else None


def order_statistic_interval(values: Sequence[float], coverage: float = 0.95) -> Interval:
    """Median with the narrowest symmetric pair of order statistics that covers the true median.

    P(x_(r) <= median <= x_(n+1-r)) = 1 - 2 P(Binomial(n, 1/2) < r) for any continuous distribution: at 95
    %, 9 values give their 2nd and 8th. Raises EvidenceError when even the extremes do not reach the
    coverage.
    """
    ordered = sorted(float(value) for value in values)
    count = len(ordered)
    if not all(math.isfinite(value) for value in ordered):
        raise EvidenceError("a measured ratio must be finite", str(ordered), "measure again")
    best, tail, weight = 0, 0, 1  # weight: the binomial coefficient of rank - 1; tail: their sum so far
    for rank in range(1, (count + 1) // 2 + 1):
        if 1 - 2 * (tail + weight) / 2**count < coverage:
            break
        best, tail = rank, tail + weight
        weight = weight * (count - rank + 1) // rank
    if best == 0:
        raise EvidenceError(
            f"an interval of {coverage:.0%} coverage needs more values", f"{count} values", "more pairs"
        )
    middle = count // 2
    median = ordered[middle] if count % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return Interval(
        median=median, low=ordered[best - 1], high=ordered[count - best], coverage=1 - 2 * tail / 2**count
    )
