"""y = epilogue(x W^T) for 1 to 8 rows of x: reading W once, at the rate memory gives it.

A program owns ROWS rows of W and all of K, so sums have one order and nothing is reduced between programs.
It asks for its first weights before it waits for the kernel before it (programmatic dependent launch), so
that memory never idles between two kernels. What surrounds a linear in a decoder is done on the way:

    x     times the gains of an RMSNorm; 1 / rms is a factor of the sum and comes last
    y     plus what other GPUs have of the sum (`exchange.py`), plus a residual; or silu(gate) * up of
          neighbouring rows 2 i and 2 i + 1

Bytes: W once. Operations: 2 M N K. The idea of one program for a few whole rows is that of the Triton GEMV of
tokenspeed (2026); packing is described in `words.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flatout.kernels.triton.elementwise import gated
from flatout.kernels.triton.exchange import addresses, summed
from flatout.kernels.triton.words import BF16, INT4, dot_4bit, dot_8bit, high, low, pair, sum_pair, value

PLAIN, RESIDUAL, SILU, GELU = (tl.constexpr(i) for i in range(4))


# Tensors have their chunks in front: the compiler gives lanes to the first of the axes that are not
# contiguous, so weights, activations and scales all come to lie in the same threads and nothing is moved.


@triton.jit
def _load_weights(w, rows, t, N, K_CHUNKS: tl.constexpr, EVEN: tl.constexpr):
    """int32 (TILE, 1, ROWS, 4): chunks t of the rows, zero beyond the weight's edge."""
    words = tl.arange(0, 4)[None, None, None, :]
    offsets = rows.to(tl.int64)[None, None, :, None] * (4 * K_CHUNKS) + 4 * t[:, None, None, None] + words
    mask = (rows < N)[None, None, :, None] & (words < 4)
    if not EVEN:
        mask = mask & (t < K_CHUNKS)[:, None, None, None]
    return tl.load(w + offsets, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def _load_pairs(x, tokens, t, j, P: tl.constexpr, K_CHUNKS: tl.constexpr, EVEN: tl.constexpr):
    """int32 (TILE, tokens, 4): the pairs of bfloat16 that meet pair j of each word of chunks t."""
    words = tl.arange(0, 4)[None, None, :]
    if P == 2:  # x is read two pairs at a time
        offsets = tokens[None, :, None] * (4 * K_CHUNKS) + 4 * t[:, None, None] + words
    else:
        offsets = tokens[None, :, None] * (4 * P * K_CHUNKS) + (4 * P) * t[:, None, None] + 4 * j + words
    if EVEN:
        found = tl.load(x + offsets)
    else:
        found = tl.load(x + offsets, mask=(t < K_CHUNKS)[:, None, None] & (words < 4), other=0)
    if P == 2:
        return (found >> (32 * j)).to(tl.int32)
    else:
        return found


@triton.jit
def _prepared(
    x, gains, tokens, t, shrink, j, P: tl.constexpr, K_CHUNKS: tl.constexpr, EVEN: tl.constexpr,
    NORM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The activations that meet pair j of chunks t, times the gains: (TILE, tokens, 4) words of two float16
    and None, or the firsts and the seconds in float32."""
    xs = _load_pairs(x, tokens, t, j, P, K_CHUNKS, EVEN)
    first, second = low(xs), high(xs)
    if NORM:
        gs = _load_pairs(gains, tl.zeros((1,), tl.int32), t, j, P, K_CHUNKS, EVEN)
        first, second = first * low(gs), second * high(gs)
    if HALF:
        return pair(first * shrink[None, :, None], second * shrink[None, :, None]), second
    else:
        return first, second


@triton.jit
def _products(w, firsts, seconds, FORMAT: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr):
    """float32 (TILE, M, ROWS): each chunk's weights times its activations, summed."""
    if HALF and FORMAT == INT4:
        each = dot_4bit(
            w,
            firsts[0][:, :, None, :],
            firsts[1][:, :, None, :],
            firsts[2][:, :, None, :],
            firsts[3][:, :, None, :],
        )
    elif HALF:
        each = dot_8bit(w, firsts[0][:, :, None, :], firsts[1][:, :, None, :], FORMAT)
    else:
        each = (
            value(w, 0, FORMAT) * firsts[0][:, :, None, :] + value(w, 1, FORMAT) * seconds[0][:, :, None, :]
        )
        for j in tl.static_range(1, P):
            each += value(w, 2 * j, FORMAT) * firsts[j][:, :, None, :]
            each += value(w, 2 * j + 1, FORMAT) * seconds[j][:, :, None, :]
    return tl.sum(each, 3)


@triton.jit
def _sums(firsts, seconds, P: tl.constexpr, HALF: tl.constexpr):
    """float32 (TILE, M): each chunk's activations, summed."""
    total = sum_pair(firsts[0]) if HALF else firsts[0] + seconds[0]
    for j in tl.static_range(1, P):
        total += sum_pair(firsts[j]) if HALF else firsts[j] + seconds[j]
    return tl.sum(total, 2)


@triton.jit(do_not_specialize=["index"])
def gemv(
    x,  # bfloat16 (M, K) seen as int32, for 8-bit weights as int64
    gains,  # bfloat16 (K,) in the same way, if NORM
    w,  # int32 (N, K / (2 P))
    scales,  # float (N,) or (N, K / GROUP)
    minima,  # like scales, if MINIMA
    residual,  # float32 (M, N), if EPILOGUE is RESIDUAL; may be y
    y,  # float32 (M, N), or bfloat16 (M, N / 2) if EPILOGUE is SILU or GELU
    y_bf16,  # bfloat16 (M, N), if EPILOGUE is RESIDUAL: y once more
    N,
    eps,
    rooms,  # of `exchange.py`, if there are several RANKS
    state,
    index,
    K: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    MINIMA: tl.constexpr,
    NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Blocks of ROWS rows, one after another. Where a tile holds a whole row, activations stay in registers
    and the next block's weights are asked for while this one's are multiplied; else tiles take turns."""
    P: tl.constexpr = 1 if FORMAT == BF16 else (4 if FORMAT == INT4 else 2)
    HALF: tl.constexpr = ASM and FORMAT != BF16
    K_CHUNKS: tl.constexpr = K // (8 * P)
    EVEN: tl.constexpr = K_CHUNKS % TILE == 0
    TILES: tl.constexpr = (K_CHUNKS + TILE - 1) // TILE
    WHOLE: tl.constexpr = TILES == 1
    chunks = tl.arange(0, TILE)
    tokens = tl.arange(0, M)
    weights = _load_weights(w, tl.program_id(0) * ROWS + tl.arange(0, ROWS), chunks, N, K_CHUNKS, EVEN)
    if RANKS > 1:
        places = addresses(rooms, RANKS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if RANKS > 1:
        flag, broken = tl.load(state) + index, tl.load(state + 1)

    factor = tl.full((M,), 1.0, tl.float32)
    shrink = tl.full((M,), 1.0, tl.float32)
    if NORM or HALF:
        squares = tl.zeros((TILE, M, 4), tl.float32)
        for tile in tl.static_range(TILES):
            for j in tl.static_range(P):
                xs = _load_pairs(x, tokens, tile * TILE + chunks, j, P, K_CHUNKS, EVEN)
                squares += low(xs) * low(xs) + high(xs) * high(xs)
        mean = tl.sum(tl.sum(squares, 2), 0) / K
        if NORM:
            factor = tl.rsqrt(mean + eps)
        if HALF:
            # float16 holds what is normalised; 1/16 keeps sums of 127 * x below 65504 even for one-hot x.
            shrink = tl.rsqrt(mean + 1e-30) * 0.0625
            factor = factor / shrink
    firsts, seconds = (), ()
    if WHOLE:
        for j in tl.static_range(P):
            own = _prepared(x, gains, tokens, chunks, shrink, j, P, K_CHUNKS, EVEN, NORM, HALF)
            firsts, seconds = firsts + (own[0],), seconds + (own[1],)

    for block in tl.range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS)
        inside = rows < N
        at = tokens[:, None] * N + rows[None, :]
        if EPILOGUE == RESIDUAL:
            before = tl.load(residual + at, mask=inside[None, :], other=0.0)
        acc = tl.zeros((TILE, M, ROWS), tl.float32)
        for i in tl.range(TILES):
            t = i * TILE + chunks
            current = weights
            if WHOLE:
                following = rows + tl.num_programs(0) * ROWS
                weights = _load_weights(w, following, chunks, N, K_CHUNKS, EVEN)
                its_firsts, its_seconds = firsts, seconds
            else:
                weights = _load_weights(w, rows, t + TILE, N, K_CHUNKS, False)
                its_firsts, its_seconds = (), ()
                for j in tl.static_range(P):
                    two = _prepared(x, gains, tokens, t, shrink, j, P, K_CHUNKS, EVEN, NORM, HALF)
                    its_firsts, its_seconds = its_firsts + (two[0],), its_seconds + (two[1],)
            products = _products(current, its_firsts, its_seconds, FORMAT, P, HALF)
            if GROUP == 0:
                acc += products
            else:
                place = rows.to(tl.int64)[None, :] * (K // GROUP) + (t // (GROUP // (8 * P)))[:, None]
                mask = inside[None, :] & (t < K_CHUNKS)[:, None]
                acc += products * tl.load(scales + place, mask=mask, other=0.0).to(tl.float32)[:, None, :]
                if MINIMA:
                    least = tl.load(minima + place, mask=mask, other=0.0).to(tl.float32)
                    acc += _sums(its_firsts, its_seconds, P, HALF)[:, :, None] * least[:, None, :]

        total = tl.sum(acc, 0) * factor[:, None]
        if GROUP == 0 and FORMAT != BF16:
            total = total * tl.load(scales + rows, mask=inside, other=0.0).to(tl.float32)[None, :]
        if EPILOGUE == SILU or EPILOGUE == GELU:
            gate, up = tl.split(tl.reshape(total, (M, ROWS // 2, 2)))
            activated = gated(gate, up, EPILOGUE == GELU)
            half = block * (ROWS // 2) + tl.arange(0, ROWS // 2)
            tl.store(
                y + tokens[:, None] * (N // 2) + half[None, :],
                activated.to(tl.bfloat16),
                mask=(half < N // 2)[None, :],
            )
        else:
            if RANKS > 1:
                total = summed(
                    total, at, inside[None, :], places, flag, broken, state, RANK, RANKS, CAPACITY
                )  # fmt: skip
            if EPILOGUE == RESIDUAL:
                total += before
                tl.store(y_bf16 + at, total.to(tl.bfloat16), mask=inside[None, :])
            tl.store(y + at, total, mask=inside[None, :])


@triton.jit
def unpack(
    w,
    scales,
    minima,
    out,
    n,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    MINIMA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out bfloat16 (n, K) in the order of columns: the values of a weight of 8 or 4 bits. For many rows of x,
    where a second pass over W costs little beside the product."""
    P: tl.constexpr = 4 if FORMAT == INT4 else 2
    row = tl.program_id(0).to(tl.int64)
    words = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = words < K // (2 * P)
    packed = tl.load(w + row * (K // (2 * P)) + words, mask=inside, other=0)
    chunk, c = words // 4, words % 4
    GROUPS: tl.constexpr = K // GROUP if GROUP else 1
    at = row * GROUPS + (chunk * (8 * P) // GROUP if GROUP else 0 * chunk)
    scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
    if MINIMA:
        least = tl.load(minima + at, mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(P):
        for e in tl.static_range(2):
            x = value(packed, 2 * j + e, FORMAT) * scale
            if MINIMA:
                x += least
            place = 4 * words + 2 * j + e if P == 2 else 32 * chunk + 8 * j + 2 * c + e
            tl.store(out + row * K + place, x.to(tl.bfloat16), mask=inside)
