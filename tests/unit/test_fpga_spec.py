"""The integer specification against floats, and its primitives against plain Python integers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import tiny_model, tiny_spec

from flatout.core.formats import uniform
from flatout.errors import UnsupportedModelError
from flatout.fpga import spec as integer
from flatout.fpga.model import NORM_SHIFT, KeyValues, forward, integer_linear, integer_model, integer_norm
from flatout.models.llama import Llama

words = st.lists(st.integers(-(2**26), 2**26 - 1), min_size=16, max_size=16)


@given(st.integers(-(2**60), 2**60), st.integers(1, 62))
def test_round_shift_rounds_half_up(value: int, shift: int) -> None:
    expected = math.floor((value + (1 << (shift - 1))) / (1 << shift)) if abs(value) < 2**52 else None
    found = int(integer.round_shift(np.int64(value), np.int64(shift)))
    assert found == (value + (1 << (shift - 1))) >> shift
    assert expected is None or found == expected


@given(st.integers(0, 2**31))
def test_a_scale_is_the_least_that_is_not_below(largest: int) -> None:
    mantissa, exponent = (int(x) for x in integer.scale_above(np.array(largest)))
    assert 1 <= mantissa < 4096
    assert mantissa << exponent >= max(largest, 1)
    below = (mantissa - 1) << exponent
    assert below < max(largest, 1)
    assert exponent == 0 or mantissa >= 2048


@given(words)
def test_codes_are_nearest_and_never_overflow(values: list[int]) -> None:
    row = np.array([values], dtype=np.int64)
    codes, mantissa, exponent = integer.quantise(row)
    scale = float(mantissa[0] << exponent[0])
    assert np.abs(codes).max() <= 127
    # The reciprocal has 14 bits: 127 / 2**14 of a code beside the half of rounding.
    assert np.abs(codes - row / scale * 127).max() <= 0.5 + 127 / 2**14


@given(words, st.integers(0, 20))
def test_spread_codes_mean_the_same_and_quiet_chunks_keep_more_bits(values: list[int], quiet: int) -> None:
    row = np.array([values], dtype=np.int64)
    row[0, 8:] >>= quiet
    codes, mantissa, exponent = integer.quantise_chunks(row, 8)
    scale = float(mantissa[0] << exponent[0])
    assert np.abs(codes).max() <= 127 << integer.SPREAD
    spread = 0
    while spread < 3 and np.abs(row[0, 8:]).max() << (spread + 1) <= scale:
        spread += 1
    assert (codes[0, 8:] % (1 << (3 - spread)) == 0).all()
    error = np.abs(codes[0, 8:] / 8 - row[0, 8:] / scale * 127).max()
    assert error <= (0.5 + 127 / 2**14) / 2**spread


def test_exp2_and_silu_follow_their_functions() -> None:
    distance = np.arange(0, 20 << 16, 997)
    # One unit of the table, one of the line between its points, one of the shift.
    assert np.abs(integer.exp2_below(distance) - 65535 * 2.0 ** (-distance / 65536)).max() <= 3
    gate = np.arange(-(20 << 16), 20 << 16, 1009)
    up = np.full_like(gate, 3 << 16)
    real = gate / 65536
    expected = real / (1 + np.exp(-real)) * 3
    # The table's line is off by (1/32)**2 / 8 of the second derivative (below 0.1), its values by 3 * 2**-16.
    bound = 3 * np.abs(real) * ((1 / 32) ** 2 / 8 * 0.1 + 3 * 2.0**-16) + 3 * 2.0**-16
    assert (np.abs(integer.silu_product(gate, up) / 65536 - expected) <= bound).all()


def test_norm_is_rms_norm() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(-(2**20), 2**20, (5, 64))
    x[1] >>= 6
    x[2, 3] = 2**26
    gamma = rng.integers(-32767, 32768, 64)
    codes, by = integer.norm(x, gamma, 11, 3, 40000, 64)
    real = x * (gamma / 2**11) / np.sqrt((x.astype(float) ** 2).mean(axis=1, keepdims=True))
    # codes * multiplier is proportional to the normalised row, with one factor for all rows
    found = codes * (by.mantissa * 2.0**-by.shift)[:, None]
    largest = np.abs(real).max(axis=1)
    factor = (np.abs(found).max(axis=1) / largest)[0]
    # Half a code, and the mean square of row 1 from integers of 9 bits.
    assert (np.abs(found / factor - real).max(axis=1) <= largest / 127).all()


@pytest.mark.parametrize("name", ["w8a8-g64", "w4a8-g32", "q4_1"])
def test_the_integer_model_follows_the_float_model(name: str) -> None:
    spec = tiny_spec()
    recipe = uniform(
        name, head="q8_0" if name == "q4_1" else None, method="native" if name == "q4_1" else "rtn"
    )
    model = tiny_model(spec, recipe)
    integers = integer_model(model, chunk=16)
    tokens = np.random.default_rng(1).integers(0, spec.vocab_size, 24)
    logits = forward(integers, tokens, KeyValues(spec, 24)) / 65536
    exact = Llama(model).forward(tokens).numpy()
    served = Llama(model, as_served=True).forward(tokens).numpy()
    # One activation scale a token is coarser than the served format's one a group.
    assert np.abs(logits - exact).mean() < 2 * np.abs(served - exact).mean()


def test_tokens_together_are_tokens_one_by_one() -> None:
    spec = tiny_spec()
    integers = integer_model(tiny_model(spec, uniform("w4a8-g32")), chunk=16)
    tokens = np.random.default_rng(2).integers(0, spec.vocab_size, 9)
    together = forward(integers, tokens, KeyValues(spec, 9))
    memory = KeyValues(spec, 9)
    single = [forward(integers, tokens[i : i + 1], memory) for i in range(9)]
    assert (np.concatenate(single) == together).all()


def test_weights_keep_the_scales_of_the_file() -> None:
    """Scales of float16 have 11 bits: with 12 they are the same numbers, unless far below the largest."""
    weight = tiny_model(tiny_spec(), uniform("w4a8-g32")).weights["layers.0.down"]
    linear = integer_linear("layers.0.down", weight)
    assert linear.products() == pytest.approx(weight.dequantize() * 2.0**linear.binary_point, rel=0, abs=0)
    bound = np.abs(linear.products()).sum(axis=1).max() * 127 * 8
    assert bound < 2**46


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("w3a8-g32", "layers.0.qkv must have symmetric 4 or 8 bits"),
        ("w6a8-g32", "layers.0.qkv must have symmetric 4 or 8 bits"),
        ("w8a8-g32-asym", "layers.0.qkv must have symmetric 4 or 8 bits"),
        ("w4a16-g32", "activations of layers.0.qkv must have 8 bits"),
    ],
)
def test_weights_without_a_path_through_the_accelerator_are_refused(name: str, what: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{what}.*try: recipe w4a8-g64"):
        integer_model(tiny_model(tiny_spec(), uniform(name)))


def test_weights_of_no_common_size_are_refused_by_name() -> None:
    model = tiny_model(tiny_spec(), uniform("w4a8-g32"))
    down = model.weights["layers.1.down"]
    tiny = dataclasses.replace(down, scales=(down.scales.astype(np.float32) * np.float32(2.0**-40)))
    changed = dataclasses.replace(model, weights={**model.weights, "layers.1.down": tiny})
    with pytest.raises(UnsupportedModelError, match=r"found: layers\.1\.down: \d\d;"):
        integer_model(changed, chunk=16)


@pytest.mark.parametrize("largest", [0.01, 1.4, 900.0])
def test_a_norm_never_saturates(largest: float) -> None:
    """First tokens of trained models are 1,000 times as large as others: here as large as a word can be."""
    weight = np.linspace(-largest, largest, 64)
    norm = integer_norm(weight, tiny_spec())
    words = np.random.default_rng(0).integers(-(2**30), 2**30, (3, 64))
    words[0, [0, -1]] = -(2**31), 2**31 - 1
    codes, by = integer.norm(words, norm.gamma, NORM_SHIFT, norm.epsilon, 40000, 16)
    real = words * weight / np.sqrt((words.astype(float) ** 2).mean(axis=1, keepdims=True))
    found = codes * (by.mantissa * 2.0**-by.shift)[:, None]
    factor = (np.abs(found).max(axis=1) / np.abs(real).max(axis=1))[2]
    # Half a code, and the 15 bits of the weights.
    assert (np.abs(found / factor - real).max(axis=1) <= np.abs(real).max(axis=1) / 127).all()


@pytest.mark.parametrize(
    ("family", "found"),
    [
        ("qwen2", "no biases of q, k and v; found: qkv_bias=True"),
        ("qwen3", "no norms of q and k; found: qk_norm=True"),
        ("gemma", "the activation silu; found: activation=gelu_tanh"),
        ("mistral", "no sliding window; found: sliding_window=8"),
    ],
)
def test_what_has_no_instruction_is_refused(family: str, found: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"the accelerator runs Llama models, which have {found}"):
        integer_model(tiny_model(tiny_spec(family), uniform("w8a8-g64")), chunk=16)


def test_float_weights_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.qkv must have symmetric 4 or 8 bits"):
        integer_model(tiny_model(tiny_spec(), uniform("bf16")), chunk=16)
