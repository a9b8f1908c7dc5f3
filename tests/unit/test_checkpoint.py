"""One model through every kind of file gives the same weights; files that do not fit their configuration are
refused when they are opened."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tests.files import gguf_name, interleave, only_flatout_errors, write_gguf_model
from tests.tiny import (
    llama3_scaling,
    tiny_checkpoint_folder,
    tiny_model,
    tiny_spec,
    tiny_tensors,
    write_tokenizer,
)

from flatout.core.artifact import save_artifact
from flatout.core.checkpoint import open_checkpoint
from flatout.core.config import ARCHITECTURES
from flatout.core.files import sha256_of
from flatout.core.formats import uniform
from flatout.core.gguf import open_gguf
from flatout.core.gguf_config import frequency_divisors
from flatout.core.quantized import QuantizedTensor
from flatout.core.spec import ModelSpec
from flatout.core.tokenizer import Tokenizer
from flatout.errors import FlatoutError, ModelFileError, UnsupportedModelError


def edit(**changes: Any) -> Callable[[Path], None]:
    """Changes of a folder's config.json."""

    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_folder_and_a_gguf_file_hold_the_same_model(tmp_path: Path, family: str) -> None:
    spec = tiny_spec(family)
    tensors = tiny_tensors(spec)
    folder = open_checkpoint(tiny_checkpoint_folder(tmp_path / "folder", spec))
    file = open_checkpoint(write_gguf_model(tmp_path / "model.gguf", spec, tensors))
    assert folder.spec == spec
    assert file.spec == spec
    assert folder.names == file.names == tuple(tensors)
    for name, expected in tensors.items():
        np.testing.assert_array_equal(folder.array(name), expected)
        if family == "gemma" and name.endswith("norm.weight"):
            # The file holds 1 + w: that sum, which the model multiplies by, is what survives exactly.
            np.testing.assert_array_equal(np.float32(1) + file.array(name), np.float32(1) + expected)
        else:
            np.testing.assert_array_equal(file.array(name), expected)
        assert folder.native(name) is None
    if spec.tie_embeddings:
        np.testing.assert_array_equal(file.array("lm_head.weight"), tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q8_0])
def test_native_blocks_have_the_rows_of_hugging_face(tmp_path: Path, kind: Type) -> None:
    spec = tiny_spec("llama", tie_embeddings=True)
    tensors = tiny_tensors(spec)
    types = {gguf_name(n): kind for n, t in tensors.items() if t.ndim == 2}
    checkpoint = open_checkpoint(write_gguf_model(tmp_path / "q.gguf", spec, tensors, types))
    for name, values in tensors.items():
        native = checkpoint.native(name)
        if values.ndim == 1:
            assert native is None
            continue
        assert native is not None
        assert native.format.name == kind.name.lower()
        # Rows quantise independently of each other, so the order of the file does not matter here.
        expected = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
        np.testing.assert_array_equal(native.dequantize(), expected)
        np.testing.assert_array_equal(checkpoint.array(name), expected)
    assert checkpoint.native("lm_head.weight") is not None


def test_q_and_k_biases_and_rows_of_other_architectures_stay(tmp_path: Path) -> None:
    spec = tiny_spec("qwen2")
    tensors = tiny_tensors(spec)
    path = write_gguf_model(tmp_path / "m.gguf", spec, tensors)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not np.array_equal(interleave(tensors[name], 4), tensors[name])
    np.testing.assert_array_equal(open_checkpoint(path).array(name), tensors[name])


def test_a_sharded_folder_is_one_model(tmp_path: Path) -> None:
    spec = tiny_spec("llama")
    folder = tiny_checkpoint_folder(tmp_path / "m", spec)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i}.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.names:
        np.testing.assert_array_equal(checkpoint.array(name), tensors[name])
    assert checkpoint.sha256 == sha256_of([folder / "model-0.safetensors", folder / "model-1.safetensors"])

    index.write_text(json.dumps({"weight_map": places | {names[0]: "model-1.safetensors"}}))
    with pytest.raises(ModelFileError, match="must hold the tensors that the index lists"):
        open_checkpoint(folder)
    index.write_text(json.dumps({"weight_map": places | {names[0]: "../m/model-0.safetensors"}}))
    with pytest.raises(ModelFileError, match="must name safetensors files beside it"):
        open_checkpoint(folder)
    index.write_text(json.dumps({"weight_map": places | {names[0]: "model-2.safetensors"}}))
    with pytest.raises(ModelFileError, match=r"the file must exist.*model-2"):
        open_checkpoint(folder)
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ModelFileError, match="weight_map must map tensors to files"):
        open_checkpoint(folder)


def test_the_hash_is_that_of_the_weights(tmp_path: Path) -> None:
    folder = tiny_checkpoint_folder(tmp_path / "m", tiny_spec("llama"))
    one = open_checkpoint(folder).sha256
    assert one == sha256_of([folder / "model.safetensors"])
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors")
    assert open_checkpoint(folder).sha256 != one


def change_weights(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "config.json").unlink(), ModelFileError, "must hold config.json"),
        (lambda f: (f / "config.json").write_text("{"), ModelFileError, r"valid JSON.*config\.json"),
        (lambda f: (f / "config.json").write_bytes(b"\xff"), ModelFileError, r"UTF-8.*config\.json"),
        (lambda f: (f / "model.safetensors").unlink(), ModelFileError, "model.safetensors or its index"),
        (lambda f: (f / "model.safetensors").rename(f / "w.bin"), UnsupportedModelError, "pickled files"),
        (cut, ModelFileError, "is it truncated"),
        (edit(model_type="gpt_neox"), UnsupportedModelError, "model_type"),
        (edit(vocab_size=321), ModelFileError, r"\(320, 64\) instead of \(321"),
        (edit(num_hidden_layers=3), ModelFileError, r"no model.layers.2.*and 7 more"),
        (edit(num_hidden_layers=1), UnsupportedModelError, r"model\.layers\.1"),
        (edit(quantization_config=3), ModelFileError, "must be an object"),
        (
            edit(quantization_config={"quant_method": "bitsandbytes"}),
            UnsupportedModelError,
            "quant_method",
        ),
        (change_weights(lambda t: t.pop("model.norm.weight")), ModelFileError, r"no model\.norm\.weight"),
        (
            change_weights(lambda t: t.update({"model.layers.0.mlp.up_proj.bias": t["model.norm.weight"]})),
            UnsupportedModelError,
            r"up_proj\.bias",
        ),
        (edit(tie_word_embeddings=True), ModelFileError, "tied lm_head"),
        (lambda f: (f / "generation_config.json").write_text("[]"), ModelFileError, "JSON object"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_right_are_refused_at_once(
    tmp_path: Path, damage: Callable[[Path], None], error: type[FlatoutError], message: str
) -> None:
    folder = tiny_checkpoint_folder(tmp_path / "m", tiny_spec("llama"))
    open_checkpoint(folder)
    damage(folder)
    with pytest.raises(error, match=f"(?s){message}") as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)
    assert caught.value.remedy


def test_a_tied_model_may_store_its_head_twice(tmp_path: Path) -> None:
    folder = tiny_checkpoint_folder(tmp_path / "m", tiny_spec("llama", tie_embeddings=True))
    tensors = load_file(folder / "model.safetensors")
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    save_file(
        tensors | frequencies | {"lm_head.weight": tensors["model.embed_tokens.weight"]},
        folder / "model.safetensors",
    )
    checkpoint = open_checkpoint(folder)
    assert "lm_head.weight" not in checkpoint.names
    np.testing.assert_array_equal(checkpoint.array("lm_head.weight"), tensors["model.embed_tokens.weight"])


def test_a_missing_tokenizer_is_reported_when_it_is_needed(tmp_path: Path) -> None:
    spec = tiny_spec("llama")
    folder = tiny_checkpoint_folder(tmp_path / "m", spec)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelFileError, match=r"must hold its tokenizer.*no tokenizer\.json in"):
        _ = open_checkpoint(folder).tokenizer
    path = write_gguf_model(tmp_path / "m.gguf", spec, tiny_tensors(spec))
    with pytest.raises(ModelFileError, match=r"must hold a tokenizer \(tokenizer\.ggml\.tokens\)"):
        _ = open_checkpoint(path).tokenizer


def test_weights_that_are_not_finite_are_refused_when_read(tmp_path: Path) -> None:
    spec = tiny_spec("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = tiny_tensors(spec)
    tensors[name][3, 5] = np.nan
    checkpoint = open_checkpoint(write_gguf_model(tmp_path / "n.gguf", spec, tensors))
    checkpoint.array("model.norm.weight")
    with pytest.raises(ModelFileError, match=rf"weights must be finite.*inf or nan in {name} in .*n\.gguf"):
        checkpoint.array(name)

    path = write_gguf_model(tmp_path / "q.gguf", spec, tiny_tensors(spec), {gguf_name(name): Type.Q4_1})
    checkpoint = open_checkpoint(path)
    offset = checkpoint.reader.file.tensors[gguf_name(name)].offset  # type: ignore[attr-defined]
    content = bytearray(path.read_bytes())
    content[offset : offset + 2] = b"\x00\x7c"  # the first scale becomes infinite
    path.write_bytes(content)
    checkpoint = open_checkpoint(path)
    with pytest.raises(ModelFileError, match=f"inf or nan in the scales of {name}"):
        checkpoint.native(name)
    with pytest.raises(ModelFileError, match="weights must be finite"):
        checkpoint.array(name)


@pytest.mark.parametrize("name", ["w8a8", "w8a8-g32-asym", "w8a16", "w4a16-g32", "w4a16-g32-asym"])
def test_a_quantised_folder_is_read_as_the_numbers_it_stands_for(tmp_path: Path, name: str) -> None:
    spec = tiny_spec("llama")
    model = tiny_model(spec, uniform(name, head=name))
    tokens = tmp_path / "tokenizer"
    tokens.mkdir()
    write_tokenizer(tokens, spec.vocab_size)
    folder = save_artifact(model, Tokenizer.from_folder(tokens), tmp_path / "artifact", {})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.spec == spec
    down, gate_up = model.weights["layers.1.down"], model.weights["layers.0.gate_up"]
    assert isinstance(down, QuantizedTensor)
    assert isinstance(gate_up, QuantizedTensor)
    up = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_array_equal(checkpoint.array("model.layers.1.mlp.down_proj.weight"), down.dequantize())
    np.testing.assert_array_equal(checkpoint.array(up), gate_up.dequantize()[spec.intermediate_size :])
    native = checkpoint.native(up)
    assert native is not None
    assert native.format.name == name
    np.testing.assert_array_equal(native.dequantize(), checkpoint.array(up))
    np.testing.assert_array_equal(checkpoint.array("model.norm.weight"), model.weights["norm"])
    assert checkpoint.native("model.norm.weight") is None

    stored = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in stored.items() if n != up + "_scale"}, folder / "model.safetensors")
    with pytest.raises(ModelFileError, match="needs codes and scales; found: not both of model"):
        open_checkpoint(folder)
    save_file(stored, folder / "model.safetensors")

    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= {
        "strategy": "group",
        "group_size": 16,
    }
    edit(quantization_config=config["quantization_config"])(folder)
    with pytest.raises(FlatoutError, match=r"groups are 32, 64 or 128 wide.*config\.json"):
        open_checkpoint(folder)


def test_an_artifact_in_our_own_tensors_is_not_an_original(tmp_path: Path) -> None:
    spec = tiny_spec("llama")
    model = tiny_model(spec, uniform("q4_1", head="q8_0", method="native"))
    write_tokenizer(tmp_path, spec.vocab_size)
    folder = save_artifact(model, Tokenizer.from_folder(tmp_path), tmp_path / "artifact", {})
    with pytest.raises(UnsupportedModelError, match="float minimum are read from the model they were taken"):
        open_checkpoint(folder)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint_folder(tmp_path / "m", tiny_spec("llama")))
    for read in (checkpoint.array, checkpoint.native):
        with pytest.raises(ModelFileError, match="one of the model's"):
            read("model.layers.9.mlp.up_proj.weight")


def test_a_safetensors_file_is_opened_by_its_folder(tmp_path: Path) -> None:
    folder = tiny_checkpoint_folder(tmp_path / "m", tiny_spec("llama"))
    with pytest.raises(ModelFileError, match=f"opened by its folder.*try: {folder}"):
        open_checkpoint(folder / "model.safetensors")


def small_gguf(path: Path) -> tuple[bytes, int]:
    """A complete model of one layer with its tokenizer, written to `path`: contents, where the data begin."""
    spec = tiny_spec(
        "llama",
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
    )
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab"]
    types = {"blk.0.ffn_up.weight": Type.Q4_1, "token_embd.weight": Type.Q8_0}
    write_gguf_model(path, spec, tiny_tensors(spec), types, tokens=tokens)
    return path.read_bytes(), min(t.offset for t in open_gguf(path).tensors.values())


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    return small_gguf(tmp_path_factory.mktemp("sound") / "s.gguf")


@settings(deadline=None, derandomize=True, max_examples=300)
@given(data=st.data())
def test_fuzz_of_a_whole_model_only_flatout_errors_escape(
    tmp_path_factory: pytest.TempPathFactory, sound: tuple[bytes, int], data: st.DataObject
) -> None:
    """Numbers and bytes of the header replaced, then everything read that the header still promises."""
    content, places = bytearray(sound[0]), st.integers(0, sound[1] - 8)
    numbers = st.sampled_from([0, 1, 2, 3, 9, 255, 1 << 20, (1 << 32) - 1, 1 << 63]) | st.integers(0, 64)
    for place, value, size in data.draw(
        st.lists(st.tuples(places, numbers, st.sampled_from([1, 4, 8])), min_size=1, max_size=3)
    ):
        content[place : place + size] = (value % (1 << (8 * size))).to_bytes(size, "little")
    path = tmp_path_factory.mktemp("fuzz", numbered=True) / "f.gguf"
    path.write_bytes(content)
    with only_flatout_errors():
        checkpoint = open_checkpoint(path)
        for name in checkpoint.names:
            checkpoint.array(name)
            checkpoint.native(name)
        checkpoint.tokenizer.encode("ab ba")
    path.unlink()


def rope_file(tmp_path: Path, spec: ModelSpec, table: np.ndarray) -> Path:
    return write_gguf_model(tmp_path / "r.gguf", spec, tiny_tensors(spec), extra={"rope_freqs.weight": table})


def test_llama3_scaling_is_recovered_from_its_table(tmp_path: Path) -> None:
    spec = tiny_spec("llama", rope_theta=5e5, head_dim=64)
    scaling = llama3_scaling()
    scaling = type(scaling)(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )
    table = frequency_divisors(scaling, 64, 5e5).astype(np.float32)
    assert len(np.unique(table)) > 4  # all three ranges occur
    assert open_checkpoint(rope_file(tmp_path, spec, table)).spec.rope_scaling == scaling
    for wrong in (
        table * 2,
        table[::-1].copy(),
        np.full(32, np.nan, np.float32),
        np.zeros(32, np.float32),
        table[:7],
    ):
        with pytest.raises(FlatoutError, match=r"Llama-3 scaling"):
            open_checkpoint(rope_file(tmp_path, spec, wrong))


def test_frequency_divisors_agree_with_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = llama3_scaling()
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        },
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1e4 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(plain / frequency_divisors(scaling, 64, 1e4), scaled.numpy(), rtol=1e-6)
