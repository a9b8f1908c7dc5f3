"""core/formats.py, core/quantized.py and core/model.py: the grammar, the recipes and what a Model must
hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import native_blocks, tiny_model, tiny_spec

from flatout.compress.rtn import round_to_nearest
from flatout.core.formats import Recipe, parse_format, uniform
from flatout.core.model import Model, expected_weights
from flatout.core.quantized import QuantizedTensor, concatenate_rows
from flatout.errors import ConfigError, ModelFileError

TABLE = {
    # name: bits, group, zero, activation, activation group
    "fp32": (32, 0, "symmetric", "fp32", 0),
    "bf16": (16, 0, "symmetric", "bf16", 0),
    "q4_0": (4, 32, "symmetric", "int8", 32),
    "q4_1": (4, 32, "minimum", "int8", 32),
    "q8_0": (8, 32, "symmetric", "int8", 32),
    "q4_0-s8": (4, 32, "symmetric", "int8", 32),
    "q4_1-s8": (4, 32, "minimum", "int8", 32),
    "w8a8": (8, 0, "symmetric", "int8", 0),
    "w8a8-g64": (8, 64, "symmetric", "int8", 64),
    "w8a8-asym": (8, 0, "asymmetric", "int8", 0),
    "w4a8-g128": (4, 128, "symmetric", "int8", 128),
    "w4a8-g32-asym": (4, 32, "asymmetric", "int8", 32),
    "w4a16-g64": (4, 64, "symmetric", "int16", 0),
    "w8a16": (8, 0, "symmetric", "int16", 0),
    "w6a8": (6, 0, "symmetric", "int8", 0),
    "w5a16-g32-asym": (5, 32, "asymmetric", "int16", 0),
    "w3a8-g32": (3, 32, "symmetric", "int8", 32),
    "w3a16-g64-asym": (3, 64, "asymmetric", "int16", 0),
}


@pytest.mark.parametrize("name", TABLE)
def test_names_mean(name: str) -> None:
    fmt = parse_format(name)
    assert (fmt.bits, fmt.group, fmt.zero, fmt.activation, fmt.activation_group) == TABLE[name]
    assert fmt.name == name
    assert fmt.is_integer == (fmt.bits < 16)
    assert fmt.is_native == name.startswith("q")
    assert fmt.scale_bits == (8 if name.endswith("-s8") else 16)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "w8",
        "w8a8-g",
        "w8a8-g0",
        "q8_0-s8",
        "w4a8-g32-s8",
        "q4_1-s8-s8",
        "w8a8-g48",
        "w4a8",
        "w4a16-asym",
        "w8a8_g64",
        "W8A8",
        "w2a8-g32",
        "w3a8",
        "q5_0",
        "w8a8-asym-g64",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"found: '") as caught:
        parse_format(name)
    assert parse_format(str(caught.value).rpartition("try: ")[2])


@settings(deadline=None, derandomize=True)
@given(st.text(alphabet="wa0123468-gsymfpbq_", max_size=12))
def test_any_text_is_a_format_or_a_config_error(text: str) -> None:
    try:
        fmt = parse_format(text)
    except ConfigError:
        return
    assert fmt.name == text
    assert fmt.bits in (3, 4, 8, 16, 32)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bf16", 2 * 96 * 128),
        ("fp32", 4 * 96 * 128),
        ("w8a8", 96 * 128 + 2 * 96),
        ("w8a8-g64", 96 * 128 + 2 * 96 * 2),
        ("w4a8-g32", 96 * 64 + 2 * 96 * 4),
        ("q4_1", 96 * 128 * 20 // 32),  # a GGUF block: 32 codes in 16 bytes, scale and minimum in 4
        ("q4_0", 96 * 128 * 18 // 32),
        ("q8_0", 96 * 128 * 34 // 32),
    ],
)
def test_weight_bytes(name: str, expected: int) -> None:
    assert parse_format(name).weight_bytes(96, 128) == expected


def test_last_matching_override_wins() -> None:
    recipe = Recipe(
        name="r",
        layers="w8a8",
        overrides=(
            ("layers.*.down", "bf16"),
            ("layers.1", "w4a8-g32"),
            ("layers.1.down", "fp32"),
            ("layers.10.o", "q8_0"),
        ),
    )
    names = {
        (i, linear): recipe.format_of(i, linear).name for i in (0, 1, 10) for linear in ("qkv", "o", "down")
    }
    assert names == {
        (0, "qkv"): "w8a8",
        (0, "o"): "w8a8",
        (0, "down"): "bf16",
        (1, "qkv"): "w4a8-g32",
        (1, "o"): "w4a8-g32",
        (1, "down"): "fp32",
        (10, "qkv"): "w8a8",
        (10, "o"): "q8_0",
        (10, "down"): "bf16",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "w9a8"}, "a format is fp32"),
        ({"overrides": (("layers.1.up", "bf16"),)}, "an override names"),
        ({"overrides": (("layers.x", "bf16"),)}, "an override names"),
        ({"overrides": (("layers.0", "bf8"),)}, "a format is fp32"),
        ({"kv_cache": "int2"}, "the KV cache is one of int8, bf16, fp32"),
        ({"method": "magic"}, "the method is one of rtn, gptq, tune"),
    ],
)
def test_bad_recipes(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(Recipe(name="r"), **changes)


def test_check_lists_every_misfit() -> None:
    spec = tiny_spec("llama", hidden_size=96, num_heads=6, intermediate_size=160)
    with pytest.raises(ConfigError, match=r"layers\.0\.qkv: w8a8-g64 on width 96.* and 6 more"):
        uniform("w8a8-g64").check(spec)
    uniform("w8a8-g32").check(spec)


def test_a_layer_that_the_model_lacks_is_named() -> None:
    recipe = Recipe(name="r", overrides=(("layers.*.down", "w8a8"), ("layers.99.down", "bf16")))
    with pytest.raises(ConfigError, match=r"layers are 0..1; found: layers.99.down; try: layers.1"):
        recipe.check(tiny_spec(num_layers=2))
    deep = replace(recipe, overrides=(("layers.1", "bf16"),))
    deep.check(tiny_spec(num_layers=2))
    with pytest.raises(ConfigError, match=r"layers are 0..0; found: layers.1;"):
        replace(deep, structure=(("depth", 1),)).check(tiny_spec(num_layers=2))


def test_uniform_keeps_the_ends_of_4_bit_models_at_8() -> None:
    assert (uniform("w4a8-g32").head, uniform("w4a8-g32").embedding) == ("w8a8-g64", "w8a8-g64")
    assert uniform("w8a8").head == "w8a8"
    assert uniform("q4_1").head == "q4_1"
    assert uniform("w4a8-g32", head="bf16").head == "bf16"


def test_dequantize_by_hand() -> None:
    scales = np.array([[0.5, 2.0]], np.float16)
    codes = np.tile(np.array([0, 8, 15, 3], np.uint8), 16)[None]
    four = QuantizedTensor(format=parse_format("w4a8-g32"), codes=codes, scales=scales)
    assert four.dequantize()[0, [0, 1, 2, 3, 32, 34]].tolist() == [-4, 0, 3.5, -2.5, -16, 14]
    asym = replace(four, format=parse_format("w4a8-g32-asym"), zeros=np.array([[3, 0]], np.uint8))
    assert asym.dequantize()[0, [0, 1, 2, 3, 32, 34]].tolist() == [-1.5, 2.5, 6, 0, 0, 30]
    minimum = replace(four, format=parse_format("q4_1"), minima=np.array([[-1.0, 0.25]], np.float16))
    assert minimum.dequantize()[0, [0, 1, 2, 3, 32, 34]].tolist() == [-1, 3, 6.5, 0.5, 0.25, 30.25]


@pytest.mark.parametrize("name", ["w8a8-g32", "w4a16-g32-asym", "q4_1"])
def test_rows_and_concatenation(name: str) -> None:
    fmt = parse_format(name)
    weight = (
        native_blocks(name, 10, 64, 0)
        if fmt.is_native
        else round_to_nearest(np.random.default_rng(0).standard_normal((10, 64)).astype(np.float32), fmt)
    )
    joined = concatenate_rows([weight.rows(0, 3), weight.rows(3, 4), weight.rows(4, 10)])
    np.testing.assert_array_equal(joined.dequantize(), weight.dequantize())


def test_tensors_that_do_not_fit_their_format() -> None:
    fmt = parse_format("w8a8-g32")
    codes, scales = np.zeros((4, 64), np.int8), np.ones((4, 2), np.float16)
    for changes, message in (
        ({"codes": codes.astype(np.uint8)}, "codes of w8a8-g32 are int8"),
        ({"scales": scales[:, :1]}, "scales of w8a8-g32 must be"),
        ({"zeros": scales.astype(np.uint8)}, "zeros of w8a8-g32 must be absent"),
        ({"minima": scales}, "minima of w8a8-g32 must be absent"),
        ({"codes": np.zeros((4, 72), np.int8)}, "the group must divide the width"),
        ({"format": parse_format("bf16")}, "needs an integer format"),
    ):
        with pytest.raises(ModelFileError, match=message):
            QuantizedTensor(**{"format": fmt, "codes": codes, "scales": scales, **changes})


def test_a_model_is_whole() -> None:
    model = tiny_model(tiny_spec("qwen3"), uniform("w8a8"))
    names = {name for name, _, _ in expected_weights(model.spec, model.recipe)}
    assert set(model.weights) == names
    for changes, message in (
        ({"layers.1.k_norm": None}, r"no layers\.1\.k_norm"),
        ({"norm": np.ones(65, np.float32)}, "norm must have shape"),
        ({"layers.0.o": np.zeros((64, 128), np.float32)}, r"layers\.0\.o must be in format w8a8"),
        ({"norm": model.weights["layers.0.o"]}, "norm must have shape"),
    ):
        weights = {name: w for name, w in {**model.weights, **changes}.items() if w is not None}
        with pytest.raises(ModelFileError, match=message):
            Model(spec=model.spec, recipe=model.recipe, weights=weights)
