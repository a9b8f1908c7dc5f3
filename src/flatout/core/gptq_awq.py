"""Weights quantised by AutoGPTQ, GPTQModel and AutoAWQ: what their folders hold, and its exact meaning.

Per module, an (N, K) weight in groups along K (G = ceil(K / group)); codes and zeros are unsigned:

    gptq  qweight int32 (K bits / 32, N)   packed along K, a stream of bits from the lowest on
          qzeros  int32 (G, N bits / 32)   packed along N likewise; `checkpoint_format` "gptq" stores them
                                           less one, "gptq_v2" as they are
          scales  (G, N)
          g_idx   int32 (K)                the group of each column; may be absent unless desc_act
    awq   qweight int32 (K, N / 8)         packed along N: bits 4 i.. of a word hold column 8 j + ORDER[i]
          qzeros  int32 (G, N / 8)         likewise
          scales  (G, N)

    w[n, k] = scales[g(k), n] * (code[n, k] - zero[g(k), n])

Formats of flatout hold that exactly where groups can be cut into 32, 64 or 128 columns, with their scales
repeated; 2- and 3-bit codes fit into 4 bits. Columns in the order of activations (a g_idx that is not
k // group) and other groups become floats, with a reason. Sources: the packing code of AutoGPTQ 0.7 and
GPTQModel (qlinear_torch.py), and of AutoAWQ 0.2 (awq/utils/packing_utils.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from flatout.core.compressed_tensors import unpack
from flatout.core.files import shown
from flatout.core.formats import parse_format
from flatout.core.quantized import QuantizedTensor
from flatout.errors import ModelFileError, UnsupportedModelError

METHODS = ("gptq", "awq")
PARTS = ("qweight", "qzeros", "scales", "g_idx")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_GROUPS = (128, 64, 32)
_REMEDY = "a full copy of the folder"


class PackedFile(Protocol):
    """What tensors are read from; `owner` names them all."""

    @property
    def owner(self) -> Mapping[str, Any]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str: ...

    def array(self, name: str) -> np.ndarray: ...

    def float32(self, name: str) -> np.ndarray: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """A folder's quantization_config. method: "gptq" or "awq"; group 0 is one scale a row; stored_less: what
    to add to stored zeros."""

    method: str
    bits: int
    group: int
    symmetric: bool
    act_order: bool
    stored_less: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedModule:
    """One quantised module, its shapes checked. group: columns that share a scale when run, 0 = the row;
    reason: why it cannot run as integers, "" where it can."""

    name: str
    packing: Packing
    shape: tuple[int, int]
    group: int
    reason: str

    @property
    def stored_group(self) -> int:
        return self.packing.group or self.shape[1]


def read_packing(config: Mapping[str, Any]) -> Packing:
    """A `quantization_config` with quant_method gptq or awq. Raises UnsupportedModelError for versions whose
    layout is another one, ModelFileError for values of the wrong type."""
    method = config.get("quant_method")
    known_bits = (4,) if method == "awq" else (2, 3, 4, 8)
    bits, group = config.get("bits"), config.get("group_size", 128)
    if type(bits) is not int or bits not in known_bits:
        raise UnsupportedModelError(
            f"{method} weights have {' or '.join(map(str, known_bits))} bits",
            f"bits {shown(bits)}",
            "the float model",
        )
    if type(group) is not int or not (group == -1 or 1 <= group <= 1 << 20):
        raise ModelFileError(
            "group_size is -1 (one a row) or a number of columns", shown(group), "check config.json"
        )
    for flag in ("sym", "desc_act", "zero_point", "is_marlin_format"):
        if not isinstance(config.get(flag, False), bool):
            raise ModelFileError(f"{flag} is true or false", shown(config[flag]), "check config.json")
    per_module = config.get("dynamic") or {}
    if not isinstance(per_module, dict) or any(not str(key).startswith("-:") for key in per_module):
        raise UnsupportedModelError(
            "all quantised modules of a folder must share bits and group",
            f"dynamic {shown(per_module)}",
            "a model quantised uniformly",
        )
    if method == "awq":
        _check_version("version", config.get("version", config.get("format", "gemm")), ("gemm",))
        asymmetric = config.get("zero_point", True)
        return Packing(
            method="awq",
            bits=bits,
            group=max(group, 0),
            symmetric=not asymmetric,
            act_order=False,
            stored_less=0,
        )
    if config.get("is_marlin_format"):
        _check_version("checkpoint_format", "marlin", ("gptq", "gptq_v2"))
    named = config.get("checkpoint_format", config.get("format", "gptq"))
    version = _check_version("checkpoint_format", named, ("gptq", "gptq_v2"))
    return Packing(
        method="gptq",
        bits=bits,
        group=max(group, 0),
        symmetric=config.get("sym", True),
        act_order=config.get("desc_act", False),
        stored_less=1 if version == "gptq" else 0,
    )


def _check_version(key: str, value: object, known: tuple[str, ...]) -> str:
    """`value` in lower case. Raises UnsupportedModelError unless it is a layout that is known."""
    name = value.lower() if isinstance(value, str) else ""
    if name not in known:
        raise UnsupportedModelError(
            f"{key} is {' or '.join(known)}: others lay the weights out differently",
            shown(value),
            "a copy in that layout, or the float model",
        )
    return name


def packed_module(file: PackedFile, name: str, packing: Packing, shape: tuple[int, ...]) -> PackedModule:
    """Check the shapes and types of one module's tensors. Raises ModelFileError; UnsupportedModelError for
    widths that do not fill 32-bit words."""
    n, k = shape
    bits = packing.bits
    along = n if packing.method == "awq" else k
    if along * bits % 32 or n * bits % 32:
        raise UnsupportedModelError(
            f"{bits}-bit codes and zeros must fill 32-bit words", f"{name} with {n} x {k}", "the float model"
        )
    groups = -(-k // (packing.group or k))
    words = (k, n * bits // 32) if packing.method == "awq" else (k * bits // 32, n)
    expected = {"qweight": words, "qzeros": (groups, n * bits // 32), "scales": (groups, n)}
    for part, wanted in expected.items():
        full = f"{name}.{part}"
        if full not in file.owner:
            raise ModelFileError("a quantised module needs all its tensors", f"no {shown(full)}", _REMEDY)
        floats = ("F16", "BF16", "F32")
        types = floats if part == "scales" else ("I32",)
        if file.shape(full) != wanted or file.dtype(full) not in types:
            raise ModelFileError(
                f"{shown(full)} must be {' or '.join(types)} of shape {wanted}, by config.json",
                f"{file.dtype(full)} {file.shape(full)}",
                "weights and configuration of the same model",
            )
    group = _run_group(packing, k)
    reason = "" if group is not None else f"groups of {packing.group} on a width of {k}"
    if packing.method == "gptq" and not _in_order(file, name, packing, k):
        reason = "columns in the order of activations (desc_act)"
    return PackedModule(name=name, packing=packing, shape=(n, k), group=group or 0, reason=reason)


def _run_group(packing: Packing, k: int) -> int | None:
    """Columns that share a scale when run, 0 = the row; None when no format of flatout divides the groups."""
    if packing.bits == 8 and (packing.group == 0 or packing.group >= k):
        return 0
    stored = packing.group or k
    return next((g for g in _GROUPS if k % g == 0 and (stored % g == 0 or stored >= k)), None)


def _in_order(file: PackedFile, name: str, packing: Packing, k: int) -> bool:
    """Whether column c belongs to group c // group."""
    full = f"{name}.g_idx"
    if full not in file.owner:
        if packing.act_order:
            raise ModelFileError(
                "with desc_act the group of each column must be stored", f"no {shown(full)}", _REMEDY
            )
        return True
    if file.shape(full) != (k,) or file.dtype(full) != "I32":
        raise ModelFileError(
            f"{shown(full)} must be I32 of shape {(k,)}", f"{file.dtype(full)} {file.shape(full)}", _REMEDY
        )
    group_of = file.array(full)
    stored = packing.group or k
    if int(group_of.min()) < 0 or int(group_of.max()) >= -(-k // stored):
        raise ModelFileError(
            f"{shown(full)} must name groups 0 to {-(-k // stored) - 1}",
            f"{int(group_of.min())} to {int(group_of.max())}",
            _REMEDY,
        )
    ordered = bool(np.array_equal(group_of, np.arange(k) // stored))
    if not ordered and not packing.act_order:
        raise ModelFileError(
            "without desc_act column k belongs to group k // group_size",
            f"another order in {shown(full)}",
            "set desc_act in config.json if the order is meant",
        )
    return ordered


def packed_tensor(file: PackedFile, module: PackedModule) -> QuantizedTensor | None:
    """The weight as integer codes with the very same values, None where `module.reason` says why not.

    4-bit weights of a symmetric folder stay symmetric where all zeros are 8. 8-bit ones use the code -128,
    which symmetric formats lack, so they become asymmetric.
    """
    if module.reason:
        return None
    k = module.shape[1]
    codes, zeros, scales = _parts(file, module)
    held = 4 if module.packing.bits <= 4 else 8
    symmetric = module.packing.bits == 4 and module.packing.symmetric and bool((zeros == 8).all())
    group = f"-g{module.group}" if module.group else ""
    fmt = parse_format(f"w{held}a16{group}{'' if symmetric else '-asym'}")
    first = np.arange(fmt.groups(k)) * (module.group or k) // module.stored_group
    return QuantizedTensor(
        format=fmt,
        codes=np.ascontiguousarray(codes),
        scales=np.ascontiguousarray(scales.T[:, first]),
        zeros=None if symmetric else np.ascontiguousarray(zeros.T[:, first]),
    )


def packed_values(file: PackedFile, module: PackedModule) -> np.ndarray:
    """The weight as float32 (N, K), whatever the order of its columns."""
    codes, zeros, scales = _parts(file, module)
    group_of = np.arange(module.shape[1]) // module.stored_group
    if f"{module.name}.g_idx" in file.owner:
        group_of = file.array(f"{module.name}.g_idx")
    values = codes.astype(np.float32)
    values -= zeros.T[:, group_of]
    values *= scales.astype(np.float32).T[:, group_of]
    return values


def _parts(file: PackedFile, module: PackedModule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes uint8 (N, K), zeros uint8 (G, N), scales float16 or float32 (G, N)."""
    n, k = module.shape
    packing, bits = module.packing, module.packing.bits
    words, zero_words = file.array(f"{module.name}.qweight"), file.array(f"{module.name}.qzeros")
    if packing.method == "awq":
        codes, zeros = _awq_columns(words, n).T, _awq_columns(zero_words, n)
    else:
        codes, zeros = _stream(words.T, bits, k), _stream(zero_words, bits, n)
    if packing.stored_less and int(zeros.max()) == (1 << bits) - 1:
        raise ModelFileError(
            f"zeros of checkpoint_format gptq are stored less one, so at most {(1 << bits) - 2}",
            f"{(1 << bits) - 1} in {shown(module.name)}.qzeros, which programs read as {1 << bits} or as 0",
            "a copy in checkpoint_format gptq_v2",
        )
    name = f"{module.name}.scales"
    scales = file.array(name) if file.dtype(name) == "F16" else file.float32(name)
    return codes, zeros + np.uint8(packing.stored_less), scales


def _stream(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """uint8 (R, columns) from rows of int32 words that are a stream of `bits`-bit codes."""
    if bits in (4, 8):
        return unpack(words, bits, columns)
    data = np.ascontiguousarray(words).view(np.uint8)
    each = np.unpackbits(data, axis=1, bitorder="little").reshape(len(words), columns, bits)
    return np.packbits(each, axis=2, bitorder="little")[:, :, 0]


def _awq_columns(words: np.ndarray, columns: int) -> np.ndarray:
    """uint8 (R, columns) from int32 words of eight columns each in AWQ's order."""
    codes = np.empty((len(words), columns), dtype=np.uint8)
    codes.reshape(len(words), -1, 8)[:, :, _AWQ_ORDER] = unpack(words, 4, columns).reshape(len(words), -1, 8)
    return codes
