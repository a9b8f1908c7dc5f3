"""Attention of a step that is launched kernel by kernel: prompts beside single tokens, of any lengths.

Legend: T tokens, S sequences, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flatout.engine.cuda_weights import LayerWeights
from flatout.engine.runner import StepInput
from flatout.kernels import gpu_attention
from flatout.kernels.gpu import Activations, Product
from flatout.kernels.gpu_attention import LayerCache

if TYPE_CHECKING:
    from flatout.engine.cuda import CudaRunner


class StepAttention:
    """Attention of a step's sequences; `tokens` int32 (T,) are theirs, `last_rows` int64 (S,) the places of
    their last ones."""

    def __init__(self, runner: CudaRunner, batch: StepInput) -> None:
        self._runner, page = runner, runner.page_size
        lengths, starts = batch.lengths.astype(np.int64), batch.starts.astype(np.int64)
        of = np.repeat(np.arange(len(lengths)), lengths)
        first, ends = np.cumsum(lengths) - lengths, starts + lengths
        positions = starts[of] + np.arange(len(of)) - first[of]
        slots = batch.pages[of, positions // page].astype(np.int64) * page + positions % page
        one, more, pages = lengths == 1, np.flatnonzero(lengths > 1), np.maximum(batch.pages, 0)
        others = ~one[of]
        own = [pages[i, : -(-int(ends[i]) // page)] for i in more]

        wide = [first + lengths - 1, first[one], np.flatnonzero(others), slots[others], *own]
        self.last_rows, ones, rest, self._slots, *own_pages = _brought(wide, np.int64, runner.device)
        self._one: Tensor | None = ones if one.any() else None
        self._others: Tensor | None = rest if one.any() else None
        narrow = [batch.tokens, positions[others], ends - 1, pages, starts[one], pages[one]]
        self.tokens, self._positions, *rows = _brought(narrow, np.int32, runner.device)
        self._last_positions, self._pages, self._one_positions, self._one_pages = rows
        self._prompts = [
            (int(starts[i]), int(lengths[i]), its) for i, its in zip(more, own_pages, strict=True)
        ]
        self._plans: dict[int, gpu_attention.AttentionPlan] = {}

    def __call__(self, product: Product, layer: LayerWeights, cache: LayerCache) -> Activations:
        return Activations(self._read(product, layer.heads, cache))

    def last(self, product: Product, layer: LayerWeights, cache: LayerCache) -> Activations:
        """What the last token of each sequence reads; keys and values of all are kept."""
        if self._prompts:
            self._rotated(product if self._others is None else product.rows(self._others), layer.heads, cache)
        product = product.rows(self.last_rows)
        return Activations(self._decode(product, layer.heads, cache, self._pages, self._last_positions))

    def _read(self, product: Product, heads: gpu_attention.HeadWeights, cache: LayerCache) -> Tensor:
        """bfloat16 (T, H E)."""
        if not self._prompts:
            return self._decode(product, heads, cache, self._one_pages, self._one_positions)
        if self._one is None or self._others is None:
            return self._prefill(product, heads, cache)
        out = torch.empty(
            len(self.tokens), self._runner.spec.q_size, dtype=torch.bfloat16, device=self._runner.device
        )
        out[self._others] = self._prefill(product.rows(self._others), heads, cache)
        one = product.rows(self._one)
        out[self._one] = self._decode(one, heads, cache, self._one_pages, self._one_positions)
        return out

    def _decode(
        self,
        product: Product,
        heads: gpu_attention.HeadWeights,
        cache: LayerCache,
        pages: Tensor,
        positions: Tensor,
    ) -> Tensor:
        """bfloat16 (rows, H E) of one token a sequence."""
        runner, rows = self._runner, product.tokens
        if rows not in self._plans:
            self._plans[rows] = gpu_attention.attention_plan(runner.card, runner.spec, rows, runner.device)
        out = torch.empty(rows, runner.spec.q_size, dtype=torch.bfloat16, device=runner.device)
        gpu_attention.decode_attention(
            runner.card, runner.spec, product, heads, runner.turns, cache, pages, positions,
            self._plans[rows], Activations(out),
        )  # fmt: skip
        return out

    def _rotated(self, product: Product, heads: gpu_attention.HeadWeights, cache: LayerCache) -> Tensor:
        """bfloat16 (T, (H + 2 G) E) of the sequences with more than one token; their keys and values are
        kept."""
        runner = self._runner
        return gpu_attention.rotate_and_store(
            runner.card, runner.spec, product, heads, runner.turns, cache, self._slots, self._positions
        )

    def _prefill(self, product: Product, heads: gpu_attention.HeadWeights, cache: LayerCache) -> Tensor:
        card, spec = self._runner.card, self._runner.spec
        qkv = self._rotated(product, heads, cache)
        found, first = [], 0
        for start, length, pages in self._prompts:
            own = slice(first, first + length)
            rows, queries = qkv[own].view(length, -1, spec.head_dim), spec.num_heads
            q, k, v = rows[:, :queries], rows[:, queries : -spec.num_kv_heads], rows[:, -spec.num_kv_heads :]
            if start:
                k, v = (_gathered(part, pages, start + length) for part in (cache.keys, cache.values))
            found.append(gpu_attention.causal_attention(card, q, k, v, spec.sliding_window))
            first += length
        return found[0] if len(found) == 1 else torch.cat(found)


def _brought(arrays: list[np.ndarray], dtype: type, device: torch.device) -> list[Tensor]:
    """`arrays` on the device, by one copy: each takes 20 us in which nothing else is launched."""
    step = 64  # kernels are compiled for aligned addresses
    sizes = [-(-array.size // step) * step for array in arrays]
    places = np.cumsum([0, *sizes])
    flat: np.ndarray = np.zeros(places[-1], dtype)
    for place, array in zip(places, arrays, strict=False):
        flat[place : place + array.size] = array.ravel()
    there = torch.from_numpy(flat).to(device)
    return [
        there[place : place + array.size].view(array.shape)
        for place, array in zip(places.tolist(), arrays, strict=False)
    ]


def _gathered(cache: Tensor, pages: Tensor, tokens: int) -> Tensor:
    """bfloat16 (tokens, G, E) of the pages (P,) of one sequence."""
    raw = cache.view(torch.uint8)[pages].view(cache.dtype).bfloat16()
    return raw.transpose(1, 2).reshape(-1, cache.shape[1], cache.shape[3])[:tokens]
