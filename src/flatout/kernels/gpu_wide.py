"""Compiling and launching `cuda/wide.cu`: products on Hopper in tiles that Triton has no shapes for.

Triton's tiles have powers of two as sides; 28,672 rows of a weight are 128 tiles of 224, one for nearly every
multiprocessor, and as tiles of 128 two rounds of which the second is two thirds full. NVRTC, the compiler,
comes with PyTorch; what it makes is kept in the cache folder.

Legend: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flatout.core.files import write_bytes
from flatout.core.sources import cache_dir
from flatout.errors import BackendError, ResourceError
from flatout.kernels.gpu import Activations, Card
from flatout.kernels.packed import PackedWeight

T_TILE = 256
_PAIR, _THREADS, _ROW_BYTES = 2, 256, 128
_SOURCE = Path(__file__).parent / "cuda" / "wide.cu"
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PROGRAMMATIC_LAUNCH = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64


class Variant(NamedTuple):
    """What a kernel is compiled for. gate: 0, or 1 for silu and 2 for gelu_tanh of every other column."""

    n_tile: int
    stages: int
    fp8: bool
    gate: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a program, whose blocks lie at multiples of 1,024."""
        return self.stages * (T_TILE + self.n_tile) * _ROW_BYTES + 1024


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


def multiply_header(n_tile: int, fp8: bool) -> str:
    """`multiply(d, a, b, add)` of wide.cu: d = a b^T for 64 rows, added to d unless `add` is zero."""
    count = n_tile // 2
    names = ", ".join(f"%{i}" for i in range(count))
    sums = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    kind = f"m64n{n_tile}k32.f32.e4m3.e4m3" if fp8 else f"m64n{n_tile}k16.f32.bf16.bf16"
    transposed = "" if fp8 else ", 0, 0"
    return (
        "__device__ __forceinline__ void multiply(\n"
        f"    float (&d)[{count}], unsigned long long a, unsigned long long b, int add) {{\n"
        f'  asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{count + 2}, 0;"\n'
        f'    " wgmma.mma_async.sync.aligned.{kind}"\n'
        f'    " {{{names}}}, %{count}, %{count + 1}, p, 1, 1{transposed}; }}"\n'
        f'    : {sums} : "l"(a), "l"(b), "r"(add));\n}}\n'
    )


@cache
def _nvrtc() -> ctypes.CDLL:
    """The compiler. Raises BackendError where there is none."""
    name = f"libnvrtc.so.{(torch.version.cuda or '13').split('.')[0]}"
    found = importlib.util.find_spec("nvidia")
    folders = [] if found is None else found.submodule_search_locations or []
    shipped = [str(path) for folder in folders for path in Path(folder).glob(f"*/lib/{name}")]
    for path in (*shipped, name):
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    raise BackendError(
        "wide products on Hopper cards are compiled by NVRTC when they are first used",
        f"{name} not found",
        "the PyTorch wheels of pip, which bring it, or pip install nvidia-cuda-nvrtc",
    )


def compiled(variant: Variant) -> bytes:
    """Machine code for sm_90a, from the cache folder if it is there. Raises BackendError. Needs no GPU."""
    nvrtc = _nvrtc()
    source = _SOURCE.read_text(encoding="utf-8")
    header = multiply_header(variant.n_tile, variant.fp8)
    options = [
        "-arch=sm_90a", "-std=c++17", f"-DN_TILE={variant.n_tile}", f"-DSTAGES={variant.stages}",
        f"-DFP8={int(variant.fp8)}", f"-DGATE={variant.gate}",
    ]  # fmt: skip
    version = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(version[0]), ctypes.byref(version[1]))
    parts = [source, header, *options, str(version[0].value), str(version[1].value)]
    path: Path | None = None
    with suppress(ResourceError):  # without a folder it is compiled in every process
        path = cache_dir() / f"wide-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.cubin"
    if path is not None and path.exists():
        return path.read_bytes()
    program = ctypes.c_void_p()
    headers, names = (ctypes.c_char_p * 1)(header.encode()), (ctypes.c_char_p * 1)(b"multiply.h")
    _check(
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"wide.cu", 1, headers, names),
        "NVRTC",
    )
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    code = nvrtc.nvrtcCompileProgram(program, len(options), given)
    if code != 0:
        log = _bytes_of(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
        raise BackendError(
            "NVRTC must compile wide.cu", log.decode(errors="replace")[:400], "a newer PyTorch (CUDA 12.4)"
        )
    found = _bytes_of(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if path is not None:
        write_bytes(path, found)
    return found


def _bytes_of(size_of: Callable[..., int], copy: Callable[..., int], program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)), "NVRTC")
    room = ctypes.create_string_buffer(size.value)
    _check(copy(program, room), "NVRTC")
    return room.raw


def _check(code: int, what: str) -> None:
    if code != 0:
        raise BackendError(f"{what} must do what wide products ask for", f"error {code}", "a newer driver")


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@cache
def _function(variant: Variant, device: int) -> ctypes.c_void_p:
    """The kernel, loaded on a GPU, which is the current one."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), compiled(variant)), "the driver")
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, b"wide"), "the driver")
    _check(_driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, variant.shared), "the driver")
    return function


def _map(room: ctypes.Array[ctypes.c_char], values: Tensor, rows: int) -> int:
    """Where in `room` lies what the bulk copy engine is told of values (R, K): blocks of `rows` rows of 128
    bytes."""
    address = -(-ctypes.addressof(room) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
    size = values.element_size()
    code = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(address),
        9 if size == 2 else 0,  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, UINT8
        2,
        ctypes.c_void_p(values.data_ptr()),
        (ctypes.c_uint64 * 2)(values.shape[1], values.shape[0]),
        (ctypes.c_uint64 * 1)(values.shape[1] * size),
        (ctypes.c_uint32 * 2)(_ROW_BYTES // size, rows),
        (ctypes.c_uint32 * 2)(1, 1),
        0,
        3,  # CU_TENSOR_MAP_SWIZZLE_128B
        2,  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B: with 256 a step of 256 sequences took 1 % longer
        0,
    )
    _check(code, "the driver")
    return address


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
    variant = Variant(n_tile, stages, x.scales is not None, gate)
    tokens, k = x.values.shape
    block_k = _ROW_BYTES // x.values.element_size()
    blocks = k // (block_k * parts)
    if k % (block_k * parts) or blocks < stages or weight.n % 16 or n_tile % 16 or (gate and parts > 1):
        raise BackendError(
            f"wide products take K in {parts} equal parts of at least {stages} blocks of {block_k}, N in 16s",
            f"{weight.n}x{k}, {n_tile} rows a tile",
            "another entry in the table of settings (flatout profile --tune makes one)",
        )
    if card.dry:
        compiled(variant)
        return
    tiles = -(-weight.n // (_PAIR * n_tile)) * _PAIR
    rooms = [ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT) for _ in range(2)]
    pointers = [
        0 if tensor is None else tensor.data_ptr() for tensor in (x.scales, weight.scales, out)
    ]  # fmt: skip
    numbers = (tokens, out.shape[-1], tiles, parts, blocks)
    arguments = [*map(ctypes.c_uint64, pointers), *map(ctypes.c_int, numbers)]
    places = (ctypes.c_void_p * (2 + len(arguments)))(
        _map(rooms[0], x.values, T_TILE // _PAIR),
        _map(rooms[1], weight.words.view(x.values.dtype), n_tile),
        *map(ctypes.addressof, arguments),
    )
    early = _Attribute(_PROGRAMMATIC_LAUNCH, 0, (ctypes.c_int * 16)(1))
    launch = _Launch(
        (ctypes.c_uint * 3)(tiles * parts * -(-tokens // T_TILE), 1, 1),
        (ctypes.c_uint * 3)(_THREADS, 1, 1),
        variant.shared,
        torch.cuda.current_stream(x.values.device).cuda_stream,
        ctypes.pointer(early),
        1,
    )
    function = _function(variant, x.values.device.index or 0)
    _check(_driver().cuLaunchKernelEx(ctypes.byref(launch), function, places, None), "the driver")
