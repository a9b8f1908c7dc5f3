"""Llama-like decoders (Llama, Mistral, Qwen2, Qwen3, Gemma) as plain PyTorch functions: the specification.

One sequence at a time, float32 throughout. Two modes:

    exact      every weight dequantised to float32, keys and values kept as float32: what the numbers mean
    as served  linears in the numerics of their formats (kernels/linear.py), keys and values rounded as the
               recipe's KV cache stores them: what a runner computes. Fast kernels may round attention
               probabilities too.

Legend: T new tokens, S all tokens seen so far, D hidden size, H query heads, G key/value heads, E head size,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from flatout.core.formats import Recipe, parse_format
from flatout.core.fuse import Source, float_recipe, float_weight
from flatout.core.model import Model, Weight
from flatout.core.quantized import QuantizedTensor
from flatout.core.spec import ModelSpec
from flatout.errors import ConfigError
from flatout.kernels.linear import BYTE, FP8_MAX, NIBBLE, as_tensor, linear_reference, quantize_activations

Linear = Callable[[str, Tensor], Tensor]
"""linear("layers.3.qkv", x (T, K)) -> (T, N): how a model multiplies by one of its fused weights."""


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float = 0.0) -> Tensor:
    """x / rms(x) * (offset + weight) over the last dimension, with rms(x) = sqrt(mean(x^2) + epsilon)."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:], offset + weight, epsilon)


def rope_frequencies(spec: ModelSpec) -> Tensor:
    """Radians per position of each of the E/2 rotated pairs, float32, with Llama-3 scaling where the spec
    has it.

    Llama-3 scaling divides the frequencies whose wavelength exceeds the original context by `factor`,
    leaves short wavelengths alone and interpolates between (Llama 3.1 model card and reference code).
    """
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    frequencies = 1.0 / spec.rope_theta**exponents
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_positions / wavelengths
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = torch.clamp((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def rope_turns(spec: ModelSpec, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (T, 1, E/2), of position * frequency: the same for every layer."""
    angles = positions[:, None].float() * rope_frequencies(spec)[None, :]
    return angles.cos()[:, None, :], angles.sin()[:, None, :]


def rotate(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on x (T, heads, E): dimension e is paired with e + E/2 and turned by its angle."""
    cos, sin = turns
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """q (T, H, E) at `positions` over k, v (S, G, E) at positions 0..S-1 -> (T, H * E). Causal; query head
    h reads key head h // (H / G); with a window, keys at least `window` positions back are not seen."""
    tokens, heads, size = q.shape
    # Queries that are all there is, in no window's way, are what PyTorch's fused kernel takes.
    if tokens == k.shape[0] and (window is None or window >= tokens):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        read = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return read[0].transpose(0, 1).reshape(tokens, heads * size)
    repeat = heads // k.shape[1]
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    scores = torch.einsum("the,she->hts", q, k) / math.sqrt(size)
    distance = positions[:, None] - torch.arange(k.shape[0], device=positions.device)[None, :]
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    probabilities = torch.softmax(scores.masked_fill(hidden[None], -math.inf), dim=-1)
    return torch.einsum("hts,she->the", probabilities, v).reshape(tokens, heads * size)


def round_keys_or_values(x: Tensor, kv_cache: str) -> Tensor:
    """x (T, G, E) as a cache of the given format returns it; int8 and int4 have one scale per token and
    head, amax / 127 and amax / 7."""
    if kv_cache == "fp32":
        return x
    if kv_cache == "bf16":
        return x.bfloat16().float()
    if kv_cache == "fp8":
        return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()
    tokens, heads, size = x.shape
    limit = NIBBLE if kv_cache == "int4" else BYTE
    codes, scales = quantize_activations(x.reshape(tokens * heads, size), 0, limit)
    return (codes.float() * scales).reshape(tokens, heads, size)


class Cache:
    """Keys and values of one sequence. Runners with their own storage override `extend` and `length`;
    `attend` is all that a layer calls."""

    def __init__(self) -> None:
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self._keys[0].shape[0] if self._keys else 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (T, G, E), rounded already, to `layer` and return all of its keys and values (S, G,
        E)."""
        if layer in self._keys:
            k = torch.cat([self._keys[layer], k])
            v = torch.cat([self._values[layer], v])
        self._keys[layer], self._values[layer] = k, v
        return k, v

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None
    ) -> Tensor:
        """Append k, v (T, G, E) and return what q (T, H, E) at `positions` reads, (T, H * E)."""
        keys, values = self.extend(layer, k, v)
        return attention(q, keys, values, positions, window)


def decoder_layer(
    spec: ModelSpec,
    layer: int,
    x: Tensor,
    positions: Tensor,
    turns: tuple[Tensor, Tensor],
    *,
    linear: Linear,
    vector: Callable[[str], Tensor],
    cache: Cache,
    kv_cache: str = "fp32",
) -> Tensor:
    """One layer on x (T, D) at `positions` with their `rope_turns`. `vector` returns norms and biases by
    fused name."""
    p = f"layers.{layer}."
    tokens = x.shape[0]
    epsilon, offset = spec.rms_norm_eps, spec.norm_offset
    qkv = linear(p + "qkv", rms_norm(x, vector(p + "input_norm"), epsilon, offset))
    if spec.qkv_bias:
        qkv = qkv + vector(p + "qkv_bias")
    q, k, v = (
        part.reshape(tokens, -1, spec.head_dim)
        for part in torch.split(qkv, [spec.q_size, spec.kv_size, spec.kv_size], dim=1)
    )
    if spec.qk_norm:
        q, k = rms_norm(q, vector(p + "q_norm"), epsilon), rms_norm(k, vector(p + "k_norm"), epsilon)
    q, k = rotate(q, turns), rotate(k, turns)
    k, v = round_keys_or_values(k, kv_cache), round_keys_or_values(v, kv_cache)
    x = x + linear(p + "o", cache.attend(layer, q, k, v, positions, spec.sliding_window))

    gate_up = linear(p + "gate_up", rms_norm(x, vector(p + "post_norm"), epsilon, offset))
    gate, up = gate_up.chunk(2, dim=1)
    if spec.activation == "gelu_tanh":
        activated = torch.nn.functional.gelu(gate, approximate="tanh") * up
    else:
        activated = torch.nn.functional.silu(gate) * up
    return x + linear(p + "down", activated)


class Llama:
    """A Model or a Checkpoint ready to run.

    Llama(model, as_served=True).forward(tokens, cache). A Checkpoint runs exactly, as its dequantised
    weights say.
    """

    def __init__(self, source: Model | Source, as_served: bool = False) -> None:
        self.spec = source.spec
        self.as_served = as_served
        self._source = source
        self._cached: dict[str, QuantizedTensor | Tensor] = {}
        if isinstance(source, Model):
            self.recipe: Recipe = source.recipe
        elif as_served:
            raise ConfigError("only a Model says how it is served", "a checkpoint", "compress it first")
        else:
            self.recipe = float_recipe("fp32")
        self.kv_cache = self.recipe.kv_cache if as_served else "fp32"

    def _weight(self, name: str) -> QuantizedTensor | Tensor:
        weight = self._cached.get(name)
        if weight is None:
            found: Weight = (
                self._source.weights[name]
                if isinstance(self._source, Model)
                else float_weight(self._source, name)
            )
            if isinstance(found, QuantizedTensor) and not self.as_served:
                found = found.dequantize()
            weight = found if isinstance(found, QuantizedTensor) else as_tensor(found)
            self._cached[name] = weight
        return weight

    def _vector(self, name: str) -> Tensor:
        weight = self._weight(name)
        if isinstance(weight, QuantizedTensor):
            raise ConfigError("norms and biases are floats", name, "re-create the model")
        return weight

    def _linear(self, name: str, x: Tensor) -> Tensor:
        if not self.as_served:
            return x @ self._vector(name).T
        if name == "head":
            fmt = parse_format(self.recipe.head)
        else:
            _, layer, linear = name.split(".")
            fmt = self.recipe.format_of(int(layer), linear)
        return linear_reference(x, self._weight(name), fmt)

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings (T, D) of token ids (T,). Raises ConfigError for ids outside the vocabulary."""
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.spec.vocab_size:
            raise ConfigError(
                f"token ids are 0..{self.spec.vocab_size - 1}",
                f"{int(tokens.min())}..{int(tokens.max())}",
                "the model's own tokenizer",
            )
        table = self._weight("embedding")
        if isinstance(table, QuantizedTensor):
            x = torch.from_numpy(gather_rows(table, tokens.numpy()).dequantize())
        else:
            x = table[tokens]
        if self.as_served and self.recipe.embedding == "bf16":
            x = x.bfloat16().float()
        return x * self.spec.embedding_scale

    @torch.no_grad()
    def hidden(self, tokens: Sequence[int] | np.ndarray, cache: Cache | None = None) -> Tensor:
        """Hidden states (T, D) after the last norm of `tokens` (T,), which follow whatever `cache` holds."""
        ids = torch.tensor(np.asarray(tokens, dtype=np.int64))
        cache = Cache() if cache is None else cache
        start = cache.length
        positions = torch.arange(start, start + len(ids))
        turns = rope_turns(self.spec, positions)
        x = self.embed(ids)
        for layer in range(self.spec.num_layers):
            x = decoder_layer(
                self.spec,
                layer,
                x,
                positions,
                turns,
                linear=self._linear,
                vector=self._vector,
                cache=cache,
                kv_cache=self.kv_cache,
            )
        return rms_norm(x, self._vector("norm"), self.spec.rms_norm_eps, self.spec.norm_offset)

    @torch.no_grad()
    def forward(
        self, tokens: Sequence[int] | np.ndarray, cache: Cache | None = None, last_only: bool = False
    ) -> Tensor:
        """Logits float32 (T, V), or (1, V) of the last token only."""
        x = self.hidden(tokens, cache)
        return self.head(x[-1:] if last_only else x)

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits float32 (T, V) of hidden states (T, D)."""
        return self._linear("head", hidden)


def gather_rows(table: QuantizedTensor, rows: np.ndarray) -> QuantizedTensor:
    """The given rows of a quantised table (an embedding look-up before dequantisation)."""
    return QuantizedTensor(
        format=table.format,
        codes=table.codes[rows],
        scales=table.scales[rows],
        zeros=None if table.zeros is None else table.zeros[rows],
        minima=None if table.minima is None else table.minima[rows],
    )
