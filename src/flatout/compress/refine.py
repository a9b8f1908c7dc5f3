"""Refining: codes and scales of a rounded linear, improved in turns until neither helps the other.

    minimise  trace((W - Q) H (W - Q)^T),   Q[n, k] = s[n, g(k)] * c[n, k],   H = mean of x x^T

    codes    one column after another, all others fixed: the best real value of column k is
             q_k - ((Q - W) H)_k / H[k, k], and its nearest level is taken (coordinate descent; Behdin et al.,
             "QuantEase", 2023, arXiv 2309.01885)
    scales   with codes fixed the error of a row is a quadratic in its G scales, whose least value solves
             A s = b with A[g, h] = c_g^T H[g, h] c_h and b[g] = c_g^T (H w)_g

Neither step can raise the error; scales are kept as they will be stored (float16), and only where that is
better. Trade-off: as much time again as GPTQ for each pass, for less error at 3 and 4 bits; at 8 bits there
is nothing to gain.

Legend: N rows, K columns, G groups of a row.
"""

from __future__ import annotations

import numpy as np

from flatout.compress.rtn import storable
from flatout.core.quantized import QuantizedTensor

_BLOCK = 32  # columns whose changes are applied to the rest together
_ROWS = 1024  # rows refined at a time
_RIDGE = 1e-3  # of the mean of A's diagonal, towards the scales there are


def refine(weight: np.ndarray, hessian: np.ndarray, rounded: QuantizedTensor, passes: int) -> QuantizedTensor:
    """`rounded` with codes and scales that suit `weight` float32 (N, K) and `hessian` (K, K) better.

    The Hessian is damped already and positive definite. Zeros stay as they are. Raises nothing of its own.
    """
    parts = [
        _refine_rows(weight[a : a + _ROWS], hessian, rounded.rows(a, a + _ROWS), passes)
        for a in range(0, len(weight), _ROWS)
    ]
    codes = np.concatenate([codes for codes, _ in parts])
    scales = np.concatenate([scales for _, scales in parts])
    return QuantizedTensor(
        format=rounded.format,
        codes=codes.astype(rounded.codes.dtype),
        scales=scales.astype(rounded.scales.dtype),
        zeros=rounded.zeros,
    )


def _refine_rows(
    weight: np.ndarray, h: np.ndarray, rounded: QuantizedTensor, passes: int
) -> tuple[np.ndarray, np.ndarray]:
    """(codes (N, K), scales (N, G)), both float32."""
    n, k = weight.shape
    groups = rounded.format.groups(k)
    zeros = np.full((n, groups), rounded.integer_zero, np.float32)
    if rounded.zeros is not None:
        zeros = rounded.zeros.astype(np.float32)
    top = np.float32((1 << rounded.format.bits) - 1)
    low, high = (
        (np.float32(-127), np.float32(127)) if rounded.codes.dtype == np.int8 else (np.float32(0), top)
    )
    width = k // groups
    levels = rounded.codes.astype(np.float32) - zeros.repeat(width, axis=1)
    scales = rounded.scales.astype(np.float32)
    wanted = weight @ h
    float16 = rounded.scales.dtype == np.float16
    for _ in range(passes):
        scales = _fit_scales(levels, scales, wanted, h, float16)
        levels = _descend(weight, h, levels, scales, low - zeros, high - zeros)
    scales = _fit_scales(levels, scales, wanted, h, float16)
    return levels + zeros.repeat(width, axis=1), scales


def _fit_scales(
    levels: np.ndarray, scales: np.ndarray, wanted: np.ndarray, h: np.ndarray, float16: bool
) -> np.ndarray:
    """The least-squares scales (N, G) of `levels` (N, K); the old ones of rows that would get worse."""
    n, k = levels.shape
    groups = scales.shape[1]
    width = k // groups
    a = np.empty((n, groups, groups), np.float32)
    for g in range(groups):
        own = slice(g * width, (g + 1) * width)
        a[:, g] = ((levels[:, own] @ h[own]) * levels).reshape(n, groups, width).sum(axis=2)
    b = (levels * wanted).reshape(n, groups, width).sum(axis=2)
    ridge = _RIDGE * np.maximum(a.diagonal(axis1=1, axis2=2).mean(axis=1), 1e-30)[:, None]
    damped = a.astype(np.float64) + ridge[:, :, None] * np.eye(groups)
    solved = np.linalg.solve(damped, (b + ridge * scales)[:, :, None].astype(np.float64))[:, :, 0]
    fitted = solved.astype(np.float32)
    fitted = np.where((fitted > 0) & np.isfinite(fitted), fitted, scales)
    if float16:
        fitted = storable(np.minimum(fitted, np.float32(np.finfo(np.float16).max)))

    def error(s: np.ndarray) -> np.ndarray:
        """Of each row, without the part that does not depend on the scales."""
        found: np.ndarray = np.einsum("ngh,ng,nh->n", a, s, s) - 2 * (b * s).sum(axis=1)
        return found

    better = error(fitted) < error(scales)
    return np.where(better[:, None], fitted, scales)


def _descend(
    weight: np.ndarray,
    h: np.ndarray,
    levels: np.ndarray,
    scales: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> np.ndarray:
    """`levels` (N, K) after one pass over the columns; low, high (N, G) bound them. Works on the transposed
    weight, where a column is contiguous."""
    n, k = weight.shape
    width = k // scales.shape[1]
    steps, lowest, highest = (np.ascontiguousarray(part.T) for part in (scales, low, high))
    c = np.ascontiguousarray(levels.T)
    q = c * steps.repeat(width, axis=0)
    slope = h @ (q - weight.T)  # (K, N): half the error's gradient
    inverse = 1 / np.diag(h)
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)
        moved = np.empty((stop - start, n), np.float32)
        for j in range(start, stop):
            g = j // width
            best = np.rint((q[j] - slope[j] * inverse[j]) / steps[g])
            np.clip(best, lowest[g], highest[g], out=best)
            change = best * steps[g] - q[j]
            c[j] = best
            moved[j - start] = change
            slope[j + 1 : stop] += np.outer(h[j + 1 : stop, j], change)
        if stop < k:
            slope[stop:] += h[stop:, start:stop] @ moved
    return np.ascontiguousarray(c.T)
