"""Quantised tensors in the form of the compressed-tensors library, so that transformers loads them.

Per module (a Hugging Face name without ".weight"), N x K weights in groups along K:

    int-quantized    weight             int8 (N, K)
                     weight_scale       (N, groups)
                     weight_zero_point  int8 (N, groups), if asymmetric
    pack-quantized   weight_packed      int32 (N, ceil(K * bits / 32)), unsigned codes, the lowest bits first
                     weight_shape       int64 (2) = N, K
                     weight_scale       (N, groups)
                     weight_zero_point  int32 (ceil(N * bits / 32), groups), packed along N, if asymmetric

Signed numbers are the unsigned ones less 2**(bits - 1). `quantization_config.is_packed` chooses what is
written; both are read. One thing is ours alone: `weight_minimum` (N, groups), the float minimum of q4_1,
which compressed-tensors cannot say; other tools refuse a folder that has one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from flatout.core.formats import Format, parse_format
from flatout.core.quantization_config import Scheme, is_packed
from flatout.core.quantized import QuantizedTensor
from flatout.errors import ConfigError, ModelFileError


class TensorFile(Protocol):
    """What tensors are read from: one safetensors file, or several behind an index."""

    @property
    def names(self) -> Iterable[str]: ...

    def dtype(self, name: str) -> str: ...

    def array(self, name: str) -> np.ndarray: ...

    def float32(self, name: str) -> np.ndarray: ...


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes (N, K) of 3 to 8 bits as int32 (N, ceil(K * bits / 32)), the first code in the lowest
    bits; codes of 3, 5 and 6 bits lie across words."""
    n, k = codes.shape
    eights = -(-k // 32) * 4  # a word's worth of any width
    padded = np.zeros((n, 8 * eights), dtype=np.uint8)
    padded[:, :k] = codes
    if bits == 4:
        data = padded[:, 0::2] | (padded[:, 1::2] << 4)
    elif bits == 8:
        data = padded
    else:  # eight codes fill `bits` bytes
        words = sum(padded[:, i::8].astype("<u8") << np.uint64(i * bits) for i in range(8))
        data = np.asarray(words).view(np.uint8).reshape(n, eights, 8)[:, :, :bits].reshape(n, -1)
    return np.ascontiguousarray(data[:, : 4 * -(-k * bits // 32)]).view("<i4")


def unpack(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Inverse of `pack`: uint8 codes (N, columns). Raises ModelFileError when the width does not fit."""
    if packed.ndim != 2 or packed.dtype != np.int32 or packed.shape[1] != -(-columns * bits // 32):
        raise ModelFileError(
            f"{columns} codes of {bits} bits fill {-(-columns * bits // 32)} int32 words a row",
            f"{packed.dtype} {packed.shape}",
            "re-create the folder",
        )
    data = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 4:
        pairs = data.astype("<u2")  # HL -> 0H 0L, in memory the low code first
        pairs |= pairs << 4
        pairs &= 0x0F0F
        data = pairs.view(np.uint8)
    elif bits != 8:
        n, eights = len(data), -(-columns // 8)
        bytes_of = np.zeros((n, eights, 8), dtype=np.uint8)
        filled = np.zeros((n, eights * bits), dtype=np.uint8)
        filled[:, : data.shape[1]] = data[:, : eights * bits]
        bytes_of[:, :, :bits] = filled.reshape(n, eights, bits)
        words = bytes_of.reshape(n, -1).view("<u8")
        data = np.empty((n, 8 * eights), dtype=np.uint8)
        for i in range(8):
            data[:, i::8] = (words >> np.uint64(i * bits)).astype(np.uint8) & np.uint8((1 << bits) - 1)
    return data[:, :columns]


def to_tensors(module: str, weight: QuantizedTensor, is_table: bool = False) -> dict[str, np.ndarray]:
    """The tensors of one module. `is_table` is for embeddings, which are stored unpacked."""
    fmt = weight.format
    tensors: dict[str, np.ndarray] = {}
    offset = np.uint8(1 << (fmt.bits - 1))
    signed = weight.codes.dtype == np.int8
    if is_packed(fmt, is_table):
        unsigned = weight.codes.view(np.uint8) + offset if signed else weight.codes
        tensors["weight_packed"] = pack(unsigned, fmt.bits)
        tensors["weight_shape"] = np.array(weight.shape, dtype=np.int64)
    else:
        tensors["weight"] = weight.codes if signed else (weight.codes - offset).view(np.int8)
        if weight.zeros is not None:
            tensors["weight_zero_point"] = (weight.zeros - offset).view(np.int8)
    tensors["weight_scale"] = weight.scales
    if weight.minima is not None:
        tensors["weight_minimum"] = weight.minima
    return {f"{module}.{name}": array for name, array in tensors.items()}


def from_tensors(
    file: TensorFile, module: str, scheme: Format | Scheme, shape: tuple[int, ...]
) -> QuantizedTensor:
    """One module back; a Scheme becomes the Format it stands for.

    Other writers use the code -128 in symmetric 8-bit weights; such a weight comes back asymmetric with the
    zero 128, which is the same numbers. Raises ModelFileError for missing tensors and wrong shapes.
    """
    fmt = scheme if isinstance(scheme, Format) else scheme.format
    names = set(file.names)
    offset = np.uint8(1 << (fmt.bits - 1))
    n, k = _shape(module, shape)
    groups = fmt.groups(k)
    packed = f"{module}.weight_packed" in names
    signed = fmt.bits == 8 and fmt.zero == "symmetric"
    if packed:
        _check(
            module, "weight_shape", _array(file, module, "weight_shape", names).reshape(-1).tolist() == [n, k]
        )
        codes = unpack(_array(file, module, "weight_packed", names), fmt.bits, k)
        if signed:
            codes = (codes - offset).view(np.int8)
    else:
        stored = _array(file, module, "weight", names)
        _check(module, "weight", stored.dtype == np.int8)
        codes = stored if signed else stored.view(np.uint8) + offset
    _check(module, "weight", codes.shape == (n, k))
    zeros = None
    if fmt.zero == "asymmetric":
        stored = _array(file, module, "weight_zero_point", names)
        zeros = unpack(stored.T, fmt.bits, n).T if packed else stored.view(np.uint8) + offset
    if signed and codes.min() == -128:
        fmt = parse_format(f"{fmt.name}-asym")
        zeros = np.full((n, groups), offset, dtype=np.uint8)
        codes = codes.view(np.uint8) + offset
    return QuantizedTensor(
        format=fmt,
        codes=codes,
        scales=_scales(file, module, "weight_scale", names, (n, groups)),
        zeros=None if zeros is None else np.ascontiguousarray(zeros),
        minima=_scales(file, module, "weight_minimum", names, (n, groups)) if fmt.zero == "minimum" else None,
    )


def read_values(file: TensorFile, module: str, scheme: Scheme, shape: tuple[int, ...]) -> np.ndarray:
    """One module's weight as float32 (N, K)."""
    return from_tensors(file, module, scheme, shape).dequantize()


def _shape(module: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2:
        raise ConfigError("a quantised module is a matrix", f"{module} {shape}", "check config.json")
    return shape[0], shape[1]


def _check(module: str, what: str, holds: bool) -> None:
    if not holds:
        raise ModelFileError(
            f"{module}.{what} must fit config.json", "another type or shape", "re-create the folder"
        )


def _array(file: TensorFile, module: str, what: str, names: set[str]) -> np.ndarray:
    name = f"{module}.{what}"
    if name not in names:
        raise ModelFileError("a quantised module needs all its tensors", f"no {name}", "re-create the folder")
    return file.array(name)


def _scales(file: TensorFile, module: str, what: str, names: set[str], shape: tuple[int, int]) -> np.ndarray:
    """Scales or minima (N, groups): float16 stays, everything else becomes float32."""
    array = _array(file, module, what, names)
    if file.dtype(f"{module}.{what}") != "F16":
        array = file.float32(f"{module}.{what}")
    _check(module, what, array.size == shape[0] * shape[1])
    return array.reshape(shape)
