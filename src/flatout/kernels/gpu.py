"""Launching the GPU kernels: which one multiplies, in what pieces, and with what the card offers.

Routes of the matrix-vector kernel come from a table measured on known cards, `triton/routes.json`, and from a
rule on any other. Everything runs on the current stream, allocates nothing that it is not given or returns,
and can be captured in a CUDA graph.

Legend: M rows of x, N outputs, K inputs, T tokens.
"""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from flatout.errors import BackendError
from flatout.kernels.packed import PAIRS, PackedWeight
from flatout.kernels.triton import elementwise, gemv, sample

FORMATS = {"bf16": 0, "fp8": 1, "int8": 2, "int4": 3}
PLAIN, RESIDUAL, SILU, GELU = 0, 1, 2, 3
FEW_ROWS = {"bf16": 2, "fp8": 2, "int8": 4, "int4": 4}
"""Most rows that the matrix-vector kernel takes: with more, the vendor's product is faster (H100)."""
ARGMAX_BLOCK = 4096
_NO_LAUNCH: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Card:
    """What a GPU offers. asm: PTX for unpacking; pdl: programmatic dependent launch; fp8: tensor cores that
    multiply e4m3."""

    name: str
    units: int  # streaming multiprocessors
    asm: bool
    pdl: bool
    fp8: bool


@cache
def card(device: torch.device) -> Card:
    """The GPU that `device` is; a processor runs the kernels in Triton's interpreter, for tests."""
    if device.type == "cpu":
        return Card("interpreter", units=1, asm=False, pdl=False, fp8=False)
    index = device.index or 0
    properties = torch.cuda.get_device_properties(index)
    version = (properties.major, properties.minor)
    nvidia = torch.version.hip is None
    return Card(
        name=properties.name,
        units=properties.multi_processor_count,
        asm=nvidia and version >= (8, 9),
        pdl=nvidia and version >= (9, 0),
        fp8=nvidia and version >= (8, 9),
    )


@cache
def _routes() -> dict[str, dict[str, list[int]]]:
    table: dict[str, dict[str, list[int]]] = json.loads(
        (Path(__file__).parent / "triton" / "routes.json").read_text(encoding="utf-8")
    )
    return table


Route = tuple[int, int, int, int]
"""Chunks of a tile, rows of a block, warps, and programs a multiprocessor, or 0 for one a block."""


@cache
def gemv_route(name: str, fmt: str, n: int, k: int, m: int) -> Route:
    """How the matrix-vector kernel is launched for an (n, k) weight on the card called `name`."""
    measured = _routes().get(name, {}).get(f"{fmt} {n}x{k} {m}")
    if measured is not None:
        return measured[0], measured[1], measured[2], measured[3]
    chunks = k // (8 * PAIRS[fmt])
    tile = min(triton.next_power_of_2(chunks), 256 if fmt == "bf16" else 128)
    rows = {"bf16": 4, "fp8": 4, "int8": 4, "int4": 8}[fmt]
    return int(tile), max(2, rows // m), 4 if tile >= 128 else 2, 0


def launch(card: Card) -> dict[str, Any]:
    """How this project's kernels are launched on the card."""
    return {"launch_pdl": True} if card.pdl else _NO_LAUNCH


_SHARED_MEMORY_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
_SHARED_PERCENT = 50
_carved: set[int] = set()


def carve(card: Card, kernel: Any) -> None:
    """Have a compiled kernel ask for the same split of a multiprocessor's memory into cache and shared memory
    as the others. A multiprocessor changes its split only when it is empty, so kernels that differ in it
    cannot overlap. For steps of a few sequences only: with many, attention wants all the shared memory."""
    if not card.pdl or kernel.function in _carved:
        return
    driver = ctypes.CDLL("libcuda.so.1")
    code = driver.cuFuncSetAttribute(
        ctypes.c_void_p(kernel.function), ctypes.c_int(_SHARED_MEMORY_CARVEOUT), ctypes.c_int(_SHARED_PERCENT)
    )
    if code != 0:
        raise BackendError("the driver must take a kernel's settings", f"CUDA error {code}", "a newer driver")
    _carved.add(kernel.function)


def words(x: Tensor, weight: PackedWeight) -> Tensor:
    """bfloat16 as the kernel reads it beside that weight."""
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
) -> None:
    """out = epilogue(norm(x) W^T) for a few rows x bfloat16 (M, K); `triton/gemv.py` says what the arguments
    mean. With a residual, out (M, N) float32 and out_bf16 both get the sum. `route` replaces the table's."""
    m = x.shape[0]
    tile, rows, warps, programs = route or gemv_route(card.name, weight.format, weight.n, weight.k, m)
    blocks = triton.cdiv(weight.n, rows)
    kernel = gemv.gemv[(min(blocks, programs * card.units) if programs else blocks,)](
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
        K=weight.k,
        M=m,
        TILE=tile,
        ROWS=rows,
        FORMAT=FORMATS[weight.format],
        GROUP=weight.group,
        MINIMA=weight.minima is not None,
        NORM=gains is not None,
        EPILOGUE=RESIDUAL if residual is not None else epilogue,
        ASM=card.asm,
        PDL=card.pdl,
        num_warps=warps,
        **launch(card),
    )
    carve(card, kernel)


def unpacked(weight: PackedWeight) -> Tensor:
    """bfloat16 (N, K) of any weight; a view of one that is bfloat16 already."""
    if weight.format == "bf16":
        return weight.words.view(torch.bfloat16)
    out = torch.empty(weight.n, weight.k, dtype=torch.bfloat16, device=weight.words.device)
    count = weight.k // (2 * PAIRS[weight.format])
    gemv.unpack[(weight.n, triton.cdiv(count, 512))](
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


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """What goes into a linear of many tokens: bfloat16 (T, K), or e4m3 with a scale a token, (T,)."""

    values: Tensor
    scales: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """What comes out: bfloat16 (T, N), to be multiplied by the scales of token and row, if there are any."""

    values: Tensor
    token_scales: Tensor | None = None
    row_scales: Tensor | None = None

    def rows(self, index: Tensor) -> Product:
        """Some tokens of it."""
        scales = None if self.token_scales is None else self.token_scales[index]
        return Product(self.values[index], scales, self.row_scales)


@cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


def multiply_many(x: Activations, weight: PackedWeight) -> Product:
    """x W^T through the vendor's library."""
    if x.scales is None:
        return Product(torch.mm(x.values, unpacked(weight).T))
    one = _one(x.values.device)
    codes = weight.words.view(torch.float8_e4m3fn)
    # Scales of tokens and rows wait for whoever reads the product: with them the library's kernel takes up to
    # 1.6 times as long (H100, 4096 x 14336, 64 tokens: 37 against 25 us).
    y = torch._scaled_mm(
        x.values, codes.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return Product(y, x.scales, weight.scales)


def logits_many(x: Activations, weight: PackedWeight) -> Tensor:
    """float32 (T, N) of the head."""
    if x.scales is None and not x.values.is_cuda:
        return x.values.float() @ unpacked(weight).float().T
    if x.scales is None:
        return torch.mm(x.values, unpacked(weight).T, out_dtype=torch.float32)
    assert weight.scales is not None
    one = _one(x.values.device)
    codes = weight.words.view(torch.float8_e4m3fn)
    y = torch._scaled_mm(x.values, codes.T, scale_a=one, scale_b=one, out_dtype=torch.float32)
    return y.mul_(x.scales[:, None]).mul_(weight.scales[None, :])


def embed(card: Card, tokens: Tensor, table: Tensor, factor: float, x: Tensor, x_bf16: Tensor) -> None:
    size = table.shape[1]
    elementwise.embed[(tokens.shape[0], triton.cdiv(size, 1024))](
        tokens, table, x, x_bf16, size, factor, BLOCK=1024, PDL=card.pdl, **launch(card)
    )


def add_norm(
    card: Card,
    x: Tensor,
    product: Product | None,
    gains: Tensor,
    eps: float,
    fp8: bool,
) -> Activations:
    """x += product; then x / rms(x) * gains, in e4m3 if asked for."""
    tokens, size = x.shape
    out, scales = _outputs(x, tokens, size, fp8)
    elementwise.add_norm[(tokens,)](
        x,
        None if product is None else product.values,
        None if product is None else product.token_scales,
        None if product is None else product.row_scales,
        gains,
        out,
        scales,
        size,
        eps,
        ADD=product is not None,
        SCALED=product is not None and product.token_scales is not None,
        FP8=fp8,
        BLOCK=triton.next_power_of_2(size),
        PDL=card.pdl,
        num_warps=_warps(size),
        **launch(card),
    )
    return Activations(out, scales)


def activate(card: Card, product: Product, gelu: bool, fp8: bool) -> Activations:
    """silu(gate) * up of a product whose columns are gate and up in turn."""
    tokens, size = product.values.shape[0], product.values.shape[1] // 2
    out, scales = _outputs(product.values, tokens, size, fp8)
    block = triton.next_power_of_2(size) if fp8 else 2048
    warps = _warps(2 * block)
    elementwise.activate[(tokens, triton.cdiv(size, block))](
        product.values,
        product.token_scales,
        product.row_scales,
        out,
        scales,
        size,
        GELU=gelu,
        SCALED=product.token_scales is not None,
        FP8=fp8,
        BLOCK=block,
        PDL=card.pdl,
        num_warps=warps,
        **launch(card),
    )
    return Activations(out, scales)


def quantize(card: Card, x: Tensor) -> Activations:
    """x bfloat16 (T, K) in e4m3."""
    tokens, size = x.shape
    out, scales = _outputs(x, tokens, size, True)
    elementwise.quantize[(tokens,)](
        x,
        out,
        scales,
        size,
        BLOCK=triton.next_power_of_2(size),
        PDL=card.pdl,
        num_warps=_warps(size),
        **launch(card),
    )
    return Activations(out, scales)


def _warps(size: int) -> int:
    return max(1, min(16, int(triton.next_power_of_2(size)) // 512))


def _outputs(like: Tensor, tokens: int, size: int, fp8: bool) -> tuple[Tensor, Tensor | None]:
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    out = torch.empty(tokens, size, dtype=dtype, device=like.device)
    return out, torch.empty(tokens, device=like.device) if fp8 else None


def argmax_keys(card: Card, logits: Tensor, keys: Tensor) -> None:
    """keys (rows,) int64, at LEAST before, name the greatest of each row of float32 logits (rows, V)."""
    rows, size = logits.shape
    sample.argmax[(triton.cdiv(size, ARGMAX_BLOCK), rows)](
        logits, keys, size, BLOCK=ARGMAX_BLOCK, PDL=card.pdl, num_warps=8, **launch(card)
    )


def advance(
    card: Card, keys: Tensor, drawn: Tensor | None, temperature: Tensor, tokens: Tensor, positions: Tensor
) -> None:
    """The chosen tokens become those of the next step; positions in use go on by one."""
    rows = keys.shape[0]
    sample.advance[(1,)](
        keys,
        drawn,
        temperature,
        tokens,
        positions,
        rows,
        DRAWN=drawn is not None,
        ROWS=triton.next_power_of_2(rows),
        PDL=card.pdl,
        **launch(card),
    )
