"""GGUF block types: how each packs weights, and their dequantisation to float32 in vectorised numpy.

A row of K weights is stored as K / elements blocks. `d` is a float16 scale, `m` a float16 minimum, `q` the
code:

    Q4_0  d * (q - 8)        32 weights, low nibbles are weights 0-15, high nibbles 16-31
    Q4_1  d * q + m
    Q5_0  d * (q - 16)       as Q4_0, with the fifth bits in a 32-bit word
    Q5_1  d * q + m
    Q8_0  d * q              int8 codes
    Q4_K  (d s) * q - (dmin t)   256 weights, 8 sub-blocks of 32 with 6-bit scale s and minimum t
    Q5_K  as Q4_K, with the fifth bits in 32 bytes
    Q6_K  (d s) * (q - 32)   256 weights, 16 sub-blocks of 16 with an int8 scale s

Source: block_q* in https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flatout.core.formats import Format, parse_format
from flatout.core.quantized import QuantizedTensor


@dataclass(frozen=True, slots=True)
class Block:
    """elements: weights a block holds; bytes: its size."""

    name: str
    elements: int
    bytes: int


BLOCKS = {
    0: Block("F32", 1, 4),
    1: Block("F16", 1, 2),
    2: Block("Q4_0", 32, 18),
    3: Block("Q4_1", 32, 20),
    6: Block("Q5_0", 32, 22),
    7: Block("Q5_1", 32, 24),
    8: Block("Q8_0", 32, 34),
    12: Block("Q4_K", 256, 144),
    13: Block("Q5_K", 256, 176),
    14: Block("Q6_K", 256, 210),
    30: Block("BF16", 1, 2),
}
"""Type number in the file -> block, for every type that is read."""

FLOATS = ("F32", "F16", "BF16")
"""Those of them that are not quantised."""

_BY_NAME = {block.name: block for block in BLOCKS.values()}

_OTHER_NAMES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64",
    28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


def type_name(number: int) -> str:
    """The name of tensor type `number`, whether it is read here or not."""
    if number in BLOCKS:
        return BLOCKS[number].name
    return _OTHER_NAMES.get(number, f"type {number}")


def dequantize(kind: str, raw: np.ndarray) -> np.ndarray:
    """uint8 bytes of whole blocks of type `kind` -> float32 (elements,)."""
    if kind == "F32":
        return raw.view("<f4").astype(np.float32)
    if kind == "F16":
        return raw.view("<f2").astype(np.float32)
    if kind == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    blocks = raw.reshape(-1, _BY_NAME[kind].bytes)
    if kind == "Q4_0":
        values = _half(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)
    elif kind == "Q4_1":
        values = _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32)
        values += _half(blocks, 2)
    elif kind == "Q5_0":
        codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
        values = _half(blocks, 0) * (codes.astype(np.float32) - 16)
    elif kind == "Q5_1":
        codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
        values = _half(blocks, 0) * codes.astype(np.float32)
        values += _half(blocks, 2)
    elif kind == "Q8_0":
        values = _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)
    elif kind == "Q4_K":
        values = _k_blocks(blocks, _k_nibbles(blocks[:, 16:]))
    elif kind == "Q5_K":
        # Bit j of byte l is the fifth bit of weight 32 j + l.
        high = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
        values = _k_blocks(blocks, _k_nibbles(blocks[:, 48:]) | (high << 4))
    else:
        values = _q6_k(blocks)
    return values.reshape(-1)


class BlockTensor(QuantizedTensor):
    """An (N, K) weight in GGUF blocks, a view of the file until `blocks`, `codes`, `scales` or `minima` are
    asked for, which are made anew every time.

    stored: uint8 (N, bytes), a row's blocks one after another. order: the stored row of each row, None where
    they are the same.
    """

    __slots__ = ("_order", "_stored")
    _stored: np.ndarray
    _order: np.ndarray | None

    def __init__(self, format: Format, stored: np.ndarray, order: np.ndarray | None = None) -> None:
        object.__setattr__(self, "format", format)
        object.__setattr__(self, "_stored", stored)
        object.__setattr__(self, "_order", order)

    @property
    def shape(self) -> tuple[int, int]:
        n, stored = self._stored.shape
        block = _BY_NAME[self.format.name.upper()]
        return (n if self._order is None else len(self._order)), stored // block.bytes * block.elements

    @property
    def blocks(self) -> np.ndarray:
        """uint8 (N, bytes)."""
        return self._stored if self._order is None else self._stored[self._order]

    @property
    def is_finite(self) -> bool:
        """Whether all scales and minima are."""
        halves = self._stored.reshape(-1, _BY_NAME[self.format.name.upper()].bytes).view("<u2")
        count = 2 if self.format.zero == "minimum" else 1  # column by column is faster than all at once
        return all(int((halves[:, i] & 0x7C00).max()) < 0x7C00 for i in range(count))

    def reordered(self, order: np.ndarray) -> BlockTensor:
        """Row i is what row order[i] of this one is in the file."""
        return BlockTensor(self.format, self._stored, order)

    @property
    def codes(self) -> np.ndarray:
        packed = self._split()[:, -32 if self.format.bits == 8 else -16 :]
        codes = packed.view(np.int8) if self.format.bits == 8 else _nibbles(packed)
        return codes.reshape(self.shape)

    @property
    def scales(self) -> np.ndarray:
        return self._halves(0)

    @property
    def minima(self) -> np.ndarray | None:
        return self._halves(2) if self.format.zero == "minimum" else None

    @property
    def zeros(self) -> None:
        return None

    def _split(self) -> np.ndarray:
        return self.blocks.reshape(-1, _BY_NAME[self.format.name.upper()].bytes)

    def _halves(self, at: int) -> np.ndarray:
        return self._split().view("<f2")[:, at // 2].reshape(self.shape[0], -1)


def native_blocks(kind: str, raw: np.ndarray, n: int) -> BlockTensor | None:
    """uint8 bytes of an (n, K) tensor -> codes and scales as stored, or None if `kind` has no such format.

    Also None when a Q8_0 block holds the code -128, which no quantiser writes and our formats exclude.
    """
    if kind not in ("Q4_0", "Q4_1", "Q8_0"):
        return None
    if kind == "Q8_0" and raw.reshape(-1, _BY_NAME[kind].bytes)[:, 2:].view(np.int8).min() == -128:
        return None
    return BlockTensor(parse_format(kind.lower()), raw.reshape(n, -1))


def concatenate_blocks(parts: Sequence[BlockTensor]) -> BlockTensor:
    """Stack weights of one format along N (q, k, v -> qkv)."""
    return BlockTensor(parts[0].format, np.concatenate([part.blocks for part in parts]))


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of every block, as float32 (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """(blocks, 16) bytes -> (blocks, 32) codes, low nibbles first."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth_bits(packed: np.ndarray) -> np.ndarray:
    """(blocks, 4) bytes -> (blocks, 32): bit j of the little-endian word is the fifth bit of weight j."""
    bits: np.ndarray = np.unpackbits(np.ascontiguousarray(packed), axis=1, bitorder="little")
    shifted: np.ndarray = bits << np.uint8(4)
    return shifted


def _k_nibbles(packed: np.ndarray) -> np.ndarray:
    """(blocks, 128) bytes -> (blocks, 8, 32): each 32 bytes hold two sub-blocks, low nibbles first."""
    quarters = packed.reshape(-1, 4, 1, 32)
    return np.concatenate([quarters & 15, quarters >> 4], axis=2).reshape(-1, 8, 32)


def _k_blocks(blocks: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Q4_K and Q5_K from codes (blocks, 8, 32): two float16, then 12 bytes of 6-bit scales and minima."""
    packed = blocks[:, 4:16]
    low, mid, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=1)
    minima = np.concatenate([mid & 63, (high >> 4) | ((mid >> 6) << 4)], axis=1)
    scaled = (_half(blocks, 0) * scales.astype(np.float32))[:, :, None]
    values: np.ndarray = scaled * codes.astype(np.float32)
    values -= (_half(blocks, 2) * minima.astype(np.float32))[:, :, None]
    return values


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    """Q6_K: 128 bytes of low nibbles, 64 of high bit pairs, 16 int8 scales, one float16."""
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    pairs = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    high = (pairs >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    codes = (low | (high << 4)).reshape(-1, 16, 16).astype(np.float32) - 32
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    values: np.ndarray = (_half(blocks, 208) * scales)[:, :, None] * codes
    return values
