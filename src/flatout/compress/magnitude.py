"""Magnitude pruning: the weights nearest to zero become zero.

    score[n, k] = |w[n, k]|

Unstructured, the smallest of the whole matrix go; of n:m, the smallest of each group. (LeCun et al.,
"Optimal Brain Damage", 1989, is what it approximates with a unit Hessian; Han et al., 2015, made it usual.)

Trade-off: no calibration text and no time. At half of the weights of a language model it loses far more than
methods that look at the inputs, because a few input channels are a hundred times louder than the others.
"""

from __future__ import annotations

import numpy as np

from flatout.core.sparsity import Sparsity


def magnitude(weight: np.ndarray, sparsity: Sparsity) -> np.ndarray:
    """Which weights of float32 (N, K) stay, bool (N, K)."""
    scores = np.abs(weight)
    if sparsity.of:
        return largest_of(scores, sparsity)
    return largest(scores.reshape(1, -1), sparsity.fraction).reshape(weight.shape)


def largest(scores: np.ndarray, fraction: float) -> np.ndarray:
    """True for all of each row of (N, K) but round(fraction * K) of the smallest; of equals the first go."""
    drop = round(fraction * scores.shape[1])
    kept = np.ones(scores.shape, dtype=bool)
    order = np.argsort(scores, axis=1, kind="stable")[:, :drop]
    np.put_along_axis(kept, order, False, axis=1)
    return kept


def largest_of(scores: np.ndarray, sparsity: Sparsity) -> np.ndarray:
    """True for the n largest of every m neighbours along the rows of (N, K); of equals the first stay."""
    groups = scores.reshape(-1, sparsity.of)
    kept = np.zeros(groups.shape, dtype=bool)
    np.put_along_axis(kept, np.argsort(-groups, axis=1, kind="stable")[:, : sparsity.kept], True, axis=1)
    return kept.reshape(scores.shape)
