"""QuantizedTensor: integer codes, scales and zeros of one weight, in plain numpy.

The one form that every method writes, every file format is converted from or to, and every runner repacks
from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from flatout.core.formats import Format, parse_format
from flatout.errors import ModelFileError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedTensor:
    """An (N, K) weight: w[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g]), or scales * codes + minima.

    codes: int8 (N, K) in [-127, 127] for 8-bit symmetric; uint8 (N, K) below 2^bits for all others. scales:
    float16 or float32 (N, K // group). zeros: uint8 (N, K // group) for "asymmetric", otherwise None;
    symmetric codes of fewer than 8 bits carry the constant zero 2^(bits - 1). minima: like scales for
    "minimum".
    """

    format: Format
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None
    minima: np.ndarray | None = None

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        fmt = self.format
        if not fmt.is_integer:
            raise ModelFileError("a quantised tensor needs an integer format", fmt.name, "use an array")
        if fmt.group and k % fmt.group:
            raise ModelFileError("the group must divide the width", f"{fmt.group} and {k}", "another format")
        signed = fmt.bits == 8 and fmt.zero == "symmetric"
        expected = np.int8 if signed else np.uint8
        if self.codes.dtype != expected:
            raise ModelFileError(
                f"codes of {fmt.name} are {np.dtype(expected)}", str(self.codes.dtype), "convert the tensor"
            )
        for what, array, needed in (
            ("scales", self.scales, True),
            ("zeros", self.zeros, fmt.zero == "asymmetric"),
            ("minima", self.minima, fmt.zero == "minimum"),
        ):
            if (array is not None) != needed or (array is not None and array.shape != (n, fmt.groups(k))):
                raise ModelFileError(
                    f"{what} of {fmt.name} must be {(n, fmt.groups(k)) if needed else 'absent'}",
                    str(None if array is None else array.shape),
                    "re-create the file",
                )

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.codes.shape
        return n, k

    @property
    def integer_zero(self) -> int:
        """The constant zero of symmetric formats: 2^(bits - 1), or 0 for 8 bits."""
        return 1 << (self.format.bits - 1) if self.format.bits < 8 and self.format.zero == "symmetric" else 0

    @property
    def code_range(self) -> tuple[int, int]:
        """The least and the largest code."""
        return (-127, 127) if self.codes.dtype == np.int8 else (0, (1 << self.format.bits) - 1)

    @property
    def float_zeros(self) -> np.ndarray:
        """The zero of each group as float32 (N, K // group), the constant one too. Formats with minima have
        none: theirs are 0."""
        if self.zeros is not None:
            return self.zeros.astype(np.float32)
        return np.full(self.scales.shape, self.integer_zero, dtype=np.float32)

    def dequantize(self) -> np.ndarray:
        """The weight as float32 (N, K)."""
        n, k = self.shape
        grouped = self.codes.reshape(n, self.format.groups(k), -1).astype(np.float32)
        scales = self.scales.astype(np.float32)[:, :, None]
        if self.minima is not None:
            values = scales * grouped + self.minima.astype(np.float32)[:, :, None]
        else:
            values = scales * (grouped - self.float_zeros[:, :, None])
        return values.reshape(n, k)

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """The weight's rows start..stop (views, no copy)."""
        return QuantizedTensor(
            format=self.format,
            codes=self.codes[start:stop],
            scales=self.scales[start:stop],
            zeros=None if self.zeros is None else self.zeros[start:stop],
            minima=None if self.minima is None else self.minima[start:stop],
        )


def concatenate_rows(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """Stack weights of one format along N (q, k, v -> qkv)."""
    first = parts[0]
    return QuantizedTensor(
        format=first.format,
        codes=np.concatenate([p.codes for p in parts]),
        scales=np.concatenate([p.scales for p in parts]),
        zeros=None if first.zeros is None else np.concatenate([p.zeros for p in parts]),
        minima=None if first.minima is None else np.concatenate([p.minima for p in parts]),
    )


def flat_arrays(weights: Mapping[str, QuantizedTensor]) -> dict[str, np.ndarray]:
    """Weights as plain arrays for an .npz file, named NAME/FORMAT/{codes,scales,zeros}."""
    arrays: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        arrays[f"{name}/{weight.format.name}/codes"] = weight.codes
        arrays[f"{name}/{weight.format.name}/scales"] = weight.scales
        if weight.zeros is not None:
            arrays[f"{name}/{weight.format.name}/zeros"] = weight.zeros
    return arrays


def from_flat_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, QuantizedTensor]:
    """Weights of `flat_arrays`; names without a slash are something else. Raises ModelFileError for arrays
    that make no weight."""
    parts: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        if "/" in key:
            name, fmt, part = key.split("/")
            parts.setdefault((name, fmt), {})[part] = array
    return {name: QuantizedTensor(format=parse_format(fmt), **found) for (name, fmt), found in parts.items()}
