"""Encoder folders, what is refused in them, and texts to vectors through the reference runner."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.encoders import packed, tiny_encoder, tiny_encoder_folder, tiny_encoder_spec

import flatout
from flatout.compress.encoder import compress_encoder
from flatout.core.encoder_folder import is_encoder, open_encoder
from flatout.core.formats import uniform
from flatout.core.safetensors import open_safetensors, write_safetensors
from flatout.engine.encoder import Encoder
from flatout.errors import ConfigError, ModelFileError, UnsupportedModelError
from flatout.models.bert import Bert

SPEC = tiny_encoder_spec()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_encoder_folder(tmp_path / "model", SPEC)


def reference(folder: Path, **options) -> Encoder:
    encoder = flatout.load(folder, runner="reference", **options)
    assert isinstance(encoder, Encoder)
    return encoder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_says_how_it_pools_and_cuts(folder: Path, tmp_path: Path) -> None:
    opened = open_encoder(folder)
    assert is_encoder(folder)
    assert (opened.pooling, opened.normalize, opened.max_tokens) == ("mean", True, 12)
    assert opened.spec == SPEC
    assert SPEC.num_parameters() == sum(
        int(np.prod(opened.tensors.shape(name))) for name in opened.tensors.names
    )
    first = open_encoder(tiny_encoder_folder(tmp_path / "cls", SPEC, pooling="cls_token"))
    assert first.pooling == "cls"
    plain = open_encoder(tiny_encoder_folder(tmp_path / "plain", SPEC, pooling=None, max_seq_length=None))
    assert (plain.pooling, plain.normalize, plain.max_tokens) == ("mean", False, SPEC.max_positions)


def test_texts_become_the_mean_of_their_own_tokens(folder: Path) -> None:
    encoder = reference(folder, format="fp32")
    texts = ["the sea was grey", "a ship", "", "cold " * 50]
    states = encoder.token_embeddings(texts, batch_size=3)
    assert [len(s) for s in states] == [6, 4, 2, 12]  # with [CLS] and [SEP]; cut to 12
    means = np.stack([s.mean(0) for s in states])
    vectors = encoder.encode(texts, batch_size=2)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_array_equal(encoder.encode(texts[1]), vectors[1])
    np.testing.assert_allclose(encoder.forward([2, 11, 12, 3], [0]), states[1], atol=1e-6)
    np.testing.assert_allclose(encoder.pooled([2, 11, 12, 3, 2, 3], [0, 4]), vectors[1:3], atol=1e-6)


def test_words_are_rounded_with_everything_else(folder: Path) -> None:
    exact = Bert(tiny_encoder(folder, SPEC, "fp32"))
    tokens, starts = packed(SPEC, [30])
    expected = exact.forward(tokens, starts, "mean", True)
    for name, least in (("bf16", 0.9999), ("w8a8", 0.999), ("w8a16", 0.9999)):
        model = compress_encoder(open_encoder(folder), name)
        got = Bert(model, as_served=True).forward(tokens, starts, "mean", True)
        assert 1 > float((got * expected).sum()) > least, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act = gelu"),
        ({"hidden_act": "gelu_new"}, "hidden_act = gelu"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = absolute"),
        ({"is_decoder": True}, "is_decoder = False"),
        ({"add_cross_attention": True}, "add_cross_attention = False"),
        ({"quantization_config": {}}, "encoders are read from float weights"),
        ({"num_attention_heads": 7}, "must divide hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be between"),
    ],
)
def test_other_arithmetic_is_refused(changes: dict, message: str, folder: Path) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        flatout.load(folder)


def test_missing_and_misshapen_tensors_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    file = open_safetensors(path)
    tensors = {name: file.array(name).copy() for name in file.names}
    name = "encoder.layer.1.output.dense.bias"
    write_safetensors(path, {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(ModelFileError, match=f"no {name}"):
        open_encoder(folder)
    write_safetensors(path, tensors | {name: np.zeros(3, np.float32)})
    with pytest.raises(ModelFileError, match=r"has shape \(3,\) instead of \(64,\)"):
        open_encoder(folder)
    write_safetensors(path, tensors | {"encoder.layer.1.adapter.weight": np.zeros(3, np.float32)})
    with pytest.raises(UnsupportedModelError, match=r"adapter\.weight"):
        open_encoder(folder)
    write_safetensors(path, tensors | {name: np.full(64, np.nan, np.float32)})
    with pytest.raises(ModelFileError, match=r"inf or nan in layers\.1\.down_bias"):
        flatout.load(folder)
    # The heads that pre-training leaves behind are no part of the encoder.
    write_safetensors(path, tensors | {"pooler.dense.bias": np.zeros(64, np.float32)})
    open_encoder(folder)


def test_other_modules_and_poolings_are_refused(folder: Path) -> None:
    edit(folder / "1_Pooling" / "config.json", pooling_mode_max_tokens=True)
    with pytest.raises(UnsupportedModelError, match="mean_tokens, cls_token"):
        open_encoder(folder)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*modules, {"type": "models.Dense", "path": "3"}]))
    with pytest.raises(UnsupportedModelError, match="Transformer, Pooling and perhaps Normalize"):
        open_encoder(folder)
    modules[1]["path"] = "../elsewhere"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelFileError, match="folder beside it"):
        open_encoder(folder)
    (folder / "modules.json").write_text("[")
    with pytest.raises(ModelFileError, match="valid JSON"):
        open_encoder(folder)


def test_a_tokenizer_must_fit_the_model(folder: Path, tmp_path: Path) -> None:
    small = tiny_encoder_folder(tmp_path / "small", tiny_encoder_spec(vocab_size=10))
    with pytest.raises(ModelFileError, match="at most the model's 10 tokens"):
        flatout.load(small)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelFileError, match=r"no tokenizer\.json"):
        flatout.load(folder)
    edit(folder / "sentence_bert_config.json", max_seq_length=2)
    with pytest.raises(ModelFileError, match="room for a token"):
        open_encoder(folder)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.encode([]), "there must be a text"),
        (lambda e: e.encode([3]), "texts must be strings; found: int"),
        (lambda e: e.encode(["\ud800"]), "valid Unicode"),
        (lambda e: e.encode(["a"], batch_size=0), "at least one text"),
        (lambda e: e.forward([], []), "tokens is a list of integers"),
        (lambda e: e.forward([1.5], [0]), "tokens is a list of integers"),
        (lambda e: e.forward([1, 2], []), "starts is a list of integers"),
        (lambda e: e.forward([1, 2], [1]), "starts begin with 0"),
        (lambda e: e.forward([1, 2], [0, 0]), "starts begin with 0, increase"),
        (lambda e: e.forward([1, 2], [0, 2]), "leave each sequence a token"),
        (lambda e: e.forward([1] * 513, [0]), "at most 512 tokens; found: 513 in sequence 0"),
        (lambda e: e.forward([1, 300], [0]), "between 0 and 299; found: 1 to 300"),
        (lambda e: e.pooled([-1], [0]), "between 0 and 299"),
    ],
)
def test_bad_input_is_refused_with_a_remedy(call, message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        call(reference(folder))
    assert caught.value.remedy


def test_arguments_that_an_encoder_or_a_decoder_has_no_use_for(folder: Path) -> None:
    with pytest.raises(ConfigError, match="an encoder has no recipe"):
        flatout.load(folder, recipe=uniform("w8a8"))
    with pytest.raises(ConfigError, match="an encoder has no max_tokens"):
        flatout.load(folder, max_tokens=100)
    with pytest.raises(ConfigError, match="an encoder has no draft"):
        flatout.load(folder, draft="smollm2-135m")
    with pytest.raises(ConfigError, match="the runner is one of"):
        flatout.load(folder, runner="gpu")
    with pytest.raises(ConfigError, match="encoders take fp32"):
        flatout.load(folder, format="q8_0")
    with pytest.raises(ConfigError, match="groups must divide the width"):
        flatout.load(folder, format="w8a8-g128")
    edit(folder / "config.json", model_type="llama")
    with pytest.raises(ConfigError, match="a decoder's formats are its recipe's"):
        flatout.load(folder, format="w8a8")
    with pytest.raises(UnsupportedModelError, match="model_type must be one of bert"):
        open_encoder(folder)
