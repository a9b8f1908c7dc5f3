"""compress/encoder_gptq.py: against rounding to nearest, linear by linear, and what it must refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.encoders import tiny_encoder_folder, tiny_encoder_spec

from flatout.compress.encoder import compress_encoder
from flatout.compress.encoder_gptq import gptq_encoder
from flatout.compress.gptq import round_linear
from flatout.core.encoder_folder import EncoderCheckpoint, open_encoder
from flatout.core.formats import parse_format
from flatout.core.quantized import QuantizedTensor
from flatout.errors import ConfigError
from flatout.models.bert import Bert

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
