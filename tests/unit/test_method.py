"""compress/method.py: bad input is named, with a remedy, before or at the layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.tiny import TinySource, tiny_source, tiny_spec

from flatout.compress.apply import apply, compress
from flatout.compress.method import data_of
from flatout.core.formats import METHODS, Recipe
from flatout.errors import ConfigError, EvidenceError

SPEC = tiny_spec("llama")
DOCUMENTS = [np.random.default_rng(i).integers(0, SPEC.vocab_size, 64).tolist() for i in range(3)]
CALIBRATED = [m for m in METHODS if m not in ("native", "rtn", "rotate")]


def recipe(method: str, layers: str = "w4a16-g32") -> Recipe:
    return Recipe(name="r", layers=layers, head="fp32", embedding="fp32", method=method)


def changed(name: str, change: object) -> TinySource:
    source = tiny_source(SPEC)
    tensors = {key: array.copy() for key, array in source.tensors.items()}
    tensors[name] = change(tensors[name])  # type: ignore[operator]
    return TinySource(SPEC, tensors)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatout.compress.tune.STEPS", 4)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_whole_model(method: str) -> None:
    layers = "fp32" if method == "native" else "w8a8" if method.startswith("smooth") else "w4a16-g32"
    model, report = apply(tiny_source(SPEC), data_of(DOCUMENTS), recipe(method, layers))
    assert report.method == method
    assert report.seconds >= 0
    assert all(0 <= error < 1 for error in report.errors.values())
    assert model.recipe.method == method


@pytest.mark.parametrize("method", CALIBRATED)
def test_no_text(method: str) -> None:
    with pytest.raises(ConfigError, match=f"method {method} needs calibration text; found: none; try: "):
        compress(tiny_source(SPEC), recipe(method, "w8a8"), [[], []])


@pytest.mark.parametrize("method", CALIBRATED)
def test_text_too_short(method: str) -> None:
    match = r"layers.1.down has 128 inputs: calibration takes at least 32 tokens.*found: 31 tokens; try: more"
    with pytest.raises(ConfigError, match=match):
        compress(tiny_source(SPEC), recipe(method, "w8a8"), [list(range(31))])


def test_text_of_another_tokenizer() -> None:
    with pytest.raises(ConfigError, match=r"0\.\.319; found: 0\.\.320; try: the model's own tokenizer"):
        compress(tiny_source(SPEC), recipe("gptq"), [list(range(321))])


def test_text_that_the_model_does_not_understand() -> None:
    """Ids of another vocabulary are in range, and the model is surer of other tokens than of these."""
    source = changed("lm_head.weight", lambda array: array * 8)
    with pytest.raises(
        EvidenceError, match=r"better than random tokens \(5.8 nats each\); found: .*tokenizer"
    ):
        compress(source, recipe("gptq"), DOCUMENTS)


def test_groups_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"groups must divide the width; found: layers.0.qkv: w4a16-g128"):
        compress(tiny_source(SPEC), recipe("gptq", "w4a16-g128"), DOCUMENTS)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "native"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(method: str, value: float) -> None:
    def spoil(array: np.ndarray) -> np.ndarray:
        array[3, 5] = value
        return array

    source = changed("model.layers.1.self_attn.o_proj.weight", spoil)
    with pytest.raises(ConfigError, match=r"weights must be finite; found: infinity or NaN in layers.1.o;"):
        compress(source, recipe(method), DOCUMENTS)


@pytest.mark.parametrize("method", CALIBRATED)
def test_activations_that_overflow(method: str) -> None:
    """Finite weights whose products are not: found at the layer, which is named."""
    source = changed("model.layers.0.mlp.up_proj.weight", lambda array: array * np.float32(3e38))
    match = "activations must be finite; found: infinity or NaN in the inputs of layers.0.down; try: "
    with pytest.raises(ConfigError, match=match):
        compress(source, replace(recipe(method), overrides=(("layers.0.gate_up", "fp32"),)), DOCUMENTS)


@pytest.mark.parametrize("method", ["gptq", "tune", "awq", "rotate-gptq"])
def test_one_token_again_and_again(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hessian has one direction only; damping must carry the rest."""
    monkeypatch.setattr("flatout.compress.inputs._WORSE_THAN_GUESSING", 9.0)
    model = compress(tiny_source(SPEC), recipe(method), [[7] * 64])
    for weight in model.weights.values():
        assert np.isfinite(getattr(weight, "scales", weight)).all()


@pytest.mark.parametrize("method", ["rtn", "gptq", "tune", "smooth-gptq"])
def test_a_layer_that_becomes_constant(method: str) -> None:
    """One weight a row 10,000 times the others: with a scale a row the rest rounds to nothing."""

    def outliers(array: np.ndarray) -> np.ndarray:
        array[:, 11] = 1e4
        return array

    source = changed("model.layers.1.mlp.down_proj.weight", outliers)
    match = r"must not be constant.*100% of the groups of layers.1.down in w8a16; try: a smaller group"
    with pytest.raises(ConfigError, match=match):
        compress(source, recipe(method, "w8a16"), DOCUMENTS)
    compress(source, replace(recipe(method, "w8a16"), overrides=(("layers.1.down", "bf16"),)), DOCUMENTS)


def test_constants_stay_constants() -> None:
    """A weight that is zero in the original may be zero afterwards."""
    source = changed("model.layers.1.mlp.down_proj.weight", np.zeros_like)
    compress(source, recipe("gptq"), DOCUMENTS)
