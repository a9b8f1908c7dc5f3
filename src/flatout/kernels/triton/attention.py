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
    """cos and sin (E / 2,) of a position."""
    at = position.to(tl.int64) * (E // 2) + tl.arange(0, E // 2)
    return tl.load(cos + at), tl.load(sin + at)


@triton.jit
def _part(
    qkv,
    token,
    at,  # places among the token's SIZE numbers
    inside,
    token_scales,
    row_scales,
    bias,
    part_size,
    SIZE: tl.constexpr,
    CUT: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
):
    """float32, like `at`: what the linear left of a token, with its bias."""
    x = joined(qkv + token.to(tl.int64) * SIZE, at, at, inside, part_size, CUT)
    if SCALED:
        x *= tl.load(token_scales + token) * tl.load(row_scales + at)
    if BIAS:
        x += tl.load(bias + at)
    return x


@triton.jit
def _heads(
    qkv,
    token,
    heads,  # (rows,) of all H + 2 G; those beyond are read as the first
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
):
    """float32 (rows, E / 2) twice: the first and the second halves of some heads of a token after bias, norm
    and RoPE, which turns each number of the first with one of the second. cos and sin are those of its
    position."""
    columns = tl.arange(0, E // 2)
    at = tl.where(heads < HEADS, heads, 0)[:, None] * E + columns[None, :]
    inside = (heads < HEADS)[:, None] & (columns >= 0)[None, :]
    x = _part(
        qkv, token, at, inside, token_scales, row_scales, bias, part_size, HEADS * E, CUT, SCALED, BIAS
    )  # fmt: skip
    y = _part(
        qkv, token, at + E // 2, inside, token_scales, row_scales, bias, part_size, HEADS * E, CUT, SCALED,
        BIAS,
    )  # fmt: skip
    if NORM:
        rms = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / E + eps)
        x *= rms[:, None] * tl.load(gains + columns).to(tl.float32)[None, :]
        y *= rms[:, None] * tl.load(gains + E // 2 + columns).to(tl.float32)[None, :]
    return x * cos[None, :] - y * sin[None, :], y * cos[None, :] + x * sin[None, :]


@triton.jit
def _stored(x, STORE_FP8: tl.constexpr):
    """x as the cache keeps it."""
    if STORE_FP8:
        return tl.clamp(x, -448.0, 448.0).to(tl.float8e4nv)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def _block(q1, q2, k1, k2, v, tokens, begin, position, peak, weight, acc, COMPUTE: tl.constexpr):
    """The running softmax of q (ROWS, E) over what came before and the tokens of k and v (BLOCK, E); q and k
    come in halves."""
    scores = tl.dot(q1, tl.trans(k1.to(COMPUTE)))
    scores = tl.dot(q2, tl.trans(k2.to(COMPUTE)), scores)
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
    q1, q2, qkv, sequence, head, token_scales, row_scales, bias, k_gains, turn_cos, turn_sin, eps, part_size,
    table, keys, values, position, G: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr,
    PAGE: tl.constexpr, COMPUTE: tl.constexpr, CUT: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Store a new token's key and value; the running softmax of q (ROWS, E), in halves, over it alone."""
    HEADS: tl.constexpr = G * R + 2 * G
    FP8: tl.constexpr = keys.dtype.element_ty == tl.float8e4nv
    columns = tl.arange(0, E)
    one = tl.zeros((1,), tl.int32)
    page = tl.load(table + position // PAGE).to(tl.int64)
    k1, k2 = _heads(
        qkv, sequence, G * R + head + one, token_scales, row_scales, bias, k_gains,
        turn_cos, turn_sin, eps, part_size, E, HEADS, CUT, SCALED, BIAS, NORM,
    )  # fmt: skip
    v = _part(
        qkv, sequence, (G * R + G + head) * E + columns, columns >= 0, token_scales, row_scales, bias,
        part_size, HEADS * E, CUT, SCALED, BIAS,
    )  # fmt: skip
    k1, k2, v = _stored(k1, FP8), _stored(k2, FP8), _stored(v, FP8)
    at = ((page * G + head) * PAGE + position % PAGE) * E
    half = tl.arange(0, E // 2)[None, :]
    tl.store(keys + at + half, k1)
    tl.store(keys + at + E // 2 + half, k2)
    tl.store(values + at + columns, v)
    # The tensor cores take sixteen keys, and cost less than a sum over what all threads hold.
    scores = tl.dot(q1, tl.trans(tl.broadcast_to(k1, (16, E // 2)).to(COMPUTE)))
    scores = tl.dot(q2, tl.trans(tl.broadcast_to(k2, (16, E // 2)).to(COMPUTE)), scores)
    peak = tl.max(scores, 1)
    acc = tl.zeros((ROWS, E), tl.float32) + v.to(tl.float32)[None, :]
    return peak, tl.full((ROWS,), 1.0, tl.float32), acc


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
    q1, q2 = _heads(
        qkv, sequence, tl.where(rows < R, head * R + rows, HEADS), token_scales, row_scales, bias, q_gains,
        turn_cos, turn_sin, eps, part_size, E, HEADS, CUT, SCALED, BIAS, NORM,
    )  # fmt: skip
    q1, q2 = (q1 * (scale * LOG2E)).to(COMPUTE), (q2 * (scale * LOG2E)).to(COMPUTE)
    peak = tl.full((ROWS,), -1e30, tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, E), tl.float32)
    if SPLITS == 1:
        peak, weight, acc = _newest(
            q1, q2, qkv, sequence, head, token_scales, row_scales, bias, k_gains, turn_cos, turn_sin, eps,
            part_size, table, keys, values, position, G, R, ROWS, E, PAGE, COMPUTE, CUT, SCALED, BIAS, NORM,
        )  # fmt: skip
    elif split == 0:
        peak, weight, acc = _newest(
            q1, q2, qkv, sequence, head, token_scales, row_scales, bias, k_gains, turn_cos, turn_sin, eps,
            part_size, table, keys, values, position, G, R, ROWS, E, PAGE, COMPUTE, CUT, SCALED, BIAS, NORM,
        )  # fmt: skip

    half = tl.arange(0, E // 2)
    for block in tl.range(start, tl.minimum(start + share, first + blocks)):
        page = tl.load(table + block * BLOCK // PAGE).to(tl.int64)
        there = block * BLOCK + tokens
        lines = ((page * G + head) * PAGE + block * BLOCK % PAGE + tokens[:, None]) * E
        # Of the last block only what is there is read.
        k1 = tl.load(keys + lines + half[None, :], mask=(there < position)[:, None], other=0.0)
        k2 = tl.load(keys + lines + E // 2 + half[None, :], mask=(there < position)[:, None], other=0.0)
        v = tl.load(values + lines + columns[None, :], mask=(there < position)[:, None], other=0.0)
        peak, weight, acc = _block(
            q1, q2, k1, k2, v, there, begin, position, peak, weight, acc, COMPUTE
        )  # fmt: skip

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
    ROWS: tl.constexpr,  # R up to a power of two
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
    position = tl.load(positions + token)
    if position < 0:
        return
    turn_cos, turn_sin = _turns(cos, sin, position, E)
    heads = tl.arange(0, ROWS)
    ours = (heads < R)[:, None]
    half, columns = tl.arange(0, E // 2)[None, :], tl.arange(0, E)
    one = tl.zeros((1,), tl.int32)
    to = out + token.to(tl.int64) * (HEADS * E)
    q1, q2 = _heads(
        qkv, token, tl.where(heads < R, head * R + heads, HEADS), token_scales, row_scales, bias, q_gains,
        turn_cos, turn_sin, eps, part_size, E, HEADS, CUT, SCALED, BIAS, NORM,
    )  # fmt: skip
    k1, k2 = _heads(
        qkv, token, G * R + head + one, token_scales, row_scales, bias, k_gains, turn_cos, turn_sin,
        eps, part_size, E, HEADS, CUT, SCALED, BIAS, NORM,
    )  # fmt: skip
    v = _part(
        qkv, token, (G * R + G + head) * E + columns, columns >= 0, token_scales, row_scales, bias,
        part_size, HEADS * E, CUT, SCALED, BIAS,
    )  # fmt: skip
    FP8: tl.constexpr = keys.dtype.element_ty == tl.float8e4nv
    k1, k2, v = _stored(k1, FP8), _stored(k2, FP8), _stored(v, FP8)
    slot = tl.load(slots + token)
    at = ((slot // PAGE * G + head) * PAGE + slot % PAGE) * E
    tl.store(keys + at + half, k1)
    tl.store(keys + at + E // 2 + half, k2)
    tl.store(values + at + columns, v)
    q_at = (head * R + heads)[:, None] * E + half
    tl.store(to + q_at, q1.to(tl.bfloat16), mask=ours)
    tl.store(to + q_at + E // 2, q2.to(tl.bfloat16), mask=ours)
    k_at = (G * R + head) * E
    tl.store(to + k_at + half, k1.to(tl.float32).to(tl.bfloat16))
    tl.store(to + k_at + E // 2 + half, k2.to(tl.float32).to(tl.bfloat16))
    tl.store(to + k_at + G * E + columns, v.to(tl.float32).to(tl.bfloat16))
