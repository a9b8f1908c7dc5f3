"""GPTQ: round a weight column by column, spreading each column's error over the columns still to come.

    minimise  sum over tokens |W x - Q x|^2  =  trace((W - Q) H (W - Q)^T),   H = sum of x x^T

With U the upper Cholesky factor of inverse(H), rounding column j leaves the error e = (w_j - q_j) / U[j,
j], and column i > j gives up e * U[j, i] (Frantar et al., "GPTQ", 2022, arXiv 2210.17323). Columns are
taken in order of decreasing H[j, j], so that the ones that matter most are rounded while most others can
still make up for it; the groups and their scales are those of the original column order, so the result is
stored like any other.

Hessians are collected layer by layer: only one layer's float weights, its four Hessians and the hidden
states of the calibration text are in memory. Each layer sees what the rounded layers before it produce.

Legend: N rows, K columns, T tokens of one document, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from flatout.compress.rtn import Grid, check_roundable, group_rows, pack, search_grid
from flatout.core.formats import Format, Recipe
from flatout.core.fuse import Source, float_weight, native_weight
from flatout.core.quantized import QuantizedTensor
from flatout.errors import ConfigError
from flatout.kernels.linear import as_tensor
from flatout.models.llama import Cache, Llama, decoder_layer

_BLOCK = 128  # columns whose updates are applied to the rest of the matrix together
_DAMPINGS = (1.0, 10.0, 100.0)  # tried in turn when H is too close to singular

Progress = Callable[[str, int, int], None]


def gptq(
    weight: np.ndarray, hessian: np.ndarray, fmt: Format, damping: float = 0.01, order: bool = True
) -> QuantizedTensor:
    """`weight` float32 (N, K) in `fmt`, rounded to suit inputs with second moments `hessian` (K, K).

    damping: part of the mean of H's diagonal that is added to it. order: take columns by decreasing H[j, j].
    Raises ConfigError for shapes that do not fit and for a Hessian that is not finite.
    """
    check_roundable(fmt)
    n, k = weight.shape
    if hessian.shape != (k, k) or not np.isfinite(hessian).all():
        raise ConfigError(f"the Hessian is finite and {(k, k)}", str(hessian.shape), "other calibration text")
    grouped = group_rows(weight, fmt)
    diagonal = np.diag(hessian)
    importance = (diagonal + damping * diagonal.mean() + 1e-12).astype(np.float32)
    grid = search_grid(grouped, fmt, importance.reshape(grouped.shape[1:]))
    columns = np.argsort(-diagonal, kind="stable") if order else np.arange(k)
    factor = _inverse_factor(hessian[np.ix_(columns, columns)], damping)
    codes = np.empty((n, k), dtype=np.float32)
    codes[:, columns] = _round_columns(weight[:, columns], factor, grid, columns // grouped.shape[2])
    return pack(codes, grid, fmt)


def _inverse_factor(hessian: np.ndarray, damping: float) -> np.ndarray:
    """Upper triangular U with U^T U = inverse(H + damping), float64. Inputs that are always zero are left
    alone."""
    h = hessian.astype(np.float64)
    h[np.diag_indices_from(h)] += np.where(np.diag(h) == 0, 1.0, 0.0)
    for times in _DAMPINGS:
        damped = h + np.eye(len(h)) * (damping * times * np.diag(h).mean())
        try:
            return np.ascontiguousarray(np.linalg.cholesky(np.linalg.inv(damped)).T)
        except np.linalg.LinAlgError:
            continue
    raise ConfigError("the Hessian must be positive definite", "a singular one", "more calibration text")


def _round_columns(weight: np.ndarray, factor: np.ndarray, grid: Grid, groups: np.ndarray) -> np.ndarray:
    """Codes (N, K) of `weight`, column by column. groups[j] is the group whose scale column j uses."""
    w = np.array(weight, dtype=np.float32, order="F")
    u = factor.astype(np.float32)
    codes = np.empty_like(w)
    k = w.shape[1]
    for start in range(0, k, _BLOCK):
        stop = min(start + _BLOCK, k)
        errors = np.empty((w.shape[0], stop - start), dtype=np.float32, order="F")
        for j in range(start, stop):
            scale, zero = grid.scales[:, groups[j]], grid.zeros[:, groups[j]]
            codes[:, j] = np.clip(np.rint(w[:, j] / scale) + zero, grid.low, grid.high)
            errors[:, j - start] = (w[:, j] - scale * (codes[:, j] - zero)) / u[j, j]
            w[:, j + 1 : stop] -= np.outer(errors[:, j - start], u[j, j + 1 : stop])
        w[:, stop:] -= errors @ u[start:stop, stop:]
    return codes


def gptq_layers(
    source: Source,
    recipe: Recipe,
    documents: Sequence[np.ndarray],
    progress: Progress | None = None,
) -> Iterator[tuple[str, QuantizedTensor]]:
    """(fused name, rounded weight) of every linear of `source` whose format rounding can make, layer by
    layer.

    documents: token ids, each run as a sequence of its own. Linears in float and native formats are used as
    they are.
    """
    spec = source.spec
    model = Llama(source)
    hidden = [model.embed(torch.from_numpy(np.asarray(d, dtype=np.int64))) for d in documents]
    total = spec.num_layers * len(spec.linears())
    for layer in range(spec.num_layers):
        names = [f"layers.{layer}.{linear}" for linear in spec.linears()]
        formats = {name: recipe.format_of(layer, name.split(".")[2]) for name in names}
        weights = {name: float_weight(source, name) for name in names}
        rounds = [name for name, fmt in formats.items() if fmt.is_integer and not fmt.is_native]
        hessians = _collect(source, layer, hidden, weights, rounds) if rounds else {}
        for done, name in enumerate(names):
            if progress is not None:
                progress(name, layer * len(names) + done, total)
            if name in rounds:
                rounded = gptq(weights[name], hessians[name], formats[name])
                weights[name] = rounded.dequantize()
                yield name, rounded
            elif formats[name].is_native:
                weights[name] = native_weight(source, name, formats[name]).dequantize()
        hidden = _advance(source, layer, hidden, weights)


def _run_layer(source: Source, layer: int, x: Tensor, linear: Callable[[str, Tensor], Tensor]) -> Tensor:
    return decoder_layer(
        source.spec,
        layer,
        x,
        torch.arange(x.shape[0]),
        linear=linear,
        vector=lambda name: as_tensor(float_weight(source, name)),
        cache=Cache(),
    )


@torch.no_grad()
def _collect(
    source: Source, layer: int, hidden: Sequence[Tensor], weights: dict[str, np.ndarray], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Mean of x x^T over the inputs x of each named linear when `hidden` states run through `layer`."""
    sums = {name: torch.zeros(weights[name].shape[1], weights[name].shape[1]) for name in names}

    def linear(name: str, x: Tensor) -> Tensor:
        if name in sums:
            sums[name] += x.T @ x
        return x @ as_tensor(weights[name]).T

    for x in hidden:
        _run_layer(source, layer, x, linear)
    tokens = sum(x.shape[0] for x in hidden)
    return {name: (total / tokens).numpy() for name, total in sums.items()}


@torch.no_grad()
def _advance(
    source: Source, layer: int, hidden: Sequence[Tensor], weights: dict[str, np.ndarray]
) -> list[Tensor]:
    """Hidden states after `layer` with the given weights."""
    return [_run_layer(source, layer, x, lambda name, y: y @ as_tensor(weights[name]).T) for x in hidden]
