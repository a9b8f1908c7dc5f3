"""What stands between the linears of a decoder, for any number of tokens: one program a token.

Inputs named `linear` are what a linear left: bfloat16 (T, N), or parts (S, T, N) to be added up, as CUT says
(`joined`). Where the vendor's library multiplied in fp8, SCALED, the numbers still lack the scales of the
activations, `token_scales` (T,), and of the weight's rows, `row_scales` (N,). Outputs go on in bfloat16 or,
with FP8, in e4m3 with a scale a token.

Legend: T tokens, D hidden size, F intermediate size, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FP8_MAX = tl.constexpr(448.0)


@triton.jit
def gated(gate, up, GELU: tl.constexpr):
    """silu(gate) * up, or gelu_tanh(gate) * up."""
    if GELU:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate * up / (1.0 + tl.exp(-2.0 * inner))
    else:
        return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def owner(block, CUT: tl.constexpr):
    """The program of `gemm.py` that multiplies a block: p has those from p * blocks // programs on."""
    return ((block + 1) * CUT[3] - 1) // CUT[4]


@triton.jit
def joined(linear, at, columns, inside, part_size, CUT: tl.constexpr):
    """float32: what a linear left at the places `at` of each part, in `columns`; parts are `part_size` apart.

    CUT: (most parts, rows of a tile, blocks of a tile, programs, blocks). Part s of a tile is that of the
    s-th program that multiplied some of it.
    """
    PARTS: tl.constexpr = CUT[0]
    x = tl.load(linear + at, mask=inside, other=0.0).to(tl.float32)
    if PARTS > 1:
        tile = columns // CUT[1]
        last = owner((tile + 1) * CUT[2] - 1, CUT) - owner(tile * CUT[2], CUT)
        for s in tl.static_range(1, PARTS):
            more = tl.load(linear + s * part_size + at, mask=inside & (s <= last), other=0.0)
            x += more.to(tl.float32)
    return x


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
    part_size,
    ADD: tl.constexpr,
    CUT: tl.constexpr,
    SCALED: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """x += linear; out = x / rms(x) * gains. What belongs to the weights is read before the wait."""
    if PDL:
        gdc_launch_dependents()
    token = tl.program_id(0)
    row = token.to(tl.int64) * D
    places = tl.arange(0, BLOCK)
    inside = places < D
    gain = tl.load(gains + places, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        scales = tl.load(row_scales + places, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
    values = tl.load(x + row + places, mask=inside, other=0.0)
    if ADD:
        more = joined(linear, row + places, places, inside, part_size, CUT)
        if SCALED:
            more *= tl.load(token_scales + token) * scales
        values += more
        tl.store(x + row + places, values, mask=inside)
    rms = tl.rsqrt(tl.sum(values * values, 0) / D + eps)
    values = values * rms * gain
    _emit(out, out_scales, token, values, places, inside, D, FP8)


@triton.jit
def activate(
    linear,  # bfloat16 (T, 2 F): gate and up in turn
    token_scales,
    row_scales,
    out,  # bfloat16 or e4m3 (T, F)
    out_scales,
    F,
    part_size,
    CUT: tl.constexpr,
    GELU: tl.constexpr,
    SCALED: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,  # of a program, all of a token's if FP8
    PDL: tl.constexpr,
):
    """out = silu(gate) * up, or with GELU gelu_tanh(gate) * up. For e4m3 they wait in bfloat16 until the
    largest is known."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0)
    row = token.to(tl.int64) * (2 * F)
    most = 0.0
    kept = ()
    for chunk in tl.static_range(CHUNKS):
        places = (tl.program_id(1) * CHUNKS + chunk) * BLOCK + tl.arange(0, BLOCK)
        both = 2 * places[:, None] + tl.arange(0, 2)[None, :]
        inside = (both < 2 * F) & (places >= 0)[:, None]
        values = joined(linear, row + both, both, inside, part_size, CUT)
        if SCALED:
            values *= tl.load(token_scales + token) * tl.load(row_scales + both, mask=inside, other=0.0)
        gate, up = tl.split(values)
        values = gated(gate, up, GELU)
        if FP8:
            most = tl.maximum(most, tl.max(tl.abs(values), 0))
            kept = kept + (values.to(tl.bfloat16),)
        else:
            _emit(out, out_scales, token, values, places, places < F, F, False)
    if FP8:
        most = tl.maximum(most, 1e-12)
        tl.store(out_scales + token, most / FP8_MAX)
        for chunk in tl.static_range(CHUNKS):
            places = chunk * BLOCK + tl.arange(0, BLOCK)
            values = tl.clamp(kept[chunk].to(tl.float32) * (FP8_MAX / most), -FP8_MAX, FP8_MAX)
            at = out + token.to(tl.int64) * F + places
            tl.store(at, values.to(out.dtype.element_ty), mask=places < F)


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
