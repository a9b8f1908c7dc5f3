"""BERT encoders as plain PyTorch functions: the specification. One sequence at a time, float32 throughout.

Two modes, as in models/llama.py: exact (weights dequantised, nothing else rounded), and as served (linears in
the numerics of their format, keys and values rounded as the CPU runner keeps them within a layer). Legend: T
tokens, D hidden size, H heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flatout.core.encoder import EncoderModel, EncoderSpec
from flatout.core.model import dense
from flatout.kernels.linear import as_tensor, linear_reference
from flatout.models.llama import round_keys_or_values


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v of q, k, v (T, H, E): every token sees every token -> (T, H * E)."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    read = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return read.transpose(0, 1).flatten(1)


class Bert:
    """An EncoderModel ready to run; also an engine.encoder.EncoderRunner."""

    def __init__(self, model: EncoderModel, as_served: bool = False) -> None:
        self.spec: EncoderSpec = model.spec
        self.name = f"reference ({'as served' if as_served else 'exact'})"
        self._model, self._as_served = model, as_served
        self._kv_cache = model.kv_cache if as_served else "fp32"
        self._floats: dict[str, Tensor] = {}

    def _vector(self, name: str) -> Tensor:
        """Weight `name` as float32; kept, since a dequantised one is made anew each time."""
        if name not in self._floats:
            self._floats[name] = as_tensor(dense(self._model.weights[name]))
        return self._floats[name]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        if (factors := self._model.factors.get(name)) is not None:
            x = x * as_tensor(factors)
        if not self._as_served:
            return x @ self._vector(name).T + self._vector(f"{name}_bias")
        product = linear_reference(x, self._model.weights[name], self._model.formats.at(name))
        return product + self._vector(f"{name}_bias")

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._vector(name), self._vector(f"{name}_bias")
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, self.spec.layer_norm_eps)

    def hidden(self, tokens: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """States (T, D) after the last norm of token ids (T,): of one sequence, or of several of `lengths`
        that lie one behind the other."""
        sizes = [len(tokens)] if lengths is None else list(lengths)
        words = self._vector("embedding")[tokens]
        if self._as_served and self._model.formats.usual != "fp32":
            words = words.bfloat16().float()
        places = torch.cat([torch.arange(size) for size in sizes])
        x = self._norm("embedding_norm", words + self._vector("positions")[places])
        for i in range(self.spec.num_layers):
            p = f"layers.{i}."
            qkv = self._linear(p + "qkv", x).reshape(len(tokens), 3, self.spec.num_heads, -1)
            k, v = (round_keys_or_values(qkv[:, j], self._kv_cache) for j in (1, 2))
            each = zip(*(torch.split(part, sizes) for part in (qkv[:, 0], k, v)), strict=True)
            read = torch.cat([attention(*one) for one in each])
            x = self._norm(p + "attention_norm", x + self._linear(p + "o", read))
            up = torch.nn.functional.gelu(self._linear(p + "up", x))
            x = self._norm(p + "output_norm", x + self._linear(p + "down", up))
        return x

    @torch.no_grad()
    def forward(self, tokens: np.ndarray, starts: np.ndarray, pooling: str, normalize: bool) -> np.ndarray:
        """As engine.encoder.EncoderRunner says."""
        ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
        states = [self.hidden(part) for part in torch.tensor_split(ids, starts[1:].tolist())]
        if pooling == "none":
            return torch.cat(states).numpy()
        pooled = torch.stack([x.mean(0) if pooling == "mean" else x[0] for x in states])
        return (torch.nn.functional.normalize(pooled, dim=1) if normalize else pooled).numpy()
