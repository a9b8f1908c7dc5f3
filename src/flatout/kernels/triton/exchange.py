"""Several GPUs add up, or take the greatest of, what each of them has, by themselves.

One-shot all-reduce over NVLink: every rank writes its part into a room of every other rank's memory, waits
for theirs in its own, and adds the parts up in the order of ranks, so that all ranks have the same bits.
Each number travels with the number of its exchange, in one word of 8 bytes, which arrives whole; so nothing
needs a fence, an atomic operation or a flag that follows, and one trip is all (NCCL's "LL" protocol, Hu et
al., arXiv:2507.04786).

Rooms have two halves that take turns. A rank writes to a half again two exchanges later; by then it has the
parts of the exchange between, which the others sent after they had read that half.

Nobody waits for ever: after SPINS looks at a word a program goes on without it and says so in `state`, after
which nobody waits at all, and the step's last exchange tells the host.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BLOCK = 1024
"""Numbers of a program, of more than FEW in all."""
FEW = 8192
SPINS = tl.constexpr(1 << 24)
"""About ten seconds."""


@triton.jit
def addresses(rooms, RANKS: tl.constexpr):
    """int64, of each rank's rooms, asked for before they are needed."""
    found = ()
    for r in tl.static_range(RANKS):
        found = found + (tl.load(rooms + r),)
    return found


@triton.jit
def send(
    rooms, half, at, inside, bits, flag, RANK: tl.constexpr, RANKS: tl.constexpr, CAPACITY: tl.constexpr
):
    """Write `bits` int32 to place `at` of this rank's room in every other rank's memory."""
    word = (flag.to(tl.int64) << 32) | (bits.to(tl.int64) & 0xFFFFFFFF)
    for r in tl.static_range(RANKS):
        if r != RANK:
            room = rooms[r].to(tl.pointer_type(tl.int64)) + (half * RANKS + RANK) * CAPACITY
            tl.store(room + at, word, mask=inside)


@triton.jit
def receive(room, at, inside, flag, spins):
    """int32: what was written to `at` in this exchange; and 1 if it did not come in time."""
    word = tl.load(room + at, mask=inside, other=0, volatile=True)
    late = tl.max(tl.where(inside & ((word >> 32).to(tl.int32) != flag), 1, 0))
    while (late > 0) & (spins > 0):
        word = tl.load(room + at, mask=inside, other=0, volatile=True)
        late = tl.max(tl.where(inside & ((word >> 32).to(tl.int32) != flag), 1, 0))
        spins -= 1
    return word.to(tl.int32), late


@triton.jit
def summed(
    own,  # float32: this rank's part
    at,  # like it: where it stands
    inside,
    rooms,  # as `addresses` gives them
    flag,  # int32: which exchange this is
    broken,  # int32: whether one has failed, here and
    state,  # in the second of these
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """float32: the sum of all ranks' parts, in their order."""
    spins = tl.where(broken == 0, SPINS, 0)
    half = flag & 1
    send(rooms, half, at, inside, own.to(tl.int32, bitcast=True), flag, RANK, RANKS, CAPACITY)
    tl.debug_barrier()  # no store may be put off beyond the wait
    here = rooms[RANK].to(tl.pointer_type(tl.int64)) + half * RANKS * CAPACITY
    total = tl.zeros_like(own)
    for r in tl.static_range(RANKS):
        if r == RANK:
            total += own
        else:
            bits, late = receive(here + r * CAPACITY, at, inside, flag, spins)
            total += bits.to(tl.float32, bitcast=True)
            tl.store(state + 1, 1, mask=late > 0)
    return total


@triton.jit(do_not_specialize=["index", "size"])
def add(
    part,  # float32 or bfloat16 (size,)
    x,  # float32 (size,): becomes x plus all parts
    x_bf16,  # bfloat16 (size,): x once more, if TWICE
    rooms,  # int64 (RANKS,): addresses of (2, RANKS, CAPACITY) words of 8 bytes
    state,  # int32 (2,): exchanges before this step; whether one of them failed
    index,  # of this exchange in its step
    size,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    TWICE: tl.constexpr,
    PDL: tl.constexpr,
):
    """x += the parts of all ranks. Each program has BLOCK numbers."""
    if PDL:
        gdc_launch_dependents()
    places = addresses(rooms, RANKS)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    if PDL:
        gdc_wait()
    flag, broken = tl.load(state) + index, tl.load(state + 1)
    before = tl.load(x + at, mask=inside, other=0.0)
    own = tl.load(part + at, mask=inside, other=0.0).to(tl.float32)
    total = before + summed(own, at, inside, places, flag, broken, state, RANK, RANKS, CAPACITY)
    tl.store(x + at, total, mask=inside)
    if TWICE:
        tl.store(x_bf16 + at, total.to(tl.bfloat16), mask=inside)


@triton.jit(do_not_specialize=["index", "size"])
def greatest(
    keys,  # int64 (size,)
    rooms,
    state,
    stalled,  # int32 (1,), in the host's memory: becomes 1 when an exchange has failed
    index,
    size,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """keys = the greatest of all ranks'. One program; the last exchange of a step."""
    if PDL:
        gdc_launch_dependents()
    places = addresses(rooms, RANKS)
    if PDL:
        gdc_wait()
    flag, broken = tl.load(state) + index, tl.load(state + 1)
    half = flag & 1
    at = tl.arange(0, BLOCK)
    inside = at < size
    best = tl.load(keys + at, mask=inside, other=0)
    send(places, half, 2 * at, inside, best.to(tl.int32), flag, RANK, RANKS, CAPACITY)
    send(places, half, 2 * at + 1, inside, (best >> 32).to(tl.int32), flag, RANK, RANKS, CAPACITY)
    tl.debug_barrier()
    here = places[RANK].to(tl.pointer_type(tl.int64)) + half * RANKS * CAPACITY
    for r in tl.static_range(RANKS):
        if r != RANK:
            spins = tl.where(broken == 0, SPINS, 0)
            low, late = receive(here + r * CAPACITY, 2 * at, inside, flag, spins)
            spins = tl.where(late == 0, spins, 0)
            high, later = receive(here + r * CAPACITY, 2 * at + 1, inside, flag, spins)
            best = tl.maximum(best, (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF))
            broken = tl.maximum(broken, tl.maximum(late, later))
    tl.store(keys + at, best, mask=inside)
    tl.store(state, flag + 1)
    tl.store(state + 1, broken)
    tl.store(stalled, 1, mask=broken > 0)
