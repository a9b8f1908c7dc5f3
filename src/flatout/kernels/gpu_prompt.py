"""Launching `cuda/prompt.cu`: attention of prompts on Hopper cards.

Legend: T tokens of a prompt, S tokens seen, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache

import torch
from torch import Tensor

from flatout.errors import BackendError
from flatout.kernels.gpu import Card
from flatout.kernels.gpu_cuda import SHARED_BYTES, Kernel, compiled, launch, products_of_64, tensor_map

HEAD_DIMS = (64, 128)
_BLOCK, _ROWS, _THREADS = 128, 64, 384
_QUERY_TILES, _MOST_STAGES = 2, 8
_ALIGNMENT, _BARRIER_BYTES = 1024, 256
_NO_WINDOW = 1 << 30
_SHORT = 512  # keys that any program reads soon enough


def serves(card: Card, tokens: int, seen: int, heads: int, head_dim: int) -> bool:
    """Whether `tokens` that see up to `seen` read faster through the kernel than through PyTorch's, several
    of whose programs share a long row of keys: with 32 tiles of queries over 2,048 keys (32/8 x 128, H100)
    27 against 24 us, with 64 26 against 38."""
    tiles = heads * -(-tokens // _BLOCK)
    return card.wgmma and head_dim in HEAD_DIMS and (seen <= _SHORT or 3 * tiles >= card.units)


@cache
def kernel_of(head_dim: int, pair: int) -> Kernel:
    """pair: programs that share keys and values, 1 or 2."""
    tile = _BLOCK * head_dim * 2
    room = SHARED_BYTES - _ALIGNMENT - _BARRIER_BYTES
    stages = min(_MOST_STAGES, room // tile - _QUERY_TILES)
    return Kernel(
        "prompt",
        products_of_64("score", _BLOCK, in_registers=True)
        + products_of_64("gather", head_dim, in_registers=True, turned=True),
        (f"E={head_dim}", f"STAGES={stages}", f"PAIR={pair}"),
        (_QUERY_TILES + stages) * tile + _ALIGNMENT,
    )


def attend(card: Card, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """bfloat16 (T, H E): the last T of S tokens, q (T, H, E), over k and v (S, G, E), each a token's heads in
    one piece. Keys at least `window` tokens back are not seen. Raises BackendError."""
    tokens, heads, head_dim = q.shape
    seen, kv_heads, _ = k.shape
    fits = all(part.stride()[1:] == (head_dim, 1) and part.dtype == torch.bfloat16 for part in (q, k, v))
    fits &= head_dim in HEAD_DIMS and heads % kv_heads == 0 and k.shape == v.shape
    if not fits or not 0 < tokens <= seen:
        raise BackendError(
            f"attention of prompts takes bfloat16 heads of {' or '.join(map(str, HEAD_DIMS))} numbers, each "
            "token's in one piece, and at most as many queries as keys",
            f"queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}, {q.dtype}",
            "--runner cpu, and please report the model",
        )
    repeat = heads // kv_heads
    pair = 2 if repeat % 2 == 0 else 1
    kernel = kernel_of(head_dim, pair)
    out = torch.empty(tokens, heads * head_dim, dtype=q.dtype, device=q.device)
    if card.dry:
        compiled(kernel)
        return out
    numbers = (tokens, seen, heads, repeat, _NO_WINDOW if window is None else window)
    launch(
        kernel,
        q.device,
        min(card.units // pair, heads // pair * -(-tokens // _BLOCK)) * pair,
        _THREADS,
        [tensor_map(part.flatten(1), _ROWS) for part in (q, k, v, out)],
        [*map(ctypes.c_int, numbers), ctypes.c_float(head_dim**-0.5 * math.log2(math.e))],
    )
    return out
