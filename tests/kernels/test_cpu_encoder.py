"""The encoder's forward pass and its own kernels, on every instruction set."""

import math

import numpy as np
import pytest
from tests.encoders import packed, tiny_encoder, tiny_encoder_spec

from flatout import _cpu
from flatout.engine.encoder import CpuEncoder
from flatout.models.bert import Bert

ISAS = _cpu.isas()
SPECS = {
    "heads-of-32": tiny_encoder_spec(),
    "heads-of-64": tiny_encoder_spec(hidden_size=128),
    "head-of-20": tiny_encoder_spec(hidden_size=40, intermediate_size=90),
}
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 130, 3, 1]
INTEGER = ["w8a8", "w8a16"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("encoders")


@pytest.mark.parametrize("isa", ISAS)
def test_gelu_is_the_exact_one(isa):
    x = np.concatenate([np.linspace(-10, 10, 40001), [0.0, -0.0, 1e-30, 100.0, -100.0, 3e38, -3e38]])
    x = x.astype(np.float32)[None]
    got = _cpu.bias_gelu(isa, x, np.full(x.shape[1], 0.25, np.float32))[0]
    shifted = (x[0] + np.float32(0.25)).astype(np.float64)
    exact = np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in shifted])
    # The fit's 1.2e-7 and the rounding of the polynomial, then of the result.
    np.testing.assert_array_less(np.abs(got - exact), 2.5e-7 + 1.2e-7 * np.abs(exact))
    np.testing.assert_array_equal(
        got, _cpu.bias_gelu("portable", x, np.full(x.shape[1], 0.25, np.float32))[0]
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [1, 5, 16, 40, 384])
def test_layer_norm(isa, width):
    rng = np.random.default_rng(width)
    x = (rng.standard_normal((7, width)) * 3 + 5).astype(np.float32)
    weight, bias = rng.standard_normal((2, width)).astype(np.float32)
    got = _cpu.layer_norm(isa, x, weight, bias, 1e-12)
    wide = x.astype(np.float64)
    centred = wide - wide.mean(1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-12) * weight + bias
    if width > 1:  # a single value is its own mean: 0 / sqrt(0 + eps)
        np.testing.assert_allclose(got, expected, atol=2e-5)
    else:
        np.testing.assert_array_equal(got, np.broadcast_to(bias, x.shape))
    np.testing.assert_array_equal(got, _cpu.layer_norm("portable", x, weight, bias, 1e-12))


@pytest.mark.parametrize("name", INTEGER)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_integer_formats_give_the_same_bits_on_every_instruction_set(spec, name, folders):
    model = tiny_encoder(folders / f"{spec.hidden_size}", spec, name)
    tokens, starts = packed(spec, LENGTHS)
    expected = CpuEncoder(model, 1, "portable").forward(tokens, starts, "none", False)
    assert np.isfinite(expected).all()
    for isa in ISAS:
        got = CpuEncoder(model, 2, isa).forward(tokens, starts, "none", False)
        np.testing.assert_array_equal(got, expected, err_msg=isa)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("name", INTEGER)
def test_neither_packing_nor_threads_change_a_bit(name, threads, folders):
    """Long batches are split by tokens and into chunks, short ones by rows of the weights."""
    spec = SPECS["heads-of-32"]
    model = tiny_encoder(folders / f"{spec.hidden_size}", spec, name)
    lengths = [*LENGTHS, 512, 300, *[2] * 90, 511]  # the twos run out of pages before tokens
    tokens, starts = packed(spec, lengths)
    alone = CpuEncoder(model, 1)
    parts = np.split(tokens, starts[1:])
    first = np.zeros(1, np.int32)
    expected = [alone.forward(np.ascontiguousarray(part), first, "none", False) for part in parts]
    runner = CpuEncoder(model, threads)
    for _ in range(2):
        got = runner.forward(tokens, starts, "none", False)
        np.testing.assert_array_equal(got, np.concatenate(expected))
        vectors = runner.forward(tokens, starts, "mean", True)
        each = [alone.forward(np.ascontiguousarray(part), first, "mean", True)[0] for part in parts]
        np.testing.assert_array_equal(vectors, each)


# Greatest difference of a state over the greatest state. fp32: sums of up to 144 products in another order,
# and keys and values whose rounding to bf16 may flip. bf16: activations rounded to 8 bits of mantissa at
# every linear, which may flip too. Integers: 8-bit queries and attention weights, which the reference leaves
# as floats.
BOUNDS = {"fp32": 5e-3, "bf16": 3e-2, "w8a8": 5e-2, "w8a16": 5e-3, "w8a8-g32": 5e-2, "w4a8-g32": 5e-2}


@pytest.mark.parametrize("name", list(BOUNDS))
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_states_stay_within_the_stated_distance_of_the_reference(spec, name, folders):
    if name.endswith("g32") and spec.hidden_size % 32:
        pytest.skip("groups of 32 do not divide this width")
    if name.endswith("g32"):
        spec = tiny_encoder_spec(hidden_size=spec.hidden_size, intermediate_size=160)
    model = tiny_encoder(folders / f"{spec.hidden_size}-{spec.intermediate_size}", spec, name)
    tokens, starts = packed(spec, LENGTHS)
    expected = Bert(model, as_served=True).forward(tokens, starts, "none", False)
    for isa in ISAS:
        runner = CpuEncoder(model, 1, isa)
        error = np.abs(runner.forward(tokens, starts, "none", False) - expected).max()
        assert error <= BOUNDS[name] * np.abs(expected).max(), (isa, error / np.abs(expected).max())
        pooled = runner.forward(tokens, starts, "cls", False)
        np.testing.assert_array_equal(pooled, runner.forward(tokens, starts, "none", False)[starts])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["w8a8", "bf16"])
def test_what_an_earlier_batch_left_behind_changes_nothing(name, isa, folders):
    spec = SPECS["heads-of-32"]
    model = tiny_encoder(folders / f"{spec.hidden_size}", spec, name)
    tokens, starts = packed(spec, [70, 5])
    fresh = CpuEncoder(model, 1, isa).forward(tokens, starts, "none", False)
    used = CpuEncoder(model, 1, isa)
    used.forward(*packed(spec, [512, 300, 40], seed=9), "none", False)
    np.testing.assert_array_equal(used.forward(tokens, starts, "none", False), fresh)


@pytest.mark.parametrize(
    ("tokens", "starts", "message"),
    [
        ([1, 300], [0], "outside the vocabulary"),
        ([-1], [0], "outside the vocabulary"),
        ([1] * 513, [0], "1 to 512 tokens, sequence 0 has 513"),
        ([1, 2], [0, 0], "sequence 0 has 0"),
        ([1, 2], [0, 2], "sequence 1 has 0"),
        ([1, 2], [0, 5], "below the number of tokens"),
        ([1, 2], [0, -5], "sequence 0 has -5"),
        ([1, 2], [1], "begin with 0"),
        ([1, 2], [], "begin with 0"),
    ],
)
def test_impossible_batches_are_refused_and_leave_the_encoder_usable(tokens, starts, message, folders):
    spec = SPECS["heads-of-32"]
    runner = CpuEncoder(tiny_encoder(folders / f"{spec.hidden_size}", spec, "w8a8"), 2)
    good = packed(spec, [7])
    before = runner.forward(*good, "none", False)
    with pytest.raises(ValueError, match=message):
        runner.forward(np.array(tokens, np.int32), np.array(starts, np.int32), "none", False)
    np.testing.assert_array_equal(runner.forward(*good, "none", False), before)
