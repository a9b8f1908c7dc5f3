"""y = x W^T for 3 to 256 rows of x, on the tensor cores: reading W once, at the rate memory gives it.

W is cut into tiles of BLOCK_N rows and these into blocks of BLOCK_K columns. Every program multiplies an
equal run of consecutive blocks (stream-K, Osama et al., arXiv:2301.03598), so that all multiprocessors are
busy to the end whatever the shape. A tile whose blocks fall to several programs comes out in parts, in
bfloat16, which whoever reads the product adds up in the order of its columns (`elementwise.py:joined`):
nothing waits for another program, and sums have one order. That order depends on the route alone, not on the
number of tokens or on what the other rows hold.

While the kernel before it still runs, a program has its first blocks of W fetched into the second-level cache
(programmatic dependent launch). Blocks come through the bulk copy engine where the card has one.

Bytes: W once, x once a program from the second-level cache. Operations: 2 T N K.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flatout.kernels.triton.elementwise import gated, owner
from flatout.kernels.triton.sample import greatest

PLAIN, SILU, GELU, ARGMAX = (tl.constexpr(i) for i in range(4))
_LINE = tl.constexpr(128)  # bytes of the second-level cache that are fetched together


@triton.jit
def _fetch(w, rows, column, K: tl.constexpr, BLOCK_K: tl.constexpr, FETCH: tl.constexpr):
    """Ask for FETCH blocks of the rows, from a column on, to be brought into the second-level cache."""
    SIZE: tl.constexpr = w.dtype.element_ty.primitive_bitwidth // 8
    LINES: tl.constexpr = FETCH * BLOCK_K * SIZE // _LINE
    columns = tl.minimum(column + tl.arange(0, LINES) * (_LINE // SIZE), K - 1)
    at = w + rows.to(tl.int64)[:, None] * K + columns[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _group_scale(token_scales, tokens, column, T, K: tl.constexpr, X_GROUP: tl.constexpr):
    """float32 (BLOCK_T,): each token's scale of a column; of the last ones for columns beyond the edge."""
    group = tl.minimum(column // X_GROUP, K // X_GROUP - 1)
    return tl.load(token_scales + tokens * (K // X_GROUP) + group, mask=tokens < T, other=0.0)


@triton.jit(do_not_specialize=["T"])
def gemm(
    x,  # descriptor of (T, K), BLOCK_T by BLOCK_K at a time
    w,  # descriptor of (N, K), BLOCK_N by BLOCK_K at a time
    w_values,  # the same as a pointer
    token_scales,  # float32 (T,), or with X_GROUP (T, K / X_GROUP), if SCALED
    row_scales,  # float32 (N,), if SCALED
    out,  # (parts, T, N); bfloat16 (T, N / 2) if EPILOGUE is SILU or GELU; int64 (T,) if it is ARGMAX
    T,
    N,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,  # at least T
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CUT: tl.constexpr,  # as `joined` takes it
    SCALED: tl.constexpr,
    X_GROUP: tl.constexpr,  # columns of x that share a scale, a multiple of BLOCK_K; 0: all
    EPILOGUE: tl.constexpr,
    FETCH: tl.constexpr,  # blocks of W to fetch ahead
    COMPUTE: tl.constexpr,  # what the tensor cores multiply
    PDL: tl.constexpr,
):
    """out = x W^T, times the scales of token and row; or silu(gate) * up of its neighbouring columns; or at
    least the key (`sample.py`) of each row's greatest."""
    K_BLOCKS: tl.constexpr = CUT[2]
    PROGRAMS: tl.constexpr = CUT[3]
    BLOCKS: tl.constexpr = CUT[4]
    program = tl.program_id(0)
    start = program * BLOCKS // PROGRAMS
    end = (program + 1) * BLOCKS // PROGRAMS
    rows = tl.arange(0, BLOCK_N)
    if PDL:
        gdc_launch_dependents()
        if FETCH > 0:
            first = tl.minimum(start // K_BLOCKS * BLOCK_N + rows, N - 1)
            _fetch(w_values, first, start % K_BLOCKS * BLOCK_K, K, BLOCK_K, FETCH)
        gdc_wait()
    tokens = tl.arange(0, BLOCK_T)
    for tile in tl.range(start // K_BLOCKS, tl.cdiv(end, K_BLOCKS), num_stages=1):
        acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        begin = tl.maximum(start - tile * K_BLOCKS, 0)
        if X_GROUP > 0:
            scale = _group_scale(token_scales, tokens, begin * BLOCK_K, T, K, X_GROUP)
        for block in tl.range(begin, tl.minimum(end - tile * K_BLOCKS, K_BLOCKS)):
            its_x = x.load([0, block * BLOCK_K]).to(COMPUTE)
            its_w = w.load([tile * BLOCK_N, block * BLOCK_K]).to(COMPUTE)
            if X_GROUP > 0:
                its_scale = (
                    scale  # asked for a block ahead, because it takes as long to come as a block to multiply
                )
                scale = _group_scale(token_scales, tokens, (block + 1) * BLOCK_K, T, K, X_GROUP)
                acc += tl.dot(its_x, tl.trans(its_w)) * its_scale[:, None]
            else:
                acc = tl.dot(its_x, tl.trans(its_w), acc)
        columns = tile * BLOCK_N + rows
        inside = (tokens < T)[:, None] & (columns < N)[None, :]
        if SCALED:
            if X_GROUP == 0:
                acc *= tl.load(token_scales + tokens, mask=tokens < T, other=0.0)[:, None]
            acc *= tl.load(row_scales + columns, mask=columns < N, other=0.0)[None, :]
        if EPILOGUE == PLAIN:
            part = (program - owner(tile * K_BLOCKS, CUT)).to(tl.int64)
            at = (part * T + tokens[:, None]) * N + columns[None, :]
            tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
        elif EPILOGUE == ARGMAX:
            logits = tl.where((columns < N)[None, :], acc, -float("inf"))
            tl.atomic_max(out + tokens, greatest(logits, columns[None, :], 1), mask=tokens < T)
        else:
            gate, up = tl.split(tl.reshape(acc, (BLOCK_T, BLOCK_N // 2, 2)))
            half = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            inside = (tokens < T)[:, None] & (half < N // 2)[None, :]
            at = tokens.to(tl.int64)[:, None] * (N // 2) + half[None, :]
            values = gated(gate, up, EPILOGUE == GELU)
            tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)
