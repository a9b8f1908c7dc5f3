"""GPTQ: round a weight column by column, spreading each column's error over the columns still to come.

    minimise  sum over tokens |W x - Q x|^2  =  trace((W - Q) H (W - Q)^T),   H = sum of x x^T

With U the upper Cholesky factor of inverse(H), rounding column j leaves the error e = (w_j - q_j) / U[j,
j], and column i > j gives up e * U[j, i] (Frantar et al., "GPTQ", 2022, arXiv 2210.17323). Columns are
taken in order of decreasing H[j, j], so that the ones that matter most are rounded while most others can
still make up for it; the groups and their scales are those of the original column order, so the result is
stored like any other.

A whole model is rounded layer by layer (compress/layers.py says how, and what it takes). Trade-off: about
four seconds of one core for a layer of 3.5 million weights and 8,192 tokens, and less error than rounding to
nearest; it believes the calibration text, so more of it is better: 20,000 tokens instead of 6,000 left 6 to
16 % less error on other text (docs/log.md).

Legend: N rows, K columns.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from flatout.compress.layers import Improve, round_layers
from flatout.compress.method import Data, Report, format_in
from flatout.compress.refine import refine
from flatout.compress.rtn import Grid, check_roundable, group_rows, pack, search_grid
from flatout.core.formats import Format, Recipe
from flatout.core.fuse import Source
from flatout.core.quantized import QuantizedTensor
from flatout.errors import ConfigError

PASSES = 2  # of refining
REFINED = 6
"""Bits up to which codes are refined: that takes longer than rounding, leaves some per cent less error at 3
bits, and the finer the codes the less there is to gain."""
DAMPING = 0.05
"""Part of the mean of H's diagonal that is added to it. On text that was not calibrated with, 3 bits lost 1
to 7 % less with 0.1 than with 0.01, except in qkv, whose inputs lie in few directions (docs/log.md)."""
STRENGTH = 0.25  # of aiming at the original's outputs
_BLOCK = 32  # columns whose updates are applied to the rest of the matrix together
_DAMPINGS = (1.0, 10.0, 100.0)  # tried in turn when H is too close to singular


def gptq(
    weight: np.ndarray, hessian: np.ndarray, fmt: Format, damping: float = DAMPING, order: bool = True
) -> QuantizedTensor:
    """`weight` float32 (N, K) in `fmt`, rounded to suit inputs with second moments `hessian` (K, K).

    damping: part of the mean of H's diagonal that is added to it. order: take columns by decreasing H[j, j].
    Raises ConfigError for shapes that do not fit and for a Hessian that is not finite.
    """
    check_roundable(fmt)
    k = weight.shape[1]
    if hessian.shape != (k, k) or not np.isfinite(hessian).all():
        raise ConfigError(f"the Hessian is finite and {(k, k)}", str(hessian.shape), "other calibration text")
    return spread(weight, factorise(hessian, damping, order), fmt)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factor:
    """A Hessian as rounding uses it: `columns` (K,) in the order in which they are rounded, the upper
    triangle of U float32 of them, row by row, and the damped diagonal (K,) in the weight's own order."""

    columns: np.ndarray
    triangle: np.ndarray
    importance: np.ndarray

    @property
    def upper(self) -> np.ndarray:
        """U (K, K), made anew each time: a search keeps hundreds of factors and uses one at a time."""
        return upper_of(self.triangle, len(self.columns))


def triangle_of(square: np.ndarray) -> np.ndarray:
    """The upper triangle of (K, K), row by row, as (K (K + 1) / 2,)."""
    triangle: np.ndarray = square[~np.tri(len(square), k=-1, dtype=bool)]
    return triangle


def upper_of(triangle: np.ndarray, k: int) -> np.ndarray:
    """(K, K) with that upper triangle and zeros below it."""
    square = np.zeros((k, k), dtype=triangle.dtype)
    square[~np.tri(k, k=-1, dtype=bool)] = triangle
    return square


def factorise(hessian: np.ndarray, damping: float = 0.01, order: bool = True) -> Factor:
    """The Factor of second moments (K, K); arguments as for `gptq`."""
    diagonal = np.diag(hessian)
    columns = np.argsort(-diagonal, kind="stable") if order else np.arange(len(hessian))
    return Factor(
        columns=columns,
        triangle=triangle_of(_inverse_factor(hessian[np.ix_(columns, columns)], damping)),
        importance=(diagonal + damping * diagonal.mean() + 1e-12).astype(np.float32),
    )


def spread(weight: np.ndarray, factor: Factor, fmt: Format) -> QuantizedTensor:
    """`weight` float32 (N, K) in `fmt`, errors spread by `factor`."""
    grouped = group_rows(weight, fmt)
    grid = search_grid(grouped, fmt, factor.importance.reshape(grouped.shape[1:]))
    codes = np.empty(weight.shape, dtype=np.float32)
    groups = factor.columns // grouped.shape[2]
    codes[:, factor.columns] = _round_columns(weight[:, factor.columns], factor.upper, grid, groups)
    return pack(codes, grid, fmt)


def _inverse_factor(hessian: np.ndarray, damping: float) -> np.ndarray:
    """Upper triangular U, float32, with U^T U = inverse(H + damping). Inputs that are always zero are left
    alone.

    Reversing rows and columns turns a lower Cholesky factor into R with H = R R^T, R upper; then U =
    inverse(R).
    """
    h = torch.from_numpy(hessian.astype(np.float64))
    h += torch.diag((h.diagonal() == 0).double())
    unit = torch.eye(len(h), dtype=torch.float64)
    for times in _DAMPINGS:
        damped = h + unit * (damping * times * float(h.diagonal().mean()))
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), unit, upper=True)
            return np.ascontiguousarray(upper.float().numpy())
    raise ConfigError("the Hessian must be positive definite", "a singular one", "more calibration text")


def _round_columns(weight: np.ndarray, factor: np.ndarray, grid: Grid, groups: np.ndarray) -> np.ndarray:
    """Codes (N, K) of `weight`, column by column. groups[j] is the group whose scale column j uses.

    Works on the transposed weight, where a column is contiguous.
    """
    w = np.array(weight.T, dtype=np.float32, order="C")
    scales, zeros = np.ascontiguousarray(grid.scales.T), np.ascontiguousarray(grid.zeros.T)
    codes = np.empty_like(w)
    k = len(w)
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)
        errors = np.empty((stop - start, w.shape[1]), dtype=np.float32)
        for j in range(start, stop):
            scale, zero = scales[groups[j]], zeros[groups[j]]
            codes[j] = np.clip(np.rint(w[j] / scale) + zero, grid.low, grid.high)
            errors[j - start] = (w[j] - scale * (codes[j] - zero)) / factor[j, j]
            w[j + 1 : stop] -= np.outer(factor[j, j + 1 : stop], errors[j - start])
        w[stop:] -= factor[start:stop, stop:].T @ errors
    return codes.T


def round_linear(weight: np.ndarray, hessian: np.ndarray, fmt: Format) -> QuantizedTensor:
    """`weight` float32 (N, K) in `fmt` by GPTQ, coarse ones refined (compress/refine.py)."""
    rounded = gptq(weight, hessian, fmt)
    if fmt.bits > REFINED:
        return rounded
    return refine(weight, damped(hessian), rounded, PASSES)


def damped(hessian: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """`hessian` with `damping` of its diagonal's mean added to the diagonal, float32 and never singular."""
    added = damping * float(np.diag(hessian).mean()) + 1e-12
    found: np.ndarray = hessian + np.float32(added) * np.eye(len(hessian), dtype=np.float32)
    return found


def gptq_layers(
    source: Source, data: Data, recipe: Recipe, improve: Improve | None = None, method: str = "gptq"
) -> tuple[dict[str, QuantizedTensor], Report]:
    """Fused name -> rounded weight of every linear of `source` whose format rounding can make.

    All documents pass a linear together; it is rounded to suit what it receives behind the rounded ones
    before it, and to make up for their errors (compress/layers.py). Raises ConfigError for text too short,
    and, naming the linear, for what is not finite.
    """
    start = time.perf_counter()

    def by_format(name: str, weight: np.ndarray, hessian: np.ndarray) -> QuantizedTensor:
        return round_linear(weight, hessian, format_in(recipe, name))

    rounded, errors = round_layers(source, data, recipe, method, by_format, STRENGTH, improve)
    seconds = time.perf_counter() - start
    return rounded, Report(method=method, seconds=seconds, tokens=data.tokens, errors=errors)
