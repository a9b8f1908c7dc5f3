"""Text that a teacher writes: what a student of it can be trained on where other text is short.

Tokens are drawn from the teacher's own distribution, so that its predictions for them are those that a
student is to have most often. All sequences of a round go on together, a token a step, their keys and values
in bfloat16. A token that ends a text is never drawn, so that every row is one document.

Legend: B rows, T tokens of a row, D hidden size, H, G query and key/value heads, E head size.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flatout.models.llama import Cache, decoder_layer, rms_norm, rope_turns
from flatout.train.data import Packed
from flatout.train.trainable import Trainable


class _Together(Cache):
    """Keys and values of B sequences of one length, as (B, G, T, E) a layer. at: the place of the token that
    is being added."""

    def __init__(self, teacher: Trainable, rows: int, length: int) -> None:
        super().__init__()
        spec, device = teacher.spec, teacher.weight("embedding").device
        shape = (spec.num_layers, rows, spec.num_kv_heads, length, spec.head_dim)
        self.keys = torch.empty(shape, dtype=torch.bfloat16, device=device)
        self.values = torch.empty_like(self.keys)
        self.at = 0

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None
    ) -> Tensor:
        """What the newest token of each sequence, q (B, H, E), reads. Heads that read one key/value head are
        its queries."""
        keys, values, seen = self.keys[layer], self.values[layer], self.at + 1
        keys[:, :, self.at], values[:, :, self.at] = k, v
        queries = q.reshape(len(q), k.shape[1], -1, q.shape[2]).to(keys.dtype)
        read = scaled_dot_product_attention(queries, keys[:, :, :seen], values[:, :, :seen])
        return read.reshape(len(q), -1)


@torch.no_grad()
def continued(teacher: Trainable, prompts: Tensor, length: int, seed: int) -> Tensor:
    """`prompts` int64 (B, P), continued to `length` tokens each, (B, length)."""
    spec, device = teacher.spec, prompts.device
    table, last = teacher.weight("embedding"), teacher.weight("norm")
    small = {
        name: weight.bfloat16()
        for name, weight in teacher.fixed.items()
        if weight.ndim == 2 and name != "embedding"
    }
    small.setdefault("head", table.bfloat16())
    ends = torch.tensor(spec.eos_token_ids, dtype=torch.int64, device=device)
    cos, sin = (turn.to(device) for turn in rope_turns(spec, torch.arange(length)))
    cache = _Together(teacher, len(prompts), length)
    tokens = torch.empty(len(prompts), length, dtype=torch.int64, device=device)
    tokens[:, : prompts.shape[1]] = prompts
    draw = torch.Generator(device).manual_seed(seed)

    def linear(name: str, x: Tensor) -> Tensor:
        return x.bfloat16() @ small[name].T

    for at in range(length - 1):
        cache.at = at
        x = table[tokens[:, at]] * spec.embedding_scale
        turns, here = (cos[at], sin[at]), torch.tensor([at])
        for layer in range(spec.num_layers):
            x = decoder_layer(spec, layer, x, here, turns, linear=linear, vector=teacher.weight, cache=cache)
        if at + 1 < prompts.shape[1]:
            continue
        logits = linear("head", rms_norm(x, last, spec.rms_norm_eps, spec.norm_offset)).float()
        logits[:, ends] = -torch.inf
        waits = torch.empty_like(logits).exponential_(generator=draw)  # the least wait has p = softmax
        tokens[:, at + 1] = (logits.softmax(dim=1) / waits).argmax(dim=1)
    return tokens


def continuations(
    teacher: Trainable,
    text: np.ndarray,
    seconds: float,
    *,
    length: int,
    prompt: int,
    rows: int,
) -> Packed:
    """Rows of `length` + 1 tokens that begin with `prompt` tokens from random places of `text`, int (N,), in
    rounds of `rows` until `seconds` are over."""
    device = teacher.weight("embedding").device
    places, rounds = np.random.default_rng(0), []
    start = time.perf_counter()
    while not rounds or (time.perf_counter() - start) * (1 + 1 / len(rounds)) < seconds:
        at = places.integers(0, len(text) - prompt, rows)
        begins = torch.from_numpy(text[at[:, None] + np.arange(prompt)].astype(np.int64)).to(device)
        rounds.append(continued(teacher, begins, length + 1, len(rounds)).cpu().numpy())
    tokens = np.concatenate(rounds).astype(np.int32)
    return Packed(tokens=tokens, documents=np.zeros_like(tokens))
