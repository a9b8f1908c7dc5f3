"""AWQ: weights that meet loud activations are made larger before rounding, by factors that are searched.

    W x = (W s) (x / s),   s_k = a_k^alpha / w_k^(1 - alpha),   a_k = rms of input k over the text,
                                                                w_k = rms of column k, relative to its group

For every linear the alpha of 0, 1/12 .. 1 with the least expected error of the rounded product is taken,
trace(E H E^T) with E = round(W s) / s - W and H the second moments of the inputs (Lin et al., "AWQ", 2023,
arXiv 2306.00978, where the error is that of a sample; the second factor of s is AWQ's `duo_scaling`).
1 / s costs nothing at run time (compress/rescale.py).

Trade-off: seconds, and safe with little text, since one number a linear is fitted; GPTQ gains more, and gains
less behind it than alone. The file's own blocks are given up where factors go into them.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from flatout.compress.inputs import linear_inputs, relative_to
from flatout.compress.method import Data, Report, format_in
from flatout.compress.rescale import Rescaled, evenly, owner_of, rescalable, rescaled
from flatout.compress.rtn import round_to_nearest
from flatout.core.formats import Format, Recipe
from flatout.core.fuse import Source

_ALPHAS = tuple(i / 12 for i in range(13))
_ROWS = 512  # of a weight, evenly spaced, whose error decides
_FAINTEST = 1e-4  # least factor of the median one: silent channels must not grow without limit


@torch.no_grad()
def awq(source: Source, data: Data, recipe: Recipe) -> tuple[Rescaled, Report]:
    """`source` with the factors that suit `recipe` on the text of `data`.

    Rescaled is every linear with weights of fewer than 8 bits, unless its weight, or the one its factors
    would go into, is taken from the file as stored. Memory: one layer's float weights and the text's
    activations.
    """
    start, spec = time.perf_counter(), source.spec
    linears = [f"layers.{i}.{linear}" for i in range(spec.num_layers) for linear in spec.linears()]
    factors: dict[str, np.ndarray] = {}
    errors: dict[str, float] = {}

    def see(name: str, inputs: Tensor, hidden: Tensor, weight: np.ndarray) -> None:
        if name == "head" or format_in(recipe, name).bits >= 8 or not rescalable(source, recipe, name):
            return
        if data.progress is not None:
            data.progress(f"scaling {name}", linears.index(name), len(linears))
        inputs = relative_to(hidden, inputs) if name.endswith((".o", ".down")) else inputs
        moments = (inputs.T @ inputs / len(inputs)).numpy()
        rows = weight[evenly(len(weight), _ROWS)]
        factors[name], errors[name] = search_factors(
            rows, moments, format_in(recipe, name), owner_of(spec, name).numpy()
        )

    linear_inputs(source, data.documents, see)
    seconds = time.perf_counter() - start
    report = Report(method="awq", seconds=seconds, tokens=data.tokens, errors=errors)
    return rescaled(source, factors), report


def search_factors(
    weight: np.ndarray, moments: np.ndarray, fmt: Format, owner: np.ndarray
) -> tuple[np.ndarray, float]:
    """(factors float32 (P,), relative error) for `weight` (N, K) in `fmt` behind inputs with second moments
    (K, K). owner (K,): the factor in 0..P-1 of each column."""
    energy = np.diag(moments).astype(np.float64)
    grouped = np.abs(weight).reshape(len(weight), fmt.groups(weight.shape[1]), -1)
    relative = grouped / np.maximum(grouped.max(axis=2, keepdims=True), 1e-12)
    columns = relative.reshape(weight.shape).mean(axis=0)
    loudness, heaviness = (_per_factor(part, owner) for part in (np.sqrt(energy), columns))
    whole = _energy(weight, moments)
    best, least = np.ones(len(loudness), np.float32), np.inf
    for alpha in _ALPHAS:
        s = loudness**alpha / heaviness ** (1 - alpha) if alpha else np.ones(len(loudness))
        s = np.maximum(s, _FAINTEST * np.median(s))
        factors = (s / np.exp(np.log(s).mean())).astype(np.float32)
        columns = factors[owner]
        rounded = round_to_nearest(weight * columns, fmt, search_clip=True).dequantize() / columns
        error = _energy(rounded - weight, moments)
        if error < least:
            best, least = factors, error
    return best, float(least / max(whole, 1e-30))


def _per_factor(values: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Root mean square of the values (K,) of each factor's columns (P,), never zero."""
    squares = np.bincount(owner, weights=values**2) / np.bincount(owner)
    found: np.ndarray = np.sqrt(squares)
    positive = found[found > 0]
    least = _FAINTEST * (float(np.median(positive)) if len(positive) else 1.0)
    return np.where(found > least, found, least)


def _energy(weight: np.ndarray, moments: np.ndarray) -> float:
    """Mean energy of the outputs of `weight` (N, K)."""
    return float(np.einsum("nk,nk->", weight @ moments, weight, dtype=np.float64))
