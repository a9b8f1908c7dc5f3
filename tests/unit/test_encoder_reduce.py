"""compress/encoder_reduce.py: encoders with weights taken away, against what they must compute."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.encoders import tiny_encoder_folder, tiny_encoder_spec, tiny_encoder_tensors

from flatout.compress.encoder import compress_encoder, load
from flatout.compress.encoder_reduce import (
    ReducedEncoder,
    cut_encoder,
    prune_encoder,
    whole,
    write_encoder,
)
from flatout.core.encoder_folder import open_encoder
from flatout.core.sparsity import METHODS, parse_sparsity
from flatout.errors import ConfigError, EvidenceError, ModelFileError
from flatout.models.bert import Bert

TEXTS = [[2, *((7 * i * j + 3) % 300 for j in range(40)), 3] for i in range(1, 5)]
WORDS = ["the sea was grey", "a cold ship"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_encoder_folder(tmp_path / "m", tiny_encoder_spec())


def vectors(source: ReducedEncoder) -> np.ndarray:
    model = Bert(compress_encoder(source, "fp32"))
    tokens = np.concatenate([np.array(ids) for ids in TEXTS])
    starts = np.cumsum([0, *(len(ids) for ids in TEXTS[:-1])])
    return model.forward(tokens, starts, "mean", True)


def with_zeros(folder: Path, changes: dict[str, object]) -> ReducedEncoder:
    from safetensors.numpy import save_file

    tensors = tiny_encoder_tensors(tiny_encoder_spec())
    for name, index in changes.items():
        tensors[name][index] = 0  # type: ignore[index]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return whole(open_encoder(folder))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["50%", "2:4"])
def test_pruned_encoders_lose_less_the_better_the_method(folder: Path, method: str, how: str) -> None:
    source = whole(open_encoder(folder))
    pruned = prune_encoder(source, parse_sparsity(f"{method}-{how}"), TEXTS)
    for layer in range(2):
        for part in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"):
            assert (pruned.tensor(f"encoder.layer.{layer}.{part}.weight") == 0).mean() == 0.5
    bias = "encoder.layer.0.output.dense.bias"
    np.testing.assert_array_equal(pruned.tensor(bias), source.tensor(bias))
    cosine = (vectors(pruned) * vectors(source)).sum(axis=1).min()
    assert 0.5 < cosine < 1


def test_methods_are_ordered(folder: Path) -> None:
    source = whole(open_encoder(folder))
    before = vectors(source)
    lost = {}
    for method in METHODS:
        pruned = prune_encoder(source, parse_sparsity(f"{method}-50%"), TEXTS)
        lost[method] = float(1 - (vectors(pruned) * before).sum(axis=1).mean())
    assert lost["sparsegpt"] < lost["magnitude"]


def test_channels_that_add_nothing_can_go(folder: Path) -> None:
    dead = np.random.default_rng(0).permutation(144)[:64]
    source = with_zeros(folder, {f"encoder.layer.{i}.output.dense.weight": np.s_[:, dead] for i in (0, 1)})
    child = cut_encoder(source, TEXTS, ffn=80)
    assert child.spec.intermediate_size == 80
    assert not set(dead.tolist()) & set(child.channels[0].tolist())
    np.testing.assert_allclose(vectors(child), vectors(source), atol=1e-5)


def test_the_layer_that_changes_least_goes(folder: Path) -> None:
    p = "encoder.layer.0."
    names = ("attention.output.dense", "output.dense")
    changes = {f"{p}{name}.{part}": np.s_[:] for name in names for part in ("weight", "bias")}
    child = cut_encoder(with_zeros(folder, changes), TEXTS, depth=1)
    assert child.layers == (1,)
    assert child.spec.num_layers == 1
    assert cut_encoder(child, TEXTS, ffn=16).layers == (1,)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_folder_is_an_encoder(folder: Path, tmp_path: Path, bfloat16: bool) -> None:
    child = cut_encoder(whole(open_encoder(folder)), TEXTS, depth=1, ffn=96)
    opened = write_encoder(child, tmp_path / "out", bfloat16=bfloat16)
    assert opened.spec == child.spec
    assert (opened.pooling, opened.normalize, opened.max_tokens) == ("mean", True, 12)
    found = vectors(whole(opened))
    np.testing.assert_allclose(found, vectors(child), atol=2e-2 if bfloat16 else 1e-6)
    encoder = load(tmp_path / "out", "reference", format="fp32")
    assert encoder.encode(WORDS).shape == (2, 64)  # type: ignore[union-attr]


def test_transformers_loads_it(folder: Path, tmp_path: Path) -> None:
    import torch
    from transformers import BertModel

    child = cut_encoder(whole(open_encoder(folder)), TEXTS, depth=1, ffn=96)
    write_encoder(prune_encoder(child, parse_sparsity("magnitude-50%")), tmp_path / "out", texts=WORDS)
    other = BertModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
    opened = open_encoder(tmp_path / "out")
    ids = opened.tokenizer().encode_batch(WORDS[:1])[0]
    with torch.no_grad():
        theirs = other(torch.tensor([ids])).last_hidden_state[0].numpy()
    ours = Bert(compress_encoder(opened, "fp32")).hidden(torch.tensor(ids)).detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_fewer_words(folder: Path, tmp_path: Path) -> None:
    """Same vectors of texts whose words stay, and of those that were unknown before."""
    before = load(folder, "reference", format="fp32")
    small = write_encoder(whole(open_encoder(folder)), tmp_path / "out", texts=WORDS, multiple=1)
    after = load(tmp_path / "out", "reference", format="fp32")
    assert small.spec.vocab_size == 12  # "and" goes
    assert "##s" in json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]
    for text in (*WORDS, "the cold the", "zebra"):
        np.testing.assert_allclose(
            after.encode(text),  # type: ignore[union-attr]
            before.encode(text),  # type: ignore[union-attr]
            atol=1e-6,
        )


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    source = whole(open_encoder(folder))
    with pytest.raises(ConfigError, match="calibration needs at least 128 tokens"):
        prune_encoder(source, parse_sparsity("wanda-50%"), TEXTS[:2])
    with pytest.raises(ConfigError, match=r"token ids are 0\.\.299"):
        cut_encoder(source, [[300] * 200], depth=1)
    with pytest.raises(ConfigError, match="ffn lies between 1 and the model's 144"):
        cut_encoder(source, TEXTS, ffn=145)
    with pytest.raises(ConfigError, match="needs rows of a multiple of 5"):
        prune_encoder(source, parse_sparsity("magnitude-2:5"))
    with pytest.raises(ConfigError, match="cut before weights are pruned"):
        cut_encoder(prune_encoder(source, parse_sparsity("magnitude-50%")), TEXTS, ffn=16)
    with pytest.raises(ConfigError, match="a new folder"):
        write_encoder(source, folder)
    bad = with_zeros(folder, {})
    broken = np.full((144, 64), np.nan, np.float32)
    with pytest.raises((ModelFileError, EvidenceError), match="finite"):
        prune_encoder(
            ReducedEncoder(
                spec=bad.spec,
                original=bad.original,
                layers=bad.layers,
                channels=bad.channels,
                changed={"encoder.layer.1.intermediate.dense.weight": broken},
            ),
            parse_sparsity("wanda-50%"),
            TEXTS,
        )
