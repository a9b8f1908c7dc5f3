"""Attention of one new token a sequence over paged keys and values; and RoPE for many.

The cache of a layer is two arrays (pages, G, PAGE, E), bfloat16 or e4m3, so that what one key/value head has
in a page lies in one piece. A step's linear `qkv` (T, (H + 2 G) E) holds a token's queries, keys and values
one after another, before bias, norm and RoPE; CUT and SCALED as in `elementwise.py`.

Legend: S sequences, T tokens, H query heads, G key/value heads, R = H / G, E head size.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flatout.kernels.triton.elementwise import FP8_MAX, joined

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _turns(cos, sin, position, E: tl.constexpr):
    """cos and sin (E,) of a position, the first half of the sines negative."""
    columns = tl.arange(0, E)
    at = position.to(tl.int64) * (E // 2) + columns % (E // 2)
    return tl.load(cos + at), tl.where(columns < E // 2, -1.0, 1.0) * tl.load(sin + at)


@triton.jit
def _heads(
    qkv,
    token,
    heads,  # (rows,) of all H + 2 G
    token_scales,
    row_scales,
    bias,
    gains,
    cos,
    sin,
    eps,
    part_size,
    E: tl.constexpr,
    HEADS: tl.constexpr,
    CUT: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """float32 (rows, E): some heads of a token after bias, norm and RoPE. cos and sin: (E,), of its position
    as `_turns` gives them. Pairs e with e + E / 2, which is read again. Rows outside are zero until the
    bias."""
    columns = tl.arange(0, E)
    inside = (heads < HEADS)[:, None] & (columns >= 0)[None, :]
    own = tl.where(heads < HEADS, heads, 0)[:, None] * E + columns[None, :]
    other = tl.where(heads < HEADS, heads, 0)[:, None] * E + (columns ^ (E // 2))[None, :]
    base = qkv + token.to(tl.int64) * (HEADS * E)
    x = joined(base, own, own, inside, part_size, CUT)
    if SCALED:
        scale = tl.load(token_scales + token)
        x *= scale * tl.load(row_scales + own)
    if BIAS:
        x += tl.load(bias + own)
    if NORM:
        rms = tl.rsqrt(tl.sum(x * x, 1) / E + eps)
        x *= rms[:, None] * tl.load(gains + columns).to(tl.float32)[None, :]
    if ROTATE:
        y = joined(base, other, other, inside, part_size, CUT)
        if SCALED:
            y *= scale * tl.load(row_scales + other)
        if BIAS:
            y += tl.load(bias + other)
        if NORM:
            y *= rms[:, None] * tl.load(gains + (columns ^ (E // 2))).to(tl.float32)[None, :]
        x = x * cos[None, :] + y * sin[None, :]
    return x


@triton.jit
def _stored(x, STORE_FP8: tl.constexpr):
    """x as the cache keeps it."""
    if STORE_FP8:
        return tl.clamp(x, -448.0, 448.0).to(tl.float8e4nv)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def _block(q, k, v, tokens, begin, position, peak, weight, acc, COMPUTE: tl.constexpr):
    """The running softmax of q (ROWS, E) over what came before and the tokens of k and v (BLOCK, E)."""
    scores = tl.dot(q, tl.trans(k.to(COMPUTE)))
    seen = (tokens < position) & (tokens >= begin)
    scores = tl.where(seen[None, :], scores, -1e30)
    higher = tl.maximum(peak, tl.max(scores, 1))
    shrink = tl.exp2(peak - higher)
    weights = tl.where(seen[None, :], tl.exp2(scores - higher[:, None]), 0.0)
    weight = weight * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(COMPUTE), v.to(COMPUTE), acc * shrink[:, None])
    return higher, weight, acc


@triton.jit
def _newest(
    q, qkv, sequence, head, token_scales, row_scales, bias, k_gains, turn_cos, turn_sin, eps, part_size,
    table, keys, values, position, G: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr,
    PAGE: tl.constexpr, CUT: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Store a new token's key and value; the running softmax of q (ROWS, E) over it alone."""
    HEADS: tl.constexpr = G * R + 2 * G
    FP8: tl.constexpr = keys.dtype.element_ty == tl.float8e4nv
    columns = tl.arange(0, E)
    one = tl.zeros((1,), tl.int32)
    new_page = tl.load(table + position // PAGE).to(tl.int64)
    new_k = _heads(
        qkv, sequence, G * R + head + one, token_scales, row_scales, bias, k_gains,
        turn_cos, turn_sin, eps, part_size, E, HEADS, CUT, SCALED, BIAS, NORM, True,
    )  # fmt: skip
    new_v = _heads(
        qkv, sequence, G * R + G + head + one, token_scales, row_scales, bias, k_gains,
        turn_cos, turn_sin, eps, part_size, E, HEADS, CUT, SCALED, BIAS, False, False,
    )  # fmt: skip
    new_k, new_v = _stored(new_k, FP8), _stored(new_v, FP8)
    new_at = ((new_page * G + head) * PAGE + position % PAGE) * E + columns[None, :]
    tl.store(keys + new_at, new_k)
    tl.store(values + new_at, new_v)
    peak = tl.sum(q * new_k.to(tl.float32), 1)
    return peak, tl.full((ROWS,), 1.0, tl.float32), tl.zeros((ROWS, E), tl.float32) + new_v.to(tl.float32)


@triton.jit
def _hand_on(out, out_scales, group, place, values, inside):
    """Store what a group's heads read: in bfloat16, or in e4m3 with one scale for all of them."""
    if out.dtype.element_ty == tl.float8e4nv:
        values = tl.where(inside[:, None], values, 0.0)
        most = tl.maximum(tl.max(tl.max(tl.abs(values), 1), 0), 1e-12)
        tl.store(out_scales + group, most / FP8_MAX)
        values = tl.clamp(values * (FP8_MAX / most), -FP8_MAX, FP8_MAX)
    tl.store(out + place, values.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["page_stride", "window"])
def decode_attention(
    qkv,
    token_scales,
    row_scales,
    bias,  # float32 ((H + 2 G) E,), if BIAS
    q_gains,  # bfloat16 (E,), if NORM
    k_gains,
    cos,  # float32 (positions, E / 2)
    sin,
    keys,
    values,
    pages,  # int32 (S, page_stride)
    positions,  # int32 (S,): of the new token; -1 for rows that are not used
    out,  # bfloat16 or e4m3 (S, H E)
    out_scales,  # float32 (S, G), of e4m3
    parts,  # float32 (S, G, SPLITS, R, E): sums of each split
    peaks,  # float32 (S, G, SPLITS, 2, R): their largest score, and sum of weights
    counters,  # int32 (S, G): zero, and left zero
    page_stride,
    scale,
    eps,
    window,  # keys at least this far back are not seen
    part_size,
    G: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,  # R padded to what the tensor cores take
    E: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens read at a time, at most PAGE
    SPLITS: tl.constexpr,
    COMPUTE: tl.constexpr,  # what the tensor cores multiply
    CUT: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program reads 1 / SPLITS of a sequence's tokens for the R query heads of one key/value head; the
    last of them to finish joins what all found (flash decoding). The first also writes the new token's key
    and value, which it attends to from registers.

    What the kernels before it in its step do not write is read before the wait: positions and turns."""
    if PDL:
        gdc_launch_dependents()
    split, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + sequence)
    HEADS: tl.constexpr = G * R + 2 * G
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, E)
    tokens = tl.arange(0, BLOCK)
    turn_cos, turn_sin = _turns(cos, sin, tl.maximum(position, 0), E)
    table = pages + sequence.to(tl.int64) * page_stride
    begin = tl.maximum(position + 1 - window, 0)
    first = begin // BLOCK
    blocks = tl.cdiv(position, BLOCK) - first
    share = tl.cdiv(blocks, SPLITS)
    start = first + split * share
    if PDL:
        gdc_wait()
    if position < 0:
        return
    q = _heads(
        qkv, sequence, tl.where(rows < R, head * R + rows, HEADS), token_scales, row_scales, bias, q_gains,
        turn_cos, turn_sin, eps, part_size, E, HEADS, CUT, SCALED, BIAS, NORM, True,
    )  # fmt: skip
    q = q * (scale * LOG2E)
    peak = tl.full((ROWS,), -1e30, tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, E), tl.float32)
    if SPLITS == 1:
        peak, weight, acc = _newest(
            q, qkv, sequence, head, token_scales, row_scales, bias, k_gains, turn_cos, turn_sin, eps,
            part_size, table, keys, values, position, G, R, ROWS, E, PAGE, CUT, SCALED, BIAS, NORM,
        )  # fmt: skip
    elif split == 0:
        peak, weight, acc = _newest(
            q, qkv, sequence, head, token_scales, row_scales, bias, k_gains, turn_cos, turn_sin, eps,
            part_size, table, keys, values, position, G, R, ROWS, E, PAGE, CUT, SCALED, BIAS, NORM,
        )  # fmt: skip

    q = q.to(COMPUTE)
    for block in tl.range(start, tl.minimum(start + share, first + blocks)):
        page = tl.load(table + block * BLOCK // PAGE).to(tl.int64)
        at = ((page * G + head) * PAGE + block * BLOCK % PAGE + tokens[:, None]) * E + columns[None, :]
        k, v = tl.load(keys + at), tl.load(values + at)
        peak, weight, acc = _block(
            q, k, v, block * BLOCK + tokens, begin, position, peak, weight, acc, COMPUTE
        )

    inside = rows < R
    place = (sequence.to(tl.int64) * (G * R) + head * R + rows)[:, None] * E + columns[None, :]
    group = sequence.to(tl.int64) * G + head
    if SPLITS == 1:
        _hand_on(out, out_scales, group, place, acc / weight[:, None], inside)
    else:
        part = (group * SPLITS + split) * R + rows
        peak_at = (group * SPLITS + split) * 2 * R + rows
        tl.store(parts + part[:, None] * E + columns[None, :], acc, mask=inside[:, None])
        tl.store(peaks + peak_at, peak, mask=inside)
        tl.store(peaks + peak_at + R, weight, mask=inside)
        tl.debug_barrier()
        # What others wrote is read past the first-level cache below.
        done = tl.atomic_add(counters + group, 1, sem="acq_rel")
        if done == SPLITS - 1:
            tl.store(counters + group, 0)
            joined_peak = tl.full((ROWS,), -1e30, tl.float32)
            joined_weight = tl.zeros((ROWS,), tl.float32)
            joined = tl.zeros((ROWS, E), tl.float32)
            for i in tl.static_range(SPLITS):
                its_at = (group * SPLITS + i) * 2 * R + rows
                its_peak = tl.load(peaks + its_at, mask=inside, other=-1e30, cache_modifier=".cg")
                its_weight = tl.load(peaks + its_at + R, mask=inside, other=0.0, cache_modifier=".cg")
                its_part = ((group * SPLITS + i) * R + rows)[:, None] * E + columns[None, :]
                its_acc = tl.load(parts + its_part, mask=inside[:, None], other=0.0, cache_modifier=".cg")
                higher = tl.maximum(joined_peak, its_peak)
                old, new = tl.exp2(joined_peak - higher), tl.exp2(its_peak - higher)
                joined_weight = joined_weight * old + its_weight * new
                joined = joined * old[:, None] + its_acc * new[:, None]
                joined_peak = higher
            _hand_on(out, out_scales, group, place, joined / joined_weight[:, None], inside)


@triton.jit
def rotate_and_store(
    qkv,
    token_scales,
    row_scales,
    bias,
    q_gains,
    k_gains,
    cos,
    sin,
    keys,
    values,
    slots,  # int64 (T,): page * PAGE + place of each token
    positions,  # int32 (T,)
    out,  # bfloat16 (T, (H + 2 G) E)
    eps,
    part_size,
    G: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    PAGE: tl.constexpr,
    CUT: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = qkv after bias, norm and RoPE; keys and values also go to the cache. One program a token and a
    key/value head with its R query heads, which come as rows 0 to R - 1, then key and value. Tokens at
    position -1 are left alone."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token, head = tl.program_id(0), tl.program_id(1)
    HEADS: tl.constexpr = G * R + 2 * G
    columns = tl.arange(0, E)
    position = tl.load(positions + token)
    if position < 0:
        return
    turn_cos, turn_sin = _turns(cos, sin, position, E)
    one = tl.zeros((1,), tl.int32)
    base = token.to(tl.int64) * (HEADS * E)
    for r in tl.static_range(R):
        q = _heads(
            qkv, token, head * R + r + one, token_scales, row_scales, bias, q_gains, turn_cos, turn_sin,
            eps, part_size, E, HEADS, CUT, SCALED, BIAS, NORM, True,
        )  # fmt: skip
        tl.store(out + base + (head * R + r) * E + columns[None, :], q.to(tl.bfloat16))
    k = _heads(
        qkv, token, G * R + head + one, token_scales, row_scales, bias, k_gains, turn_cos, turn_sin,
        eps, part_size, E, HEADS, CUT, SCALED, BIAS, NORM, True,
    )  # fmt: skip
    v = _heads(
        qkv, token, G * R + G + head + one, token_scales, row_scales, bias, k_gains, turn_cos, turn_sin,
        eps, part_size, E, HEADS, CUT, SCALED, BIAS, False, False,
    )  # fmt: skip
    FP8: tl.constexpr = keys.dtype.element_ty == tl.float8e4nv
    k, v = _stored(k, FP8), _stored(v, FP8)
    slot = tl.load(slots + token)
    at = ((slot // PAGE * G + head) * PAGE + slot % PAGE) * E + columns[None, :]
    tl.store(keys + at, k)
    tl.store(values + at, v)
    tl.store(out + base + (G * R + head) * E + columns[None, :], k.to(tl.float32).to(tl.bfloat16))
    tl.store(out + base + (G * R + G + head) * E + columns[None, :], v.to(tl.float32).to(tl.bfloat16))
