"""The grid of a group of weights, among a few, on which rounding loses least (compress/rtn.py):

    argmin over c of  sum over i of importance_i (s_c clamp(round(w_i / s_c), low - z_c, high - z_c) - w_i)^2

The C++ extension does it (kernels/cpu/rounding.cpp), numpy where that is not built: the same but for sums in
another order. No PyTorch, as rounding to nearest needs none.

Legend: N rows of the weight, G groups of W columns, C candidates.
"""

from __future__ import annotations

import functools
from types import ModuleType

import numpy as np

_TOGETHER = 1 << 16  # weights, which stay in a processor's cache


def nearest_grids(
    grouped: np.ndarray,
    steps: np.ndarray,
    zeros: np.ndarray,
    low: int,
    high: int,
    importance: np.ndarray | None = None,
) -> np.ndarray:
    """The index of the best candidate of each group, integers (N, G); of equal ones the first.

    grouped: float32 (N, G, W); steps, zeros: float32 (C, N, G); importance: float32 (G, W), all ones by
    default. Raises nothing of its own: callers have checked that everything is finite and steps are positive.
    """
    cpu = extension()
    if cpu is None:
        return reference(grouped, steps, zeros, low, high, importance)
    arrays = [
        None if array is None else np.ascontiguousarray(array, dtype=np.float32)
        for array in (grouped, importance, steps, zeros)
    ]
    found: np.ndarray = cpu.nearest_grids(cpu.isas()[0], *arrays, low, high)
    return found


def reference(
    grouped: np.ndarray,
    steps: np.ndarray,
    zeros: np.ndarray,
    low: int,
    high: int,
    importance: np.ndarray | None = None,
) -> np.ndarray:
    """As `nearest_grids`, in numpy, rows a few at a time."""
    best = np.empty(grouped.shape[:2], dtype=np.int32)
    rows = max(1, _TOGETHER // max(1, grouped[0].size))
    for a in range(0, len(grouped), rows):
        own = slice(a, a + rows)
        errors = []
        for step, zero in zip(steps[:, own, :, None], zeros[:, own, :, None], strict=True):
            levels = np.clip(np.rint(grouped[own] / step), low - zero, high - zero)
            lost = levels * step - grouped[own]
            weighted = lost if importance is None else lost * importance
            errors.append(np.einsum("ngk,ngk->ng", lost, weighted))
        best[own] = np.argmin(errors, axis=0)
    return best


@functools.cache
def extension() -> ModuleType | None:
    """The compiled module flatout._cpu, None where it is not built."""
    try:
        from flatout import _cpu
    except ImportError:
        return None
    module: ModuleType = _cpu
    return module
