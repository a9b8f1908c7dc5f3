"""What stands between the linears of a decoder, for any number of tokens: one program a token.

Inputs named `linear` are what a linear left, bfloat16 (T, N); where it multiplied in fp8, SCALED, its numbers
still lack the scales of its activations, `token_scales` (T,), and of its weight's rows, `row_scales` (N,).
Outputs go on in bfloat16 or, with FP8, in e4m3 with a scale a token.

Legend: T tokens, D hidden size, F intermediate size, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FP8_MAX = tl.constexpr(448.0)


@triton.jit
def _emit(out, out_scales, token, values, places, inside, D, FP8: tl.constexpr):
    """Store a token's values."""
    if FP8:
        most = tl.maximum(tl.max(tl.abs(values), 0), 1e-12)
        tl.store(out_scales + token, most / FP8_MAX)
        values = tl.clamp(values * (FP8_MAX / most), -FP8_MAX, FP8_MAX)
    tl.store(out + token.to(tl.int64) * D + places, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def embed(tokens, table, x, x_bf16, D, factor, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """x (T, D) float32, and in bfloat16, = factor * rows `tokens` of table (V, D) bfloat16."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.maximum(tl.load(tokens + token), 0).to(tl.int64)  # -1 marks a token that could not be chosen
    values = tl.load(table + row * D + places, mask=places < D, other=0.0).to(tl.float32) * factor
    tl.store(x + token.to(tl.int64) * D + places, values, mask=places < D)
    tl.store(x_bf16 + token.to(tl.int64) * D + places, values.to(tl.bfloat16), mask=places < D)


@triton.jit
def add_norm(
    x,  # float32 (T, D): the residual stream, overwritten if ADD
    linear,  # bfloat16 (T, D), if ADD
    token_scales,
    row_scales,
    gains,  # bfloat16 (D,)
    out,  # bfloat16 or e4m3 (T, D)
    out_scales,  # float32 (T,), if FP8
    D,
    eps,
    ADD: tl.constexpr,
    SCALED: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """x += linear; out = x / rms(x) * gains."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0)
    row = token.to(tl.int64) * D
    places = tl.arange(0, BLOCK)
    inside = places < D
    values = tl.load(x + row + places, mask=inside, other=0.0)
    if ADD:
        more = tl.load(linear + row + places, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            more *= tl.load(token_scales + token) * tl.load(row_scales + places, mask=inside, other=0.0)
        values += more
        tl.store(x + row + places, values, mask=inside)
    rms = tl.rsqrt(tl.sum(values * values, 0) / D + eps)
    values = values * rms * tl.load(gains + places, mask=inside, other=0.0).to(tl.float32)
    _emit(out, out_scales, token, values, places, inside, D, FP8)


@triton.jit
def activate(
    linear,  # bfloat16 (T, 2 F): gate and up in turn
    token_scales,
    row_scales,
    out,  # bfloat16 or e4m3 (T, F)
    out_scales,
    F,
    GELU: tl.constexpr,
    SCALED: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = silu(gate) * up, or with GELU gelu_tanh(gate) * up."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0)
    row = token.to(tl.int64) * (2 * F)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < F
    both = 2 * places[:, None] + tl.arange(0, 2)[None, :]
    values = tl.load(linear + row + both, mask=inside[:, None], other=0.0).to(tl.float32)
    if SCALED:
        values *= tl.load(token_scales + token) * tl.load(row_scales + both, mask=inside[:, None], other=0.0)
    gate, up = tl.split(values)
    if GELU:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        values = gate * up / (1.0 + tl.exp(-2.0 * inner))
    else:
        values = gate * up / (1.0 + tl.exp(-gate))
    _emit(out, out_scales, token, values, places, inside, F, FP8)


@triton.jit
def quantize(
    x,
    out,
    out_scales,
    D,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """x bfloat16 (T, D) as e4m3 with a scale a token."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0)
    places = tl.arange(0, BLOCK)
    inside = places < D
    values = tl.load(x + token.to(tl.int64) * D + places, mask=inside, other=0.0).to(tl.float32)
    _emit(out, out_scales, token, values, places, inside, D, True)
