"""Several GPUs add up, or take the greatest of, what each of them has: one kernel that all of them run.

One-shot all-reduce: every rank writes its part into a room of every other rank's memory, over NVLink, then
raises a flag there; it waits for the flags in its own memory, and adds the parts up in the order of ranks,
so that all ranks have the same bits. For the few kilobytes of a decode step the time is that of one trip,
where a ring would take several.

Rooms have two halves that take turns. A rank writes to a half again two exchanges later; by then it has seen
every flag of the exchange between, which the others raised after they had read that half.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PROGRAMS = 32
"""Of every launch, so that all programs count the same exchanges."""


@triton.jit(do_not_specialize=["size"])
def exchange(
    part,  # float32 or bfloat16 (size,), or int64 with GREATEST
    x,  # float32 (size,): becomes x plus all parts; with GREATEST int64: becomes the greatest
    x_bf16,  # bfloat16 (size,): x once more, if TWICE
    rooms,  # int64 (RANKS,): addresses of (2, RANKS, CAPACITY) numbers of 4 bytes, or half as many of 8
    flags,  # int64 (RANKS,): addresses of int32 (RANKS, programs): exchanges that each rank has written
    counts,  # int32 (programs,): exchanges so far
    size,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    GREATEST: tl.constexpr,
    TWICE: tl.constexpr,
    PDL: tl.constexpr,
):
    """x += the parts of all ranks; or the greatest of them."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    count = tl.load(counts + program) + 1
    half = count % 2
    number: tl.constexpr = tl.int64 if GREATEST else tl.float32
    ROOM: tl.constexpr = CAPACITY // 2 if GREATEST else CAPACITY
    for r in tl.static_range(RANKS):
        room = tl.load(rooms + r).to(tl.pointer_type(number)) + (half * RANKS + RANK) * ROOM
        for begin in tl.range(program * BLOCK, size, tl.num_programs(0) * BLOCK):
            at = begin + tl.arange(0, BLOCK)
            tl.store(room + at, tl.load(part + at, mask=at < size).to(number), mask=at < size)
    tl.debug_barrier()
    for r in tl.static_range(RANKS):
        flag = tl.load(flags + r).to(tl.pointer_type(tl.int32)) + RANK * tl.num_programs(0) + program
        tl.atomic_xchg(flag, count, sem="release", scope="sys")
    own_flags = tl.load(flags + RANK).to(tl.pointer_type(tl.int32)) + program
    for r in tl.static_range(RANKS):
        flag = own_flags + r * tl.num_programs(0)
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        while seen < count:
            seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    own = tl.load(rooms + RANK).to(tl.pointer_type(number)) + half * RANKS * ROOM
    for begin in tl.range(program * BLOCK, size, tl.num_programs(0) * BLOCK):
        at = begin + tl.arange(0, BLOCK)
        # What others wrote is read past the first-level cache.
        total = tl.load(own + at, mask=at < size, cache_modifier=".cg")
        for r in tl.static_range(1, RANKS):
            more = tl.load(own + r * ROOM + at, mask=at < size, cache_modifier=".cg")
            total = tl.maximum(total, more) if GREATEST else total + more
        if not GREATEST:
            total += tl.load(x + at, mask=at < size)
        tl.store(x + at, total, mask=at < size)
        if TWICE:
            tl.store(x_bf16 + at, total.to(tl.bfloat16), mask=at < size)
    tl.store(counts + program, count)
