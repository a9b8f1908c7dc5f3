"""compress/awq.py: the same function, the factors that a sample of outputs asks for, nothing moved that must
stay."""

from __future__ import annotations

import numpy as np
import pytest
from tests.tiny import tiny_source, tiny_spec
from tests.unit.test_smooth import texts, with_outliers

from flatout.compress.apply import compress
from flatout.compress.awq import awq, search_factors
from flatout.compress.method import data_of
from flatout.compress.rtn import round_to_nearest
from flatout.core.formats import Recipe, parse_format
from flatout.models.llama import Llama

W4 = Recipe(name="r", layers="w4a16-g32", head="fp32", embedding="fp32", method="awq")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma"])
def test_the_function_stays(family: str) -> None:
    spec = tiny_spec(family)
    source = with_outliers(spec)
    changed, report = awq(source, data_of(texts(spec)), W4)
    assert set(report.errors) == {f"layers.{i}.{x}" for i in range(2) for x in spec.linears()}
    assert all(0 < error < 0.1 for error in report.errors.values())
    tokens = np.random.default_rng(9).integers(0, spec.vocab_size, 50)
    expected, found = Llama(source).forward(tokens), Llama(changed).forward(tokens)
    assert float((found - expected).norm() / expected.norm()) < 2e-5
    assert "lm_head.weight" not in changed.columns


def test_factors_are_the_best_of_those_tried() -> None:
    """Against the outputs themselves: loud inputs and even weights, where scaling must pay."""
    rng = np.random.default_rng(0)
    loud = np.exp(1.5 * rng.standard_normal(64))
    x = (rng.standard_normal((3000, 64)) * loud).astype(np.float32)
    w = rng.standard_normal((48, 64)).astype(np.float32)
    fmt = parse_format("w4a16-g32")

    def lost(factors: np.ndarray) -> float:
        rounded = round_to_nearest(w * factors, fmt, search_clip=True).dequantize() / factors
        return float(((x @ (rounded - w).T) ** 2).sum() / ((x @ w.T) ** 2).sum())

    factors, error = search_factors(w, x.T @ x / len(x), fmt, np.arange(64))
    assert error == pytest.approx(lost(factors), rel=1e-2)
    assert error < 0.9 * lost(np.ones(64, np.float32))
    assert np.corrcoef(np.log(factors), np.log(loud))[0, 1] > 0.9


def test_silent_channels_stay_bounded() -> None:
    x = np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)
    x[:, :8] = 0
    w = np.random.default_rng(1).standard_normal((16, 64)).astype(np.float32)
    factors, _ = search_factors(w, x.T @ x / 200, parse_format("w4a16-g32"), np.arange(64))
    assert np.isfinite(factors).all()
    assert factors.max() / factors.min() < 1e5
    nothing, error = search_factors(
        w, np.zeros((64, 64), np.float32), parse_format("w4a16-g32"), np.arange(64)
    )
    assert np.isfinite(nothing).all()
    assert np.isfinite(error)


def test_eight_bits_and_blocks_are_left_alone() -> None:
    spec = tiny_spec("llama")
    recipe = Recipe(name="r", layers="w8a16", method="awq", overrides=(("layers.1.down", "w4a16-g32"),))
    changed, report = awq(tiny_source(spec), data_of(texts(spec)), recipe)
    assert list(report.errors) == ["layers.1.down"]
    assert set(changed.rows) == {"model.layers.1.mlp.up_proj.weight"}
    native = tiny_source(spec, layers="q4_1")
    recipe = Recipe(name="r", layers="q4_1", method="awq", overrides=(("layers.1.down", "w4a16-g32"),))
    assert awq(native, data_of(texts(spec)), recipe)[0].rows == {}, "up is the file's own"


@pytest.mark.parametrize("method", ["awq", "awq-gptq"])
def test_a_whole_model_is_closer_than_rounding(method: str) -> None:
    spec = tiny_spec("llama")
    source = with_outliers(spec)
    tokens = np.random.default_rng(9).integers(0, spec.vocab_size, 96)
    exact = Llama(source).forward(tokens)

    def error(how: str) -> float:
        recipe = Recipe(name="r", layers="w4a16-g64", head="fp32", embedding="fp32", method=how)
        model = compress(source, recipe, texts(spec, 12, 96))
        return float((Llama(model).forward(tokens) - exact).norm())

    assert error(method) < 0.9 * error("rtn")
