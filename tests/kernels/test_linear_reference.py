"""kernels/linear.py against scalar loops over the C library's fmaf, and its own promises."""

from __future__ import annotations

import ctypes
import ctypes.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import native_blocks

from flatout.compress.rtn import round_to_nearest
from flatout.core.formats import Format, parse_format
from flatout.core.quantized import QuantizedTensor
from flatout.errors import ConfigError
from flatout.kernels.linear import (
    FIFTEEN_BITS,
    fused_multiply_add,
    linear_reference,
    quantize_activations,
    split_planes,
)

_libm = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6")
_libm.fmaf.restype = ctypes.c_float
_libm.fmaf.argtypes = [ctypes.c_float] * 3

BYTES = ["w8a8", "w8a8-g32", "w8a8-g64-asym", "w4a8-g32", "w4a8-g64", "w4a8-g32-asym", "q4_0", "q4_1", "q8_0"]
WIDE = ["w8a16", "w8a16-g32", "w8a16-asym", "w4a16-g64", "w4a16-g32-asym"]
INTEGER = [*BYTES, *WIDE]
FLOAT = ["bf16", "fp32"]


def make_weight(name: str, n: int, k: int, seed: int = 0) -> QuantizedTensor | np.ndarray:
    fmt = parse_format(name)
    if fmt.is_native:
        return native_blocks(name, n, k, seed)
    array = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    return round_to_nearest(array, fmt) if fmt.is_integer else array


def scalar_codes(row: np.ndarray, groups: int, fmt: Format) -> tuple[list[np.float32], list[int]]:
    """Scale of each weight group and the code of each activation."""
    f32 = np.float32
    limit = 127 if fmt.activation == "int8" else 16256
    parts = row.reshape(groups if fmt.activation_group else 1, -1)
    scales, codes = [], []
    for part in parts:
        amax = np.abs(part).max()
        inverse = f32(limit) / amax if amax > 0 else f32(0)
        scales += [f32(amax / f32(limit))] * (groups // len(parts))
        codes += [int(np.clip(np.rint(v * inverse), -limit, limit)) for v in part]
    return scales, codes


def scalar_linear(x: np.ndarray, weight: QuantizedTensor) -> np.ndarray:
    """The definition in the module's docstring, one output at a time."""
    f32 = np.float32
    n, k = weight.shape
    groups = weight.format.groups(k)
    width = k // groups
    y = np.zeros((len(x), n), dtype=f32)
    for t, row in enumerate(x):
        a_scales, codes = scalar_codes(row, groups, weight.format)
        planes = [(codes, 1)]
        if weight.format.activation == "int16":
            high = [(c + 64) // 128 for c in codes]
            planes = [(high, 128), ([c - 128 * h for c, h in zip(codes, high, strict=True)], 1)]
        for row_n in range(n):
            acc = f32(0)
            for g in range(groups):
                zero = weight.integer_zero if weight.zeros is None else int(weight.zeros[row_n, g])
                columns = slice(g * width, (g + 1) * width)
                for plane, factor in planes:
                    pairs = zip(plane[columns], weight.codes[row_n, columns], strict=True)
                    dot = sum(a * (int(c) - zero) for a, c in pairs)
                    c = f32(f32(a_scales[g] * f32(weight.scales[row_n, g])) * f32(factor))
                    acc = f32(_libm.fmaf(f32(dot), c, acc))
                if weight.minima is not None:
                    factor = f32(a_scales[g] * f32(sum(codes[columns])))
                    acc = f32(_libm.fmaf(factor, f32(weight.minima[row_n, g]), acc))
            y[t, row_n] = acc
    return y


@pytest.mark.parametrize(("tokens", "n", "k"), [(1, 1, 64), (3, 7, 192)])
@pytest.mark.parametrize("name", INTEGER)
def test_bits_equal_the_definition(name: str, tokens: int, n: int, k: int) -> None:
    weight = make_weight(name, n, k)
    assert isinstance(weight, QuantizedTensor)
    x = np.random.default_rng(1).standard_normal((tokens, k)).astype(np.float32)
    x[0, :32] = 0  # a group of zeros has scale and codes of zero
    ours = linear_reference(torch.from_numpy(x), weight, weight.format).numpy()
    np.testing.assert_array_equal(ours, scalar_linear(x, weight))


def test_wide_rows_stay_exact() -> None:
    """A per-channel row whose integer sum passes 2**24, where float32 partial sums would be wrong."""
    fmt = parse_format("w8a8")
    rng = np.random.default_rng(0)
    codes = rng.integers(120, 128, (2, 4096)).astype(np.int8)
    weight = QuantizedTensor(format=fmt, codes=codes, scales=np.ones((2, 1), np.float32))
    x = rng.uniform(0.9, 1, (2, 4096)).astype(np.float32)
    np.testing.assert_array_equal(
        linear_reference(torch.from_numpy(x), weight, fmt).numpy(), scalar_linear(x, weight)
    )


@pytest.mark.parametrize("name", INTEGER + FLOAT)
def test_close_to_dequantised_product(name: str) -> None:
    fmt, k = parse_format(name), 192
    weight = make_weight(name, 33, k)
    dense = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
    x = np.random.default_rng(2).standard_normal((5, k)).astype(np.float32)
    exact = x.astype(np.float64) @ dense.astype(np.float64).T
    error = np.linalg.norm(
        linear_reference(torch.from_numpy(x), weight, fmt).numpy() - exact
    ) / np.linalg.norm(exact)
    # int8 rounding: amax of a token ~ 3 sigma, so a step of 3/127 and a deviation of step / sqrt(12); bf16:
    # 2**-9.
    limit = {"int8": 0.012, "int16": 1e-4, "bf16": 0.004, "fp32": 1e-6}[fmt.activation]
    assert error < limit


@pytest.mark.parametrize("name", INTEGER)
def test_a_token_does_not_depend_on_its_batch(name: str) -> None:
    weight = make_weight(name, 9, 128)
    assert isinstance(weight, QuantizedTensor)
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(3))
    whole = linear_reference(x, weight, weight.format)
    for t in range(6):
        assert torch.equal(linear_reference(x[t : t + 1], weight, weight.format)[0], whole[t])


_finite = st.floats(allow_nan=False, allow_infinity=False, width=32, allow_subnormal=False)


@settings(deadline=None, derandomize=True)
@given(_finite, _finite, _finite)
def test_fused_multiply_add_is_fmaf(a: float, b: float, c: float) -> None:
    ours = fused_multiply_add(*(torch.tensor([v], dtype=torch.float32) for v in (a, b, c)))
    assert ours.item() == _libm.fmaf(a, b, c)


def test_fused_multiply_add_where_two_roundings_differ() -> None:
    """(1 + 2**-23) squared plus a tiny term: rounding to float64 first would land on a tie and lose the
    term."""
    a = 1 + 2.0**-12
    for tiny in (2.0**-80, -(2.0**-80), 2.0**-60, 0.0):
        ours = fused_multiply_add(*(torch.tensor([v], dtype=torch.float32) for v in (a, a, tiny)))
        assert ours.item() == _libm.fmaf(a, a, tiny)


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 32, 64]), st.floats(1e-6, 1e6))
def test_activation_codes_are_nearest(seed: int, group: int, size: float) -> None:
    x = torch.from_numpy((np.random.default_rng(seed).standard_normal((3, 64)) * size).astype(np.float32))
    codes, scales = quantize_activations(x, group)
    assert codes.shape == (3, 64)
    assert scales.shape == (3, 64 // (group or 64))
    back = codes.reshape(3, scales.shape[1], -1).double() * scales[:, :, None].double()
    error = (back.reshape(3, 64) - x.double()).abs().reshape(3, scales.shape[1], -1)
    assert (error <= scales[:, :, None].double() * (0.5 + 1e-4)).all()
    assert (codes.reshape(3, scales.shape[1], -1).abs().amax(dim=2) == 127).all()


def test_two_planes_hold_every_code() -> None:
    codes = torch.arange(-FIFTEEN_BITS, FIFTEEN_BITS + 1, dtype=torch.int16)[None]
    high, low = split_planes(codes)
    assert high.dtype == low.dtype == torch.int8
    assert torch.equal(128 * high.int() + low.int(), codes.int())
    assert (int(low.min()), int(low.max())) == (-64, 63)
    assert (int(high.min()), int(high.max())) == (-127, 127)


def test_wrong_format_is_refused() -> None:
    weight = make_weight("w8a8-g32", 4, 64)
    x = torch.zeros(1, 64)
    with pytest.raises(ConfigError, match="the weight must be in format w8a8-g64; found: w8a8-g32"):
        linear_reference(x, weight, parse_format("w8a8-g64"))
    with pytest.raises(ConfigError, match="must be in format bf16; found: w8a8-g32"):
        linear_reference(x, weight, Format(name="bf16", bits=16, activation="bf16"))
