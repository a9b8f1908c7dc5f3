"""Weights as the GPU kernels read them: 32-bit words, laid out as kernels/triton/words.py unpacks them.

Formats of packed weights: "bf16", "fp8" (e4m3 with a float32 scale a row), "int8" and "int4" (with a scale a
row or a group, and where the format has a zero or a minimum, a float a group that is added). Everything here
is plain PyTorch, on whatever device the tensors are.

Legend: N output rows, K columns, G columns that share a scale (0: the whole row).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flatout.kernels.linear import FP8_MAX

PAIRS = {"bf16": 1, "fp8": 2, "int8": 2, "int4": 4}
"""Format -> pairs of weights in a 32-bit word."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """An (N, K) weight. words: int32 (N, K / (2 * pairs)). scales: None for bf16, float32 (N,) without
    groups, float16 or float32 (N, K / group) with them. minima: like scales, or None; w = scale * code +
    minimum, where codes of int4 count from -8."""

    format: str
    n: int
    k: int
    words: Tensor
    scales: Tensor | None = None
    minima: Tensor | None = None
    group: int = 0

    @property
    def bytes(self) -> int:
        parts = (self.words, self.scales, self.minima)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def pack_bf16(weight: Tensor) -> PackedWeight:
    """bfloat16 (N, K) as it is."""
    n, k = weight.shape
    return PackedWeight("bf16", n, k, weight.contiguous().view(torch.int32))


def pack_fp8(weight: Tensor) -> PackedWeight:
    """float (N, K) rounded to e4m3, a row's largest value at 448."""
    n, k = weight.shape
    scales = weight.float().abs().amax(dim=1).clamp(min=1e-12) / FP8_MAX
    codes = (weight.float() / scales[:, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return PackedWeight("fp8", n, k, pack_8bit(codes.view(torch.uint8)), scales)


def pack_8bit(codes: Tensor) -> Tensor:
    """Bytes (N, K) -> int32 words (N, K / 4), in order."""
    return codes.contiguous().view(torch.int32)


def unpack_8bit(words: Tensor) -> Tensor:
    """The inverse of `pack_8bit`: uint8 (N, K)."""
    return words.view(torch.uint8)


def pack_4bit(codes: Tensor) -> Tensor:
    """uint8 codes (N, K) below 16 -> int32 words (N, K / 8)."""
    n, k = codes.shape
    at = codes.reshape(n, k // 32, 4, 4, 2).to(torch.int32)  # pair j, word c, element e
    words = torch.zeros(n, k // 32, 4, dtype=torch.int32, device=codes.device)
    for j in range(4):
        for e in range(2):
            words |= at[:, :, j, :, e] << (4 * j + 16 * e)
    return words.reshape(n, k // 8)


def unpack_4bit(words: Tensor) -> Tensor:
    """The inverse of `pack_4bit`: uint8 (N, K)."""
    n = words.shape[0]
    at = words.reshape(n, -1, 4)
    pairs = [
        torch.stack([(at >> (4 * j + 16 * e)) & 15 for e in range(2)], dim=-1) for j in range(4)
    ]  # each (N, K / 32, 4, 2)
    return torch.stack(pairs, dim=2).to(torch.uint8).reshape(n, -1)


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight's values (N, K): what every kernel must multiply by."""
    n, k = weight.n, weight.k
    if weight.format == "bf16":
        return weight.words.view(torch.bfloat16).to(dtype)
    if weight.format == "fp8":
        codes = unpack_8bit(weight.words).view(torch.float8_e4m3fn).float()
    elif weight.format == "int8":
        codes = unpack_8bit(weight.words).view(torch.int8).float()
    else:
        codes = unpack_4bit(weight.words).float() - 8
    assert weight.scales is not None
    groups = k // weight.group if weight.group else 1
    values = codes.view(n, groups, -1) * weight.scales.float().view(n, groups, 1)
    if weight.minima is not None:
        values += weight.minima.float().view(n, groups, 1)
    return values.view(n, k).to(dtype)
