"""The end of a step on the GPU: the greatest logit, and what the next step starts from.

Greedy choices are those of `engine/sampler.py`: the largest logit, the lowest id among equals, and -1 where
the largest is not finite. A logit and its id are one 64-bit key that is ordered like them, so that the parts
of a row meet in an atomic maximum, whose result does not depend on their order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LEAST = tl.constexpr(-(1 << 63))
_INFINITY = tl.constexpr(0x7F800000)


@triton.jit
def greatest(x, ids, axis: tl.constexpr):
    """int64: the keys of the greatest of logits x float32 with the tokens `ids`, along an axis."""
    x = tl.where(x == x, x, float("inf"))
    most = tl.max(x, axis, keep_dims=True)
    token = tl.min(tl.where(x == most, ids, 0x7FFFFFFF), axis)
    bits = tl.max(x, axis).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - token.to(tl.int64))


@triton.jit
def argmax(logits, keys, V, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """keys (rows,) int64 |= the key of the greatest of BLOCK logits, float32 (rows, V). Keys start as
    LEAST."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    part, row = tl.program_id(0), tl.program_id(1)
    ids = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * V + ids, mask=ids < V, other=-float("inf"))
    tl.atomic_max(keys + row, greatest(x, ids, 0))


@triton.jit(do_not_specialize=["capacity", "rows"])
def advance(
    keys,
    drawn,
    temperature,
    tokens,
    positions,
    results,  # int32 (2, capacity), in the host's memory
    turn,  # int32 (1,): which half of results was written last
    capacity,
    rows,
    DRAWN: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """tokens = what `keys` name, or what was `drawn` where DRAWN and the temperature is positive, for the
    next step and for the host, whose halves of `results` take turns; positions in use move on by one; keys
    are reset."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.arange(0, ROWS)
    inside = row < rows
    key = tl.load(keys + row, mask=inside, other=0)
    ordered = (key >> 32).to(tl.int32)
    token = (0xFFFFFFFF - (key & 0xFFFFFFFF)).to(tl.int32)
    finite = (ordered < _INFINITY) & (ordered > -1 - _INFINITY)
    if DRAWN:
        hot = tl.load(temperature + row, mask=inside, other=0.0) > 0
        token = tl.where(hot, tl.load(drawn + row, mask=inside, other=0), token)
    token = tl.where(finite, token, -1)
    half = 1 - tl.load(turn)
    tl.store(tokens + row, token, mask=inside)
    tl.store(results + half * capacity + row, token, mask=inside)
    tl.debug_barrier()  # everyone has read it
    tl.store(turn, half)
    position = tl.load(positions + row, mask=inside, other=-1)
    tl.store(positions + row, tl.where(position < 0, position, position + 1), mask=inside)
    tl.store(keys + row, LEAST, mask=inside)
