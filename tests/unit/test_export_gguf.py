"""export/gguf.py and core/gguf_write.py: files against the package `gguf`, our reader and the models'
logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import llama3_scaling, native_blocks, tiny_model, tiny_source, tiny_spec, write_tokenizer

from flatout.compress.apply import compress
from flatout.compress.rtn import round_to_nearest
from flatout.core.checkpoint import open_checkpoint
from flatout.core.formats import Recipe, parse_format, uniform
from flatout.core.gguf import open_gguf
from flatout.core.gguf_write import (
    OutTensor,
    block_kind,
    float_blocks,
    is_exact,
    weight_blocks,
    write_gguf,
)
from flatout.core.model import Model
from flatout.core.quantized import QuantizedTensor
from flatout.core.tokenizer import Tokenizer
from flatout.errors import ModelFileError, UnsupportedModelError
from flatout.export import gguf as export
from flatout.export.gguf import write_model
from flatout.models.llama import Llama

TOKENS = [(7 * i * i + 3) % 320 for i in range(40)]


def tokenizer(folder: Path, vocab_size: int = 320) -> Tokenizer:
    folder.mkdir(exist_ok=True)
    write_tokenizer(folder, vocab_size)
    return Tokenizer.from_folder(folder)


def relative_error(model: Model, path: Path) -> float:
    ours, again = Llama(model).forward(TOKENS), Llama(open_checkpoint(path)).forward(TOKENS)
    return float((ours - again).abs().max() / ours.abs().max())


def test_the_package_gguf_reads_what_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    plain, rounded = rng.standard_normal((3, 5)).astype(np.float32), rng.standard_normal((4, 64))
    blocks = gguf.quants.quantize(rounded.astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    words = ["a", "", "\u4f60\u597d"]
    metadata = {
        "general.architecture": "llama",
        "n": 7,
        "x": 0.5,
        "yes": True,
        "words": words,
        "ids": np.array([1, -2]),
        "scores": np.array([0.25, -1e9]),
    }
    tensors = [
        OutTensor(name="p", shape=(3, 5), kind="F32", make=lambda: float_blocks(plain, "F32")),
        OutTensor(name="b", shape=(3, 5), kind="BF16", make=lambda: float_blocks(plain, "BF16")),
        OutTensor(name="q", shape=(4, 64), kind="Q8_0", make=lambda: blocks.reshape(-1)),
    ]
    write_gguf(tmp_path / "f.gguf", metadata, tensors)
    theirs = gguf.GGUFReader(tmp_path / "f.gguf")
    assert [t.name for t in theirs.tensors] == ["p", "b", "q"]
    np.testing.assert_array_equal(theirs.tensors[0].data, plain)
    bits = theirs.tensors[1].data.view(np.uint16).reshape(3, 5)
    expected = torch.from_numpy(plain).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(bits, expected)
    np.testing.assert_array_equal(theirs.tensors[2].data, blocks)
    for key in ("n", "x", "yes", "words"):
        assert theirs.get_field(key).contents() == metadata[key]
    file = open_gguf(tmp_path / "f.gguf")
    np.testing.assert_array_equal(file.metadata["ids"], [1, -2])
    np.testing.assert_array_equal(file.metadata["scores"], np.array([0.25, -1e9], np.float32))
    np.testing.assert_array_equal(file.float32("p"), plain)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(
        ["w8a8", "w8a8-g32", "w8a16-g128", "w6a8", "w6a8-g64", "w5a8", "w5a16-g32", "w4a8-g32", "w4a16-g128"]
    ),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_symmetric_codes_become_blocks_of_the_same_numbers(name: str, n: int, widths: int, seed: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((n, 128 * widths)).astype(np.float32)
    tensor = round_to_nearest(weight, parse_format(name))
    kind = block_kind(tensor)
    assert kind == {4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 8: "Q8_0"}[tensor.format.bits]
    assert is_exact(tensor)
    raw = weight_blocks(tensor).reshape(n, -1)
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(theirs, tensor.dequantize())


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q8_0", "q4_0-s8", "q4_1-s8"])
def test_native_blocks_stay(name: str) -> None:
    tensor = native_blocks(name, 3, 96, seed=1)
    raw = weight_blocks(tensor).reshape(3, -1)
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[tensor.format.blocks.upper()])
    np.testing.assert_array_equal(theirs, tensor.dequantize())


@pytest.mark.parametrize("bits", [4, 5])
def test_zero_points_become_minima(bits: int) -> None:
    weight = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    tensor = round_to_nearest(weight, parse_format(f"w{bits}a16-g32-asym"))
    kind = gguf.GGMLQuantizationType[f"Q{bits}_1"]
    assert block_kind(tensor) == kind.name
    theirs = gguf.quants.dequantize(weight_blocks(tensor).reshape(4, -1), kind)
    assert np.abs(theirs - tensor.dequantize()).max() <= float(tensor.scales.max()) * 2**bits / 2048


def test_what_no_block_holds_is_refused() -> None:
    weight = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    with pytest.raises(UnsupportedModelError, match="no blocks of more than 5 bits with a zero point"):
        block_kind(round_to_nearest(weight, parse_format("w8a8-g32-asym")))
    huge = round_to_nearest(weight * np.float32(1e8), parse_format("w8a8-g32"))
    with pytest.raises(UnsupportedModelError, match="scales of GGUF blocks are float16"):
        block_kind(huge)


RECIPES = [
    uniform("fp32"),
    uniform("bf16"),
    uniform("w8a8-g32"),
    uniform("w4a8-g32"),
    uniform("w4a16-g64"),
    Recipe(
        name="mixed", layers="w8a8", embedding="w8a8-g32", head="bf16", overrides=(("layers.1.down", "bf16"),)
    ),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_file_is_the_model(tmp_path: Path, recipe: Recipe) -> None:
    model = tiny_model(tiny_spec("llama"), recipe)
    path = tmp_path / "m.gguf"
    assert write_model(model, tokenizer(tmp_path / "t"), path, "tiny") == 0
    assert open_checkpoint(path).spec == replace(model.spec, eos_token_ids=(2,))
    # bf16 weights are floats in memory and rounded in the file; everything else is the same numbers.
    holds_bf16 = "bf16" in (recipe.layers, recipe.head)
    assert relative_error(model, path) <= (2e-2 if holds_bf16 else 1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma"])
def test_families(tmp_path: Path, family: str) -> None:
    model = tiny_model(tiny_spec(family), uniform("w8a8-g32"))
    write_model(model, tokenizer(tmp_path / "t"), tmp_path / "m.gguf", family)
    assert relative_error(model, tmp_path / "m.gguf") < 1e-5


def test_llama3_scaling_and_windows(tmp_path: Path) -> None:
    scaling = replace(llama3_scaling(), original_max_positions=8192)
    model = tiny_model(tiny_spec("llama", rope_scaling=scaling), uniform("w8a8-g32"))
    write_model(model, tokenizer(tmp_path / "t"), tmp_path / "m.gguf", "scaled")
    assert open_checkpoint(tmp_path / "m.gguf").spec.rope_scaling == scaling
    windowed = tiny_model(tiny_spec("mistral"), uniform("w8a8-g32"))
    with pytest.raises(UnsupportedModelError, match="without a sliding window"):
        write_model(windowed, tokenizer(tmp_path / "t"), tmp_path / "w.gguf", "m")
    whole = tiny_model(tiny_spec("mistral", sliding_window=512), uniform("w8a8-g32"))
    write_model(whole, tokenizer(tmp_path / "t"), tmp_path / "w.gguf", "m")
    assert relative_error(whole, tmp_path / "w.gguf") < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_pair_is_written_once(tmp_path: Path, tied: bool) -> None:
    spec = tiny_spec("llama", tie_embeddings=True)
    recipe = uniform("w8a8-g32") if tied else replace(uniform("w8a8-g32"), head="w8a8-g64")
    write_model(tiny_model(spec, recipe), tokenizer(tmp_path / "t"), tmp_path / "m.gguf", "m")
    assert ("output.weight" in open_gguf(tmp_path / "m.gguf").tensors) != tied


def test_the_blocks_of_a_file_go_through_unchanged(tmp_path: Path) -> None:
    source = tiny_source(tiny_spec("llama"), layers="q4_1", head="q8_0")
    recipe = Recipe(name="native", layers="q4_1", embedding="q8_0", head="q8_0", method="native")
    write_model(compress(source, recipe), tokenizer(tmp_path / "t"), tmp_path / "a.gguf", "m")
    first = open_checkpoint(tmp_path / "a.gguf")
    write_model(compress(first, recipe), first.tokenizer, tmp_path / "b.gguf", "m")
    second = open_checkpoint(tmp_path / "b.gguf")
    for name in first.names:
        ours, theirs = source.native(name), second.native(name)
        assert (ours is None) == (theirs is None)
        if isinstance(ours, QuantizedTensor) and theirs is not None:
            np.testing.assert_array_equal(theirs.codes, ours.codes)
            np.testing.assert_array_equal(theirs.scales, ours.scales)


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    words = tokenizer(tmp_path / "t")
    write_model(tiny_model(tiny_spec("llama"), uniform("w8a8-g32")), words, tmp_path / "m.gguf", "m")
    again = open_checkpoint(tmp_path / "m.gguf").tokenizer
    for text in ("then <s>other ink", "caf\u00e9 \U0001f98a\n  12", "</s>"):
        assert again.encode(text) == words.encode(text)
    assert (again.bos, again.eos, again.chat_template) == (words.bos, words.eos, words.chat_template)
    assert again.vocab_size == 320  # 265 tokens and unused ones


def sentence_piece(folder: Path) -> Tokenizer:
    """The kind that Llama 2 has: scores in GGUF, byte fallback, a space in front."""
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("i", "n"), ("a", "n"), ("h", "e")]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *letters, *("".join(pair) for pair in merges)]
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    inner.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    decoders = tokenizers.decoders
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return Tokenizer(inner, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def test_sentence_piece_comes_along(tmp_path: Path) -> None:
    words = sentence_piece(tmp_path)
    write_model(tiny_model(tiny_spec("llama"), uniform("w8a8-g32")), words, tmp_path / "m.gguf", "m")
    again = open_checkpoint(tmp_path / "m.gguf").tokenizer
    for text in ("the thin hen", "in an \u00e9tat", "  two spaces", "</s>the"):
        assert again.encode(text) == words.encode(text), text


def test_a_tokenizer_without_a_name_is_refused(tmp_path: Path) -> None:
    words = tokenizer(tmp_path / "t")
    contents, config = words.state()
    contents["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False},
            contents["pre_tokenizer"],
        ],
    }
    model = tiny_model(tiny_spec("llama"), uniform("w8a8-g32"))
    with pytest.raises(UnsupportedModelError, match="GGUF export knows how"):
        write_model(model, Tokenizer.from_state(contents, config), tmp_path / "m.gguf", "m")
    assert not (tmp_path / "m.gguf").exists()


def test_widths_that_blocks_do_not_divide_are_refused(tmp_path: Path) -> None:
    model = tiny_model(tiny_spec("llama", intermediate_size=144), uniform("w8a8"))
    with pytest.raises(ModelFileError, match=r"rows of Q8_0 are a multiple of 32 wide.*ffn_down"):
        write_model(model, tokenizer(tmp_path / "t"), tmp_path / "m.gguf", "m")
    assert not (tmp_path / "m.gguf").exists()


def test_what_does_not_read_back_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_spec("llama"), uniform("w8a8-g32"))
    monkeypatch.setattr(export, "weight_blocks", lambda weight: weight_blocks(weight) ^ 1)
    with pytest.raises(ModelFileError, match="every weight must read back"):
        write_model(model, tokenizer(tmp_path / "t"), tmp_path / "m.gguf", "m")
    assert not (tmp_path / "m.gguf").exists()
