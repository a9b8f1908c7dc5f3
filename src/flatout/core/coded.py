"""Entropy-coded safetensors: the same tensors to the last bit in fewer bytes, for transfer and storage.

Trained weights use few exponents. A bfloat16 has 8 bits of exponent that carry about 2.6 bits, while sign
and mantissa look like noise (Zhang et al., "DFloat11", 2025, arXiv 2504.11651; Hershcovitch et al., "ZipNN",
2024, arXiv 2411.05239). So each tensor is cut into planes, the i-th bytes of all its elements, floats first
rotated by one bit so that the exponent fills a byte, and every plane that gets smaller by it is coded:

    float         rotate left by one bit: sign last, exponent in the top byte
    plane i       byte i of every element
    coded plane   Huffman codes of its bytes, in pieces of 4 MiB that decode independently and in parallel

The coder is zlib's Huffman stage alone (Z_HUFFMAN_ONLY): matches of whole strings find nothing in weights and
make it slower. It is in the standard library, bounds its output and checks itself.

The file is an ordinary safetensors file, checked like any other: each tensor is U8 bytes, and the metadata
key "flatout_coded" says what they decode to, with a CRC-32 of the result. Costs: decoding takes time at load
and nothing afterwards; weights in 4-bit codes gain next to nothing, because they are dense already.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flatout.core.files import corrupt, parse_json_object, shown
from flatout.core.safetensors import DTYPES, Entry, SafetensorsFile, open_safetensors, write_safetensors
from flatout.core.sparse import with_dense_names

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

KEY = "flatout_coded"
_VERSION = 1
_PIECE = 1 << 22  # bytes of a plane that are coded together
_FLOATS = ("BF16", "F16", "F32", "F64")
_THREADS = 4
_MOST_EXPANSION = 1040  # zlib's limit: 258 bytes from two bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Coding:
    """How one tensor is coded. planes: for each byte of an element the bytes of its coded pieces, or none
    where the plane is stored as it is; crc: CRC-32 of the tensor's own bytes."""

    dtype: str
    shape: tuple[int, ...]
    planes: tuple[tuple[int, ...], ...]
    crc: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def encode(array: np.ndarray, dtype: str) -> tuple[np.ndarray, Coding]:
    """`array` as stored in a safetensors file of type `dtype`, as (bytes uint8 (n,), how to decode them)."""
    flat = np.ascontiguousarray(array).reshape(-1)
    stored: list[bytes] = []
    planes: list[tuple[int, ...]] = []
    for plane in _planes(flat, dtype):
        raw = plane.tobytes()
        pieces = [_deflate(raw[at : at + _PIECE]) for at in range(0, len(raw), _PIECE)]
        if sum(map(len, pieces)) < len(raw):
            stored += pieces
            planes.append(tuple(map(len, pieces)))
        else:
            stored.append(raw)
            planes.append(())
    coding = Coding(
        dtype=dtype, shape=array.shape, planes=tuple(planes), crc=zlib.crc32(flat.view(np.uint8).data)
    )
    return np.frombuffer(b"".join(stored), np.uint8), coding


def decode(data: np.ndarray, coding: Coding, pool: ThreadPoolExecutor | None = None) -> np.ndarray:
    """The array that `encode` was given. Raises ValueError for bytes that it did not write."""
    size = np.dtype(DTYPES[coding.dtype]).itemsize
    buffer = np.empty((coding.count, size), dtype=np.uint8)
    at = 0
    work: list[tuple[int, int, np.ndarray]] = []  # (plane, first element, coded bytes)
    for plane, pieces in enumerate(coding.planes):
        for number, length in enumerate(pieces):
            work.append((plane, number * _PIECE, data[at : at + length]))
            at += length
        if not pieces:
            buffer[:, plane] = data[at : at + coding.count]
            at += coding.count

    def inflate(item: tuple[int, int, np.ndarray]) -> None:
        plane, first, coded = item
        wanted = min(_PIECE, coding.count - first)
        buffer[first : first + wanted, plane] = np.frombuffer(_inflate(coded, wanted), np.uint8)

    for _ in map(inflate, work) if pool is None else pool.map(inflate, work):
        pass
    flat = _unrotated(buffer, coding.dtype)
    if zlib.crc32(flat.view(np.uint8).data) != coding.crc:
        raise ValueError("the checksum of the decoded tensor differs")
    return flat.reshape(coding.shape)


def _deflate(raw: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(raw) + coder.flush()


def _inflate(coded: np.ndarray, wanted: int) -> bytes:
    """Exactly `wanted` bytes, and no more memory than that."""
    decoder = zlib.decompressobj(-15)
    try:
        raw = decoder.decompress(coded.data, wanted)
        if len(raw) == wanted and not decoder.eof:
            decoder.decompress(decoder.unconsumed_tail, 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(raw) != wanted or not decoder.eof or decoder.unused_data:
        raise ValueError(f"a piece decodes to {len(raw)} bytes instead of {wanted}")
    return raw


def _planes(flat: np.ndarray, dtype: str) -> Iterator[np.ndarray]:
    """The i-th bytes of all elements, floats rotated."""
    size = flat.dtype.itemsize
    bits = flat.view(f"<u{size}")
    if dtype in _FLOATS:
        bits = (bits << 1) | (bits >> (8 * size - 1))
    columns = np.ascontiguousarray(bits).view(np.uint8).reshape(-1, size)
    for i in range(size):
        yield np.ascontiguousarray(columns[:, i])


def _unrotated(buffer: np.ndarray, dtype: str) -> np.ndarray:
    size = buffer.shape[1]
    bits = buffer.reshape(-1).view(f"<u{size}")
    if dtype in _FLOATS:
        bits = (bits >> 1) | (bits << (8 * size - 1))
    return bits.view(DTYPES[dtype])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CodedFile(SafetensorsFile):
    """A coded file, read like any other; a tensor is decoded when it is asked for, and not kept."""

    codings: Mapping[str, Coding]

    def array(self, name: str) -> np.ndarray:
        coding = self.codings.get(name)
        if coding is None:
            return SafetensorsFile.array(self, name)
        from concurrent.futures import ThreadPoolExecutor  # with logging 8 ms, and few files are coded

        entry = self.entries[name]
        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                return decode(self.data[entry.start : entry.stop], coding, pool)
        except ValueError as error:
            raise corrupt(self.path, f"{shown(name)} must decode to what was stored", str(error)) from error


def decoded(file: SafetensorsFile) -> SafetensorsFile:
    """`file` itself, or a CodedFile where its metadata say that its tensors are coded.

    Raises ModelFileError for metadata that do not fit the tensors, before anything is decoded.
    """
    if KEY not in file.metadata:
        return file
    listing = parse_json_object(file.metadata[KEY], file.path)
    if listing.get("version") != _VERSION or not isinstance(listing.get("tensors"), dict):
        raise corrupt(file.path, f"{KEY} must be of version {_VERSION}", listing.get("version"))
    codings: dict[str, Coding] = {}
    entries = dict(file.entries)
    for name, value in listing["tensors"].items():
        entry = entries.get(name)
        coding = _coding(value)
        if coding is None or entry is None or not _fits(coding, entry):
            raise corrupt(file.path, f"{KEY} must fit its tensors", name)
        codings[name] = coding
        entries[name] = Entry(coding.dtype, coding.shape, entry.start, entry.stop)
    return CodedFile(
        path=file.path,
        metadata={key: value for key, value in file.metadata.items() if key != KEY},
        names=file.names,
        entries=entries,
        mapped=file.mapped,
        data=file.data,
        codings=codings,
    )


def _coding(value: Any) -> Coding | None:
    """The coding that metadata describe, None where they do not make sense."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    dtype, shape, planes, crc = value
    sound = (
        isinstance(dtype, str)
        and dtype in DTYPES
        and _sizes(shape)
        and isinstance(planes, list)
        and all(_sizes(pieces) for pieces in planes)
        and _sizes([crc])
    )
    if not sound:
        return None
    return Coding(dtype=dtype, shape=tuple(shape), planes=tuple(map(tuple, planes)), crc=crc)


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in values)


def _fits(coding: Coding, entry: Entry) -> bool:
    """Whether the planes are as many as bytes of an element, fill the tensor, and can hold what they
    claim."""
    count = coding.count
    if len(coding.planes) != np.dtype(DTYPES[coding.dtype]).itemsize or len(coding.shape) > 8:
        return False
    bytes_used = 0
    for pieces in coding.planes:
        if pieces and len(pieces) != -(-count // _PIECE):
            return False
        if pieces and count > _MOST_EXPANSION * sum(pieces):
            return False
        bytes_used += sum(pieces) if pieces else count
    return entry.dtype == "U8" and bytes_used == entry.stop - entry.start


def write_coded(path: Path, file: SafetensorsFile) -> int:
    """Write the tensors of `file` coded, atomically, compare what is read back, and return its bytes.

    Raises ResourceError when it cannot be written and ModelFileError when what is read back differs, in which
    case no file stays.
    """
    coded: dict[str, np.ndarray] = {}
    listing: dict[str, list[Any]] = {}
    for name in file.names:
        coded[name], how = encode(file.array(name), file.dtype(name))
        listing[name] = [how.dtype, list(how.shape), [list(pieces) for pieces in how.planes], how.crc]
        file.forget()
    text = json.dumps({"version": _VERSION, "tensors": listing}, separators=(",", ":"))
    write_safetensors(path, coded, file.metadata | {KEY: text})
    again = decoded(open_safetensors(path))
    for name in file.names:
        ours, theirs = again.array(name), file.array(name)
        same = ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()
        if not same or again.dtype(name) != file.dtype(name):
            path.unlink()
            raise corrupt(path, "a coded file must decode to the same bytes", name)
    return path.stat().st_size


def open_weights(path: str | Path) -> SafetensorsFile:
    """Open and check a safetensors file whose tensors may be coded, and whose weights may be packed two of
    four (core/sparse.py); errors as of `open_safetensors`."""
    return with_dense_names(decoded(open_safetensors(path)))
