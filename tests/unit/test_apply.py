"""compress/apply.py and core/fuse.py: every weight in the format and of the origin that the recipe says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.tiny import TinySource, native_blocks, tiny_source, tiny_spec

from flatout.compress.apply import compress
from flatout.compress.rtn import round_to_nearest
from flatout.core.formats import Recipe, parse_format, uniform
from flatout.core.fuse import assemble, float_recipe, native_recipe, source_names
from flatout.core.model import expected_weights
from flatout.core.quantized import QuantizedTensor
from flatout.core.spec import weight_names
from flatout.errors import ConfigError, UnsupportedModelError


def codes(weight: np.ndarray | QuantizedTensor) -> np.ndarray:
    assert isinstance(weight, QuantizedTensor)
    return weight.codes


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma"])
def test_every_tensor_is_used_once(family: str) -> None:
    spec = tiny_spec(family)
    used = [
        name
        for fused, _, _ in expected_weights(spec, float_recipe("fp32"))
        for name in source_names(spec, fused)
        if not (fused == "head" and spec.tie_embeddings)
    ]
    assert sorted(used) == sorted(weight_names(spec))


def test_rows_are_joined_in_order() -> None:
    spec = tiny_spec("qwen2")
    source = tiny_source(spec)
    model = assemble(source, float_recipe("fp32"))
    p = "model.layers.1.self_attn."
    expected = np.concatenate([source.array(f"{p}{x}_proj.weight") for x in "qkv"])
    np.testing.assert_array_equal(model.weights["layers.1.qkv"], expected)
    expected = np.concatenate([source.array(f"{p}{x}_proj.bias") for x in "qkv"])
    np.testing.assert_array_equal(model.weights["layers.1.qkv_bias"], expected)
    expected = np.concatenate([source.array(f"model.layers.0.mlp.{x}_proj.weight") for x in ("gate", "up")])
    np.testing.assert_array_equal(model.weights["layers.0.gate_up"], expected)
    np.testing.assert_array_equal(model.weights["head"], source.array("model.embed_tokens.weight"))


def test_each_layer_gets_its_format() -> None:
    spec = tiny_spec("llama")
    recipe = Recipe(
        name="mixed",
        layers="w8a8-g64",
        embedding="w4a16-g32",
        head="w8a8",
        overrides=(("layers.*.down", "w4a8-g32"), ("layers.1", "bf16"), ("layers.1.o", "w8a16-g32")),
    )
    source = tiny_source(spec)
    model = compress(source, recipe)
    for name, weight in model.weights.items():
        fmt = next(f for n, _, f in expected_weights(spec, recipe) if n == name)
        assert isinstance(weight, QuantizedTensor) == fmt.is_integer
    down = source.array("model.layers.0.mlp.down_proj.weight")
    expected = round_to_nearest(down, parse_format("w4a8-g32"), search_clip=True)
    np.testing.assert_array_equal(codes(model.weights["layers.0.down"]), expected.codes)
    o = round_to_nearest(source.array("model.layers.1.self_attn.o_proj.weight"), parse_format("w8a16-g32"))
    np.testing.assert_array_equal(codes(model.weights["layers.1.o"]), o.codes)


@pytest.mark.parametrize("method", ["native", "rtn", "gptq"])
def test_native_blocks_are_taken_as_they_are(method: str) -> None:
    spec = tiny_spec("llama", tie_embeddings=True)
    source = tiny_source(spec, layers="q4_1", head="q8_0")
    recipe = replace(native_recipe(source), method=method)
    assert (recipe.layers, recipe.embedding, recipe.head) == ("q4_1", "q8_0", "q8_0")
    model = compress(source, recipe, [[1, 2, 3]])
    embedding = source.blocks["model.embed_tokens.weight"]
    assert model.weights["embedding"] is embedding
    assert model.weights["head"] is embedding
    qkv = model.weights["layers.0.qkv"]
    assert isinstance(qkv, QuantizedTensor)
    parts = [source.blocks[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv"]
    np.testing.assert_array_equal(qkv.codes, np.concatenate([part.codes for part in parts]))
    np.testing.assert_array_equal(qkv.dequantize(), np.concatenate([part.dequantize() for part in parts]))


def test_codes_of_the_same_format_are_not_rounded_again() -> None:
    """A checkpoint that is already w8a8 keeps its codes under a w8a8 recipe."""
    spec = tiny_spec("llama")
    source = tiny_source(spec)
    blocks = {
        name: round_to_nearest(array * 0.9, parse_format("w8a8-g32"))
        for name, array in source.tensors.items()
        if name.endswith("o_proj.weight")
    }
    taken = TinySource(spec, source.tensors, blocks)
    assert native_recipe(taken).overrides == (("layers.0.o", "w8a8-g32"), ("layers.1.o", "w8a8-g32"))
    model = compress(taken, uniform("w8a8-g32"))
    assert model.weights["layers.0.o"] is blocks["model.layers.0.self_attn.o_proj.weight"]


def test_native_recipe_of_a_mixed_file() -> None:
    """Fused weights whose parts differ fall back, and one layer that differs is an override."""
    spec = tiny_spec("llama", num_layers=3)
    source = tiny_source(spec, layers="q4_1", head="q8_0")
    blocks = dict(source.blocks)
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.2.self_attn.v_proj.weight"):
        blocks[name] = native_blocks("q8_0", *blocks[name].shape, seed=1)
    del blocks["lm_head.weight"]
    recipe = native_recipe(TinySource(spec, source.tensors, blocks), fallback="fp32")
    assert recipe.layers == "q4_1"
    assert recipe.head == "fp32"
    assert recipe.overrides == (("layers.1.down", "q8_0"), ("layers.2.qkv", "fp32"))
    model = assemble(TinySource(spec, source.tensors, blocks), recipe)
    assert isinstance(model.weights["layers.2.qkv"], np.ndarray)


def test_missing_blocks_are_an_error() -> None:
    spec = tiny_spec("llama")
    with pytest.raises(
        UnsupportedModelError, match=r"embedding needs all its parts in q4_1; found: .* is float"
    ):
        compress(tiny_source(spec), uniform("q4_1"))
    source = tiny_source(spec, layers="q4_1", head="q8_0")
    blocks = dict(source.blocks)
    name = "model.layers.1.self_attn.k_proj.weight"
    blocks[name] = native_blocks("q8_0", *blocks[name].shape, seed=1)
    recipe = Recipe(name="r", layers="q4_1", embedding="q8_0", head="q8_0")
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.qkv needs all .*k_proj\.weight is q8_0"):
        compress(TinySource(spec, source.tensors, blocks), recipe)


def test_wrong_recipes_stop_before_work() -> None:
    source = tiny_source(tiny_spec("llama"))
    with pytest.raises(
        ConfigError, match=r"groups must divide the width; found: layers.0.qkv: w8a8-g128 on width 64"
    ):
        compress(source, uniform("w8a8-g128"))
    with pytest.raises(UnsupportedModelError, match="w8a8 takes blocks as the file stores them"):
        compress(source, uniform("w8a8", method="native"))


def test_progress_reaches_the_end() -> None:
    steps: list[tuple[str, int, int]] = []
    compress(tiny_source(tiny_spec("llama")), uniform("w8a8"), progress=lambda *step: steps.append(step))
    assert [done for _, done, _ in steps] == list(range(len(steps)))
    assert steps[-1][1] == steps[-1][2]
