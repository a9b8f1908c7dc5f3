"""compress/rtn.py: errors stay below half a step, and the stored scales are the ones that were used."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatout.compress.rtn import round_to_nearest
from flatout.core.formats import parse_format
from flatout.core.quantized import QuantizedTensor
from flatout.errors import ConfigError

FORMATS = ["w8a8", "w8a8-g32", "w8a16-g64-asym", "w4a8-g32", "w4a16-g64", "w4a16-g128", "w4a8-g32-asym"]


def random_weight(n: int, k: int, seed: int, size: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n, k)) * size).astype(np.float32)


def steps(tensor: QuantizedTensor) -> np.ndarray:
    """The step of every element, (N, K)."""
    k = tensor.shape[1]
    return np.repeat(tensor.scales.astype(np.float64), k // tensor.scales.shape[1], axis=1)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("search", [False, True])
@settings(deadline=None, derandomize=True, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 5), size=st.floats(1e-9, 1e9))
def test_error_is_half_a_step(name: str, search: bool, seed: int, n: int, size: float) -> None:
    weight = random_weight(n, 256, seed, size)
    tensor = round_to_nearest(weight, parse_format(name), search_clip=search)
    error = np.abs(tensor.dequantize().astype(np.float64) - weight)
    if search:  # the range may be clipped to 0.6 of itself
        assert (
            np.linalg.norm(error)
            <= np.linalg.norm(round_to_nearest(weight, parse_format(name)).dequantize() - weight) * 1.0001
        )
    else:
        # Scales keep 11 bits, so an extreme may be off by 127 / 2048 (255 / 2048) of a step beyond the
        # half, where an integer zero has used up the half already.
        limit = 0.5 + (127 if parse_format(name).zero == "symmetric" else 255) / 2048 + 0.01
        assert (error <= steps(tensor) * limit + 1e-30).all()


@pytest.mark.parametrize("name", FORMATS)
def test_zero_rows_and_odd_values(name: str) -> None:
    weight = random_weight(4, 128, 0)
    weight[0] = 0
    weight[1] = 1e-30
    weight[2] = 3.0  # constant
    values = round_to_nearest(weight, parse_format(name)).dequantize()
    assert (values[0] == 0).all()
    assert (np.abs(values[1]) < 1e-7).all()
    np.testing.assert_allclose(values[2], 3.0, rtol=0.075)  # amax / 7.5 leaves half a step at the extreme


def test_a_grid_weight_survives_exactly() -> None:
    """Weights that lie on the grid already come back bit for bit."""
    rng = np.random.default_rng(5)
    codes = rng.integers(-127, 128, (8, 64))
    codes[:, ::32] = 127
    scales = np.exp2(rng.integers(-9, -3, (8, 2))).astype(np.float32)
    weight = (codes * np.repeat(scales, 32, axis=1)).astype(np.float32)
    tensor = round_to_nearest(weight, parse_format("w8a8-g32"))
    np.testing.assert_array_equal(tensor.codes, codes)
    np.testing.assert_array_equal(tensor.dequantize(), weight)


def test_huge_scales_are_float32() -> None:
    tensor = round_to_nearest(np.full((2, 32), 1e8, np.float32), parse_format("w8a8-g32"))
    assert tensor.scales.dtype == np.float32
    assert round_to_nearest(np.ones((2, 32), np.float32), parse_format("w8a8-g32")).scales.dtype == np.float16


def test_asymmetric_is_finer_on_one_sided_weights() -> None:
    weight = np.abs(random_weight(16, 128, 1))
    symmetric, asymmetric = (
        np.square(round_to_nearest(weight, parse_format(name)).dequantize() - weight).mean()
        for name in ("w4a16-g32", "w4a16-g32-asym")
    )
    assert asymmetric < symmetric / 2.5  # twice the levels, so a quarter of the error power


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="groups must divide the width; found: w8a8-g64 on width 96"):
        round_to_nearest(np.zeros((2, 96), np.float32), parse_format("w8a8-g64"))
    with pytest.raises(ConfigError, match="weights must be finite"):
        round_to_nearest(np.full((2, 64), np.nan, np.float32), parse_format("w8a8-g64"))
    for name in ("q4_1", "bf16"):
        with pytest.raises(ConfigError, match="rounding makes"):
            round_to_nearest(np.zeros((2, 64), np.float32), parse_format(name))
