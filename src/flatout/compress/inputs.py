"""What every linear of a model receives when calibration text passes through it.

Layer by layer: one layer's float weights and the text's activations are in memory at a time, about 4 bytes x
tokens x (3 x intermediate size + hidden size).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from flatout.core.fuse import Source, float_weight
from flatout.kernels.linear import as_tensor
from flatout.models.llama import Cache, Llama, attention, decoder_layer, rms_norm, rope_turns

See = Callable[[str, Tensor, Tensor, np.ndarray], None]
"""see(name, inputs (T, K), hidden (T, D), weight (N, K)): hidden is the state that the layer started from."""


class Documents(Cache):
    """Attention within each of several documents that lie one after the other. Nothing is kept."""

    def __init__(self, lengths: Sequence[int]) -> None:
        super().__init__()
        self._lengths = list(lengths)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None
    ) -> Tensor:
        read, start = [], 0
        for length in self._lengths:
            own = slice(start, start + length)
            read.append(attention(q[own], k[own], v[own], positions[own], window))
            start += length
        return torch.cat(read)


@torch.no_grad()
def linear_inputs(source: Source, documents: Sequence[np.ndarray], see: See) -> None:
    """Call `see` for every fused linear of `source` in execution order and then for the head, with what it
    receives from `documents`: token ids, each a sequence of its own that lies behind the one before. Weights
    are used as they are."""
    spec = source.spec
    cache = Documents([len(document) for document in documents])
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    turns = rope_turns(spec, positions)
    x = Llama(source).embed(torch.from_numpy(np.concatenate(documents).astype(np.int64)))

    def vector(name: str) -> Tensor:
        return as_tensor(float_weight(source, name))

    def linear(name: str, inputs: Tensor) -> Tensor:
        weight = float_weight(source, name)
        see(name, inputs, x, weight)
        return inputs @ as_tensor(weight).T

    for layer in range(spec.num_layers):
        x = decoder_layer(spec, layer, x, positions, turns, linear=linear, vector=vector, cache=cache)
    normed = rms_norm(x, vector("norm"), spec.rms_norm_eps, spec.norm_offset)
    see("head", normed, x, float_weight(source, "head"))
