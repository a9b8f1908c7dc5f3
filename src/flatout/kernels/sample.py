"""Drawing tokens with PyTorch, as `engine/sampler.py` specifies it: whole batches, inside CUDA graphs."""

from __future__ import annotations

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits of int64 read as unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """float64 in [0, 1) of seeds (B,), int64 holding the bits of uint64, and positions (B,)."""
    x = seeds + (positions.long() + 1) * _GAMMA
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    x = x ^ _shifted(x, 31)
    return _shifted(x, 11).double() * 2.0**-53


def draw(
    logits: Tensor, positions: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seeds: Tensor
) -> Tensor:
    """int32 (B,): a token for each row of float32 logits (B, V), at `positions` (B,). Rows whose temperature
    is not positive get a token without meaning."""
    size = logits.shape[1]
    scaled = logits / torch.where(temperature > 0, temperature, 1.0)[:, None]
    ranked, order = torch.sort(scaled, dim=1, descending=True, stable=True)
    cumulative = torch.cumsum(torch.exp(ranked.double() - ranked[:, :1].double()), dim=1)
    kept = torch.where((top_k > 0) & (top_k < size), top_k, size).long()[:, None]
    ranks = torch.arange(size, device=logits.device)[None, :]
    total = cumulative.gather(1, kept - 1)
    below = (cumulative / total < top_p.double()[:, None]) & (ranks < kept)
    kept = torch.minimum(1 + below.sum(dim=1, keepdim=True), kept)
    threshold = uniform(seeds, positions)[:, None] * cumulative.gather(1, kept - 1)
    passed = ((cumulative <= threshold) & (ranks < kept)).sum(dim=1, keepdim=True)
    return order.gather(1, torch.minimum(passed, kept - 1))[:, 0].int()
