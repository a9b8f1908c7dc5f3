"""The library: what it keeps is what GPTQ and smoothing make of a linear by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.tiny import loud_source, tiny_source, tiny_spec

from flatout.compress.apply import compress
from flatout.compress.gptq import damped, factorise, gptq
from flatout.compress.library import Library
from flatout.compress.refine import refine
from flatout.compress.rescale import rescaled
from flatout.core.costs import moment_bytes
from flatout.core.formats import Recipe, parse_format
from flatout.core.fuse import float_weight
from flatout.core.model import Model
from flatout.core.quantized import QuantizedTensor
from flatout.errors import ConfigError
from flatout.models.llama import Llama, rms_norm
from flatout.search.sensitivity import by_rounding

SPEC = tiny_spec("llama", num_layers=3)
DOCUMENTS = [np.random.default_rng(i).integers(0, SPEC.vocab_size, 96).tolist() for i in range(12)]


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(tiny_source(SPEC), DOCUMENTS)


def recipe(layers: str, *overrides: tuple[str, str], head: str = "w8a16") -> Recipe:
    return Recipe(
        name="r", layers=layers, head=head, embedding=head, method="smooth-gptq", overrides=overrides
    )


def codes(library: Library, which: Recipe, name: str) -> np.ndarray:
    weight = library.model(which).weights[name]
    assert isinstance(weight, QuantizedTensor)
    return weight.codes


def assert_same(first: Model, second: Model) -> None:
    for name, weight in first.weights.items():
        other = second.weights[name]
        np.testing.assert_array_equal(getattr(weight, "codes", weight), getattr(other, "codes", other), name)


def test_a_linear_by_hand(library: Library) -> None:
    """What the first linear receives is the normed embedding."""
    source = tiny_source(SPEC)
    x = Llama(source).embed(torch.tensor(np.concatenate(DOCUMENTS)))
    x = rms_norm(x, torch.from_numpy(float_weight(source, "layers.0.input_norm")), SPEC.rms_norm_eps).numpy()
    weight = float_weight(source, "layers.0.qkv")
    moments = x.T @ x / len(x)
    expected = refine(weight, damped(moments), gptq(weight, moments, parse_format("w4a8-g32")), passes=1)
    found = codes(library, recipe("w4a8-g32"), "layers.0.qkv")
    assert (found == expected.codes).mean() > 0.999  # sums in another order move a code at a tie


@pytest.mark.parametrize("smoothed", [False, True])
def test_smoothing_takes_the_hessian_along(library: Library, smoothed: bool) -> None:
    """H of x / s is H / s s^T: rounding W s by it is GPTQ of the smoothed linear."""
    name = "layers.1.gate_up"
    which = recipe("w8a16", (name, "w8a8")) if smoothed else recipe("w8a16")
    source = rescaled(library.source, {name: library._smoothing[name]} if smoothed else {})
    s = library.smoothing(name) if smoothed else np.ones(64, np.float32)
    moments = library.moments(name) / np.outer(s, s)
    fmt = which.format_of(1, "gate_up")
    expected = gptq(float_weight(source, name), moments, fmt)
    assert (codes(library, which, name) == expected.codes).mean() > 0.999


def test_places_do_not_depend_on_each_other(library: Library) -> None:
    first = library.model(recipe("w8a16"))
    second = library.model(recipe("w8a16", ("layers.1.down", "w4a8-g32"), ("layers.2", "w8a8-g32")))
    for name in ("layers.0.qkv", "layers.0.down", "layers.1.qkv", "layers.1.gate_up"):
        assert second.weights[name] is first.weights[name], "it is made once"
    assert second.weights["layers.1.down"] is not first.weights["layers.1.down"]


def test_a_mixed_model_computes_what_the_original_does(library: Library) -> None:
    """Smoothed, spread and rounded, some of each: as served it is near the original, and nearer than 4 bits
    everywhere; rounded to nearest it is further off."""
    tokens = np.random.default_rng(99).integers(0, SPEC.vocab_size, 96)
    exact = Llama(library.source).forward(tokens)

    def error(which: Recipe) -> float:
        model = compress(library.source, which, DOCUMENTS) if which.method == "rtn" else library.model(which)
        return float((Llama(model, as_served=True).forward(tokens) - exact).norm() / exact.norm())

    mixed = recipe("w8a8", ("layers.0", "w8a16"), ("layers.1.o", "w4a8-g32"), ("layers.2.down", "w8a8-g32"))
    four = recipe("w4a8-g32")
    nearest = Recipe(name="n", layers=four.layers, head=four.head, embedding=four.embedding, method="rtn")
    assert error(mixed) < 0.1
    assert error(mixed) < error(four) < 0.95 * error(nearest)


def test_the_method_alone_makes_the_same_model(library: Library) -> None:
    which = recipe("w8a8", ("layers.1.o", "w4a8-g32"))
    assert_same(library.model(which), compress(tiny_source(SPEC), which, DOCUMENTS))


def test_blocks_of_the_file_stay() -> None:
    source = tiny_source(SPEC, layers="q4_1", head="q8_0")
    model = Library(source, DOCUMENTS[:2]).model(
        recipe("q4_1", ("layers.1.o", "w8a8-g32"), ("layers.2.down", "w8a8"), head="q8_0")
    )
    own = model.weights["layers.0.down"]
    assert isinstance(own, QuantizedTensor)
    stored = source.native("model.layers.0.mlp.down_proj.weight")
    assert stored is not None
    np.testing.assert_array_equal(own.codes, stored.codes)
    tokens = np.arange(40)
    exact, found = Llama(source).forward(tokens), Llama(model).forward(tokens)
    assert float((found - exact).norm() / exact.norm()) < 0.05


def test_a_turned_model_loses_less_where_channels_are_loud() -> None:
    """One channel of the residual stream 30 times as heavy in what reads it: behind a rotation no group has
    it alone. The method alone makes the same model."""
    source = loud_source(SPEC)
    tokens = np.random.default_rng(99).integers(0, SPEC.vocab_size, 96)
    exact = Llama(source).forward(tokens)
    errors = {}
    for method in ("smooth-gptq", "rotate-smooth-gptq"):
        which = replace(recipe("w4a8-g32"), method=method)
        model = Library(source, DOCUMENTS, rotated=which.rotates).model(which)
        assert model.spec == SPEC
        assert_same(model, compress(source, which, DOCUMENTS))
        errors[method] = float((Llama(model, as_served=True).forward(tokens) - exact).norm() / exact.norm())
    assert errors["rotate-smooth-gptq"] < 0.7 * errors["smooth-gptq"]


def test_a_turned_model_has_no_blocks_of_the_file() -> None:
    library = Library(tiny_source(SPEC, layers="q4_1"), DOCUMENTS[:2], rotated=True)
    with pytest.raises(ConfigError, match="no blocks of the file left; found: q4_1"):
        library.model(replace(recipe("q4_1"), method="rotate-smooth-gptq"))


def test_what_rounding_with_spreading_does() -> None:
    """Mean over random weights of (error . g)^2, for inputs that nearly repeat each other."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 8)) @ rng.standard_normal((8, 32))
    moments = (x.T @ x / 500 + np.eye(32)).astype(np.float32)
    weight = np.random.default_rng(2).standard_normal((4000, 32)).astype(np.float32)
    errors = gptq(weight, moments, parse_format("w8a16"), damping=0.01).dequantize() - weight
    step = np.abs(weight).max(axis=1) / 127
    directions = np.concatenate([x[:3], rng.standard_normal((3, 32))]).astype(np.float32)
    expected = by_rounding(torch.from_numpy(directions), factorise(moments)).square().sum(dim=1).numpy()
    found = np.square(errors @ directions.T / step[:, None]).mean(axis=0) * 12
    np.testing.assert_allclose(found, expected, rtol=0.1)  # of 4,000 weights: 2 % standard error
    assert (expected[:3] < 0.5 * np.square(directions[:3]).sum(axis=1)).all()  # as inputs lie: little is left


def test_bytes_of_the_hessians_by_hand() -> None:
    assert moment_bytes(SPEC) == 4 * 3 * (64**2 + 64**2 + 64**2 + 128**2)


def test_text_is_needed() -> None:
    with pytest.raises(ConfigError, match="a library needs calibration text"):
        Library(tiny_source(SPEC), [])
