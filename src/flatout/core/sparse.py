"""Two of four, stored packed: the sparse-24-bitmask form of the compressed-tensors library.

Per module (a Hugging Face name without ".weight"), an (N, K) weight with at most two of every four neighbours
along K that are not zero:

    compressed   (N, K / 2), the two weights kept of each four, in order
    bitmask      uint8 (N, ceil(K / 8)), a bit a weight, the lowest first: as large as two 2-bit positions a
    four shape        int64 (2, 1) = N, K

9 bits a weight instead of 16, exactly the same numbers. It saves room in files; nothing here multiplies in
this form, so a loaded weight is dense again. Current versions of compressed-tensors list the form as legacy
and do not load it, which is why folders hold dense zeros unless this is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from flatout.core.files import corrupt
from flatout.core.safetensors import Entry, SafetensorsFile
from flatout.errors import ConfigError

FORMAT = "sparse-24-bitmask"
PARTS = ("compressed", "bitmask", "shape")


def is_two_of_four(dense: np.ndarray) -> bool:
    """Whether every four neighbours along the rows of (N, K) hold two zeros."""
    n, k = dense.shape
    return k % 4 == 0 and bool(((dense.reshape(n, -1, 4) != 0).sum(axis=2) <= 2).all())


def pack_two_of_four(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(compressed, bitmask) of an (N, K) array of any type. Raises ConfigError unless it has the pattern."""
    n, k = dense.shape
    if not is_two_of_four(dense):
        raise ConfigError("at most two of four neighbours are not zero", f"{dense.shape} with more", "dense")
    fours = dense.reshape(-1, 4)
    # A four with fewer than two weights keeps zeros as well, so that every row has K / 2 values.
    order = np.argsort(fours == 0, axis=1, kind="stable")[:, :2]
    mask = np.zeros(fours.shape, dtype=bool)
    np.put_along_axis(mask, order, True, axis=1)
    return fours[mask].reshape(n, k // 2), np.packbits(mask.reshape(n, k), axis=1, bitorder="little")


def unpack_two_of_four(values: np.ndarray, bitmask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Inverse of `pack_two_of_four`; the caller has checked the shapes. Raises ConfigError for another
    mask."""
    mask = np.unpackbits(bitmask, axis=1, count=shape[1], bitorder="little").astype(bool)
    if not (mask.sum(axis=1) == values.shape[1]).all():
        raise ConfigError("a bit mask marks half of each row", "another number", "a sound file")
    dense = np.zeros(shape, dtype=values.dtype)
    dense[mask] = values.reshape(-1)
    return dense


def packed_tensors(module: str, dense: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors that stand for `module`'s weight in the file; bfloat16 comes and goes as uint16 bits."""
    values, bitmask = pack_two_of_four(dense)
    shape = np.array([[size] for size in dense.shape], dtype=np.int64)
    return {f"{module}.compressed": values, f"{module}.bitmask": bitmask, f"{module}.shape": shape}


def sparsity_config(ignore: Iterable[str]) -> dict[str, object]:
    """`quantization_config` of a folder whose linears other than `ignore` are packed."""
    return {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "compressed",
        "config_groups": {},
        "ignore": [],
        "sparsity_config": {
            "format": FORMAT,
            "global_sparsity": 0.5,
            "sparsity_structure": "2:4",
            "targets": ["Linear"],
            "ignore": sorted(ignore),
        },
    }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SparseFile(SafetensorsFile):
    """A file whose packed modules read as their dense weights. inner: the same file without that."""

    inner: SafetensorsFile

    def array(self, name: str) -> np.ndarray:
        module = name.removesuffix(".weight")
        if f"{module}.bitmask" not in self.inner.entries:
            return self.inner.array(name)
        values, mask = (self.inner.array(f"{module}.{part}") for part in PARTS[:2])
        n, k = self.shape(name)
        try:
            return unpack_two_of_four(values, mask, (n, k))
        except ConfigError as error:
            raise corrupt(self.path, error.rule, f"{error.value} in {name}") from error


def with_dense_names(file: SafetensorsFile) -> SafetensorsFile:
    """`file` itself, or one in which each packed module reads as its weight. Raises ModelFileError for parts
    that do not fit each other."""
    modules = [name.removesuffix(".bitmask") for name in file.names if name.endswith(".bitmask")]
    if not modules:
        return file
    dense: dict[str, Entry] = {}
    for module in modules:
        listed = file.array(f"{module}.shape")
        shape = tuple(int(size) for size in listed.reshape(-1)) if listed.size == 2 else ()
        sound = len(shape) == 2 and all(0 < size < 1 << 31 for size in shape) and shape[1] % 4 == 0
        if (
            not sound
            or file.dtype(f"{module}.bitmask") != "U8"
            or file.shape(f"{module}.bitmask") != (shape[0], -(-shape[1] // 8))
            or file.shape(f"{module}.compressed") != (shape[0], shape[1] // 2)
        ):
            raise corrupt(file.path, "values and bit mask must fit the shape", f"{module} of {shape}")
        values = file.entries[f"{module}.compressed"]
        dense[f"{module}.weight"] = Entry(values.dtype, shape, values.start, values.stop)
    hidden = {f"{module}.{part}" for module in modules for part in PARTS}
    return SparseFile(
        path=file.path,
        metadata=file.metadata,
        names=(*(name for name in file.names if name not in hidden), *dense),
        entries={**file.entries, **dense},
        mapped=file.mapped,
        data=file.data,
        inner=file,
    )
