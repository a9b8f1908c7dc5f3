"""GPTQ: round a weight column by column, spreading each column's error over the columns still to come.

    minimise  sum over tokens |W x - Q x|^2  =  trace((W - Q) H (W - Q)^T),   H = sum of x x^T

With U the upper Cholesky factor of inverse(H), rounding column j leaves the error e = (w_j - q_j) / U[j,
j], and column i > j gives up e * U[j, i] (Frantar et al., "GPTQ", 2022, arXiv 2210.17323). Columns are
taken in order of decreasing H[j, j], so that the ones that matter most are rounded while most others can
still make up for it; the groups and their scales are those of the original column order, so the result is
stored like any other.

Calibration runs layer by layer: one layer's float weights, one Hessian and the activations of the
calibration text are in memory at a time, about 4 bytes x tokens x (3 x intermediate size + hidden size).

Legend: N rows, K columns, T tokens of all documents, H, G query and key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flatout.compress.apply import Progress
from flatout.compress.inputs import Documents
from flatout.compress.rtn import Grid, check_roundable, group_rows, pack, search_grid
from flatout.core.formats import Format, Recipe
from flatout.core.fuse import Source, float_weight, native_weight
from flatout.core.quantized import QuantizedTensor
from flatout.errors import ConfigError
from flatout.kernels.linear import as_tensor
from flatout.models.llama import Llama, decoder_layer, rope_turns

_BLOCK = 32  # columns whose updates are applied to the rest of the matrix together
_DAMPINGS = (1.0, 10.0, 100.0)  # tried in turn when H is too close to singular


def gptq(
    weight: np.ndarray, hessian: np.ndarray, fmt: Format, damping: float = 0.01, order: bool = True
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


@torch.no_grad()
def gptq_layers(
    source: Source,
    recipe: Recipe,
    documents: Sequence[np.ndarray],
    progress: Progress | None = None,
) -> dict[str, QuantizedTensor]:
    """Fused name -> rounded weight of every linear of `source` whose format rounding can make.

    documents: token ids, each a sequence of its own. All documents pass a linear together; it is rounded to
    suit what it receives and then used rounded, so that everything after it makes up for its error. Linears
    in float and native formats are used as they are.
    """
    spec = source.spec
    rounded: dict[str, QuantizedTensor] = {}
    total = spec.num_layers * len(spec.linears())

    def linear(name: str, inputs: Tensor) -> Tensor:
        _, layer, what = name.split(".")
        fmt = recipe.format_of(int(layer), what)
        if progress is not None:
            progress(name, int(layer) * len(spec.linears()) + list(spec.linears()).index(what), total)
        if fmt.is_native:
            weight = native_weight(source, name, fmt).dequantize()
        elif fmt.is_integer:
            hessian = (inputs.T @ inputs / len(inputs)).numpy()
            rounded[name] = gptq(float_weight(source, name), hessian, fmt)
            weight = rounded[name].dequantize()
        else:
            weight = float_weight(source, name)
        return inputs @ as_tensor(weight).T

    cache = Documents([len(document) for document in documents])
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    turns = rope_turns(spec, positions)
    x = Llama(source).embed(torch.from_numpy(np.concatenate(documents).astype(np.int64)))
    for layer in range(spec.num_layers):
        x = decoder_layer(
            spec,
            layer,
            x,
            positions,
            turns,
            linear=linear,
            vector=lambda name: as_tensor(float_weight(source, name)),
            cache=cache,
        )
    return rounded
