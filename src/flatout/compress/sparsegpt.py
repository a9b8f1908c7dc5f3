"""SparseGPT: weights become zero column by column, and those still to come make up for each.

    minimise  trace((W - P) H (W - P)^T) over P with the pattern,   H = mean over tokens of x x^T

With U the upper Cholesky factor of inverse(H), taking w[n, j] away costs w[n, j]^2 / U[j, j]^2, and what it
leaves, e = w[n, j] / U[j, j], is subtracted from column i > j as e * U[j, i] (Frantar and Alistarh,
"SparseGPT", 2023, arXiv 2301.00774). Columns are taken in their own order. Which go is decided for 128
columns at a time over all rows by that cost (of n:m, when the first of each m columns is reached, by row), so
that later choices see what earlier ones changed.

Trade-off: a K x K factor and a pass over the columns for every linear, minutes where Wanda takes seconds; the
least loss of the three at 2:4 and beyond one half. At one half unstructured Wanda is about as good.
"""

from __future__ import annotations

import numpy as np

from flatout.compress.gptq import Factor
from flatout.compress.magnitude import largest, largest_of
from flatout.core.sparsity import Sparsity

_BLOCK = 128


def sparsegpt(weight: np.ndarray, factor: Factor, sparsity: Sparsity) -> np.ndarray:
    """float32 (N, K) with zeros by `sparsity` and the rest made up. factor: of the inputs' second moments
    with the columns in order (`gptq.factorise(moments, order=False)`)."""
    w = np.array(weight.T, dtype=np.float32, order="C")  # a column of the weight is contiguous
    upper = factor.upper
    diagonal = np.diag(upper)[:, None]
    k = len(w)
    step = _BLOCK - _BLOCK % sparsity.of if sparsity.of else _BLOCK
    for start in range(0, k, step):
        stop = min(start + step, k)
        errors = np.empty((stop - start, w.shape[1]), dtype=np.float32)
        if not sparsity.of:
            costs = (w[start:stop] / diagonal[start:stop]) ** 2
            kept = largest(costs.reshape(1, -1), sparsity.fraction).reshape(costs.shape)
        for j in range(start, stop):
            if sparsity.of and (j - start) % sparsity.of == 0:
                costs = (w[j : j + sparsity.of] / diagonal[j : j + sparsity.of]) ** 2
                group = largest_of(np.ascontiguousarray(costs.T), sparsity).T
            keeps = group[(j - start) % sparsity.of] if sparsity.of else kept[j - start]
            errors[j - start] = np.where(keeps, np.float32(0), w[j] / upper[j, j])
            w[j] = np.where(keeps, w[j], np.float32(0))
            w[j + 1 : stop] -= np.outer(upper[j, j + 1 : stop], errors[j - start])
        w[stop:] -= upper[start:stop, stop:].T @ errors
    return np.ascontiguousarray(w.T)
