"""Wanda: the weights whose products with the inputs are small become zero.

    score[n, k] = |w[n, k]| * sqrt(mean over tokens of x[k]^2)

compared within each output row, which has one sum to keep right (Sun et al., "A Simple and Effective Pruning
Approach for Large Language Models", 2023, arXiv 2306.11695). Of n:m, the smallest of each group of a row go.

Trade-off: as quick as magnitude once the text has passed through, one number an input channel to remember;
the weights that stay are not changed, so nothing makes up for those that went (compress/sparsegpt.py does).
"""

from __future__ import annotations

import numpy as np

from flatout.compress.magnitude import largest, largest_of
from flatout.core.sparsity import Sparsity


def wanda(weight: np.ndarray, energy: np.ndarray, sparsity: Sparsity) -> np.ndarray:
    """Which weights of float32 (N, K) stay, bool (N, K). energy: mean squares of the inputs, float32 (K,)."""
    scores = np.abs(weight) * np.sqrt(energy)
    return largest_of(scores, sparsity) if sparsity.of else largest(scores, sparsity.fraction)
