"""compress/rotate.py: orthogonal matrices of any order, and the same function behind them."""

from __future__ import annotations

import numpy as np
import pytest
from tests.tiny import loud_source, tiny_source, tiny_spec

from flatout.compress.apply import apply, compress
from flatout.compress.method import data_of
from flatout.compress.rotate import hadamard, orthogonal, rotate
from flatout.core.formats import Recipe
from flatout.errors import ConfigError
from flatout.models.llama import Llama

W4 = Recipe(name="r", layers="w4a16-g32", head="w8a16", embedding="w8a16", method="rotate")


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 24, 64, 144, 576, 1536])
def test_hadamard_matrices(n: int) -> None:
    found = hadamard(n)
    assert found is not None
    assert set(np.unique(found)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(found @ found.T, n * np.eye(n))


@pytest.mark.parametrize("n", [3, 6, 10, 36 + 2])
def test_orders_that_have_none(n: int) -> None:
    assert hadamard(n) is None


@pytest.mark.parametrize("n", [6, 16, 64, 96])
def test_orthogonal_and_its_own_inverse_transposed(n: int) -> None:
    q = orthogonal(n, 3)
    np.testing.assert_allclose(q @ q.T, np.eye(n), atol=1e-5)
    assert not np.array_equal(q, orthogonal(n, 4))
    np.testing.assert_array_equal(q, orthogonal(n, 3))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_the_function_stays(family: str) -> None:
    spec = tiny_spec(family)
    source = tiny_source(spec)
    rotated, report = rotate(source, data_of(None), W4)
    assert report.tokens == 0
    tokens = np.random.default_rng(5).integers(0, spec.vocab_size, 40)
    expected, found = Llama(source).forward(tokens), Llama(rotated).forward(tokens)
    assert float((found - expected).norm() / expected.norm()) < 1e-4  # float32 sums in another order
    name = "model.layers.0.self_attn.o_proj.weight"
    assert not np.allclose(rotated.array(name), source.array(name), atol=1e-2)


def test_outliers_of_the_residual_stream_are_spread() -> None:
    """One channel 30 times as loud in every weight that reads the stream: groups around it lose their levels
    to it, behind a rotation they do not."""
    spec = tiny_spec("llama", num_layers=1)
    loud = loud_source(spec)
    tokens = np.random.default_rng(5).integers(0, spec.vocab_size, 60)
    exact = Llama(loud).forward(tokens)

    def error(method: str) -> float:
        recipe = Recipe(name="r", layers="w4a16-g64", head="fp32", embedding="fp32", method=method)
        return float((Llama(compress(loud, recipe)).forward(tokens) - exact).norm())

    assert error("rotate") < 0.5 * error("rtn")


def test_head_and_embedding_become_two_tables() -> None:
    spec = tiny_spec("llama", tie_embeddings=True)
    model, report = apply(tiny_source(spec), data_of(None), W4)
    assert report.method == "rotate"
    head, embedding = model.weights["head"], model.weights["embedding"]
    assert not np.array_equal(getattr(head, "codes", head), getattr(embedding, "codes", embedding))


@pytest.mark.parametrize("method", ["rotate", "rotate-smooth-gptq"])
def test_blocks_of_the_file_are_refused(method: str) -> None:
    """Before anything else is: the second method has no text here."""
    source = tiny_source(tiny_spec("llama"), layers="q4_1", head="q8_0")
    recipe = Recipe(name="r", layers="w4a16-g32", head="q8_0", embedding="w8a16", method=method)
    with pytest.raises(ConfigError, match="no blocks of the file left; found: q8_0"):
        compress(source, recipe)
