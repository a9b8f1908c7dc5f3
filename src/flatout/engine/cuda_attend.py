"""Attention of a step that is launched kernel by kernel: prompts beside single tokens, of any lengths.

Legend: T tokens, S sequences, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

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


class _Places(NamedTuple):
    """Where a step's tokens stand: of all sequences, of those with one new token, and of the others.

    last_rows int64 (S,), each one's last token in the step, last_positions int32 (S,), pages int32 (S, P);
    one_rows, one_positions and one_pages likewise. rows int64, the tokens of the others; slots int64, page
    * page size + place, and positions int32 of each. prompts: (tokens before, tokens, pages) of each."""

    last_rows: Tensor
    last_positions: Tensor
    pages: Tensor
    one_rows: Tensor
    one_positions: Tensor
    one_pages: Tensor
    rows: Tensor
    slots: Tensor
    positions: Tensor
    prompts: list[tuple[int, int, Tensor]]


def _places(batch: StepInput, page_size: int, device: torch.device) -> _Places:
    lengths, starts = batch.lengths.astype(np.int64), batch.starts.astype(np.int64)
    of = np.repeat(np.arange(len(lengths)), lengths)
    first, ends = np.cumsum(lengths) - lengths, starts + lengths
    one, more, pages = lengths == 1, np.flatnonzero(lengths > 1), np.maximum(batch.pages, 0)
    rows = np.flatnonzero(~one[of])
    positions = (starts[of] + np.arange(len(of)) - first[of])[rows]
    slots = batch.pages[of[rows], positions // page_size].astype(np.int64) * page_size + positions % page_size
    own = [pages[i, : -(-int(ends[i]) // page_size)] for i in more]
    wide = [first + lengths - 1, first[one], rows, slots, *own]
    last_rows, one_rows, own_rows, own_slots, *own_pages = brought(wide, np.int64, device)
    narrow = [ends - 1, pages, starts[one], pages[one], positions]
    last_positions, all_pages, one_positions, one_pages, own_positions = brought(narrow, np.int32, device)
    prompts = [(int(starts[i]), int(lengths[i]), its) for i, its in zip(more, own_pages, strict=True)]
    return _Places(
        last_rows, last_positions, all_pages, one_rows, one_positions, one_pages, own_rows, own_slots,
        own_positions, prompts,
    )  # fmt: skip


class StepAttention:
    """Attention of a step's sequences, whatever their lengths. What it needs on the GPU is brought there when
    it is first asked, while the GPU has work."""

    def __init__(self, runner: CudaRunner, batch: StepInput) -> None:
        self._runner, self._batch = runner, batch
        self._plans: dict[int, gpu_attention.AttentionPlan] = {}

    @cached_property
    def _at(self) -> _Places:
        return _places(self._batch, self._runner.page_size, self._runner.device)

    @property
    def last_rows(self) -> Tensor:
        """int64 (S,): the last token of each sequence."""
        return self._at.last_rows

    def __call__(self, product: Product, layer: LayerWeights, cache: LayerCache) -> Activations:
        return Activations(self._read(product, layer.heads, cache))

    def last(self, product: Product, layer: LayerWeights, cache: LayerCache) -> Activations:
        """What the last token of each sequence reads; keys and values of all are kept."""
        at = self._at
        if at.prompts:
            self._rotated(product.rows(at.rows) if len(at.one_rows) else product, layer.heads, cache)
        product = product.rows(at.last_rows)
        return Activations(self._decode(product, layer.heads, cache, at.pages, at.last_positions))

    def _read(self, product: Product, heads: gpu_attention.HeadWeights, cache: LayerCache) -> Tensor:
        """bfloat16 (T, H E)."""
        at = self._at
        if not at.prompts:
            return self._decode(product, heads, cache, at.one_pages, at.one_positions)
        if not len(at.one_rows):
            return self._prefill(product, heads, cache)
        shape = product.tokens, self._runner.spec.q_size
        out = torch.empty(shape, dtype=torch.bfloat16, device=self._runner.device)
        out[at.rows] = self._prefill(product.rows(at.rows), heads, cache)
        one = product.rows(at.one_rows)
        out[at.one_rows] = self._decode(one, heads, cache, at.one_pages, at.one_positions)
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
            runner.card, runner.spec, product, heads, runner.turns, cache, self._at.slots, self._at.positions
        )

    def _prefill(self, product: Product, heads: gpu_attention.HeadWeights, cache: LayerCache) -> Tensor:
        card, spec = self._runner.card, self._runner.spec
        qkv = self._rotated(product, heads, cache)
        found, first = [], 0
        for start, length, pages in self._at.prompts:
            own = slice(first, first + length)
            rows, queries = qkv[own].view(length, -1, spec.head_dim), spec.num_heads
            q, k, v = rows[:, :queries], rows[:, queries : -spec.num_kv_heads], rows[:, -spec.num_kv_heads :]
            if start:
                k, v = (gathered(part, pages, start + length) for part in (cache.keys, cache.values))
            found.append(gpu_attention.causal_attention(card, q, k, v, spec.sliding_window))
            first += length
        return found[0] if len(found) == 1 else torch.cat(found)


def brought(arrays: list[np.ndarray], dtype: type, device: torch.device) -> list[Tensor]:
    """`arrays` on the device, by one copy that waits for nothing."""
    step = 64  # kernels are compiled for aligned addresses
    sizes = [-(-array.size // step) * step for array in arrays]
    places = [sum(sizes[:i]) for i in range(len(sizes))]
    flat = torch.from_numpy(np.zeros(sum(sizes), dtype))
    if device.type == "cuda":
        flat = flat.pin_memory()
    for place, array in zip(places, arrays, strict=True):
        flat.numpy()[place : place + array.size] = array.ravel()
    there = flat.to(device, non_blocking=True)
    return [
        there[place : place + array.size].view(array.shape)
        for place, array in zip(places, arrays, strict=True)
    ]


def gathered(cache: Tensor, pages: Tensor, tokens: int) -> Tensor:
    """bfloat16 (tokens, G, E), a token's heads in one piece, of the pages (P,) of one sequence."""
    raw = cache.view(torch.uint8)[pages].view(cache.dtype).bfloat16()
    return raw.transpose(1, 2).contiguous().view(-1, cache.shape[1], cache.shape[3])[:tokens]
