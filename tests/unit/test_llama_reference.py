"""models/llama.py against transformers on the same weights, and its cache and rounding against themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny import llama3_scaling, tiny_checkpoint_folder, tiny_model, tiny_source, tiny_spec

from flatout.core.formats import Recipe, uniform
from flatout.core.fuse import assemble, float_recipe
from flatout.core.spec import ModelSpec
from flatout.errors import ConfigError
from flatout.models.llama import Cache, Llama, attention, round_keys_or_values

SPECS = {
    "llama": tiny_spec("llama"),
    "llama-tied-one-kv-head": tiny_spec("llama", tie_embeddings=True, num_kv_heads=1),
    "llama3-scaling": tiny_spec("llama", rope_scaling=llama3_scaling(), rope_theta=500000.0),
    "mistral-window-8": tiny_spec("mistral"),
    "qwen2": tiny_spec("qwen2"),
    "qwen3": tiny_spec("qwen3"),
    "gemma": tiny_spec("gemma"),
}


def some_tokens(spec: ModelSpec, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, spec.vocab_size, count)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_logits_equal_transformers(spec: ModelSpec, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_checkpoint_folder(tmp_path / "model", spec, seed=3)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens = some_tokens(spec, 70)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)[None]).logits[0]
    ours = Llama(tiny_source(spec, seed=3)).forward(tokens)
    # Two float32 evaluations of the same formula: a few hundred roundings of 6e-8 each.
    torch.testing.assert_close(ours, expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_cached_steps_equal_one_pass(spec: ModelSpec) -> None:
    model = Llama(tiny_source(spec, seed=1))
    tokens = some_tokens(spec, 23)
    whole = model.forward(tokens)
    cache = Cache()
    pieces = [model.forward(tokens[a:b], cache) for a, b in ((0, 1), (1, 9), (9, 10), (10, 23))]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-4, atol=1e-4)
    assert cache.length == 23
    torch.testing.assert_close(model.forward(tokens, last_only=True), whole[-1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [None, 9, 10, 4])
def test_attention_at_once_is_attention_token_by_token(window: int | None) -> None:
    """The fused kernel, which takes whole prompts, against the formula, which takes what continues them."""
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(9, heads, 16, generator=draw) for heads in (6, 2, 2))
    whole = attention(q, k, v, torch.arange(9), window)
    for i in range(1, 9):
        last = attention(q[i : i + 1], k[: i + 1], v[: i + 1], torch.tensor([i]), window)
        torch.testing.assert_close(whole[i : i + 1], last)


def test_sliding_window_forgets() -> None:
    spec = tiny_spec("mistral", num_layers=1, sliding_window=4)
    model = Llama(tiny_source(spec))
    tokens = some_tokens(spec, 12)
    changed = tokens.copy()
    changed[2] = (changed[2] + 1) % spec.vocab_size
    a, b = model.forward(tokens), model.forward(changed)
    different = (a - b).abs().amax(dim=1) > 0
    # One layer sees its own token and the three before it.
    assert different.nonzero().flatten().tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize(
    "name", ["fp32", "bf16", "w8a8", "w8a8-g64", "w4a8-g32", "w4a16-g32-asym", "q4_1", "q8_0"]
)
def test_served_model_is_near_its_exact_weights(name: str) -> None:
    spec = tiny_spec("qwen3")
    model = tiny_model(spec, uniform(name, head=name), seed=2)
    tokens = some_tokens(spec, 40)
    exact, served = Llama(model).forward(tokens), Llama(model, as_served=True).forward(tokens)
    error = float((served - exact).norm() / exact.norm())
    # The int8 KV cache rounds by half of 1/127, int8 activations and bf16 by about as much: percents, never
    # more.
    assert 0 < error < 0.05


def test_served_fp32_without_cache_rounding_is_exact() -> None:
    spec = tiny_spec("llama")
    source = tiny_source(spec)
    model = assemble(source, float_recipe("fp32"))
    tokens = some_tokens(spec, 20)
    served = Llama(model, as_served=True)
    served.kv_cache = "fp32"
    torch.testing.assert_close(served.forward(tokens), Llama(source).forward(tokens), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "limit"), [("int8", 127), ("int4", 7)])
def test_integer_caches_round_per_token_and_head(name: str, limit: int) -> None:
    x = torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(0))
    x[1, 0] *= 1000
    x[3] = 0
    rounded = round_keys_or_values(x, name)
    step = x.abs().amax(dim=2, keepdim=True) / limit
    assert ((rounded - x).abs() <= step * 0.5001).all()
    assert (rounded[3] == 0).all()
    # Rounding the second head alone gives the same bits.
    assert torch.equal(round_keys_or_values(x[:, 1:], name), rounded[:, 1:])


def test_embedding_and_head_may_differ_when_tied() -> None:
    spec = tiny_spec("llama", tie_embeddings=True)
    recipe = Recipe(name="mixed", layers="fp32", embedding="w4a16-g32", head="w8a8-g64", kv_cache="int8")
    model = tiny_model(spec, recipe)
    logits = Llama(model, as_served=True).forward(some_tokens(spec, 3))
    assert logits.shape == (3, spec.vocab_size)
    assert torch.isfinite(logits).all()


def test_token_outside_vocabulary() -> None:
    spec = tiny_spec("llama")
    with pytest.raises(ConfigError, match=r"token ids are 0\.\.319; found: 5\.\.320"):
        Llama(tiny_source(spec)).forward([5, 320])


def test_a_checkpoint_is_not_served() -> None:
    with pytest.raises(ConfigError, match="only a Model says how it is served"):
        Llama(tiny_source(tiny_spec("llama")), as_served=True)
