"""Scales and minima of GGUF blocks in 8 bits: -127 to 127 times a power of two of their row.

Such numbers are float16 numbers as well, so whoever reads the file sees ordinary blocks; a runner that knows
of it streams 18 bytes for 32 weights instead of 20 (q4_1), or 17 instead of 18 (q4_0).
"""

from __future__ import annotations

from itertools import product

import numpy as np

from flatout.core.formats import Format
from flatout.core.quantized import QuantizedTensor

_MOST = 127
_LEAST_UNIT = 2.0**-24  # of float16


def with_byte_scales(weight: QuantizedTensor, fmt: Format) -> QuantizedTensor:
    """The codes of `weight` with scales s' and minima m' of 8 bits, as `fmt`.

    Of the nine pairs around the nearest s' and m' each block takes the one with the least
    sum_k ((s' - s) c_k + m' - m)^2: what rounding the scale does to a block's middle, the minimum makes up
    for. Rows whose scales are not finite keep them.
    """
    codes = weight.codes.reshape(*weight.scales.shape, -1).astype(np.float32) - weight.float_zeros[:, :, None]
    first, second = codes.sum(axis=2, dtype=np.float64), np.square(codes).sum(axis=2, dtype=np.float64)
    scales = weight.scales.astype(np.float64)
    minima = np.zeros_like(scales) if weight.minima is None else weight.minima.astype(np.float64)
    best, chosen = np.full(scales.shape, np.inf), (scales, minima)
    with np.errstate(invalid="ignore"):
        for s, m in product(_around(scales), [minima] if weight.minima is None else _around(minima)):
            ds, dm = s - scales, m - minima
            error = ds * ds * second + 2.0 * ds * dm * first + dm * dm * codes.shape[2]
            better = error < best
            best = np.where(better, error, best)
            chosen = np.where(better, s, chosen[0]), np.where(better, m, chosen[1])
    finite = np.isfinite(scales + minima).all(axis=1, keepdims=True)
    return QuantizedTensor(
        format=fmt,
        codes=weight.codes,
        scales=np.where(finite, chosen[0], scales).astype(np.float16),
        minima=None if weight.minima is None else np.where(finite, chosen[1], minima).astype(np.float16),
    )


def _around(values: np.ndarray) -> list[np.ndarray]:
    """`values` (N, groups) in their row's unit, to nearest, one less and one more."""
    largest = np.abs(values).max(axis=1, keepdims=True)
    unit = np.exp2(np.ceil(np.log2(np.maximum(largest, _LEAST_UNIT) / _MOST))).clip(min=_LEAST_UNIT)
    nearest = np.rint(values / unit)
    return [(nearest + step).clip(-_MOST, _MOST) * unit for step in (0.0, -1.0, 1.0)]
