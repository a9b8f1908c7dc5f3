"""models/bert.py against transformers on the same weights, and as served against itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.encoders import packed, tiny_encoder, tiny_encoder_folder, tiny_encoder_spec

from flatout.models.bert import Bert

SPECS = {
    "heads-of-32": tiny_encoder_spec(),
    "heads-of-64": tiny_encoder_spec(hidden_size=128, num_layers=3),
    "head-of-20": tiny_encoder_spec(hidden_size=40, intermediate_size=90, layer_norm_eps=1e-5),
}


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_states_equal_transformers(spec, prefix, tmp_path: Path) -> None:
    from transformers import BertModel

    folder = tiny_encoder_folder(tmp_path / "model", spec, seed=3, prefix=prefix)
    theirs = BertModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval()
    lengths = [1, 70, 17, 2]
    tokens, starts = packed(spec, lengths)
    states = []
    for start, length in zip(starts, lengths, strict=True):
        with torch.no_grad():
            ids = torch.tensor(tokens[None, start : start + length].astype(np.int64))
            states.append(theirs(ids).last_hidden_state[0].numpy())
    ours = Bert(tiny_encoder(folder, spec, "fp32")).forward(tokens, starts, "none", False)
    expected = np.concatenate(states)
    # Two float32 evaluations of the same formula: a few hundred roundings of 6e-8 each.
    np.testing.assert_allclose(ours, expected, atol=5e-5 * np.abs(expected).max())


def test_pooling_and_its_length(tmp_path: Path) -> None:
    spec = tiny_encoder_spec()
    model = Bert(tiny_encoder(tmp_path / "model", spec, "fp32"))
    tokens, starts = packed(spec, [3, 1, 9])
    states = np.split(model.forward(tokens, starts, "none", False), starts[1:])
    mean = np.stack([s.mean(0) for s in states])
    np.testing.assert_allclose(model.forward(tokens, starts, "mean", False), mean, atol=1e-6)
    np.testing.assert_array_equal(model.forward(tokens, starts, "cls", False), [s[0] for s in states])
    unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(model.forward(tokens, starts, "mean", True), unit, atol=1e-6)


@pytest.mark.parametrize(("name", "least"), [("fp32", 5e-3), ("bf16", 3e-2), ("w8a8", 0.1), ("w8a16", 0.05)])
def test_as_served_stays_near_the_exact_states(name: str, least: float, tmp_path: Path) -> None:
    spec = tiny_encoder_spec()
    model = tiny_encoder(tmp_path / "model", spec, name)
    tokens, starts = packed(spec, [40, 5])
    exact = Bert(tiny_encoder(tmp_path / "model", spec, "fp32")).forward(tokens, starts, "none", False)
    served = Bert(model, as_served=True).forward(tokens, starts, "none", False)
    assert 0 < np.abs(served - exact).max() <= least * np.abs(exact).max()
