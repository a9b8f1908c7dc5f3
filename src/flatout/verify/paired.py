"""Two models on the same items, each right or wrong: did the second lose accuracy?

Of n items, `lost` were right under the original only and `gained` under the optimised model only; items on
which both agree say nothing about the difference. The change of the accuracy is (gained - lost) / n.

    McNemar     exact two-sided test that a flip goes either way with equal probability: the binomial tail
                of min(lost, gained) among lost + gained (McNemar, Psychometrika 1947)
    interval    all changes that Tango's score test does not reject (Tango, Statistics in Medicine 1998):
                T(x) = (gained - lost - n x) / sqrt(n (2 q + x (1 - x))), with q the likeliest probability
                of a loss were the true change x. It needs no cell to be filled and, other than Wald's, is
                wider than 0 when nothing flipped. Newcombe's hybrid of Wilson intervals (1998, method 10)
                has similar coverage but also depends on how many items both models get right, which
                carries no information on the change.

Non-inferiority (CONSORT extension, Piaggio et al. 2012): the loss is inside the margin when the interval's
lower end lies above -margin. Both ends are one-sided bounds at 1 - alpha.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flatout.errors import ConfigError, EvidenceError

FEWEST_ITEMS = 32
_BISECTIONS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedChange:
    """Change of a proportion between two models on the same n items; low and high are one-sided bounds at 1 -
    alpha, mcnemar_p the exact two-sided test."""

    n: int
    lost: int
    gained: int
    change: float
    low: float
    high: float
    mcnemar_p: float


def mcnemar_p(lost: int, gained: int) -> float:
    """Two-sided exact p value of `lost` and `gained` flips; 1 when there are none."""
    from scipy.special import bdtr

    flips = lost + gained
    return min(1.0, 2 * float(bdtr(min(lost, gained), flips, 0.5))) if flips else 1.0


def paired_change(n: int, lost: int, gained: int, alpha: float) -> PairedChange:
    """The change with Tango's interval. Raises EvidenceError without items, ConfigError for an impossible
    alpha."""
    if n < 1 or lost < 0 or gained < 0 or lost + gained > n:
        raise EvidenceError("flips are counted among the items", f"{lost} and {gained} of {n}", "score again")
    if not 0 < alpha < 0.5:
        raise ConfigError("the error level lies between 0 and 0.5", str(alpha), "0.05")
    from scipy.special import ndtri

    z = float(ndtri(1 - alpha))
    # The lower end for (lost, gained) is the negative of the upper end for (gained, lost).
    return PairedChange(
        n=n,
        lost=lost,
        gained=gained,
        change=(gained - lost) / n,
        low=-_upper(n, gained, lost, z),
        high=_upper(n, lost, gained, z),
        mcnemar_p=mcnemar_p(lost, gained),
    )


def _upper(n: int, lost: int, gained: int, z: float) -> float:
    """The change x at which T(x) = -z; T falls as x grows."""
    low, high = (gained - lost) / n, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _score(n, lost, gained, middle) > -z:
            low = middle
        else:
            high = middle
    return high


def _score(n: int, lost: int, gained: int, x: float) -> float:
    """T(x), with q as the root of 2 n q^2 + B q - lost x (1 - x) = 0."""
    b = (2 * n - gained + lost) * x - gained - lost
    q = (math.sqrt(max(b * b + 8 * n * lost * x * (1 - x), 0.0)) - b) / (4 * n)
    variance = n * (2 * q + x * (1 - x))
    difference = gained - lost - n * x
    return difference / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, difference)


def needed_items(seen: PairedChange, margin: float, alpha: float, power: float = 0.9) -> int | None:
    """Items of the same kind that would show the loss to be inside the margin with probability `power`; None
    when the change seen leaves no room."""
    from scipy.special import ndtri

    room = margin + seen.change
    if room <= 0:
        return None
    flips = max(seen.lost + seen.gained, 1) / seen.n
    reach = float(ndtri(1 - alpha)) + float(ndtri(power))
    return math.ceil(reach**2 * max(flips - seen.change**2, 0.0) / room**2)
