"""Every instruction set's linear against the PyTorch reference: bit for bit where sums are integers."""

import numpy as np
import pytest
import torch

from flatout import _cpu
from flatout.compress.rtn import round_to_nearest
from flatout.core.byte_scales import with_byte_scales
from flatout.core.formats import parse_format
from flatout.core.quantized import QuantizedTensor
from flatout.kernels.linear import linear_reference

FORMATS = [
    "w8a8",
    "w8a8-g32",
    "w8a8-g64",
    "w8a8-g128",
    "w8a8-g64-asym",
    "w4a8-g32",
    "w4a8-g64-asym",
    "w4a8-g128",
    "w8a16",
    "w8a16-g64",
    "w8a16-g32-asym",
    "w4a16-g32",
    "w4a16-g128-asym",
    "w5a8",
    "w5a8-g32",
    "w5a16-g64-asym",
    "w6a8",
    "w6a8-g64",
    "w6a8-asym",
    "w6a16",
    "q4_0",
    "q4_1",
    "q8_0",
    "q4_0-s8",
    "q4_1-s8",
]
# (tokens, rows, columns): one of everything, rows that fill no panel, odd panels, more than a token block.
SHAPES = [(1, 1, 128), (2, 17, 384), (5, 48, 128), (6, 16, 256), (16, 33, 128), (23, 96, 384), (131, 40, 256)]


def random_weight(rng, rows, columns, name):
    fmt = parse_format(name)
    if not fmt.is_native:
        return round_to_nearest(rng.standard_normal((rows, columns)).astype(np.float32), fmt)
    scales = rng.uniform(0.01, 0.1, (rows, columns // 32)).astype(np.float16)
    minima = rng.standard_normal(scales.shape).astype(np.float16) if fmt.zero == "minimum" else None
    if name == "q8_0":
        codes = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
    else:
        codes = rng.integers(0, 16, (rows, columns)).astype(np.uint8)
    if fmt.scale_bits == 8:
        if rows > 2:  # a row without scales, one whose minima are far larger, one of the least numbers
            scales[0] = 0
            scales[1] *= np.float16(1e-4)
            scales[2] = np.float16(2.0**-24)
        blocks = QuantizedTensor(format=parse_format(fmt.blocks), codes=codes, scales=scales, minima=minima)
        return with_byte_scales(blocks, fmt)
    return QuantizedTensor(format=fmt, codes=codes, scales=scales, minima=minima)


def run(isa, x, weight):
    fmt = weight.format
    return _cpu.linear_quantized(
        isa,
        x,
        np.ascontiguousarray(weight.codes),
        np.ascontiguousarray(weight.scales),
        weight.zeros,
        weight.minima,
        fmt.bits,
        fmt.group,
        fmt.zero,
        fmt.activation,
        fmt.activation_group,
        fmt.scale_bits == 8,
    )


def activations(rng, tokens, columns):
    """Normal values with outlier columns, a zero token, and a token whose groups differ in size by 1e6."""
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    x[:, :: columns // 4] *= 40
    if tokens > 1:
        x[1] = 0
    if tokens > 2:
        x[2, : columns // 2] *= 1e-6
    return x


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("isa", _cpu.isas())
def test_integer_linear_equals_the_reference_bit_for_bit(isa, name):
    rng = np.random.default_rng(7)
    for tokens, rows, columns in SHAPES:
        weight = random_weight(rng, rows, columns, name)
        x = activations(rng, tokens, columns)
        expected = linear_reference(torch.from_numpy(x), weight, weight.format).numpy()
        np.testing.assert_array_equal(run(isa, x, weight), expected, err_msg=f"{tokens} x {rows} x {columns}")


@pytest.mark.parametrize("name", ["w8a8", "w8a16", "w6a8", "w5a16"])
@pytest.mark.parametrize("columns", [4, 60, 100, 576, 1536])
@pytest.mark.parametrize("isa", _cpu.isas())
def test_one_scale_a_row_takes_any_width(isa, columns, name):
    rng = np.random.default_rng(columns)
    weight = random_weight(rng, 35, columns, name)
    x = rng.standard_normal((19, columns)).astype(np.float32)
    expected = linear_reference(torch.from_numpy(x), weight, weight.format).numpy()
    np.testing.assert_array_equal(run(isa, x, weight), expected)


@pytest.mark.parametrize("name", ["w8a8", "w4a8-g32", "q4_1", "w8a16", "w8a8-g64-asym"])
@pytest.mark.parametrize("isa", _cpu.isas())
def test_a_token_does_not_depend_on_its_company(isa, name):
    rng = np.random.default_rng(3)
    weight = random_weight(rng, 64, 256, name)
    x = activations(rng, 40, 256)
    together = run(isa, x, weight)
    for first, last in ((0, 1), (3, 5), (7, 16), (10, 40)):
        np.testing.assert_array_equal(run(isa, x[first:last], weight), together[first:last])


@pytest.mark.parametrize("isa", _cpu.isas())
@pytest.mark.parametrize("tokens", [1, 3, 7, 33])
def test_float_linear(isa, tokens):
    """fp32: 2 K roundings of 2^-24 on sums of |x w|; bf16: products of bf16 are exact in fp32, so the same
    bound holds against the double-precision product of the rounded operands."""
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, 200)).astype(np.float32)
    w = rng.standard_normal((37, 200)).astype(np.float32)
    for name in ("fp32", "bf16"):
        a, b = torch.from_numpy(x), torch.from_numpy(w)
        if name == "bf16":
            a, b = a.bfloat16(), b.bfloat16()
        exact = (a.double() @ b.double().T).numpy()
        bound = 2 * 200 * 2.0**-24 * (a.double().abs() @ b.double().abs().T).numpy()
        assert (np.abs(_cpu.linear_float(isa, x, w, name) - exact) <= bound).all()


@pytest.mark.parametrize("isa", _cpu.isas())
def test_largest_codes_do_not_overflow(isa):
    """The AVX2 pair product saturates at 32767 in the instruction meant for it; sums must stay exact."""
    fmt = parse_format("w8a8")
    codes = np.full((16, 1536), 127, np.int8)
    codes[1::2] = -127
    weight = QuantizedTensor(format=fmt, codes=codes, scales=np.ones((16, 1), np.float32))
    x = np.ones((17, 1536), np.float32)
    x[1::2] = -1
    expected = linear_reference(torch.from_numpy(x), weight, fmt).numpy()
    np.testing.assert_array_equal(run(isa, x, weight), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 48}, "multiple of 32"),
        ({"scales": np.ones((16, 3), np.float32)}, "one value a row and group"),
        ({"bits": 7}, "4, 5, 6 or 8 bits"),
        ({"activation": "int4"}, "int8 or int16"),
        ({"x": np.ones((1, 64), np.float32)}, "as wide as the weight"),
        ({"scales": np.ones((16, 2), np.float64)}, "float16 or float32"),
        ({"byte_scales": True}, "are float16"),
        ({"byte_scales": True, "scales": np.array([[1, 0.01]] * 16, np.float16)}, "-127 to 127 times"),
        ({"byte_scales": True, "scales": np.array([[1, np.nan]] * 16, np.float16)}, "-127 to 127 times"),
    ],
)
def test_misshapen_arguments_are_refused(change, message):
    good = {
        "isa": "portable",
        "x": np.ones((1, 128), np.float32),
        "codes": np.zeros((16, 128), np.int8),
        "scales": np.ones((16, 2), np.float32),
        "zeros": None,
        "minima": None,
        "bits": 8,
        "group": 64,
        "zero": "symmetric",
        "activation": "int8",
        "activation_group": 64,
    }
    _cpu.linear_quantized(**good)
    with pytest.raises(ValueError, match=message):
        _cpu.linear_quantized(**(good | change))


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="cannot run instruction set 'sse9'"):
        _cpu.linear_float("sse9", np.ones((1, 4), np.float32), np.ones((2, 4), np.float32), "fp32")
