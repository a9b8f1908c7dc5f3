"""Writing GGUF files (core/gguf.py has the layout), and weights as the blocks that GGUF holds.

    8 and 6 bits, symmetric     Q8_0         a scale for 32 weights; wider groups repeat theirs
    5 and 4 bits, symmetric     Q5_0, Q4_0   the same, around 16 and 8
    5 and 4 bits, asymmetric    Q5_1, Q4_1   scale * code + minimum; minimum = -scale * zero, rounded to
    float16 q4_0, q4_1, q8_0            their own blocks as they are

All but the third are exactly the numbers they were made from. No format here becomes Q4_K: its scales are
6-bit multiples of one scale for 256 weights, which ours are by accident only. What a file already has in
K-quants goes through as those bytes (export/gguf.py).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from flatout.core.files import write_atomic
from flatout.core.gguf_blocks import BLOCKS, BlockTensor
from flatout.core.quantized import QuantizedTensor
from flatout.errors import ModelFileError, UnsupportedModelError

_ALIGNMENT = 32
_NUMBER_OF = {block.name: number for number, block in BLOCKS.items()}
_BLOCK_OF = {block.name: block for block in BLOCKS.values()}
Value = bool | int | float | str | Sequence[str] | np.ndarray
"""Metadata: integers are written as u32, floats as f32, arrays as int32 or float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutTensor:
    """One tensor to write. kind: a name of gguf_blocks.BLOCKS; make: its bytes, uint8, when it is its
    turn."""

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        block = _BLOCK_OF[self.kind]
        return int(np.prod(self.shape)) // block.elements * block.bytes


def write_gguf(path: Path, metadata: Mapping[str, Value], tensors: Sequence[OutTensor]) -> None:
    """Write a GGUF file of version 3, atomically, one tensor in memory at a time.

    Raises ResourceError when it cannot be written and ModelFileError for a row that its blocks do not divide.
    """
    for tensor in tensors:
        elements = _BLOCK_OF[tensor.kind].elements
        if tensor.shape[-1] % elements:
            raise ModelFileError(
                f"rows of {tensor.kind} are a multiple of {elements} wide",
                f"{tensor.name} {tensor.shape}",
                "bf16 for this model",
            )
    header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        header += [_string(key), *_value(value)]
    at = 0
    for tensor in tensors:
        sizes = tensor.shape[::-1]
        number = _NUMBER_OF[tensor.kind]
        header += [
            _string(tensor.name),
            struct.pack("<I", len(sizes)),
            struct.pack(f"<{len(sizes)}Q", *sizes),
        ]
        header.append(struct.pack("<IQ", number, at))
        at += _padded(tensor.nbytes)

    def write(file: BinaryIO) -> None:
        head = b"".join(header)
        file.write(head + b"\0" * (_padded(len(head)) - len(head)))
        for tensor in tensors:
            raw = tensor.make()
            if raw.nbytes != tensor.nbytes:
                raise ModelFileError(
                    f"{tensor.name} takes {tensor.nbytes} bytes", str(raw.nbytes), "another type"
                )
            file.write(raw.tobytes() + b"\0" * (_padded(raw.nbytes) - raw.nbytes))

    write_atomic(path, write)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> list[bytes]:
    if isinstance(value, bool):  # before int, of which it is one
        return [struct.pack("<IB", 7, value)]
    if isinstance(value, int):
        return [struct.pack("<II", 4, value)]
    if isinstance(value, float):
        return [struct.pack("<If", 6, value)]
    if isinstance(value, str):
        return [struct.pack("<I", 8), _string(value)]
    if isinstance(value, np.ndarray):
        kind, array = (6, value.astype("<f4")) if value.dtype.kind == "f" else (5, value.astype("<i4"))
        return [struct.pack("<IIQ", 9, kind, array.size), array.tobytes()]
    return [struct.pack("<IIQ", 9, 8, len(value)), *map(_string, value)]


def float_blocks(array: np.ndarray, kind: str) -> np.ndarray:
    """float32 values as the bytes of an F32 or BF16 tensor; BF16 rounds to nearest even."""
    flat = np.ascontiguousarray(array, dtype="<f4").reshape(-1)
    if kind == "F32":
        return flat.view(np.uint8)
    bits = flat.view("<u4")
    rounded: np.ndarray = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return rounded.view(np.uint8)


def block_kind(weight: QuantizedTensor) -> str:
    """The block type that holds this weight. Raises UnsupportedModelError where none does."""
    fmt = weight.format
    if fmt.is_native:
        return fmt.blocks.upper()
    if weight.scales.dtype != np.float16:
        raise UnsupportedModelError(
            "scales of GGUF blocks are float16", f"{fmt.name} with float32 scales", "bf16 for this model"
        )
    if fmt.zero == "symmetric":
        return {4: "Q4_0", 5: "Q5_0"}.get(fmt.bits, "Q8_0")
    if fmt.bits <= 5:
        return f"Q{fmt.bits}_1"
    raise UnsupportedModelError(
        "GGUF has no blocks of more than 5 bits with a zero point", fmt.name, fmt.name.removesuffix("-asym")
    )


def is_exact(weight: QuantizedTensor) -> bool:
    """Whether the blocks of `block_kind` are the same numbers."""
    if weight.format.zero != "asymmetric":
        return True
    minima = _minima(weight)
    exact = weight.scales.astype(np.float32) * -np.asarray(weight.zeros, dtype=np.float32)
    return bool((minima.astype(np.float32) == exact).all())


def _minima(weight: QuantizedTensor) -> np.ndarray:
    zeros = np.asarray(weight.zeros, dtype=np.float32)
    return (weight.scales.astype(np.float32) * -zeros).astype(np.float16)


def weight_blocks(weight: QuantizedTensor) -> np.ndarray:
    """The blocks of `block_kind`, uint8, row after row."""
    if isinstance(weight, BlockTensor):
        return np.ascontiguousarray(weight.blocks).reshape(-1)
    kind = block_kind(weight)
    repeat = weight.shape[1] // 32 // weight.scales.shape[1]
    parts = [_halves(weight.scales, repeat)]
    if kind.endswith("_1"):
        minima = weight.minima if weight.minima is not None else _minima(weight)
        parts.append(_halves(minima, repeat))
    codes = weight.codes.reshape(-1, 32)
    if kind == "Q8_0":
        # Codes of 6 bits lie around 32, those of 8 around 0.
        parts.append((codes.view(np.uint8) - np.uint8(weight.integer_zero)).view(np.uint8))
    else:
        if kind.startswith("Q5"):
            parts.append(np.packbits(codes >> 4, axis=1, bitorder="little"))
        pairs = (codes & 15).reshape(-1, 2, 16)
        parts.append(pairs[:, 0] | (pairs[:, 1] << 4))
    return np.concatenate(parts, axis=1).reshape(-1)


def _halves(values: np.ndarray, repeat: int) -> np.ndarray:
    """(N, groups) float16 as uint8 (N * K / 32, 2), a pair of bytes for each block."""
    blocks = np.repeat(values.astype("<f2"), repeat, axis=1)
    return np.ascontiguousarray(blocks).reshape(-1, 1).view(np.uint8)
