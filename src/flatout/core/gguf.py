"""GGUF files: one header of typed metadata, then aligned tensors, mapped and dequantised on demand.

Layout (version 2 and 3, little-endian; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):

    "GGUF", version u32, tensor count u64, key/value count u64 key/value pairs    key: string (u64 length,
    UTF-8), type u32, value; arrays: element type u32, count u64, elements tensor infos       name: string,
    dimensions u32, sizes u64 (fastest first), type u32, offset u64 into the data data               starts at
    the next multiple of general.alignment (32); so does every tensor

Every count is checked against the bytes that are left before anything is allocated, and every tensor against
the file's end and its neighbours, so a corrupt file gives one ModelFileError when it is opened. Strings in
arrays are stepped over and decoded on demand (`Strings`): a vocabulary takes a tenth of a start.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np

from flatout.core.files import corrupt, map_file, shown
from flatout.core.gguf_blocks import BLOCKS, BlockTensor, dequantize, native_blocks, type_name
from flatout.errors import UnsupportedModelError

_MAX_PAIRS = 1 << 16
_MAX_TENSORS = 1 << 20
_MAX_STRING = 1 << 24
_MAX_ARRAY = 1 << 24
_MAX_ALIGNMENT = 1 << 16

_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One tensor of the file. shape: (N, K) or (N,), slowest dimension first; offset: bytes from the file's
    start."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Strings(Sequence[str]):
    """An array of strings in a file, decoded whenever they are asked for: keep `list(strings)` for more than
    a few. starts: where each one begins, and one more as if another followed. Raises ModelFileError for bytes
    that are not UTF-8, when they are reached."""

    path: Path
    what: str
    mapped: mmap.mmap
    starts: Sequence[int]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return self._decoded([(self.starts[i], self.starts[i + 1])])[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._decoded(pairwise(self.starts)))

    def _decoded(self, bounds: Iterable[tuple[int, int]]) -> list[str]:
        data = self.mapped
        try:
            return [data[start : following - _U64.size].decode() for start, following in bounds]
        except UnicodeDecodeError as error:
            raise corrupt(self.path, f"{self.what} must be UTF-8", str(error)) from error


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GgufFile:
    """An opened file. metadata: key -> int, float, bool, str, numpy array of numbers, list of bool, or
    Strings."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    mapped: mmap.mmap
    data: np.ndarray  # the same as uint8

    def float32(self, name: str) -> np.ndarray:
        """Tensor `name` dequantised to float32, in its shape. Raises ModelFileError if it is not in the
        file."""
        tensor = self._tensor(name)
        # A corrupt scale may be inf or nan: whoever needs finite weights reports it, numpy must not.
        with np.errstate(all="ignore"):
            return dequantize(tensor.type, self._raw(tensor)).reshape(tensor.shape)

    def native(self, name: str) -> BlockTensor | None:
        """Matrix `name` as q4_0, q4_1 or q8_0 codes and float16 scales as stored (which may be inf or nan in
        a corrupt file); None for any other type, and for a vector."""
        tensor = self._tensor(name)
        if len(tensor.shape) != 2:
            return None
        return native_blocks(tensor.type, self._raw(tensor), tensor.shape[0])

    def stored(self, name: str) -> tuple[str, np.ndarray]:
        """(type, uint8 bytes) of tensor `name` as the file has them, a view."""
        tensor = self._tensor(name)
        return tensor.type, self._raw(tensor)

    def forget(self) -> None:
        """Give the file's pages back to the system; views stay valid and read them anew."""
        self.mapped.madvise(mmap.MADV_DONTNEED)

    def _tensor(self, name: str) -> GgufTensor:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise corrupt(self.path, "every weight must be in the file", f"no tensor {shown(name)}")
        return tensor

    def _raw(self, tensor: GgufTensor) -> np.ndarray:
        return self.data[tensor.offset : tensor.offset + tensor.nbytes]


class _Header:
    """A cursor over the mapped header. Every read is bounded by the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, count: int, what: str) -> bytes:
        if count > len(self.data) - self.at:
            raise corrupt(
                self.path,
                "a header must end inside the file",
                f"{what} needs {count} bytes at {self.at}, the file has {len(self.data)}",
            )
        start, self.at = self.at, self.at + count
        return self.data[start : self.at]

    def u32(self, what: str) -> int:
        return int(_U32.unpack(self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack(self.take(8, what))[0])

    def count(self, what: str, limit: int, least_bytes: int) -> int:
        """A u64 count of things that take at least `least_bytes` each in the rest of the file."""
        value = self.u64(what)
        left = len(self.data) - self.at
        if value > limit or value * least_bytes > left:
            raise corrupt(
                self.path, f"{what} must be at most {min(limit, left // least_bytes)} in this file", value
            )
        return value

    def string(self, what: str) -> str:
        raw = self.take(self.count(f"the length of {what}", _MAX_STRING, 1), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise corrupt(self.path, f"{what} must be UTF-8", str(error)) from error

    def strings(self, count: int, what: str) -> Strings:
        """`count` strings; the loop is inlined because a vocabulary has 10^5 of them."""
        data, at, end, unpack = self.data, self.at + 8, len(self.data), _U64.unpack_from
        starts = [at]
        try:
            for _ in range(count):
                (length,) = unpack(data, at - 8)
                if length > min(end - at, _MAX_STRING):
                    raise corrupt(
                        self.path, f"a string of {what} must end inside the file", f"{length} bytes"
                    )
                at += length + 8
                starts.append(at)
        except struct.error as error:
            found = f"{len(starts) - 1} of {count}"
            raise corrupt(self.path, f"{what} must end inside the file", found) from error
        self.at = at - 8
        return Strings(path=self.path, what=what, mapped=data, starts=starts)

    def value(self, kind: int, what: str) -> Any:
        if kind in _NUMBERS:
            dtype = np.dtype(_NUMBERS[kind])
            return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()
        if kind == _BOOL:
            return self.bools(1, what)[0]
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        raise corrupt(self.path, "a metadata type is a number from 0 to 12", f"{kind} for {what}")

    def bools(self, count: int, what: str) -> list[bool]:
        raw = self.take(count, what)
        if raw and max(raw) > 1:
            raise corrupt(self.path, "a boolean is 0 or 1", f"{max(raw)} for {what}")
        return [byte == 1 for byte in raw]

    def array(self, what: str) -> Any:
        kind = self.u32(f"the element type of {what}")
        if kind in _NUMBERS:
            dtype = np.dtype(_NUMBERS[kind])
            count = self.count(f"the length of {what}", _MAX_ARRAY, dtype.itemsize)
            return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)
        if kind == _BOOL:
            return self.bools(self.count(f"the length of {what}", _MAX_ARRAY, 1), what)
        if kind == _STRING:
            return self.strings(self.count(f"the length of {what}", _MAX_ARRAY, 8), what)
        raise corrupt(
            self.path, "an array holds numbers, booleans or strings", f"element type {kind} for {what}"
        )

    def pairs(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for i in range(count):
            key = self.string(f"metadata key {i}")
            if key in metadata:
                raise corrupt(self.path, "metadata keys must differ", key)
            what = f"metadata {shown(key)}"
            metadata[key] = self.value(self.u32(f"the type of {what}"), what)
        return metadata

    def tensor(self, i: int) -> GgufTensor:
        """Tensor info i; its offset still counts from the start of the data."""
        name = self.string(f"the name of tensor {i}")
        what = f"tensor {shown(name)}"
        dimensions = self.u32(f"the dimensions of {what}")
        if not 1 <= dimensions <= 4:
            raise corrupt(self.path, "a tensor has 1 to 4 dimensions", f"{dimensions} for {what}")
        sizes = [self.u64(f"a size of {what}") for _ in range(dimensions)]
        number = self.u32(f"the type of {what}")
        if number not in BLOCKS:
            raise UnsupportedModelError(
                f"tensor types that flatout reads are {', '.join(b.name for b in BLOCKS.values())}",
                f"{type_name(number)} for {what} in {shown(str(self.path), 300)}",
                "a Q4_0, Q8_0 or Q4_K_M file of this model",
            )
        block = BLOCKS[number]
        elements = 1
        for size in sizes:
            elements *= size
        # Python integers do not overflow, so an absurd product is simply larger than the file.
        nbytes = elements // block.elements * block.bytes
        if elements < 1 or nbytes > len(self.data):
            raise corrupt(self.path, "a tensor must hold data and fit in the file", f"{what} of {sizes}")
        if sizes[0] % block.elements:
            raise corrupt(
                self.path,
                f"rows of {block.name} are a multiple of {block.elements} wide",
                f"{what} of {sizes}",
            )
        offset = self.u64(f"the offset of {what}")
        return GgufTensor(name=name, type=block.name, shape=tuple(sizes[::-1]), offset=offset, nbytes=nbytes)


def open_gguf(path: str | Path) -> GgufFile:
    """Open and check a GGUF file; tensor data stay on disk until asked for.

    Raises ModelFileError for a missing, truncated or corrupt file, UnsupportedModelError for a version, byte
    order or tensor type that is not read here.
    """
    path = Path(path)
    mapped = map_file(path)
    header = _Header(mapped, path)
    if header.take(4, "the magic number") != b"GGUF":
        raise corrupt(path, 'a GGUF file starts with "GGUF"', mapped[:4], "a .gguf file")
    version = header.u32("the version")
    if version not in (2, 3):
        raise UnsupportedModelError(
            "GGUF versions 2 and 3, little-endian, are read",
            f"{version} in {shown(str(path), 300)}",
            "convert it again",
        )
    tensor_count = header.count("the number of tensors", _MAX_TENSORS, 8 + 4 + 8 + 4 + 8)
    metadata = header.pairs(header.count("the number of metadata pairs", _MAX_PAIRS, 8 + 4 + 1))
    relative = [header.tensor(i) for i in range(tensor_count)]
    tensors = _place(path, relative, header.at, _alignment(path, metadata), len(mapped))
    return GgufFile(
        path=path, metadata=metadata, tensors=tensors, mapped=mapped, data=np.frombuffer(mapped, np.uint8)
    )


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise corrupt(path, f"general.alignment is a power of two up to {_MAX_ALIGNMENT}", alignment)
    return alignment


def _place(
    path: Path, relative: list[GgufTensor], header_end: int, alignment: int, size: int
) -> dict[str, GgufTensor]:
    """Tensors by name with offsets from the file's start, checked for alignment, end of file and overlap."""
    data_start = -(-header_end // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for t in relative:
        if t.name in tensors:
            raise corrupt(path, "tensor names must differ", t.name)
        if t.offset % alignment:
            raise corrupt(
                path, f"tensors start at multiples of {alignment}", f"{t.offset} for {shown(t.name)}"
            )
        start = data_start + t.offset
        if start + t.nbytes > size:
            raise corrupt(
                path,
                "tensor data must end inside the file",
                f"{shown(t.name)} ends at byte {start + t.nbytes}, the file has {size}",
            )
        tensors[t.name] = GgufTensor(name=t.name, type=t.type, shape=t.shape, offset=start, nbytes=t.nbytes)
    for a, b in pairwise(sorted(tensors.values(), key=lambda t: t.offset)):
        if a.offset + a.nbytes > b.offset:
            raise corrupt(path, "tensors must not overlap", f"{shown(a.name)} and {shown(b.name)}")
    return tensors
