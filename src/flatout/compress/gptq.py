"""GPTQ: round a weight column by column, spreading each column's error over the columns still to come.

    minimise  sum over tokens |W x - Q x|^2  =  trace((W - Q) H (W - Q)^T),   H = sum of x x^T

With U the upper Cholesky factor of inverse(H), rounding column j leaves the error e = (w_j - q_j) / U[j,
j], and column i > j gives up e * U[j, i] (Frantar et al., "GPTQ", 2022, arXiv 2210.17323). Columns are
taken in order of decreasing H[j, j], so that the ones that matter most are rounded while most others can
still make up for it; the groups and their scales are those of the original column order, so the result is
stored like any other.

A whole model is rounded layer by layer (compress/layers.py says how, and what it takes). Trade-off: about
three seconds of one core for a layer of 3.5 million weights and 8,192 tokens, and less error than rounding to
nearest; it believes the calibration text, so more of it is better: 20,000 tokens instead of 6,000 left 6 to
16 % less error on other text (docs/log.md).

Products and sweeps run where the weight and Hessian lie, on a GPU too. Legend: N rows, K columns.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flatout.compress.layers import Improve, round_layers
from flatout.compress.method import Data, Report, format_in
from flatout.compress.refine import refine
from flatout.compress.rtn import (
    Grid,
    check_groups,
    check_roundable,
    chosen_grid,
    clipped_grids,
    group_rows,
    pack,
    search_grid,
)
from flatout.core.formats import Format, Recipe
from flatout.core.fuse import Source
from flatout.core.quantized import QuantizedTensor
from flatout.errors import ConfigError
from flatout.kernels.linear import as_tensor
from flatout.kernels.rounding import BLOCK, GroupLevels, round_block

PASSES = 2  # of refining
REFINED = 6
"""Bits up to which codes are refined: that takes longer than rounding, leaves some per cent less error at 3
bits, and the finer the codes the less there is to gain."""
DAMPING = 0.05
"""Part of the mean of H's diagonal that is added to it. On text that was not calibrated with, 3 bits lost 1
to 7 % less with 0.1 than with 0.01, except in qkv, whose inputs lie in few directions (docs/log.md)."""
STRENGTH = 0.25  # of aiming at the original's outputs
_SMALL = 256  # width of a triangular matrix that is inverted at once
_DAMPINGS = (1.0, 10.0, 100.0)  # tried in turn when H is too close to singular

Matrix = np.ndarray | Tensor


def gptq(
    weight: Matrix,
    hessian: Matrix,
    fmt: Format,
    damping: float = DAMPING,
    order: bool = True,
    factor: Factor | None = None,
) -> QuantizedTensor:
    """`weight` float32 (N, K) in `fmt`, rounded to suit inputs with second moments `hessian` (K, K).

    damping: part of the mean of H's diagonal that is added to it. order: take columns by decreasing H[j, j].
    factor: what `factorise` makes of the same arguments, where it is at hand. Raises ConfigError for shapes
    that do not fit and for a Hessian that is not finite.
    """
    check_roundable(fmt)
    w, h = as_tensor(weight), as_tensor(hessian)
    k = w.shape[1]
    if h.shape != (k, k) or not bool(torch.isfinite(h).all()):
        raise ConfigError(
            f"the Hessian is finite and {(k, k)}", str(tuple(h.shape)), "other calibration text"
        )
    if factor is None:
        columns, upper = _ordered_factor(h, damping, order)
    else:
        columns, upper = torch.from_numpy(factor.columns), torch.from_numpy(factor.upper)
    diagonal = h.diagonal()
    importance = (diagonal + damping * diagonal.mean() + 1e-12).float()
    return _spread(w, columns, upper, importance, fmt)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factor:
    """A Hessian as rounding uses it: `columns` (K,) in the order in which they are rounded and the upper
    triangle of U float32 of them, row by row."""

    columns: np.ndarray
    triangle: np.ndarray

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
    columns, upper = _ordered_factor(as_tensor(hessian), damping, order)
    return Factor(columns=columns.numpy(), triangle=triangle_of(upper.numpy()))


def _ordered_factor(h: Tensor, damping: float, order: bool) -> tuple[Tensor, Tensor]:
    """Columns (K,) in the order in which they are rounded, and U (K, K) of them."""
    columns = torch.arange(len(h), device=h.device)
    if order:
        columns = torch.argsort(h.diagonal(), descending=True, stable=True)
    return columns, _inverse_factor(h[columns][:, columns], damping)


def _spread(
    weight: Tensor, columns: Tensor, upper: Tensor, importance: Tensor, fmt: Format
) -> QuantizedTensor:
    """Scales by search, codes by the sweep; all tensors on one device."""
    if weight.device.type == "cpu":
        grouped = group_rows(weight.numpy(), fmt)
        grid = search_grid(grouped, fmt, importance.numpy().reshape(grouped.shape[1:]))
    else:
        grid = search_on_device(weight, fmt, importance)
    groups = (columns // (weight.shape[1] // grid.scales.shape[1])).tolist()
    codes = torch.empty(weight.shape, dtype=torch.int8 if grid.low < 0 else torch.uint8, device=weight.device)
    codes[:, columns] = _round_columns(weight.T[columns].contiguous(), upper, grid, groups).T.to(codes.dtype)
    return pack(codes.cpu().numpy(), grid, fmt)


def search_on_device(weight: Tensor, fmt: Format, importance: Tensor) -> Grid:
    """As `search_grid`, of `weight` (N, K) and `importance` (K,), computed where they lie: whole weights at
    a time, which a GPU's memory is fast enough for and a processor's cache too small."""
    check_groups(weight.shape[1], fmt)
    n, groups, device = len(weight), fmt.groups(weight.shape[1]), weight.device
    grouped, counts = weight.reshape(n, groups, -1), importance.reshape(groups, -1)
    least, largest = (part.cpu().numpy() for part in grouped.aminmax(dim=2))
    grids = clipped_grids(least, largest, fmt)
    error = torch.full((n, groups), torch.inf, device=device)
    best = torch.zeros((n, groups), dtype=torch.int64, device=device)
    for which, grid in enumerate(grids):
        step, zero = (torch.from_numpy(part).to(device)[:, :, None] for part in (grid.scales, grid.zeros))
        levels = (grouped / step).round_().clamp_(grid.low - zero, grid.high - zero)
        found = levels.mul_(step).sub_(grouped).square_().mul_(counts).sum(dim=2)
        best = torch.where(found < error, which, best)
        error = torch.minimum(found, error)
    return chosen_grid(grids, best.cpu().numpy())


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U, float32, with U^T U = inverse(H + damping). Inputs that are always zero are left
    alone.

    Reversing rows and columns turns a lower Cholesky factor into R with H = R R^T, R upper; then U =
    inverse(R).
    """
    h = hessian.to(torch.float64, copy=True)
    h.diagonal().add_((h.diagonal() == 0).double())
    added = damping * float(h.diagonal().mean())
    for times in _DAMPINGS:
        damped = h.flip(0, 1)
        damped.diagonal().add_(times * added)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped  # a width of 14,336 takes 1.6 GB
        if not int(failed):
            # Damped, a triangle's condition is at most sqrt(K / damping): float32 loses four digits of seven.
            return _inverse_upper(lower.flip(0, 1).float())
    raise ConfigError("the Hessian must be positive definite", "a singular one", "more calibration text")


def _inverse_upper(r: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix (K, K), by halves: of [[A, B], [0, C]] it is [[A', -A' B C'],
    [0, C']], and products are faster than solving for a unit matrix whose zeros are not seen."""
    k = len(r)
    if k <= _SMALL:
        unit = torch.eye(k, dtype=r.dtype, device=r.device)
        inverse: Tensor = torch.linalg.solve_triangular(r, unit, upper=True)
        return inverse
    half = k // 2
    found = torch.zeros_like(r)
    a, c = _inverse_upper(r[:half, :half]), _inverse_upper(r[half:, half:])
    found[:half, :half], found[half:, half:] = a, c
    found[:half, half:] = -(a @ (r[:half, half:] @ c))
    return found


def _round_columns(w: Tensor, factor: Tensor, grid: Grid, groups: list[int]) -> Tensor:
    """Codes (K, N) of the transposed weight w (K, N), where a column is contiguous; w is used up. groups[j]
    is the group whose scale column j uses."""
    scales, zeros = (torch.from_numpy(part.T.copy()).to(w.device) for part in (grid.scales, grid.zeros))
    levels = GroupLevels(scales, grid.low - zeros, grid.high - zeros)
    spread = factor / factor.diagonal()[:, None]
    found = torch.empty_like(w)
    for start in range(0, len(w), BLOCK):
        own = slice(start, min(start + BLOCK, len(w)))
        found[own], errors = round_block(w[own], spread[own, own], groups[own], levels)
        w[own.stop :].addmm_(spread[own, own.stop :].T, errors, alpha=-1)
    return found.add_(zeros[groups])


def round_linear(
    weight: Matrix, hessian: Matrix, fmt: Format, passes: int = PASSES, factor: Factor | None = None
) -> QuantizedTensor:
    """`weight` float32 (N, K) in `fmt` by GPTQ, coarse ones refined in `passes` (compress/refine.py). factor:
    that of the Hessian, where it is at hand."""
    rounded = gptq(weight, hessian, fmt, factor=factor)
    if fmt.bits > REFINED:
        return rounded
    return refine(weight, damped(hessian), rounded, passes)


def damped(hessian: Matrix, damping: float = DAMPING) -> Tensor:
    """`hessian` with `damping` of its diagonal's mean added to the diagonal, float32 and never singular."""
    found = as_tensor(hessian).to(torch.float32, copy=True)
    found.diagonal().add_(damping * float(found.diagonal().mean()) + 1e-12)
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

    def by_format(name: str, weight: Tensor, hessian: Tensor) -> QuantizedTensor:
        return round_linear(weight, hessian, format_in(recipe, name))

    rounded, errors = round_layers(source, data, recipe, method, by_format, STRENGTH, improve)
    seconds = time.perf_counter() - start
    return rounded, Report(method=method, seconds=seconds, tokens=data.tokens, errors=errors)
