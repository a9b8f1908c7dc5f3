"""What measured candidates say of expected losses: a factor for each bit width, by Bayesian least squares.

A candidate whose linears of width b are expected to lose p[b] loses m = sum of a[b] p[b] + noise, noise of
the standard error s. The factors have the prior mean 1 and the covariance

    COMMON^2 (the same error in all) + OWN^2 on the diagonal (an error of this width alone)

and with rows p / s and results m / s the posterior is that of linear regression: precision = prior precision
+ sum of p p^T / s^2. One factor for all would call 6 bits expensive because a candidate's 5 bits were. The
solver spends a budget where it looks cheapest, so what is expected too cheap is used most, and one candidate
made of it says most about its factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flatout.core.formats import parse_format

WIDTHS = (8, 6, 5, 4)
"""Classes of places: linears of at least 8 bits, head and cache; of 6 or 7; of 5; of at most 4."""

COMMON, OWN = 0.2, 0.22
"""Standard deviations of the factors: 0.3 for one width, as whole recipes scatter (docs/log.md)."""

_LEAST = 0.2  # of a factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A candidate of this search: expected loss by width, measured loss and its error, nats a token."""

    expected: tuple[float, ...]
    measured: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scale:
    """Posterior of the factors: mean (W,) and covariance (W, W) in the order of `WIDTHS`."""

    mean: np.ndarray
    covariance: np.ndarray

    def of(self, expected: Sequence[float]) -> tuple[float, float]:
        """Mean and standard deviation of the loss of a recipe expected to lose this by width."""
        p = np.asarray(expected)
        return float(p @ self.mean), math.sqrt(max(float(p @ self.covariance @ p), 0.0))


def width_of(place: str, name: str) -> int:
    """Index in `WIDTHS` of a format in a place."""
    if not place.startswith("layers."):
        return 0
    bits = parse_format(name).bits
    return next(i for i, width in enumerate(WIDTHS) if bits >= width or width == WIDTHS[-1])


def by_width(losses: Mapping[tuple[str, str], float]) -> tuple[float, ...]:
    """Sums of (place, format) -> nats a token by width."""
    sums = [0.0] * len(WIDTHS)
    for (place, name), loss in losses.items():
        sums[width_of(place, name)] += loss
    return tuple(sums)


def loss_scale(seen: Sequence[Observation]) -> Scale:
    """The posterior after these observations."""
    count = len(WIDTHS)
    prior = np.linalg.inv(COMMON**2 * np.ones((count, count)) + OWN**2 * np.eye(count))
    precision, total = prior.copy(), prior @ np.ones(count)
    for one in seen:
        if one.error > 0:
            p = np.asarray(one.expected)
            precision += np.outer(p, p) / one.error**2
            total += p * one.measured / one.error**2
    covariance = np.linalg.inv(precision)
    return Scale(mean=np.maximum(covariance @ total, _LEAST), covariance=covariance)
