"""Linear layers of every format: the PyTorch reference that fast kernels must match.

    y[t, n] = sum over k of x[t, k] * w[n, k]

Integer formats round each token's activations to integers a, form exact int32 sums a group, and join the
groups in order in float32 with one fused multiply-add each:

    acc = fmaf(float(idot[g]), a_scale[g] * w_scale[n, g], acc)            every format
    acc = fmaf(a_scale[g] * float(asum[g]), minimum[n, g], acc)            after it, "minimum" formats

where idot[g] = sum of a[k] * (code[n, k] - zero[n, g]) and asum[g] = sum of a[k]. "int8" activations have 8
bits and a scale a group or a token. "int16" activations have 15 bits and a scale a token; they are
multiplied in two planes of bytes, a = 128 * high + low with low in [-64, 63]: first high, with a scale 128
times as large, then low. The result of a token does not depend on batch, chunk or thread count, and a
kernel can be compared bit by bit. Float formats ("bf16", "fp8", "fp32") are plain matrix products
accumulated in float32, whose summation order is free.

Legend: T tokens, K input width, N output width, g index of a group along K.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flatout.core.formats import Format
from flatout.core.quantized import QuantizedTensor
from flatout.errors import ConfigError

FP8_MAX = 448.0
NIBBLE, BYTE, FIFTEEN_BITS = 7, 127, 127 * 128
"""Largest codes of an int4 KV cache, and of "int8" and "int16" activations."""
_EXACT_FLOAT32_WIDTH = 512  # 512 * 127 * 255 < 2**24: float32 holds every partial sum of a group exactly


def as_tensor(array: np.ndarray | Tensor) -> Tensor:
    """`array` as a tensor, shared where it is writable and copied where it is not (memory-mapped files)."""
    if isinstance(array, Tensor):
        return array
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def quantize_activations(x: Tensor, group: int, limit: int = BYTE) -> tuple[Tensor, Tensor]:
    """Round float32 x (T, K) to (codes (T, K), scales float32 (T, K // group)); group 0 is the whole token.

    scale = amax / limit and code = clamp(round_to_even(x * (limit / amax)), -limit, limit), all in float32.
    Codes are int8 where they fit and int16 otherwise.
    """
    tokens, k = x.shape
    grouped = x.float().reshape(tokens, -1, group or k)
    amax = grouped.abs().amax(dim=2)
    # A division by tensors: `limit / amax` would multiply by a rounded reciprocal.
    inverse = torch.where(amax > 0, torch.full_like(amax, limit) / amax, torch.zeros_like(amax))
    codes = torch.clamp(torch.round(grouped * inverse[:, :, None]), -limit, limit)
    return codes.to(torch.int8 if limit <= BYTE else torch.int16).reshape(tokens, k), amax / limit


def split_planes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """15-bit codes (T, K) as (high, low) int8 with codes = 128 * high + low and low in [-64, 63]."""
    high = (codes.int() + 64) >> 7
    return high.to(torch.int8), (codes.int() - 128 * high).to(torch.int8)


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """float32 a * b + c rounded once, as C's fmaf: the product is exact in float64, and the sum is rounded
    to odd before it is rounded to float32, which makes the second rounding harmless (Boldo and Melquiond,
    2008)."""
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.contiguous().view(torch.int64)
    step = torch.where((error > 0) == (total > 0), 1, -1)
    inexact_and_even = (error != 0) & (bits & 1 == 0)
    return torch.where(inexact_and_even, bits + step, bits).view(torch.float64).float()


def integer_linear(codes: Tensor, scales: Tensor, weight: QuantizedTensor) -> Tensor:
    """y (T, N) of activation codes (T, K), int8 or int16, and scales (T, 1 or groups) times `weight`, as the
    kernels round it."""
    n, k = weight.shape
    groups = weight.format.groups(k)
    width = k // groups
    exact = torch.float32 if width <= _EXACT_FLOAT32_WIDTH else torch.float64
    w_scales = as_tensor(weight.scales).float()
    planes = [(codes, 1.0)]
    if codes.dtype == torch.int16:
        high, low = split_planes(codes)
        planes = [(high, 128.0), (low, 1.0)]
    y = torch.zeros(codes.shape[0], n)
    for g in range(groups):
        columns = slice(g * width, (g + 1) * width)
        w = as_tensor(weight.codes[:, columns]).to(exact)
        if weight.zeros is not None:
            w = w - as_tensor(weight.zeros)[:, g, None].to(exact)
        w = w - weight.integer_zero
        a_scale = scales[:, min(g, scales.shape[1] - 1), None]
        for plane, factor in planes:
            dot = (plane[:, columns].to(exact) @ w.T).float()
            y = fused_multiply_add(dot, a_scale * w_scales[None, :, g] * factor, y)
        if weight.minima is not None:
            total = codes[:, columns].sum(dim=1, keepdim=True).float()
            y = fused_multiply_add(a_scale * total, as_tensor(weight.minima)[None, :, g].float(), y)
    return y


def round_to_fp8(weight: Tensor) -> Tensor:
    """float (N, K) in e4m3 with a scale a row that puts its largest value at 448, as float32 again."""
    scales = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    codes = (weight.float() / scales).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes.float() * scales


def linear_reference(x: Tensor, weight: QuantizedTensor | np.ndarray | Tensor, fmt: Format) -> Tensor:
    """y (T, N) = x (T, K) times weight (N, K) transposed, in the numerics of `fmt`; float32 in and out.

    Raises ConfigError when the weight is not in `fmt`.
    """
    if isinstance(weight, QuantizedTensor) != fmt.is_integer or (
        isinstance(weight, QuantizedTensor) and weight.format != fmt
    ):
        found = weight.format.name if isinstance(weight, QuantizedTensor) else "a float array"
        raise ConfigError(f"the weight must be in format {fmt.name}", found, "the recipe's own format")
    if isinstance(weight, QuantizedTensor):
        limit = BYTE if fmt.activation == "int8" else FIFTEEN_BITS
        codes, scales = quantize_activations(x, fmt.activation_group, limit)
        return integer_linear(codes, scales, weight)
    w = weight if isinstance(weight, Tensor) else as_tensor(weight)
    if fmt.name == "fp8":
        return x.bfloat16().float() @ round_to_fp8(w).T
    if fmt.activation == "bf16":
        return x.bfloat16().float() @ w.bfloat16().float().T
    return x.float() @ w.float().T
