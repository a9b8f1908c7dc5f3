"""Launching the GPU kernels that take one token's numbers at a time, and what the card offers all of them.

Everything runs on the current stream, allocates nothing that it is not given or returns, and can be captured
in a CUDA graph. Products are launched by `gpu_linear.py`, attention by `gpu_attention.py`.

Legend: T tokens, N outputs, K inputs.
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

from flatout.core.files import corrupt, read_json_object
from flatout.core.sources import cache_dir
from flatout.errors import BackendError, ResourceError
from flatout.kernels.triton import elementwise, sample

ARGMAX_BLOCK = 4096
_NO_LAUNCH: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Card:
    """What a GPU offers. asm: PTX for unpacking; pdl: programmatic dependent launch; fp8: tensor cores that
    multiply e4m3. tiles: shared memory for the tiles of `triton/gemm.py`. wgmma: what `cuda/` is for.
    dry: kernels are compiled where they would be launched, and nothing runs."""

    name: str
    units: int  # streaming multiprocessors
    asm: bool
    pdl: bool
    fp8: bool
    tiles: bool = False
    wgmma: bool = False
    dry: bool = False


@cache
def card(device: torch.device) -> Card:
    """The GPU that `device` is; a processor runs the kernels in Triton's interpreter, for tests."""
    if device.type == "cpu":
        return Card("interpreter", units=1, asm=False, pdl=False, fp8=False, tiles=True)
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
        tiles=nvidia and properties.major in (9, 10),  # 227 KB of shared memory a program
        wgmma=nvidia and properties.major == 9,
    )


ROUTES = "gpu_routes.json"
Table = dict[str, dict[str, list[int]]]
"""Card -> kernel -> how it is launched."""


@cache
def _tables() -> Table:
    shipped = (Path(__file__).parent / "triton" / "routes.json").read_text(encoding="utf-8")
    table: Table = json.loads(shipped)
    for name, entries in own_routes().items():
        table.setdefault(name, {}).update(entries)
    return table


def own_routes() -> Table:
    """What was measured on this machine and kept in the cache folder (`flatout profile --tune`). Raises
    ModelFileError for a file that does not hold that."""
    try:
        path = cache_dir() / ROUTES
    except ResourceError:  # without a folder nothing was kept
        return {}
    if not path.exists():
        return {}
    table = read_json_object(path)
    for entries in table.values():
        settings = entries.values() if isinstance(entries, dict) else [None]
        if not all(isinstance(s, list) and all(type(n) is int for n in s) for s in settings):
            raise corrupt(
                path,
                "launch settings are lists of whole numbers, by card and kernel",
                entries,
                "delete the file",
            )
    return table


def measured_routes(name: str) -> dict[str, list[int]]:
    """How kernels are launched on the card called `name`, where that was measured (perf/gpu_routes.py),
    here or for the table that comes with the package."""
    return _tables().setdefault(name, {})


def start(
    card: Card, kernel: Any, grid: tuple[int, ...], *args: Any, only_load: bool = False, **constants: Any
) -> Any:
    """Launch one of this project's kernels, or on a dry card compile it; what was compiled. only_load:
    compile it and load it on the card, to be launched later."""
    if card.pdl:
        constants["launch_pdl"] = True
    if not (card.dry or only_load):
        return kernel[grid](*args, **constants)
    compiled = kernel.warmup(*args, grid=grid, **constants)
    if only_load:
        _ = compiled.run
    return compiled


_SHARED_MEMORY_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
FEW_SHARED, MANY_SHARED = 50, 100
"""Per cent of a multiprocessor's memory that is shared in steps of few tokens, which want cache, and of many,
whose products and attention want room."""
_carved: dict[int, int] = {}


def carve(card: Card, kernel: Any, percent: int) -> None:
    """Have a compiled kernel ask for the same split of a multiprocessor's memory into cache and shared memory
    as its neighbours. A multiprocessor changes its split only when it is empty, so kernels that differ in it
    cannot overlap."""
    if not card.pdl or card.dry or _carved.get(kernel.function) == percent:
        return
    driver = ctypes.CDLL("libcuda.so.1")
    code = driver.cuFuncSetAttribute(
        ctypes.c_void_p(kernel.function), ctypes.c_int(_SHARED_MEMORY_CARVEOUT), ctypes.c_int(percent)
    )
    if code != 0:
        raise BackendError("the driver must take a kernel's settings", f"CUDA error {code}", "a newer driver")
    _carved[kernel.function] = percent


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """What goes into a linear of many tokens: bfloat16 (T, K), or e4m3 with a scale a token, (T,), or one for
    each of a token's groups of columns, (T, groups), if the linear takes them (`gpu_linear.takes_groups`)."""

    values: Tensor
    scales: Tensor | None = None

    def rows(self, index: Tensor) -> Activations:
        """Some tokens of it."""
        scales = None if self.scales is None else self.scales.index_select(0, index)
        return Activations(self.values.index_select(0, index), scales)


Cut = tuple[int, int, int, int, int]
"""How a product was divided among programs; `triton/elementwise.py:joined` says what the numbers are."""
WHOLE: Cut = (1, 1, 1, 1, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """What comes out: bfloat16 (T, N), or (parts, T, N) to be added up as `cut` says; to be multiplied by the
    scales of token and row, if there are any."""

    values: Tensor
    token_scales: Tensor | None = None
    row_scales: Tensor | None = None
    cut: Cut = WHOLE

    @property
    def tokens(self) -> int:
        return self.values.shape[-2]

    @property
    def part_size(self) -> int:
        """Numbers from one part to the next."""
        return self.tokens * self.values.shape[-1]

    def rows(self, index: Tensor) -> Product:
        """Some tokens of it."""
        # Not by an index in brackets: on "meta" that imports PyTorch's compiler.
        scales = None if self.token_scales is None else self.token_scales.index_select(0, index)
        return Product(self.values.index_select(-2, index), scales, self.row_scales, self.cut)


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """An exchange between GPUs: `triton/exchange.py` says what the parts are. only_load: it does not take
    place, but its kernels are made ready."""

    rooms: Tensor
    state: Tensor
    rank: int
    ranks: int
    capacity: int
    index: int = 0
    only_load: bool = False


def embed(card: Card, tokens: Tensor, table: Tensor, factor: float, x: Tensor, x_bf16: Tensor) -> None:
    size = table.shape[1]
    grid = tokens.shape[0], triton.cdiv(size, 1024)
    start(
        card, elementwise.embed, grid, tokens, table, x, x_bf16, size, factor, BLOCK=1024, PDL=card.pdl
    )  # fmt: skip


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
    kernel = start(
        card,
        elementwise.add_norm,
        (tokens,),
        x,
        None if product is None else product.values,
        None if product is None else product.token_scales,
        None if product is None else product.row_scales,
        gains,
        out,
        scales,
        size,
        eps,
        0 if product is None else product.part_size,
        ADD=product is not None,
        CUT=WHOLE if product is None else product.cut,
        SCALED=product is not None and product.token_scales is not None,
        FP8=fp8,
        BLOCK=triton.next_power_of_2(size),
        PDL=card.pdl,
        num_warps=_warps(size),
    )
    carve(card, kernel, MANY_SHARED)
    return Activations(out, scales)


def activate(card: Card, product: Product, gelu: bool, fp8: bool) -> Activations:
    """silu(gate) * up of a product whose columns are gate and up in turn."""
    tokens, size = product.tokens, product.values.shape[-1] // 2
    out, scales = _outputs(product.values, tokens, size, fp8)
    # For e4m3 a program has all of a token: in pieces of 4,096 117 us a layer, of 2,048 125 (H100, a prompt).
    most = 4096 if fp8 and product.token_scales is None else 2048
    block = min(most, triton.next_power_of_2(size))
    chunks = triton.cdiv(size, block)
    kernel = start(
        card,
        elementwise.activate,
        (tokens, 1 if fp8 else chunks),
        product.values,
        product.token_scales,
        product.row_scales,
        out,
        scales,
        size,
        product.part_size,
        CUT=product.cut,
        GELU=gelu,
        SCALED=product.token_scales is not None,
        FP8=fp8,
        BLOCK=block,
        CHUNKS=chunks if fp8 else 1,
        PDL=card.pdl,
        num_warps=min(8, _warps(2 * block)),
    )
    carve(card, kernel, MANY_SHARED)
    return Activations(out, scales)


def quantize(card: Card, x: Tensor) -> Activations:
    """x bfloat16 (T, K) in e4m3."""
    tokens, size = x.shape
    out, scales = _outputs(x, tokens, size, True)
    kernel = start(
        card, elementwise.quantize, (tokens,), x, out, scales, size, BLOCK=triton.next_power_of_2(size),
        PDL=card.pdl, num_warps=_warps(size),
    )  # fmt: skip
    carve(card, kernel, MANY_SHARED)
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
    grid = triton.cdiv(size, ARGMAX_BLOCK), rows
    start(card, sample.argmax, grid, logits, keys, size, BLOCK=ARGMAX_BLOCK, PDL=card.pdl, num_warps=8)


def advance(
    card: Card,
    keys: Tensor,
    drawn: Tensor | None,
    temperature: Tensor,
    tokens: Tensor,
    positions: Tensor,
    results: Tensor,
    turn: Tensor,
) -> None:
    """The chosen tokens become those of the next step and are written to the other half of results int32 (2,
    capacity) than turn (1,) names; positions in use go on by one."""
    rows = keys.shape[0]
    start(
        card, sample.advance, (1,), keys, drawn, temperature, tokens, positions, results, turn,
        results.shape[1], rows,
        DRAWN=drawn is not None, ROWS=triton.next_power_of_2(rows), PDL=card.pdl,
    )  # fmt: skip
