"""Round to nearest: the scale of each group from its extremes (or from a search), the codes by rounding.

    c = clamp(round(w / s) + z),   W' = s (c - z),   s, z of a group of neighbours along a row

Symmetric 8-bit codes span [-127, 127] with scale amax / 127; those of b < 8 bits span -2^(b - 1) to
2^(b - 1) - 1 around the zero 2^(b - 1) with scale amax / (2^(b - 1) - 1/2), which leaves no error above half
a step; asymmetric codes span min(w, 0)..max(w, 0) with an integer zero. Scales are float16 (float32 where a
scale exceeds float16's range) and codes are rounded against the scale as stored, so the rounding of scales
costs nothing extra. The search tries nine narrower ranges a group and keeps the one with the least squared
error, clipping a few extremes for finer steps (Banner et al., 2019, arXiv 1810.05723).

Trade-off: seconds and no text at all; at 4 bits and fewer GPTQ loses less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from flatout.compress.method import check_weight
from flatout.core.formats import Format
from flatout.core.fuse import Source, float_weight, native_format, native_weight
from flatout.core.model import Weight
from flatout.core.quantized import QuantizedTensor
from flatout.errors import ConfigError
from flatout.kernels.grids import nearest_grids

CLIP_RATIOS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68)
_SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)
_SMALLEST = float(np.finfo(np.float16).smallest_subnormal)
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """The levels scale * (code - zero) of each group, code in [low, high]. Both arrays are float32 (N,
    groups)."""

    scales: np.ndarray
    zeros: np.ndarray
    low: int
    high: int

    def codes(self, grouped: np.ndarray) -> np.ndarray:
        """Nearest codes of `grouped` (N, groups, width), as float32 integers."""
        levels = np.rint(grouped / self.scales[:, :, None]) + self.zeros[:, :, None]
        codes: np.ndarray = np.clip(levels, self.low, self.high)
        return codes


def check_roundable(fmt: Format) -> None:
    """Raise ConfigError unless rounding can produce `fmt`."""
    if not fmt.is_integer or fmt.is_native:
        raise ConfigError(
            "rounding makes w{8,6,5,4,3}a{8,16} formats; GGUF blocks are taken from a file that has them",
            fmt.name,
            "w8a8-g64",
        )


def storable(scales: np.ndarray) -> np.ndarray:
    """Scales as they will be stored, widened back to float32; never zero, so division is safe.

    Below float16's normal range they are rounded up: there a scale rounded down would clip the group's
    extremes.
    """
    scales = np.maximum(scales, np.float32(_SMALLEST))
    if scales.size and float(scales.max()) > _LARGEST:
        return scales
    rounded_up = np.ceil(scales / np.float32(_SMALLEST)) * np.float32(_SMALLEST)
    return np.where(scales < _SMALLEST_NORMAL, rounded_up, scales.astype(np.float16).astype(np.float32))


def extremes(grouped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest of each group of (N, groups, width), both (N, groups)."""
    return grouped.min(axis=2), grouped.max(axis=2)


def grid_between(minimum: np.ndarray, maximum: np.ndarray, fmt: Format, clip: float = 1.0) -> Grid:
    """The grid of groups between `minimum` and `maximum` float32 (N, groups), whose range is that times
    `clip`."""
    if fmt.zero == "symmetric":
        amax = np.maximum(-minimum, maximum) * np.float32(clip)
        zero, low, high = (0, -127, 127) if fmt.bits == 8 else (1 << (fmt.bits - 1), 0, (1 << fmt.bits) - 1)
        half_range = (high - low) / 2
        scales = storable(amax / np.float32(half_range))
        return Grid(scales=scales, zeros=np.full_like(scales, zero), low=low, high=high)
    top = (1 << fmt.bits) - 1
    minimum = np.minimum(minimum, 0) * np.float32(clip)
    maximum = np.maximum(maximum, 0) * np.float32(clip)
    scales = storable((maximum - minimum) / np.float32(top))
    zeros = np.clip(np.rint(-minimum / scales), 0, top)
    return Grid(scales=scales, zeros=zeros, low=0, high=top)


def make_grid(grouped: np.ndarray, fmt: Format, clip: float = 1.0) -> Grid:
    """The grid of `grouped` float32 (N, groups, width) whose range is its own times `clip`."""
    return grid_between(*extremes(grouped), fmt, clip)


def search_grid(grouped: np.ndarray, fmt: Format, importance: np.ndarray | None = None) -> Grid:
    """For every group the clip ratio with the least squared error, weighted by `importance` (groups, width)
    if given. A narrower range clips a few extremes and rounds everything else finer."""
    grids = clipped_grids(*extremes(grouped), fmt)
    steps, zeros = (np.stack([getattr(grid, part) for grid in grids]) for part in ("scales", "zeros"))
    best = nearest_grids(grouped, steps, zeros, grids[0].low, grids[0].high, importance)
    return chosen_grid(grids, best)


def clipped_grids(minimum: np.ndarray, maximum: np.ndarray, fmt: Format) -> list[Grid]:
    """The grids of all of CLIP_RATIOS, of groups between `minimum` and `maximum` float32 (N, groups)."""
    return [grid_between(minimum, maximum, fmt, clip) for clip in CLIP_RATIOS]


def chosen_grid(grids: Sequence[Grid], which: np.ndarray) -> Grid:
    """Of each group the grid with the index `which` (N, groups)."""
    scales, zeros = (np.stack([getattr(grid, part) for grid in grids]) for part in ("scales", "zeros"))
    return replace(
        grids[0],
        scales=np.take_along_axis(scales, which[None], axis=0)[0],
        zeros=np.take_along_axis(zeros, which[None], axis=0)[0],
    )


def pack(codes: np.ndarray, grid: Grid, fmt: Format) -> QuantizedTensor:
    """A QuantizedTensor of integer-valued `codes` (N, K) on `grid`."""
    return QuantizedTensor(
        format=fmt,
        codes=codes.astype(np.int8 if grid.low < 0 else np.uint8),
        scales=_narrowed(grid.scales),
        zeros=grid.zeros.astype(np.uint8) if fmt.zero == "asymmetric" else None,
    )


def _narrowed(scales: np.ndarray) -> np.ndarray:
    """Storable scales as float16, or float32 where that would change them."""
    with np.errstate(over="ignore"):
        fits = bool((scales.astype(np.float16) == scales).all())
    return scales.astype(np.float16 if fits else np.float32)


def with_scales(rounded: QuantizedTensor, scales: np.ndarray) -> QuantizedTensor:
    """The codes of `rounded` with other `scales` float32 (N, groups), as they can be stored."""
    return replace(rounded, scales=_narrowed(storable(scales)))


def check_groups(k: int, fmt: Format) -> None:
    """Raise ConfigError when the groups of `fmt` do not divide the width `k`."""
    if fmt.group and k % fmt.group:
        raise ConfigError("groups must divide the width", f"{fmt.name} on width {k}", "a group of 32 or 64")


def group_rows(weight: np.ndarray, fmt: Format) -> np.ndarray:
    """float32 (N, K) as (N, groups, width). Raises ConfigError when the group does not divide K or values
    are not finite."""
    n, k = weight.shape
    check_groups(k, fmt)
    if not np.isfinite(weight).all():
        raise ConfigError("weights must be finite", "infinity or NaN", "another checkpoint")
    return np.asarray(weight, dtype=np.float32).reshape(n, fmt.groups(k), -1)


def round_to_nearest(weight: np.ndarray, fmt: Format, search_clip: bool = False) -> QuantizedTensor:
    """`weight` float32 (N, K) in `fmt`. search_clip: pick each group's range by least squared error."""
    check_roundable(fmt)
    grouped = group_rows(weight, fmt)
    grid = search_grid(grouped, fmt) if search_clip else make_grid(grouped, fmt)
    return pack(grid.codes(grouped).reshape(weight.shape), grid, fmt)


def to_nearest(source: Source, name: str, fmt: Format) -> Weight:
    """The fused weight in `fmt` without calibration: float, the file's own blocks, or rounded to nearest.
    Raises ConfigError, naming it, for one that is not finite."""
    if not fmt.is_integer:
        return float_weight(source, name)
    if fmt.is_native or native_format(source, name) == fmt.name:
        return native_weight(source, name, fmt)
    weight = float_weight(source, name)
    check_weight(name, weight)
    return round_to_nearest(weight, fmt, search_clip=fmt.bits < 8)
