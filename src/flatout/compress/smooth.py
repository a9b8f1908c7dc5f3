"""Smoothing: move outliers from activations, which share one scale a token, into weights, for nothing at run
time.

    x W^T = (x / s) (W s)^T          for any factors s > 0, one for each input channel

1 / s goes where it costs nothing (compress/rescale.py; Xiao et al., "SmoothQuant", 2022, arXiv 2211.10438).
The model computes what it did before.

SmoothQuant sets s_k from the largest activation and the largest weight of channel k and one exponent. Here
s minimises the expected error of the product. Rounding to steps of max_k |x_tk / s_k| / 127 and max_k
|w_nk s_k| / 127 adds independent errors of variance step^2 / 12 to both factors, so that, without the
constant 12 * 127^2,

    error(s) = mean over t of max_k (x_tk / s_k)^2  *  sum over n, k of (w_nk s_k)^2
             + sum over n of max_k (w_nk s_k)^2     *  sum over k of mean over t of (x_tk / s_k)^2

All four are sums of maxima of monomials in s with positive coefficients, so error(s) is convex in log s (a
geometric program; Boyd et al., 2007): no exponent to choose and one least value to descend to.

Trade-off: it helps int8 activations that share one scale a token, and nothing else; the file's own blocks
are given up where factors go into them.

Legend: T tokens, N rows and K columns of a weight, P free factors (K, or fewer where columns share one).
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from torch import Tensor

from flatout.compress.inputs import linear_inputs, relative_to
from flatout.compress.method import Data, Report, format_in
from flatout.compress.rescale import Rescaled, evenly, owner_of, rescalable, rescaled
from flatout.core.formats import Recipe
from flatout.core.fuse import Source
from flatout.core.spec import ModelSpec
from flatout.errors import ConfigError
from flatout.kernels.linear import as_tensor

_DOCUMENTS, _TOKENS = 16, 2048  # of calibration text, at most, that pass through the model
_FITTED_TOKENS = 512  # of these, evenly spaced, that factors are fitted to
_WEIGHT_ROWS = 1024  # rows of a weight, evenly spaced, that factors are fitted to
_STEPS = 40
_RATE = 0.1  # first step in log s; it falls to zero along a cosine
_START = 0.65  # SmoothQuant's exponent, where the descent starts
_FAINTEST = 1e-3
"""A channel counts as at least this part of the median one, in activations and in weights. Other text may
wake a channel that calibration text left silent, whose factor would otherwise fall without limit; a column
of zeros would let its factor grow without limit."""


def fit_factors(x: Tensor, weight: Tensor, owner: Tensor) -> Tensor:
    """Factors s float32 (P,) with the least expected error of x (T, K) times weight (N, K) transposed.

    owner: int64 (K,), the factor in 0..P-1 that scales each column. The geometric mean of s is 1.
    """
    free = int(owner.max()) + 1

    def per_factor(values: Tensor, how: str = "sum") -> Tensor:
        return torch.zeros(free).scatter_reduce(0, owner, values, how)

    x2, w2 = _audible(x.square()), _audible(weight.square())
    loudest, heaviest = per_factor(x2.amax(dim=0), "amax"), per_factor(w2.amax(dim=0), "amax")
    input_energy, weight_energy = per_factor(x2.mean(dim=0)), per_factor(w2.sum(dim=0))
    u = (_START * loudest.log() - (1 - _START) * heaviest.log()) / 2
    u -= u.mean()
    first, second = torch.zeros(free), torch.zeros(free)  # moments of the gradient, as in Adam
    best, least = u, math.inf
    for step in range(_STEPS):
        squared = torch.exp(2 * u)
        of_columns = squared[owner]
        a, a_at = (x2 / of_columns).max(dim=1)
        b, b_at = (w2 * of_columns).max(dim=1)
        weights, inputs = weight_energy * squared, input_energy / squared
        of_activations = float(a.mean() * weights.sum())
        of_weights = float(b.sum() * inputs.sum())
        error = of_activations + of_weights
        if error < least:
            best, least = u, error
        # The gradient of log error; a maximum has that of the entry where it lies.
        gradient = of_activations * (weights / weights.sum() - _placed(a / a.sum(), owner[a_at], free))
        gradient += of_weights * (_placed(b / b.sum(), owner[b_at], free) - inputs / inputs.sum())
        gradient /= error
        first, second = 0.8 * first + 0.2 * gradient, 0.95 * second + 0.05 * gradient.square()
        mean, square = first / (1 - 0.8 ** (step + 1)), second / (1 - 0.95 ** (step + 1))
        rate = _RATE * 0.5 * (1 + math.cos(math.pi * step / _STEPS))
        u = u - rate * mean / (square.sqrt() + 1e-8)
        u -= u.mean()
    return torch.exp(best)


def _audible(squares: Tensor) -> Tensor:
    """`squares` (rows, K) with the mean of every column raised to _FAINTEST^2 of the median one; ones if all
    are 0."""
    means = squares.mean(dim=0)
    present = means[means > 0]
    if not len(present):
        return torch.ones_like(squares)
    return squares + torch.clamp(_FAINTEST**2 * present.median() - means, min=0)


def _placed(values: Tensor, where: Tensor, size: int) -> Tensor:
    return torch.zeros(size).scatter_add_(0, where, values)


@torch.no_grad()
def smooth(source: Source, data: Data, recipe: Recipe) -> tuple[Rescaled, Report]:
    """`source` with the factors that suit `recipe`, fitted to the text of `data`.

    Smoothed is every linear whose activations share one int8 scale a token, unless its weight, or the one
    its factors would go into, is taken from the file as stored. Of the documents, beginnings of 16 with
    2,048 tokens in all are used. Memory: one layer's float weights and these tokens' activations. Raises
    ConfigError when there is no text.
    """
    start = time.perf_counter()
    if not data.documents:
        raise ConfigError("smoothing needs calibration text", "none", "method rtn, or give token lists")
    spec = source.spec
    linears = [f"layers.{i}.{linear}" for i in range(spec.num_layers) for linear in spec.linears()] + ["head"]
    factors: dict[str, np.ndarray] = {}

    def see(name: str, inputs: Tensor, hidden: Tensor, weight: np.ndarray) -> None:
        if data.progress is not None:
            data.progress(f"smoothing {name}", linears.index(name), len(linears))
        if smoothable(source, recipe, name):
            factors[name] = factors_for(spec, name, inputs, hidden, weight)

    documents = [data.documents[i] for i in evenly(len(data.documents), _DOCUMENTS)]
    documents = [document[: _TOKENS // len(documents)] for document in documents]
    linear_inputs(source, documents, see)
    tokens = sum(len(document) for document in documents)
    report = Report(method="smooth", seconds=time.perf_counter() - start, tokens=tokens, errors={})
    return rescaled(source, factors), report


def smoothable(source: Source, recipe: Recipe, name: str) -> bool:
    """Whether linear `name` rounds its activations to int8 with one scale a token, and can be rescaled."""
    return format_in(recipe, name).scales_tokens and rescalable(source, recipe, name)


def factors_for(spec: ModelSpec, name: str, inputs: Tensor, hidden: Tensor, weight: np.ndarray) -> np.ndarray:
    """The factors float32 (P,) of linear `name`, from a few of its inputs and rows."""
    inputs = relative_to(hidden, inputs) if name.endswith((".o", ".down")) else inputs
    rows = as_tensor(weight[evenly(len(weight), _WEIGHT_ROWS)])
    return fit_factors(inputs[evenly(len(inputs), _FITTED_TOKENS)], rows, owner_of(spec, name)).numpy()
