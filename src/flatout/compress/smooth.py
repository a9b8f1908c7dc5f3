"""Smoothing: move outliers from activations, which share one scale a token, into weights, for nothing at run
time.

    x W^T = (x / s) (W s)^T          for any factors s > 0, one for each input channel

1 / s goes where it costs nothing (Xiao et al., "SmoothQuant", 2022, arXiv 2211.10438): into the norm before
qkv, gate_up and the head, into the rows of up_proj before down, and into the rows of v_proj before o, where
the query heads that read one key/value head share their factors. The model computes what it did before.

SmoothQuant sets s_k from the largest activation and the largest weight of channel k and one exponent. Here
s minimises the expected error of the product. Rounding to steps of max_k |x_tk / s_k| / 127 and max_k
|w_nk s_k| / 127 adds independent errors of variance step^2 / 12 to both factors, so that, without the
constant 12 * 127^2,

    error(s) = mean over t of max_k (x_tk / s_k)^2  *  sum over n, k of (w_nk s_k)^2
             + sum over n of max_k (w_nk s_k)^2     *  sum over k of mean over t of (x_tk / s_k)^2

All four are sums of maxima of monomials in s with positive coefficients, so error(s) is convex in log s (a
geometric program; Boyd et al., 2007): no exponent to choose and one least value to descend to.

Legend: T tokens, N rows and K columns of a weight, P free factors (K, or fewer where columns share one).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flatout.compress.apply import Progress
from flatout.compress.inputs import linear_inputs
from flatout.core.formats import Format, Recipe, parse_format
from flatout.core.fuse import Source, native_format, source_names
from flatout.core.quantized import QuantizedTensor
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
_CARRIERS: dict[str, tuple[str, ...]] = {
    "qkv": ("input_layernorm.weight",),
    "o": ("self_attn.v_proj.weight",),
    "gate_up": ("post_attention_layernorm.weight",),
    "down": ("mlp.up_proj.weight",),
}
_FED_BY = {"o": "qkv", "down": "gate_up"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Smoothed:
    """A Source that computes what `original` does, with other activations between its linears.

    columns: Hugging Face name -> float32 (K,) that multiplies the columns. rows: name -> float32 (N,) that
    divides the rows; of norms, the factors that are applied (the weight plus spec.norm_offset). A smoothed
    head is a tensor of its own, so `spec` then does not tie it to the embedding.
    """

    spec: ModelSpec
    original: Source
    columns: Mapping[str, np.ndarray]
    rows: Mapping[str, np.ndarray]

    def array(self, name: str) -> np.ndarray:
        array = self.original.array(name)
        if name in self.columns:
            array = array * self.columns[name]
        if name in self.rows:
            divisor = self.rows[name]
            if name.endswith("norm.weight"):
                offset = np.float32(self.spec.norm_offset)
                array = (array + offset) / divisor - offset
            else:
                array = array / (divisor[:, None] if array.ndim == 2 else divisor)
        return array

    def native(self, name: str) -> QuantizedTensor | None:
        rescaled = name in self.columns or name in self.rows
        return None if rescaled else self.original.native(name)


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


def relative_to(hidden: Tensor, inputs: Tensor) -> Tensor:
    """`inputs` (T, K) of o or down, each token divided by the size of its hidden state (T, D).

    What they add to a token is soon divided by that size in a norm, and so is their error; without this a
    few tokens with huge states outweigh all others.
    """
    size = hidden.square().mean(dim=1, keepdim=True).sqrt()
    return inputs / torch.clamp(size, min=1e-6)


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
def smooth(
    source: Source,
    recipe: Recipe,
    documents: Sequence[np.ndarray],
    progress: Progress | None = None,
) -> Smoothed:
    """`source` with the factors that suit `recipe`, fitted to `documents`, token ids, each a sequence of its
    own.

    Smoothed is every linear whose activations share one int8 scale a token, unless its weight, or the one
    its factors would go into, is taken from the file as stored. Of the documents, beginnings of 16 with
    2,048 tokens in all are used. Memory: one layer's float weights and these tokens' activations.
    progress(what, done, total) counts linears. Raises ConfigError when there is no text.
    """
    documents = [document for document in documents if len(document)]
    if not documents:
        raise ConfigError("smoothing needs calibration text", "none", "method rtn, or give token lists")
    spec = source.spec
    linears = [f"layers.{i}.{linear}" for i in range(spec.num_layers) for linear in spec.linears()] + ["head"]
    factors: dict[str, np.ndarray] = {}

    def see(name: str, inputs: Tensor, hidden: Tensor, weight: np.ndarray) -> None:
        if progress is not None:
            progress(f"smoothing {name}", linears.index(name), len(linears))
        if smoothable(source, recipe, name):
            factors[name] = factors_for(spec, name, inputs, hidden, weight)

    documents = [documents[i] for i in _evenly(len(documents), _DOCUMENTS)]
    documents = [document[: _TOKENS // len(documents)] for document in documents]
    linear_inputs(source, documents, see)
    return rescaled(source, factors)


def factors_for(spec: ModelSpec, name: str, inputs: Tensor, hidden: Tensor, weight: np.ndarray) -> np.ndarray:
    """The factors float32 (P,) of linear `name`, from a few of its inputs and rows."""
    inputs = relative_to(hidden, inputs) if name.endswith((".o", ".down")) else inputs
    rows = as_tensor(weight[_evenly(len(weight), _WEIGHT_ROWS)])
    return fit_factors(inputs[_evenly(len(inputs), _FITTED_TOKENS)], rows, owner_of(spec, name)).numpy()


def rescaled(source: Source, factors: Mapping[str, np.ndarray]) -> Smoothed:
    """`source` with `factors` (P,) by fused name moved into its weights."""
    spec = source.spec
    columns: dict[str, np.ndarray] = {}
    rows: dict[str, np.ndarray] = {}
    for name, of_linear in factors.items():
        parts = ("lm_head.weight",) if name == "head" else source_names(spec, name)
        columns.update(dict.fromkeys(parts, of_linear[owner_of(spec, name).numpy()]))
        rows.update(dict.fromkeys(_carriers(spec, name), of_linear))
    tied = spec.tie_embeddings and "head" not in factors
    return Smoothed(spec=replace(spec, tie_embeddings=tied), original=source, columns=columns, rows=rows)


def _format(recipe: Recipe, name: str) -> Format:
    if name == "head":
        return parse_format(recipe.head)
    _, layer, linear = name.split(".")
    return recipe.format_of(int(layer), linear)


def _is_rounded(source: Source, recipe: Recipe, name: str) -> bool:
    """Whether the integer weight is made by rounding and not taken from the file."""
    fmt = _format(recipe, name)
    return fmt.is_integer and not fmt.is_native and native_format(source, name) != fmt.name


def smoothable(source: Source, recipe: Recipe, name: str) -> bool:
    fmt = _format(recipe, name)
    if not fmt.scales_tokens or not _is_rounded(source, recipe, name):
        return False
    layer, _, linear = name.rpartition(".")
    if linear not in _FED_BY:
        return True
    before = f"{layer}.{_FED_BY[linear]}"
    return not _format(recipe, before).is_integer or _is_rounded(source, recipe, before)


def _carriers(spec: ModelSpec, name: str) -> tuple[str, ...]:
    """The tensors whose rows are divided by the factors of linear `name`."""
    if name == "head":
        return ("model.norm.weight",)
    _, layer, linear = name.split(".")
    suffixes = _CARRIERS[linear]
    if linear == "o" and spec.qkv_bias:
        suffixes = (*suffixes, "self_attn.v_proj.bias")
    return tuple(f"model.layers.{layer}.{suffix}" for suffix in suffixes)


def owner_of(spec: ModelSpec, name: str) -> Tensor:
    """The factor of each column (K,): its own, but o's columns share those of the value that heads read."""
    if name.endswith(".o"):
        values = torch.arange(spec.kv_size).reshape(spec.num_kv_heads, 1, spec.head_dim)
        return values.expand(-1, spec.num_heads // spec.num_kv_heads, -1).reshape(-1)
    return torch.arange(spec.linears()["down"][1] if name.endswith(".down") else spec.hidden_size)


def _evenly(count: int, most: int) -> np.ndarray:
    """At most `most` of 0..count-1, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))
