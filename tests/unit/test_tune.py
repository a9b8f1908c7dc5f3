"""compress/tune.py: layers nearer to the original on text that was not learned from, never further away."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from tests.tiny import tiny_source, tiny_spec

from flatout.compress.inputs import Text
from flatout.compress.rtn import round_to_nearest
from flatout.compress.tune import tune_layer
from flatout.core.formats import parse_format
from flatout.core.fuse import float_weight
from flatout.core.quantized import QuantizedTensor
from flatout.kernels.linear import as_tensor

SPEC = tiny_spec("llama", num_layers=1)
DOCUMENTS = [np.random.default_rng(i).integers(0, SPEC.vocab_size, 96) for i in range(40)]
JUDGED = slice(30 * 96, None)  # tokens of the last quarter of the documents
SOURCE = tiny_source(SPEC)
TEXT = Text(SOURCE, DOCUMENTS)
FLOATS = {f"layers.0.{name}": as_tensor(float_weight(SOURCE, f"layers.0.{name}")) for name in SPEC.linears()}
Rounded = Mapping[str, QuantizedTensor]


def layer(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return TEXT.layer(0, TEXT.embed(), lambda name, inputs: inputs @ weights[name].T)


def error(rounded: Rounded) -> float:
    """Mean over judging tokens of the squared distance of the layer's output over its square, in float32."""
    target = layer(FLOATS)[JUDGED]
    made = layer({name: torch.from_numpy(weight.dequantize()) for name, weight in rounded.items()})[JUDGED]
    return float(((made - target).square().mean(1) / target.square().mean(1)).mean())


def nearest() -> Rounded:
    return {
        name: round_to_nearest(weight.numpy(), parse_format("w3a16-g32-asym"))
        for name, weight in FLOATS.items()
    }


def tuned(rounded: Rounded) -> Rounded:
    with torch.no_grad():
        return tune_layer(TEXT, 0, TEXT.embed(), layer(FLOATS), FLOATS, rounded)


def test_a_tuned_layer_is_nearer_on_text_that_it_has_not_learned() -> None:
    before = nearest()
    after = tuned(before)
    assert error(after) < 0.9 * error(before)
    for name, weight in after.items():
        moved = np.abs(weight.codes.astype(int) - before[name].codes)
        low, high = weight.code_range
        assert 0 < (moved > 0).mean() < 0.5
        assert low <= weight.codes.min() <= weight.codes.max() <= high


def test_steps_that_harm_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatout.compress.tune.RATE", 1e3)
    before = nearest()
    assert tuned(before) is before
