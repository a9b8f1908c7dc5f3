"""Candidates fit the model, and a recipe's name says what it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_bench import SPEC, FakeSource
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import tiny_source, tiny_spec

from flatout.errors import ConfigError
from flatout.search.recipes import ORIGINAL, candidates, layer_map, recipe_from_name

SOURCE = FakeSource()


def test_candidates_of_a_quantised_file() -> None:
    found = {c.recipe.name: c.recipe for c in candidates(SOURCE)}
    assert [list(found)[i] for i in (0, 1, -1)] == ["native-s8", "native", "bf16"]
    native = found["native"]
    assert (native.layers, native.head, native.embedding) == ("q4_1", "q8_0", "q8_0")
    assert (native.kv_cache, native.method) == ("int8", "native")
    assert {"w8a8-g64", "w8a8-g32", "w8a8", "w4a8-g32", "w4a8-g64", "w4a8-g32/gptq"} <= set(found)
    assert found["w4a8-g64/gptq"].method == "gptq"
    assert found["w8a8/smooth,layers.*.down=w8a16"].head == found["w4a8-g64"].head == "q8_0"
    finer = recipe_from_name("w8a8,layers.*.down=w8a16", SOURCE)
    assert {finer.format_of(i, "down").name for i in range(3)} == {"w8a16"}
    assert {finer.format_of(i, "qkv").name for i in range(3)} == {"w8a8"}


def test_the_head_of_a_float_file_is_finer_than_its_layers() -> None:
    found = {c.recipe.name: c.recipe for c in candidates(FakeSource(native=False))}
    assert found["w4a8-g64"].head == "w8a8-g64"
    assert found["w8a8"].head == found["w8a8"].embedding == "w8a16"


def test_a_float_file_has_no_native_candidate() -> None:
    names = [c.recipe.name for c in candidates(FakeSource(native=False))]
    assert "native" not in names
    assert "w8a8-g64" in names
    with pytest.raises(ConfigError, match="native takes the blocks q4_0, q4_1 and q8_0 of a GGUF file"):
        recipe_from_name("native", FakeSource(native=False))


def test_groups_that_do_not_divide_the_width_are_left_out() -> None:
    narrow = FakeSource(native=False, spec=replace(SPEC, hidden_size=96, intermediate_size=160))
    names = [c.recipe.name for c in candidates(narrow)]
    assert "w8a8-g64" not in names
    assert "w4a8-g64" not in names
    assert "w8a8-g32" in names
    for candidate in candidates(narrow):
        candidate.recipe.check(narrow.spec)


def test_a_partly_native_file_is_rounded_where_it_must_be() -> None:
    source = FakeSource()
    for name in [n for n in source._native if n.endswith("down_proj.weight")]:
        del source._native[name]
    recipe = next(c.recipe for c in candidates(source) if c.recipe.name == "native")
    assert recipe.method == "rtn"
    assert recipe.format_of(0, "qkv").name == "q4_1"
    assert recipe.format_of(0, "down").name == "w8a8-g32"


def test_a_refined_recipe_names_the_one_it_refines() -> None:
    found = {c.recipe.name: c for c in candidates(SOURCE)}
    refined = [c for c in found.values() if c.relative is not None]
    assert refined
    assert all(c.relative in found for c in refined)


@pytest.mark.parametrize("name", [c.recipe.name for c in candidates(SOURCE)])
def test_every_candidate_can_be_asked_for_by_name(name: str) -> None:
    recipe = next(c.recipe for c in candidates(SOURCE) if c.recipe.name == name)
    assert recipe_from_name(name, SOURCE) == recipe


BODIES = st.sampled_from(["native", "bf16", "w8a8", "w8a8-g64", "w8a8-g32-asym", "w4a8-g32", "w4a16-g64"])
CHANGES = st.sampled_from(
    ["head=w8a8", "embedding=bf16", "kv=bf16", "kv=int8", "layers.*.down=w8a8-g32", "layers.1=bf16",
     "layers.0.qkv=w8a8-g64"]
)  # fmt: skip


@settings(deadline=None, derandomize=True, max_examples=80)
@given(BODIES, st.lists(CHANGES, max_size=3, unique_by=lambda change: change.partition("=")[0]))
def test_changes_take_effect_in_order(body: str, changes: list[str]) -> None:
    recipe = recipe_from_name(",".join([body, *changes]), SOURCE)
    assert recipe.name == ",".join([body, *changes])
    for change in changes:
        place, _, value = change.partition("=")
        if place == "kv":
            assert recipe.kv_cache == value
        elif place in ("head", "embedding"):
            assert getattr(recipe, place) == value
        else:
            assert (place, value) in recipe.overrides
    rounded = [f for f in (recipe.layers, recipe.head, recipe.embedding) if f.startswith("w")]
    assert not (rounded and recipe.method == "native")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "a format is"),
        ("w2a8", "a format is"),
        ("w4a8", "weights of 3 or 4 bits need one"),
        ("w8a8-g128", "groups must divide the width"),
        ("w8a8/qwa", "after the slash stands rtn, gptq, tune, smooth"),
        ("w8a8/native", "after the slash stands"),
        ("w8a8,head", "a change is PLACE=FORMAT"),
        ("w8a8,head=", "a change is PLACE=FORMAT"),
        ("w8a8,kv=int4", "the cpu runner has no int4 cache"),
        ("w8a8,kv=int2", "the KV cache is one of int8, bf16, fp32"),
        ("w8a8,kv=fp8", "the cpu runner has no fp8; found: the KV cache"),
        ("fp8", "the cpu runner has no fp8; found: layers"),
        ("w8a8,layers.x.down=w8a8", "an override names"),
        ("w8a8,layers.0.dwn=w8a8", "an override names"),
        ("w8a8,tail=w8a8", "a change is of head, embedding, kv, sparsity, depth"),
        ("w8a8,dept=1", "found: 'dept'; try: depth=1"),
        ("w4a16-g64/gtpq", "found: 'gtpq'; try: w4a16-g64/gptq"),
        ("w4a16-g64/awq-gqtp", "try: w4a16-g64/awq-gptq"),
        ("W4A16-G64", "try: w4a16-g64"),
        ("w4a16g64asym", "try: w4a16-g64-asym"),
        ("w5a16-g96-asym", "found: 'w5a16-g96-asym'; try: w5a16-g64-asym"),
        ("w8a8,kv=int8,kv=bf16", "a recipe names each place once; found: kv, 2 times"),
        ("bf16,sparsity=wanda-50%,sparsity=magnitude-2:4", "each place once; found: sparsity, 2 times"),
        ("w8a8,layers.*.down=bf16,layers.*.down=w8a8", r"each place once; found: layers\.\*\.down"),
        ("bf16,sparsity=wnda-50%", "found: 'wnda-50%'; try: wanda-50%"),
        ("bf16,sparsity=half", "try: wanda-50% or sparsegpt-2:4"),
        ("bf16/gptq", "a method chooses integer codes; found: bf16/gptq"),
        ("w4a16-g64/smooth", "smoothing is for int8 activations that share one scale a token"),
    ],
)
def test_bad_names_are_refused_with_the_rule(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_from_name(name, SOURCE)


def test_the_layer_map_names_every_place() -> None:
    recipe = recipe_from_name("w8a8,layers.1.down=w8a8-g32", SOURCE)
    places = layer_map(SPEC, recipe)
    assert places["down"] == ["w8a8", "w8a8-g32", "w8a8"]
    assert places["qkv"] == ["w8a8"] * 3
    assert places["head"] == ["q8_0"]
    assert places["kv_cache"] == ["int8"]
    assert layer_map(SPEC, ORIGINAL)["kv_cache"] == ["bf16"]


def test_a_rotated_recipe_gives_up_the_blocks_of_the_tables() -> None:
    source = tiny_source(tiny_spec("llama", tie_embeddings=True), layers="q4_1", head="q8_0")
    assert recipe_from_name("w4a16-g32/gptq", source).head == "q8_0"
    rotated = recipe_from_name("w4a16-g32/rotate-gptq", source)
    assert (rotated.head, rotated.embedding, rotated.method) == ("w8a8-g64", "w8a8-g64", "rotate-gptq")
    assert recipe_from_name("w3a16-g64-asym/awq", source).layers == "w3a16-g64-asym"


def test_a_method_is_of_integer_layers_among_floats() -> None:
    recipe = recipe_from_name("bf16/gptq,layers.*.down=w4a16-g64", SOURCE)
    assert (recipe.method, recipe.layers) == ("gptq", "bf16")
    assert recipe_from_name("bf16,layers.*.down=w4a16-g64", SOURCE).method == "rtn"
