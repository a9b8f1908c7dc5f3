"""compress/encoder_gptq.py: against rounding to nearest, linear by linear, and what it must refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.encoders import tiny_encoder_folder, tiny_encoder_spec

from flatout.compress.encoder import compress_encoder, load
from flatout.compress.encoder_gptq import gptq_encoder
from flatout.compress.gptq import round_linear
from flatout.core.encoder_folder import (
    EncoderCheckpoint,
    open_encoder,
    save_encoder,
    saved_format,
    saved_weights,
)
from flatout.core.formats import parse_format
from flatout.core.model import dense
from flatout.core.quantized import QuantizedTensor
from flatout.engine.encoder import Encoder
from flatout.errors import ConfigError, ModelFileError
from flatout.models.bert import Bert
from flatout.search.encoder_recipes import encoder_from_name

TEXTS = [[2, *((7 * i * j + 3) % 300 for j in range(40)), 3] for i in range(1, 9)]


@pytest.fixture
def encoder(tmp_path: Path) -> EncoderCheckpoint:
    return open_encoder(tiny_encoder_folder(tmp_path / "m", tiny_encoder_spec(intermediate_size=128)))


def states(model: Bert) -> torch.Tensor:
    return torch.cat([model.hidden(torch.tensor(ids)) for ids in TEXTS])


def test_several_texts_at_once_are_what_each_is_alone(encoder: EncoderCheckpoint) -> None:
    model = Bert(compress_encoder(encoder, "fp32"))
    lengths = [len(ids) for ids in TEXTS]
    together = model.hidden(torch.tensor([token for ids in TEXTS for token in ids]), lengths)
    torch.testing.assert_close(together, states(model), rtol=1e-5, atol=1e-5)


def test_it_changes_states_less_than_rounding_to_nearest(encoder: EncoderCheckpoint) -> None:
    exact = states(Bert(compress_encoder(encoder, "fp32")))
    name = "w3a16-g32-asym"
    lost = [
        float((states(Bert(model)) - exact).square().sum())
        for model in (gptq_encoder(encoder, name, TEXTS), compress_encoder(encoder, name))
    ]
    assert lost[0] < 0.8 * lost[1]


def test_the_first_linear_is_rounded_for_what_it_receives(encoder: EncoderCheckpoint) -> None:
    fmt = parse_format("w4a16-g32")
    model = Bert(compress_encoder(encoder, "fp32"))
    inputs = []
    model._linear = lambda name, x: (inputs.append(x), Bert._linear(model, name, x))[1]  # type: ignore
    for ids in TEXTS:
        inputs_before = len(inputs)
        model.hidden(torch.tensor(ids))
        del inputs[inputs_before + 1 :]
    x = torch.cat(inputs).double()
    expected = round_linear(encoder.array("layers.0.qkv"), (x.T @ x / len(x)).float(), fmt)
    found = gptq_encoder(encoder, fmt.name, TEXTS).weights["layers.0.qkv"]
    assert isinstance(found, QuantizedTensor)
    assert (found.codes == expected.codes).mean() > 0.99
    np.testing.assert_allclose(found.dequantize(), expected.dequantize(), atol=0.1)


@pytest.mark.parametrize(
    ("name", "texts", "rule"),
    [
        ("w4a16-g32", [[2, 3]], "calibration needs at least"),
        ("w4a16-g32", [*TEXTS, [100_000]], "token ids are"),
        ("w4a16-g128", TEXTS, "groups must divide"),
    ],
)
def test_refusals(encoder: EncoderCheckpoint, name: str, texts: list[list[int]], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        gptq_encoder(encoder, name, texts)


def test_weights_that_are_not_finite_are_named(encoder: EncoderCheckpoint) -> None:
    class Broken:
        spec = encoder.spec

        def array(self, name: str) -> np.ndarray:
            array = encoder.array(name)
            return np.full_like(array, np.nan) if name == "layers.1.up" else array

    with pytest.raises(ConfigError, match=r"layers\.1\.up"):
        gptq_encoder(Broken(), "w4a16-g32", TEXTS)


def test_what_it_chose_is_kept_beside_the_folder(encoder: EncoderCheckpoint, tmp_path: Path) -> None:
    made = gptq_encoder(encoder, "w4a16-g32", TEXTS)
    rounded = {name: weight for name, weight in made.weights.items() if isinstance(weight, QuantizedTensor)}
    out = tmp_path / "out"
    save_encoder(encoder, out, "w4a16-g32", {}, rounded)
    assert saved_format(out) == "w4a16-g32"
    again, factors = saved_weights(out)
    assert factors == {}
    assert again.keys() == rounded.keys()
    nearest = compress_encoder(encoder, "w4a16-g32").weights
    for name, weight in rounded.items():
        np.testing.assert_array_equal(again[name].dequantize(), weight.dequantize())
        assert not np.array_equal(weight.dequantize(), dense(nearest[name]))
    text = "the sea was grey and cold"
    loaded, to_nearest = load(out), load(out, format="w4a16-g32")
    assert isinstance(loaded, Encoder)
    assert isinstance(to_nearest, Encoder)
    expected = Encoder.of(made, encoder.tokenizer(), normalize=encoder.normalize).encode(text)
    np.testing.assert_array_equal(loaded.encode(text), expected)
    assert not np.array_equal(to_nearest.encode(text), expected)


def test_kept_codes_that_were_changed_are_refused(encoder: EncoderCheckpoint, tmp_path: Path) -> None:
    weight = compress_encoder(encoder, "w4a16-g32").weights["layers.0.o"]
    assert isinstance(weight, QuantizedTensor)
    wild = replace(weight, codes=weight.codes | np.uint8(16))
    save_encoder(encoder, tmp_path / "wild", "w4a16-g32", {}, {"layers.0.o": wild})
    with pytest.raises(ModelFileError, match="codes lie between 0 and 15"):
        load(tmp_path / "wild")
    save_encoder(encoder, tmp_path / "cut", "w4a16-g32", {}, {"layers.0.o": weight})
    file = tmp_path / "cut" / "flatout.npz"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ModelFileError, match="files must be as they were written"):
        load(tmp_path / "cut")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w8a8/awq", "after the slash of an encoder stands rtn, gptq, smooth"),
        ("w8a8/gtpq", "found: 'gtpq'; try: w8a8/gptq"),
        ("w8a8,head=bf16", "a change of an encoder is sparsity=, depth=, ffn= or layers.I.LINEAR="),
        ("w8a8,dept=1", "found: 'dept=1'; try: depth=1"),
        ("w8a8,depth=one", "depth is a whole number"),
        ("w8a8,depth=0", "depth lies between 1 and the model's 2"),
        ("w8a8,ffn=9999", "ffn lies between 1 and the model's"),
        ("w8a8-g32,ffn=40", "groups must divide the width"),
        ("w8a8,ffn=42,sparsity=wanda-2:4", "2:4 needs rows of a multiple of 4 weights"),
        ("w8a8,ffn=64,ffn=32", "a recipe names each change once; found: ffn"),
        ("bf16,sparsity=wnda-50%", "try: wanda-50%"),
        ("bf16/gptq", "gptq chooses integer codes"),
        ("w8a8-g128/gptq", "groups must divide the width"),
    ],
)
def test_recipes_of_an_encoder(encoder: EncoderCheckpoint, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder_from_name(encoder, name)
