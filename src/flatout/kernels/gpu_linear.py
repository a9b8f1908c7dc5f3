"""Launching products on a GPU: which kernel multiplies, in what pieces.

Four kernels: the matrix-vector one for one to a few tokens (`triton/gemv.py`), the tensor cores' for up to
256 (`triton/gemm.py`), wide tiles for 129 and more (`cuda/wide.cu`), and the vendor's library for any number.
Routes come from a table measured on known cards, `triton/routes.json`, and but for wide tiles from a rule on
any other.

Legend: M or T tokens, rows of x; N outputs, K inputs.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flatout.kernels import gpu_wide
from flatout.kernels.gpu import (
    FEW_SHARED,
    MANY_SHARED,
    Activations,
    Card,
    Cut,
    Exchange,
    Product,
    activate,
    argmax_keys,
    carve,
    measured_routes,
    quantize,
    start,
)
from flatout.kernels.packed import PAIRS, PackedWeight
from flatout.kernels.triton import gemm, gemv

FORMATS = {"bf16": 0, "fp8": 1, "int8": 2, "int4": 3}
PLAIN, RESIDUAL, SILU, GELU = 0, 1, 2, 3
FEW_ROWS = {"bf16": 2, "fp8": 2, "int8": 4, "int4": 4}
"""Most rows that the matrix-vector kernel takes: with more, the tensor cores are faster (H100)."""
SCALED_TOKENS = 2048
"""From so many on, the vendor's e4m3 products come with their scales."""
TILE_ROWS = (64, 128, 256)
"""Rows that the tensor cores' kernel is compiled for."""
PROMPT_TOKENS = 2048
"""From so many on, tokens have an entry of their own in the table, under this number."""


Route = tuple[int, int, int, int]
"""Chunks of a tile, rows of a block, warps, and programs a multiprocessor, or 0 for one a block."""


@cache
def gemv_route(name: str, fmt: str, n: int, k: int, m: int) -> Route:
    """How the matrix-vector kernel is launched for an (n, k) weight on the card called `name`."""
    measured = measured_routes(name).get(f"{fmt} {n}x{k} {m}")
    if measured is not None:
        return measured[0], measured[1], measured[2], measured[3]
    chunks = k // (8 * PAIRS[fmt])
    tile = min(triton.next_power_of_2(chunks), 256 if fmt == "bf16" else 128)
    rows = {"bf16": 4, "fp8": 4, "int8": 4, "int4": 8}[fmt]
    return int(tile), max(2, rows // m), 4 if tile >= 128 else 2, 0


class TileRoute(NamedTuple):
    """How the tensor cores' kernel is launched. programs: on each multiprocessor, or 0 for one a tile, which
    leaves whole tiles only; -1 for the vendor's library. fetch: blocks asked for before the wait. wide:
    equal parts of a tile's columns if it is launched by `gpu_wide.py`, with `programs` 0, or 0."""

    block_n: int
    block_k: int
    warps: int
    stages: int
    programs: int
    fetch: int
    wide: int = 0


VENDOR = TileRoute(0, 0, 0, 0, -1, 0)


@cache
def gemm_route(card: Card, fmt: str, n: int, k: int, tile_rows: int) -> TileRoute:
    """How the tensor cores' kernel is launched for an (n, k) weight; VENDOR if it is not."""
    measured = measured_routes(card.name).get(f"{fmt} {n}x{k} tile {tile_rows}")
    if measured is not None:
        return TileRoute(*measured)
    # As on the H100: tiles enough for every multiprocessor take what comes after them along; of smaller
    # weights only those that meet few tokens gain.
    block_k = 64 if fmt == "bf16" else 128
    if not card.tiles:
        return VENDOR
    if n >= 16384:
        return TileRoute(128, block_k, 4 if tile_rows == 64 else 8, 4, 0, 4)
    return TileRoute(64, block_k, 4, 8, 1, 4) if tile_rows == 64 else VENDOR


@cache
def prompt_route(name: str, fmt: str, n: int, k: int) -> TileRoute:
    """How PROMPT_TOKENS or more meet an (n, k) weight on the card called `name`: through the vendor's library
    unless wide tiles were measured to be faster."""
    measured = measured_routes(name).get(f"{fmt} {n}x{k} tile {PROMPT_TOKENS}")
    return VENDOR if measured is None else TileRoute(*measured)


@cache
def cut_of(n: int, k: int, route: TileRoute, units: int) -> Cut:
    """How the blocks of an (n, k) weight are divided among the programs of a card with so many units."""
    tiles, k_blocks = triton.cdiv(n, route.block_n), triton.cdiv(k, route.block_k)
    blocks = tiles * k_blocks
    programs = min(route.programs * units, blocks) if route.programs else tiles * max(1, route.wide)

    def owner(block: int) -> int:
        return int(((block + 1) * programs - 1) // blocks)

    parts = max(owner((t + 1) * k_blocks - 1) - owner(t * k_blocks) + 1 for t in range(tiles))
    return parts, route.block_n, k_blocks, programs, blocks


def words(x: Tensor, weight: PackedWeight) -> Tensor:
    """bfloat16 as the matrix-vector kernel reads it beside that weight."""
    return x.view(torch.int64 if PAIRS[weight.format] == 2 else torch.int32)


def multiply_few(
    card: Card,
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    *,
    gains: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    out_bf16: Tensor | None = None,
    epilogue: int = PLAIN,
    route: Route | None = None,
    exchange: Exchange | None = None,
) -> None:
    """out = epilogue(norm(x) W^T) for a few rows x bfloat16 (M, K); `triton/gemv.py` says what the arguments
    mean. With a residual, out (M, N) float32 and out_bf16 both get the sum; with an `exchange`, that of all
    ranks, or the kernel is only loaded for it. `route` replaces the table's."""
    m = x.shape[0]
    tile, rows, warps, programs = route or gemv_route(card.name, weight.format, weight.n, weight.k, m)
    blocks = triton.cdiv(weight.n, rows)
    kernel = start(
        card,
        gemv.gemv,
        (min(blocks, programs * card.units) if programs else blocks,),
        words(x, weight),
        None if gains is None else words(gains, weight),
        weight.words,
        weight.scales,
        weight.minima,
        residual,
        out,
        out_bf16,
        weight.n,
        eps,
        None if exchange is None else exchange.rooms,
        None if exchange is None else exchange.state,
        0 if exchange is None else exchange.index,
        K=weight.k,
        M=m,
        TILE=tile,
        ROWS=rows,
        FORMAT=FORMATS[weight.format],
        GROUP=weight.group,
        MINIMA=weight.minima is not None,
        NORM=gains is not None,
        EPILOGUE=RESIDUAL if residual is not None else epilogue,
        only_load=exchange is not None and exchange.only_load,
        RANK=0 if exchange is None else exchange.rank,
        RANKS=1 if exchange is None else exchange.ranks,
        CAPACITY=0 if exchange is None else exchange.capacity,
        ASM=card.asm,
        PDL=card.pdl,
        num_warps=warps,
    )
    carve(card, kernel, FEW_SHARED)


def unpacked(card: Card, weight: PackedWeight) -> Tensor:
    """bfloat16 (N, K) of any weight; a view of one that is bfloat16 already."""
    if weight.format == "bf16":
        return weight.words.view(torch.bfloat16)
    out = torch.empty(weight.n, weight.k, dtype=torch.bfloat16, device=weight.words.device)
    count = weight.k // (2 * PAIRS[weight.format])
    start(
        card,
        gemv.unpack,
        (weight.n, triton.cdiv(count, 512)),
        weight.words,
        weight.scales,
        weight.minima,
        out,
        weight.n,
        K=weight.k,
        FORMAT=FORMATS[weight.format],
        GROUP=weight.group,
        MINIMA=weight.minima is not None,
        BLOCK=512,
    )
    return out


@cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


def tile_route(card: Card, x: Activations, weight: PackedWeight) -> TileRoute:
    """How these tokens meet that weight; VENDOR if through the vendor's library."""
    tokens = x.values.shape[0]
    if weight.format != ("bf16" if x.scales is None else "fp8"):
        return VENDOR
    if tokens >= PROMPT_TOKENS:
        return prompt_route(card.name, weight.format, weight.n, weight.k)
    if tokens > TILE_ROWS[-1]:
        return VENDOR
    rows = next(rows for rows in TILE_ROWS if rows >= tokens)
    return gemm_route(card, weight.format, weight.n, weight.k, rows)


def takes_groups(card: Card, weight: PackedWeight, tokens: int, group: int) -> bool:
    """Whether so many tokens may meet that e4m3 weight with a scale for each `group` of their columns."""
    if weight.format != "fp8" or tokens > TILE_ROWS[-1]:
        return False
    rows = next(rows for rows in TILE_ROWS if rows >= tokens)
    route = gemm_route(card, weight.format, weight.n, weight.k, rows)
    return route.programs >= 0 and not route.wide and group % route.block_k == 0


def multiply(card: Card, x: Activations, weight: PackedWeight) -> Product:
    """x W^T."""
    route = tile_route(card, x, weight)
    if route.programs < 0:
        return _multiply_vendor(card, x, weight)
    cut = cut_of(weight.n, weight.k, route, card.units)
    out = torch.empty(
        cut[0], x.values.shape[0], weight.n, dtype=torch.bfloat16, device=x.values.device
    )  # fmt: skip
    multiply_tiles(card, x, weight, out, route, cut)
    return Product(out, cut=cut)


def multiply_whole(card: Card, x: Activations, weight: PackedWeight) -> Tensor:
    """bfloat16 (T, N): x W^T, with nothing left to be done."""
    product = _multiply_vendor(card, x, weight)
    if product.token_scales is None or product.row_scales is None:
        return product.values
    scales = product.token_scales[:, None] * product.row_scales[None, :]
    return (product.values.float() * scales).bfloat16()


def multiply_gated(
    card: Card, x: Activations, weight: PackedWeight, gelu: bool, fp8: bool, following: PackedWeight | None
) -> Activations:
    """silu(gate) * up of x W^T, whose columns are gate and up in turn, as the next linear takes it: in e4m3
    if `fp8`, where it can with a scale for each tile's columns. following: that linear, if it is to be
    asked."""
    route = tile_route(card, x, weight)
    if route.programs or route.wide > 1:
        return activate(card, multiply(card, x, weight), gelu, fp8)
    tokens, device = x.values.shape[0], x.values.device
    cut = cut_of(weight.n, weight.k, route, card.units)
    epilogue = gemm.GELU if gelu else gemm.SILU
    group = route.block_n // 2
    # Wide tiles give 112 columns, which no linear takes as a group.
    whole = weight.n % route.block_n == 0 and not route.wide
    if fp8 and whole and following is not None and takes_groups(card, following, tokens, group):
        codes = torch.empty(tokens, weight.n // 2, dtype=torch.float8_e4m3fn, device=device)
        scales = torch.empty(tokens, weight.n // route.block_n, device=device)
        multiply_tiles(card, x, weight, codes, route, cut, epilogue, scales)
        return Activations(codes, scales)
    out = torch.empty(tokens, weight.n // 2, dtype=torch.bfloat16, device=device)
    multiply_tiles(card, x, weight, out, route, cut, epilogue)
    return quantize(card, out) if fp8 else Activations(out)


def logits(card: Card, x: Activations, weight: PackedWeight) -> Tensor:
    """float32 (T, N) of the head."""
    route = tile_route(card, x, weight)
    if route.programs == 0:
        out = torch.empty(x.values.shape[0], weight.n, device=x.values.device)
        multiply_tiles(card, x, weight, out, route, cut_of(weight.n, weight.k, route, card.units))
        return out
    if card.dry:
        _compile_unpacking(card, x, weight)
        return torch.empty(x.values.shape[0], weight.n, device=x.values.device)
    if x.scales is None and not x.values.is_cuda:
        return x.values.float() @ unpacked(card, weight).float().T
    if x.scales is None:
        return torch.mm(x.values, unpacked(card, weight).T, out_dtype=torch.float32)
    assert weight.scales is not None
    one = _one(x.values.device)
    codes = weight.words.view(torch.float8_e4m3fn)
    y = torch._scaled_mm(x.values, codes.T, scale_a=one, scale_b=one, out_dtype=torch.float32)
    return y.mul_(x.scales[:, None]).mul_(weight.scales[None, :])


def greedy_keys(card: Card, x: Activations, weight: PackedWeight, keys: Tensor) -> None:
    """keys (T,) int64, at LEAST before, name the greatest of each row of the head's logits."""
    route = tile_route(card, x, weight)
    if route.programs:
        argmax_keys(card, logits(card, x, weight), keys)
    else:
        cut = cut_of(weight.n, weight.k, route, card.units)
        multiply_tiles(card, x, weight, keys, route, cut, gemm.ARGMAX)


def multiply_tiles(
    card: Card,
    x: Activations,
    weight: PackedWeight,
    out: Tensor,
    route: TileRoute,
    cut: Cut,
    epilogue: Any = gemm.PLAIN,
    out_scales: Tensor | None = None,
) -> None:
    """Into out, which is what `triton/gemm.py` says for each epilogue."""
    if route.wide:
        gate = int(epilogue.value)
        gpu_wide.multiply_wide(card, x, weight, out, route.block_n, route.stages, route.wide, gate)
        return
    tokens = x.values.shape[0]
    rows = next(rows for rows in TILE_ROWS if rows >= tokens)
    values = weight.words.view(x.values.dtype)
    kernel = start(
        card,
        gemm.gemm,
        (cut[3],),
        TensorDescriptor.from_tensor(x.values, [rows, route.block_k]),
        TensorDescriptor.from_tensor(values, [route.block_n, route.block_k]),
        values,
        x.scales,
        weight.scales,
        out,
        out_scales,
        tokens,
        weight.n,
        K=weight.k,
        BLOCK_T=rows,
        BLOCK_N=route.block_n,
        BLOCK_K=route.block_k,
        CUT=cut,
        SCALED=x.scales is not None,
        X_GROUP=0 if x.scales is None or x.scales.dim() == 1 else weight.k // x.scales.shape[1],
        EPILOGUE=epilogue,
        FETCH=route.fetch,
        COMPUTE=tl.float32 if x.values.device.type == "cpu" else _ELEMENTS[x.values.dtype],
        PDL=card.pdl,
        num_warps=route.warps,
        num_stages=route.stages,
    )
    carve(card, kernel, MANY_SHARED)


_ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float8_e4m3fn: tl.float8e4nv}


def _compile_unpacking(card: Card, x: Activations, weight: PackedWeight) -> None:
    """What is ours of a product of the vendor's. The product itself is left out on a dry card: PyTorch
    imports its compiler, for seconds, to say what shape comes out."""
    if x.scales is None:
        unpacked(card, weight)


def _multiply_vendor(card: Card, x: Activations, weight: PackedWeight) -> Product:
    whole = x.scales is None or (card.tiles and len(x.values) >= SCALED_TOKENS)
    if card.dry:
        _compile_unpacking(card, x, weight)
        y = torch.empty(x.values.shape[0], weight.n, dtype=torch.bfloat16, device=x.values.device)
        return Product(y) if whole else Product(y, x.scales, weight.scales)
    if x.scales is None:
        return Product(torch.mm(x.values, unpacked(card, weight).T))
    one = _one(x.values.device)
    scale_a, scale_b = one, one
    # Where the library's kernels for scales of tokens and rows are as fast as those without (H100, the four
    # products of a layer: 742 against 746 us for 2,048 tokens, 435 against 418 for 1,024), they are applied
    # there. Else they wait for whoever reads the product.
    if whole:
        assert weight.scales is not None
        scale_a, scale_b = x.scales[:, None], weight.scales[None, :]
    y = torch._scaled_mm(
        x.values,
        weight.words.view(torch.float8_e4m3fn).T,
        scale_a=scale_a,
        scale_b=scale_b,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return Product(y) if whole else Product(y, x.scales, weight.scales)
