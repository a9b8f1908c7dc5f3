"""core/byte_scales.py: scales of 8 bits are float16 numbers, whole in their row's unit, and the best of nine
pairs."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import tiny_source, tiny_spec

from flatout.core.byte_scales import with_byte_scales
from flatout.core.formats import parse_format, with_short_scales
from flatout.core.fuse import native_weight
from flatout.core.quantized import QuantizedTensor
from flatout.errors import UnsupportedModelError


def blocks(seed: int, rows: int, groups: int, name: str, size: float = 0.01) -> QuantizedTensor:
    rng = np.random.default_rng(seed)
    fmt = parse_format(name)
    scales = (size * rng.lognormal(0.0, 0.6, (rows, groups))).astype(np.float16)
    if fmt.zero == "symmetric":
        scales *= rng.choice(np.array([-1, 1], np.float16), scales.shape)
    minima = -(scales * rng.uniform(4, 11, scales.shape)).astype(np.float16)
    codes = rng.integers(0, 16, (rows, 32 * groups)).astype(np.uint8)
    return QuantizedTensor(
        format=fmt, codes=codes, scales=scales, minima=minima if fmt.zero == "minimum" else None
    )


def whole(values: np.ndarray) -> bool:
    """Whether each row is -127 to 127 times some power of two."""
    for row in values.astype(np.float64):
        units = 2.0 ** np.arange(-24, 16)
        counts = row / units[:, None]
        if not ((counts == np.rint(counts)) & (np.abs(counts) <= 127)).all(axis=1).any():
            return False
    return True


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 5),
    groups=st.integers(1, 6),
    name=st.sampled_from(["q4_0", "q4_1"]),
    size=st.sampled_from([1e-7, 1e-4, 0.01, 30.0]),
)
def test_what_comes_out_is_whole_and_the_codes_stay(
    seed: int, rows: int, groups: int, name: str, size: float
) -> None:
    weight = blocks(seed, rows, groups, name, size)
    short = with_byte_scales(weight, parse_format(f"{name}-s8"))
    assert short.format.name == f"{name}-s8"
    np.testing.assert_array_equal(short.codes, weight.codes)
    assert short.scales.dtype == np.float16
    assert whole(short.scales)
    if short.minima is not None:
        assert short.minima.dtype == np.float16
        assert whole(short.minima)


@pytest.mark.parametrize("name", ["q4_0", "q4_1"])
def test_no_pair_nearby_is_better(name: str) -> None:
    """Each block by itself, against all pairs within two units of the nearest, by the dequantised weights."""
    weight = blocks(3, 4, 5, name)
    short = with_byte_scales(weight, parse_format(f"{name}-s8"))
    exact = weight.dequantize().reshape(4, 5, 32).astype(np.float64)
    errors = np.square(short.dequantize().reshape(4, 5, 32) - exact).sum(axis=2)
    codes = weight.codes.reshape(4, 5, 32).astype(np.float64) - weight.integer_zero
    unit = 2.0 ** np.ceil(np.log2(np.abs(weight.scales.astype(np.float64)).max(axis=1, keepdims=True) / 127))
    scales = [np.rint(weight.scales / unit) * unit + step * unit for step in (-1, 0, 1)]
    minima = [np.zeros_like(scales[0])]
    if weight.minima is not None:
        large = np.abs(weight.minima.astype(np.float64)).max(axis=1, keepdims=True)
        unit = 2.0 ** np.ceil(np.log2(large / 127))
        minima = [np.rint(weight.minima / unit) * unit + step * unit for step in (-1, 0, 1)]
    for s, m in product(scales, minima):
        if np.abs(s / unit).max() > 127 or np.abs(m / unit).max() > 127:
            continue
        other = np.square(s[:, :, None] * codes + m[:, :, None] - exact).sum(axis=2)
        assert (errors <= other * (1 + 1e-4)).all()


def test_the_pair_beats_rounding_each_by_itself() -> None:
    weight = blocks(5, 64, 18, "q4_1")
    exact = weight.dequantize()
    short = with_byte_scales(weight, parse_format("q4_1-s8")).dequantize()

    def nearest(values: np.ndarray) -> np.ndarray:
        unit = 2.0 ** np.ceil(np.log2(np.abs(values.astype(np.float64)).max(axis=1, keepdims=True) / 127))
        return (np.rint(values / unit) * unit).astype(np.float16)

    assert weight.minima is not None
    plain = QuantizedTensor(
        format=weight.format,
        codes=weight.codes,
        scales=nearest(weight.scales),
        minima=nearest(weight.minima),
    ).dequantize()
    assert np.square(short - exact).sum() < 0.6 * np.square(plain - exact).sum()


def test_rows_of_zeros_and_rows_that_are_not_finite_stay() -> None:
    weight = blocks(7, 3, 2, "q4_1")
    assert weight.minima is not None
    weight.scales[0] = 0
    weight.minima[0] = 0
    weight.scales[1, 0] = np.inf
    short = with_byte_scales(weight, parse_format("q4_1-s8"))
    assert short.minima is not None
    assert not short.scales[0].any()
    assert not short.minima[0].any()
    np.testing.assert_array_equal(short.scales[1], weight.scales[1])
    np.testing.assert_array_equal(short.minima[1], weight.minima[1])
    assert whole(short.scales[2:])


def test_a_file_of_other_blocks_has_none() -> None:
    spec = tiny_spec()
    source = tiny_source(spec, layers="q4_1", head="q8_0")
    fmt = parse_format("q4_1-s8")
    weight = native_weight(source, "layers.0.qkv", fmt)
    plain = native_weight(source, "layers.0.qkv", parse_format("q4_1"))
    assert weight.format == fmt
    np.testing.assert_array_equal(weight.codes, plain.codes)
    step = np.abs(plain.scales.astype(np.float32)).max()
    assert np.abs(weight.dequantize() - plain.dequantize()).max() < 0.25 * step
    with pytest.raises(UnsupportedModelError, match="q4_0-s8 takes blocks"):
        native_weight(source, "layers.0.qkv", parse_format("q4_0-s8"))
    assert [with_short_scales(name) for name in ("q4_0", "q4_1", "q8_0", "w4a8-g32")] == [
        "q4_0-s8",
        "q4_1-s8",
        "q8_0",
        "w4a8-g32",
    ]
