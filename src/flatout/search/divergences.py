"""Measured divergences: what rounding one kind of linear in many layers does to predictions.

KL(original || rounded) in nats a token, everything else exact. All variants pass the layers together, so that
no layer's weights stay in memory.

Legend: T tokens, N rows and K columns of a weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from flatout.compress.inputs import Documents, Text
from flatout.compress.library import Library
from flatout.compress.method import is_rounded
from flatout.compress.rtn import round_to_nearest
from flatout.core.formats import Format, parse_format
from flatout.core.fuse import Source, float_weight
from flatout.kernels.linear import BYTE, FIFTEEN_BITS, as_tensor, quantize_activations
from flatout.models.llama import decoder_layer, rms_norm, round_keys_or_values

Progress = Callable[[str, int, int], None]

SPREAD = ("w5a16", "w5a8", "w4a8-g32")
"""Formats in which what GPTQ leaves is measured, each in every second layer: weights decide there, and
coarser ones lose more than finer ones say."""


_OF_A_LAYER = 9  # four linears, up to four norms and a bias


def rounded_inputs(x: Tensor, fmt: Format) -> Tensor:
    """x (T, K) as a linear of `fmt` multiplies it."""
    if fmt.activation == "fp32":
        return x
    if fmt.activation == "bf16":
        return x.bfloat16().float()
    limit = BYTE if fmt.activation == "int8" else FIFTEEN_BITS
    codes, scales = quantize_activations(x, fmt.activation_group, limit)
    width = fmt.activation_group or x.shape[1]
    return codes.float() * scales.repeat_interleave(width, dim=1)


def float_weights(source: Source) -> Callable[[str], Tensor]:
    """name -> the weight (N, K) as float32; the latest are kept, as many as a layer has, and the vocabulary's
    for good. A tied head is the embedding."""
    tied = source.spec.tie_embeddings

    def read(name: str) -> Tensor:
        return as_tensor(float_weight(source, name))

    vocabulary, latest = functools.cache(read), functools.lru_cache(_OF_A_LAYER)(read)

    def weight(name: str) -> Tensor:
        if name in ("head", "embedding"):
            return vocabulary("embedding" if tied else name)
        return latest(name)

    return weight


def is_spread(library: Library, name: str, fmt: Format) -> bool:
    """Whether smooth-gptq rounds this weight by GPTQ: heads are rounded to nearest."""
    return name != "head" and is_rounded(library.source, name, fmt)


def is_measured(place: str, name: str) -> bool:
    """Whether what GPTQ leaves in this format is measured in the layer of `place`: the formats take turns."""
    return name in SPREAD and int(place.split(".")[1]) % 2 == SPREAD.index(name) % 2


class _RoundedCache(Documents):
    """Attention within documents whose keys and values are rounded as a cache of this format does."""

    def __init__(self, lengths: Sequence[int], format_name: str) -> None:
        super().__init__(lengths)
        self._format = format_name

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None
    ) -> Tensor:
        k, v = (round_keys_or_values(x, self._format) for x in (k, v))
        return super().attend(layer, q, k, v, positions, window)


@torch.no_grad()
def divergences(
    library: Library,
    documents: Sequence[Sequence[int]],
    kinds: Sequence[tuple[str, str]],
    progress: Progress | None = None,
    by_gptq: bool = False,
) -> dict[tuple[str, str], float]:
    """Measured KL(original || rounded) in nats a token of each (kind, format): a linear rounded to nearest in
    all layers at once, the head, or the cache, everything else exact. kind: qkv, o, gate_up, down, head or
    kv_cache. by_gptq: round linears as smooth-gptq does, in the layers that `is_measured` this format."""
    source = library.source
    spec = source.spec
    lengths = [len(document) for document in documents]
    text = Text(source, [np.asarray(document, dtype=np.int64) for document in documents])
    weight = float_weights(source)

    def linear(kind: str, format_name: str) -> Callable[[str, Tensor], Tensor]:
        def multiply(name: str, x: Tensor) -> Tensor:
            w = weight(name)
            if name.rpartition(".")[2] != kind or (by_gptq and not is_measured(name, format_name)):
                return x @ w.T
            fmt = parse_format(format_name)
            if fmt.scales_tokens:
                s = as_tensor(library.smoothing(name))
                x, w = x / s, w * s
            if is_rounded(source, name, fmt):
                rounded = (
                    library.rounded(name, fmt.scales_tokens, fmt)
                    if by_gptq
                    else round_to_nearest(w.numpy(), fmt)
                )
                w = as_tensor(rounded.dequantize())
            elif fmt.activation == "bf16":
                w = w.bfloat16().float()
            return rounded_inputs(x, fmt) @ w.T

        return multiply

    def log_probabilities(state: Tensor, kind: str, name: str) -> Tensor:
        normed = rms_norm(state, weight("norm"), spec.rms_norm_eps, spec.norm_offset)
        return torch.log_softmax(linear(kind, name)("head", normed), dim=1)

    variants = [("", ""), *kinds]
    states = [text.embed()] * len(variants)
    for layer in range(spec.num_layers):
        if progress is not None:
            progress("divergence", layer, spec.num_layers)
        for i, (kind, name) in enumerate(variants):
            cache = _RoundedCache(lengths, name) if kind == "kv_cache" else Documents(lengths)
            states[i] = decoder_layer(
                spec,
                layer,
                states[i],
                text.positions,
                text.turns,
                linear=linear(kind, name),
                vector=weight,
                cache=cache,
            )
    exact = log_probabilities(states[0], "", "")
    likely = exact.exp()
    return {
        (kind, name): float((likely * (exact - log_probabilities(state, kind, name))).sum() / sum(lengths))
        for (kind, name), state in zip(kinds, states[1:], strict=True)
    }
