"""Safetensors files: a JSON header, then raw little-endian tensors, mapped and converted on demand.

Layout (https://huggingface.co/docs/safetensors): header length u64, header (JSON: name -> dtype, shape,
data_offsets relative to the header's end; "__metadata__" -> strings), data. Tensors fill the data without gap
or overlap. Everything is checked when the file is opened: a corrupt header gives one ModelFileError.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flatout.core.files import corrupt, map_file, parse_json_object, shown, write_atomic
from flatout.errors import ModelFileError, UnsupportedModelError

_MAX_HEADER = 1 << 25  # the format allows 100 MB, which as JSON objects would take gigabytes of memory
_MAX_DIMENSIONS = 8

DTYPES = {
    "BOOL": "|b1",
    "U8": "|u1",
    "I8": "|i1",
    "F8_E4M3": "|u1",
    "F8_E5M2": "|u1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "BF16": "<u2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}
"""Name in the file -> the numpy type that holds it; types numpy lacks are held as unsigned integers."""

_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
}
"""numpy type -> name written to the file."""


@dataclass(frozen=True, slots=True)
class Entry:
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SafetensorsFile:
    """An opened file. names: in the order of the file; metadata: the writer's strings."""

    path: Path
    metadata: dict[str, str]
    names: tuple[str, ...]
    entries: dict[str, Entry]
    mapped: mmap.mmap
    data: np.ndarray  # the same as uint8

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """The type's name in the file: F32, BF16, F16, I8, U8, I32, I64..."""
        return self._entry(name).dtype

    def array(self, name: str) -> np.ndarray:
        """The tensor as stored: a read-only view of the file, BF16 as uint16 and F8 as uint8."""
        entry = self._entry(name)
        return self.data[entry.start : entry.stop].view(DTYPES[entry.dtype]).reshape(entry.shape)

    def forget(self) -> None:
        """Give the file's pages back to the system; views stay valid and read them anew."""
        self.mapped.madvise(mmap.MADV_DONTNEED)

    def float32(self, name: str) -> np.ndarray:
        """A float tensor as float32. Raises UnsupportedModelError for integer and 8-bit float types."""
        array, dtype = self.array(name), self.dtype(name)
        if dtype == "BF16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        if dtype in ("F16", "F32", "F64"):
            with np.errstate(all="ignore"):
                return array.astype(np.float32)
        raise UnsupportedModelError(
            "plain weights are F32, F16, BF16 or F64",
            f"{dtype} for {shown(name)} in {shown(str(self.path), 300)}",
            "the unquantised model, or a compressed-tensors folder",
        )

    def _entry(self, name: str) -> Entry:
        entry = self.entries.get(name)
        if entry is None:
            raise corrupt(self.path, "every weight must be in the file", f"no tensor {shown(name)}")
        return entry


def open_safetensors(path: str | Path) -> SafetensorsFile:
    """Open and check a safetensors file; tensors are views of the mapped file.

    Raises ModelFileError for a missing, truncated or corrupt file, UnsupportedModelError for a type not read
    here.
    """
    path = Path(path)
    mapped = map_file(path)
    size = len(mapped)
    if size < 8:
        raise corrupt(path, "a safetensors file starts with an 8-byte header length", f"{size} bytes")
    (length,) = struct.unpack_from("<Q", mapped)
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise corrupt(
            path, f"the header's length must be from 2 to {min(_MAX_HEADER, size - 8)} in this file", length
        )
    header = parse_json_object(mapped[8 : 8 + length], path)
    metadata = _metadata(path, header.pop("__metadata__", {}))
    entries = {name: _entry(path, name, info, 8 + length) for name, info in header.items()}
    # Names break ties, so that an empty tensor may share its offset with the next one.
    ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop))
    at = 8 + length
    for name, entry in ordered:
        if entry.start != at:
            raise corrupt(
                path,
                "tensors must follow each other without gap or overlap",
                f"{shown(name)} starts at byte {entry.start}, expected {at}",
            )
        at = entry.stop
    if at != size:
        raise corrupt(path, f"a file of these tensors has {at} bytes (is it truncated?)", f"{size} bytes")
    return SafetensorsFile(
        path=path,
        metadata=metadata,
        names=tuple(entries),
        entries=entries,
        mapped=mapped,
        data=np.frombuffer(mapped, np.uint8),
    )


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise corrupt(path, "__metadata__ must map names to strings", value)
    return value


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _entry(path: Path, name: str, info: Any, data_start: int) -> Entry:
    """The checked header entry of one tensor, offsets from the file's start."""
    what = shown(name)
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise corrupt(path, f"tensor {what} must have dtype, shape and data_offsets", info)
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UnsupportedModelError(
            f"tensor types that flatout reads are {', '.join(DTYPES)}",
            f"{shown(dtype)} for {what} in {shown(str(path), 300)}",
            "the model in BF16",
        )
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise corrupt(
            path, f"a shape is a list of at most {_MAX_DIMENSIONS} sizes", f"{shown(shape)} for {what}"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise corrupt(path, "data_offsets are two positions", f"{shown(offsets)} for {what}")
    start, stop = offsets
    # Python integers do not overflow, so an absurd shape simply disagrees with its offsets.
    if stop - start != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise corrupt(
            path,
            f"data_offsets must span dtype x shape ({dtype} {shown(shape)})",
            f"{start} to {stop} for {what}",
        )
    return Entry(dtype, tuple(shape), data_start + start, data_start + stop)


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bfloat16 (ties to even), as uint16 bits."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), 0x7FC0, rounded).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """uint16 bits of bfloat16 as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, np.ndarray | tuple[np.ndarray, str]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors atomically, in the order given; (uint16 array, "BF16") writes bfloat16 bits.

    The header is padded so that data start at a multiple of 64 bytes from the file's start. Raises
    ResourceError when the file cannot be written, ModelFileError for an array of a type the format lacks.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    arrays: list[np.ndarray] = []
    at = 0
    for name, value in tensors.items():
        array, dtype = value if isinstance(value, tuple) else (value, _NAMES.get(value.dtype.name, ""))
        if DTYPES.get(dtype) is None or np.dtype(DTYPES[dtype]).itemsize != array.dtype.itemsize:
            raise ModelFileError(
                f"{name} must have a type that safetensors holds",
                f"{array.dtype} {dtype}".strip(),
                "another type",
            )
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        arrays.append(array)
        at += array.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % 64)

    def write(file: BinaryIO) -> None:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for array in arrays:
            little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            file.write(little.reshape(-1).view(np.uint8).data)

    write_atomic(Path(path), write)
