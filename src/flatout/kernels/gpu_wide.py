"""Launching `cuda/wide.cu`: products on Hopper in tiles that Triton has no shapes for.

Triton's tiles have powers of two as sides; 28,672 rows of a weight are 128 tiles of 224, one for nearly every
multiprocessor, and as tiles of 128 two rounds of which the second is two thirds full.

Legend: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

from torch import Tensor

from flatout.errors import BackendError
from flatout.kernels.gpu import Activations, Card
from flatout.kernels.gpu_cuda import (
    ROW_BYTES,
    SHARED_BYTES,
    Kernel,
    compiled,
    launch,
    products_of_64,
    tensor_map,
)
from flatout.kernels.packed import PackedWeight

_T_TILE, _PAIR, _THREADS = 256, 2, 256
_ALIGNMENT = 1024  # of blocks in shared memory


class Variant(NamedTuple):
    """What a kernel is compiled for. gate: 0, or 1 for silu and 2 for gelu_tanh of every other column."""

    n_tile: int
    stages: int
    fp8: bool
    gate: int


def stage_bytes(n_tile: int) -> int:
    """Bytes of shared memory of a stage: of a block of columns, both factors."""
    return (_T_TILE + n_tile) * ROW_BYTES


def most_stages(n_tile: int) -> int:
    """Stages that a program has room for."""
    return (SHARED_BYTES - _ALIGNMENT) // stage_bytes(n_tile)


@cache
def kernel_of(variant: Variant) -> Kernel:
    n_tile, stages, fp8, gate = variant
    return Kernel(
        "wide",
        products_of_64("multiply", n_tile, fp8),
        (f"N_TILE={n_tile}", f"STAGES={stages}", f"FP8={int(fp8)}", f"GATE={gate}"),
        stages * stage_bytes(n_tile) + _ALIGNMENT,
    )


def multiply_wide(
    card: Card,
    x: Activations,
    weight: PackedWeight,
    out: Tensor,
    n_tile: int,
    stages: int,
    parts: int,
    gate: int,
) -> None:
    """out bfloat16 (parts, T, N), to be added up, or (T, N / 2) where gated, = x W^T; `cuda/wide.cu` says
    what the numbers mean. Raises BackendError."""
    tokens, k = x.values.shape
    block_k = ROW_BYTES // x.values.element_size()
    blocks = k // (block_k * parts)
    if k % (block_k * parts) or blocks < stages or weight.n % 16 or n_tile % 16 or (gate and parts > 1):
        raise BackendError(
            f"wide products take K in {parts} equal parts of at least {stages} blocks of {block_k}, N in 16s",
            f"{weight.n}x{k}, {n_tile} rows a tile",
            "another entry in the table of settings (flatout profile --tune makes one)",
        )
    kernel = kernel_of(Variant(n_tile, stages, x.scales is not None, gate))
    if card.dry:
        compiled(kernel)
        return
    tiles = -(-weight.n // (_PAIR * n_tile)) * _PAIR
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in (x.scales, weight.scales, out)]
    numbers = (tokens, out.shape[-1], tiles, parts, blocks)
    launch(
        kernel,
        x.values.device,
        tiles * parts * -(-tokens // _T_TILE),
        _THREADS,
        [
            tensor_map(x.values, _T_TILE // _PAIR),
            tensor_map(weight.words.view(x.values.dtype), n_tile),
        ],
        [*map(ctypes.c_uint64, pointers), *map(ctypes.c_int, numbers)],
    )
