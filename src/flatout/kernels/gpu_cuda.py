"""Compiling and launching what is written in CUDA C++ for Hopper cards (`cuda/`).

NVRTC, the compiler, comes with PyTorch; what it makes is kept in the cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flatout.core.files import write_bytes
from flatout.core.sources import cache_dir
from flatout.errors import BackendError, ResourceError

ROW_BYTES = 128
"""Of a row of what a bulk copy brings."""
SHARED_BYTES = 227 << 10
"""Shared memory that a program can have on Hopper cards."""
_FOLDER = Path(__file__).parent / "cuda"
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PROGRAMMATIC_LAUNCH = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64


class Kernel(NamedTuple):
    """What is compiled: the function `name` of `name`.cu, what it includes as multiply.h, and what it finds
    defined. shared: bytes of shared memory of a program."""

    name: str
    header: str
    defines: tuple[str, ...]
    shared: int


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


def products_of_64(
    name: str, n: int, fp8: bool = False, in_registers: bool = False, turned: bool = False
) -> str:
    """A function `name`(d, a, b, add): d = a b^T for 64 rows and `n` columns, added to d if `add` is not 0.
    a and b are descriptors of 32 bytes of each row in shared memory; or a comes in four registers.
    turned: b is as it lies not (n, k) but (k, n)."""
    count = n // 2
    sums = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    names = ", ".join(f"%{i}" for i in range(count))
    kind = f"m64n{n}k32.f32.e4m3.e4m3" if fp8 else f"m64n{n}k16.f32.bf16.bf16"
    if in_registers:
        taken = ", ".join(f"unsigned a{i}" for i in range(4))
        given = ", ".join(f'"r"(a{i})' for i in range(4))
        a, at = f"{{{', '.join(f'%{count + i}' for i in range(4))}}}", count + 4
    else:
        taken, given, a, at = "unsigned long long a", '"l"(a)', f"%{count}", count + 1
    ways = "" if fp8 else f", {int(turned)}" if in_registers else f", 0, {int(turned)}"
    return (
        f"__device__ __forceinline__ void {name}(\n"
        f"    float (&d)[{count}], {taken}, unsigned long long b, int add) {{\n"
        f'  asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{at + 1}, 0;"\n'
        f'    " wgmma.mma_async.sync.aligned.{kind}"\n'
        f'    " {{{names}}}, {a}, %{at}, p, 1, 1{ways}; }}"\n'
        f'    : {sums} : {given}, "l"(b), "r"(add));\n}}\n'
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
        "kernels for Hopper cards are compiled by NVRTC when they are first used",
        f"{name} not found",
        "the PyTorch wheels of pip, which bring it, or pip install nvidia-cuda-nvrtc",
    )


def compiled(kernel: Kernel) -> bytes:
    """Machine code for sm_90a, from the cache folder if it is there. Raises BackendError. Needs no GPU."""
    nvrtc = _nvrtc()
    source = (_FOLDER / f"{kernel.name}.cu").read_text(encoding="utf-8")
    headers = {
        "hopper.h": (_FOLDER / "hopper.h").read_text(encoding="utf-8"),
        "multiply.h": kernel.header,
    }
    options = ["-arch=sm_90a", "-std=c++17", *(f"-D{name}" for name in kernel.defines)]
    version = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(version[0]), ctypes.byref(version[1]))
    parts = [source, *headers.values(), *options, str(version[0].value), str(version[1].value)]
    path: Path | None = None
    with suppress(ResourceError):  # without a folder it is compiled in every process
        digest = hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]
        path = cache_dir() / f"{kernel.name}-{digest}.cubin"
    if path is not None and path.exists():
        return path.read_bytes()
    program = ctypes.c_void_p()
    code = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), f"{kernel.name}.cu".encode(), len(headers),
        _strings(headers.values()), _strings(headers),
    )  # fmt: skip
    _check(code, "NVRTC")
    code = nvrtc.nvrtcCompileProgram(program, len(options), _strings(options))
    if code != 0:
        log = _bytes_of(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
        raise BackendError(
            f"NVRTC must compile {kernel.name}.cu",
            log.decode(errors="replace")[:400],
            "a newer PyTorch (CUDA 12.4)",
        )
    found = _bytes_of(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if path is not None:
        write_bytes(path, found)
    return found


def _strings(texts: Any) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [text.encode() for text in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def _bytes_of(size_of: Callable[..., int], copy: Callable[..., int], program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)), "NVRTC")
    room = ctypes.create_string_buffer(size.value)
    _check(copy(program, room), "NVRTC")
    return room.raw


def _check(code: int, what: str) -> None:
    if code != 0:
        raise BackendError(
            f"{what} must do what kernels for Hopper ask for", f"error {code}", "a newer driver"
        )


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@cache
def _function(kernel: Kernel, device: int) -> ctypes.c_void_p:
    """The kernel, loaded on a GPU, which is the current one."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), compiled(kernel)), "the driver")
    _check(_driver().cuModuleGetFunction(ctypes.byref(function), module, kernel.name.encode()), "the driver")
    _check(_driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, kernel.shared), "the driver")
    return function


class Map(NamedTuple):
    """What the bulk copy engine is told of a matrix; `room` holds it."""

    address: int
    room: Any


def tensor_map(values: Tensor, rows: int) -> Map:
    """Of values (R, K), whose rows may lie apart: copies have `rows` rows of 128 bytes. What lies beyond the
    matrix is read as zero, and not written. Raises BackendError."""
    size = values.element_size()
    return _encoded(values.data_ptr(), *values.shape, values.stride(0) * size, size, rows)


@lru_cache(maxsize=4096)  # 5 us each; memory that is given back is soon given out again
def _encoded(pointer: int, count: int, columns: int, pitch: int, size: int, rows: int) -> Map:
    room = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
    address = -(-ctypes.addressof(room) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
    code = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(address),
        9 if size == 2 else 0,  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, UINT8
        2,
        ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * 2)(columns, count),
        (ctypes.c_uint64 * 1)(pitch),
        (ctypes.c_uint32 * 2)(ROW_BYTES // size, rows),
        (ctypes.c_uint32 * 2)(1, 1),
        0,
        3,  # CU_TENSOR_MAP_SWIZZLE_128B
        2,  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B: with 256 a step of 256 sequences took 1 % longer
        0,
    )
    _check(code, "the driver")
    return Map(address, room)


def launch(
    kernel: Kernel,
    device: torch.device,
    programs: int,
    threads: int,
    maps: Sequence[Map],
    arguments: Sequence[Any],
) -> None:
    """On the current stream. arguments: what the kernel takes after its maps, as ctypes has it. Raises
    BackendError."""
    places = (ctypes.c_void_p * (len(maps) + len(arguments)))(
        *(there.address for there in maps), *map(ctypes.addressof, arguments)
    )
    early = _Attribute(_PROGRAMMATIC_LAUNCH, 0, (ctypes.c_int * 16)(1))
    how = _Launch(
        (ctypes.c_uint * 3)(programs, 1, 1),
        (ctypes.c_uint * 3)(threads, 1, 1),
        kernel.shared,
        torch.cuda.current_stream(device).cuda_stream,
        ctypes.pointer(early),
        1,
    )
    function = _function(kernel, device.index or 0)
    _check(_driver().cuLaunchKernelEx(ctypes.byref(how), function, places, None), "the driver")
