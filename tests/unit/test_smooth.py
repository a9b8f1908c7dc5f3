"""compress/smooth.py: the same function, the least expected error, and nothing moved that must stay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from tests.tiny import TinySource, tiny_model, tiny_source, tiny_spec, write_tokenizer

from flatout.compress.apply import compress
from flatout.compress.method import Progress, data_of
from flatout.compress.rescale import Rescaled
from flatout.compress.rtn import round_to_nearest
from flatout.compress.smooth import fit_factors
from flatout.compress.smooth import smooth as by_method
from flatout.core.artifact import load_artifact, save_artifact
from flatout.core.formats import Recipe, parse_format, uniform
from flatout.core.fuse import Source, native_recipe
from flatout.core.quantized import QuantizedTensor
from flatout.core.spec import ModelSpec
from flatout.core.tokenizer import Tokenizer
from flatout.errors import ConfigError
from flatout.kernels.linear import linear_reference
from flatout.models.llama import Llama

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma"]
W8A8 = uniform("w8a8", method="smooth")


def smooth(
    source: Source, recipe: Recipe, documents: list[np.ndarray], progress: Progress | None = None
) -> Rescaled:
    return by_method(source, data_of(documents, progress), recipe)[0]


def texts(spec: ModelSpec, count: int = 6, length: int = 40) -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(0, spec.vocab_size, length) for i in range(count)]


def with_outliers(spec: ModelSpec) -> TinySource:
    """A model whose norms, values and up-projections make a few channels 50 times as loud as the others, and
    whose next linears take them back."""
    source = tiny_source(spec)
    tensors = {name: array.copy() for name, array in source.tensors.items()}
    for i in range(spec.num_layers):
        p, E = f"model.layers.{i}.", spec.head_dim
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            channels = [3 + i, 17]
            values = tensors[f"{p}{norm}.weight"]
            values[channels] = (values[channels] + spec.norm_offset) * 50 - spec.norm_offset
            for reader in readers:
                tensors[f"{p}{reader}.weight"][:, channels] /= 50
        tensors[p + "mlp.up_proj.weight"][[5, 90]] *= 50
        tensors[p + "mlp.down_proj.weight"][:, [5, 90]] /= 50
        tensors[p + "self_attn.v_proj.weight"][E - 1] *= 50
        if spec.qkv_bias:
            tensors[p + "self_attn.v_proj.bias"][E - 1] *= 50
        heads = range(spec.num_heads // spec.num_kv_heads)
        tensors[p + "self_attn.o_proj.weight"][:, [h * E + E - 1 for h in heads]] /= 50
    return TinySource(spec, tensors)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_stays(family: str) -> None:
    spec = tiny_spec(family)
    source = with_outliers(spec)
    smoothed = smooth(source, W8A8, texts(spec))
    tokens = np.random.default_rng(99).integers(0, spec.vocab_size, 50)
    assert relative(Llama(smoothed).forward(tokens), Llama(source).forward(tokens)) < 2e-5
    p = "model.layers.1."
    carriers = {f"{p}{x}.weight" for x in ("input_layernorm", "post_attention_layernorm", "mlp.up_proj")}
    assert carriers | {p + "self_attn.v_proj.weight", "model.norm.weight"} <= set(smoothed.rows)
    # The outliers, 50 times as loud, have moved.
    for i in range(spec.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            name = f"model.layers.{i}.{norm}.weight"
            factors = smoothed.rows[name]
            assert factors[[3 + i, 17]].min() > 10 * np.median(factors)
            applied = np.abs(smoothed.array(name) + spec.norm_offset)
            assert applied.max() < 10 * np.median(applied)
        assert smoothed.rows[f"model.layers.{i}.mlp.up_proj.weight"].argmax() in (5, 90)


def test_query_heads_share_the_factors_of_their_values() -> None:
    spec = tiny_spec("llama")
    smoothed = smooth(with_outliers(spec), W8A8, texts(spec))
    values = smoothed.rows["model.layers.0.self_attn.v_proj.weight"].reshape(spec.num_kv_heads, -1)
    columns = smoothed.columns["model.layers.0.self_attn.o_proj.weight"].reshape(spec.num_heads, -1)
    for head in range(spec.num_heads):
        np.testing.assert_array_equal(columns[head], values[head // (spec.num_heads // spec.num_kv_heads)])


def expected_error(u: np.ndarray, x: np.ndarray, w: np.ndarray, owner: np.ndarray) -> float:
    """The formula of the module, in float64."""
    s = np.exp(u - u.mean())[owner]
    x, w = x.astype(np.float64) / s, w.astype(np.float64) * s
    activations = (x**2).max(axis=1).mean() * (w**2).sum()
    return float(activations + (w**2).max(axis=1).sum() * (x**2).mean(axis=0).sum())


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_no_other_factors_are_better(seed: int, shared: bool) -> None:
    """Against a general optimiser started from ours, and against every SmoothQuant exponent."""
    rng = np.random.default_rng(seed)
    owner = np.array([0, 1, 2, 3, 0, 1, 2, 3] if shared else range(8))
    x = (rng.standard_t(4, (60, 8)) * np.exp(1.5 * rng.standard_normal(4 if shared else 8))[owner]).astype(
        np.float32
    )
    w = (rng.standard_normal((20, 8)) * np.exp(0.5 * rng.standard_normal(8))).astype(np.float32)
    ours = fit_factors(torch.from_numpy(x), torch.from_numpy(w), torch.from_numpy(owner)).numpy()
    assert ours.shape == (owner.max() + 1,)
    assert np.log(ours).mean() == pytest.approx(0, abs=1e-5)
    found = expected_error(np.log(ours), x, w, owner)
    best = minimize(expected_error, np.log(ours), (x, w, owner), "Nelder-Mead", options={"maxiter": 3000}).fun
    assert found < 1.02 * best
    if not shared:
        for alpha in np.linspace(0, 1, 21):
            u = alpha * np.log(np.abs(x).max(axis=0)) - (1 - alpha) * np.log(np.abs(w).max(axis=0))
            assert found < 1.01 * expected_error(u, x, w, owner)


def test_the_expected_error_is_the_real_one() -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((400, 96)) * np.exp(rng.standard_normal(96))).astype(np.float32)
    w = rng.standard_normal((64, 96)).astype(np.float32)
    fmt, owner = parse_format("w8a8"), np.arange(96)

    def measured(s: np.ndarray) -> float:
        y = linear_reference(torch.from_numpy(x / s), round_to_nearest(w * s, fmt), fmt).numpy()
        return float(((y - x @ w.T) ** 2).sum(axis=1).mean())

    s = fit_factors(torch.from_numpy(x), torch.from_numpy(w), torch.from_numpy(owner)).numpy()
    # The entry that sets a step is rounded without error, so the real error is a little less.
    assert measured(s) == pytest.approx(expected_error(np.log(s), x, w, owner) / (12 * 127**2), rel=0.1)
    assert measured(s) < 0.6 * measured(np.ones_like(s))


@pytest.mark.parametrize("dead", ["x", "w", "both", "all x", "all w", "everything"])
def test_dead_channels(dead: str) -> None:
    """Factors stay finite, and a channel that calibration never woke does not become the loudest once it
    is."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((50, 32)).astype(np.float32)
    w = rng.standard_normal((16, 32)).astype(np.float32)
    if dead in ("x", "both"):
        x[:, 7] = 0
    if dead in ("w", "both"):
        w[:, 7] = 0
    if dead in ("all x", "everything"):
        x[:] = 0
    if dead in ("all w", "everything"):
        w[:] = 0
    s = fit_factors(torch.from_numpy(x), torch.from_numpy(w), torch.arange(32)).numpy()
    assert np.isfinite(s).all()
    assert (s > 0).all()
    assert s.min() / np.median(s) > 1e-4
    assert s.max() / np.median(s) < 1e4
    smoothed = Rescaled(
        spec=tiny_spec(),
        original=TinySource(tiny_spec(), {"model.norm.weight": np.zeros(32, np.float32)}),
        columns={},
        rows={"model.norm.weight": s},
    )
    np.testing.assert_array_equal(smoothed.array("model.norm.weight"), np.zeros(32))


def test_other_formats_are_left_alone() -> None:
    spec = tiny_spec("llama")
    recipe = Recipe(
        name="mixed",
        layers="w8a8",
        embedding="w8a8",
        head="w8a16",
        method="smooth",
        overrides=(("layers.0.qkv", "w8a16"), ("layers.1.gate_up", "bf16"), ("layers.1.o", "w8a8-g32")),
    )
    source = tiny_source(spec)
    smoothed = smooth(source, recipe, texts(spec))
    names = {name for name in source.names if smoothed.array(name) is not source.tensors[name]}
    first = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj", "self_attn.v_proj")
    second = ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert names == {
        *(f"model.layers.0.{x}.weight" for x in (*first, "post_attention_layernorm")),
        *(f"model.layers.1.{x}.weight" for x in (*second, "input_layernorm")),
    }
    assert smooth(source, uniform("w8a8-g32", method="smooth"), texts(spec)).rows == {}


def test_weights_from_the_file_stay() -> None:
    """Native blocks are neither rescaled themselves nor made to carry the factors of the next linear."""
    spec = tiny_spec("llama", tie_embeddings=True)
    source = tiny_source(spec, layers="q4_1", head="q8_0")
    changes = (("layers.*.o", "w8a8"), ("layers.1.down", "w8a8"), ("layers.1.gate_up", "w8a8"))
    recipe = replace(native_recipe(source), method="smooth", overrides=changes)
    smoothed = smooth(source, recipe, texts(spec))
    assert set(smoothed.rows) == {
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.1.mlp.up_proj.weight",
    }
    assert smoothed.spec == spec
    model = compress(source, recipe, [text.tolist() for text in texts(spec)])
    down = model.weights["layers.0.down"]
    assert isinstance(down, QuantizedTensor)
    np.testing.assert_array_equal(down.codes, source.blocks["model.layers.0.mlp.down_proj.weight"].codes)
    assert model.weights["head"] is source.blocks["model.embed_tokens.weight"]


def test_whole_model() -> None:
    spec = tiny_spec("llama", num_layers=3)
    source = with_outliers(spec)
    calibration = [text.tolist() for text in texts(spec, 12, 64)]
    tokens = np.random.default_rng(99).integers(0, spec.vocab_size, 96)
    exact = Llama(source).forward(tokens)
    served = {}
    for method in ("rtn", "smooth"):
        recipe = Recipe(name=method, layers="w8a8", kv_cache="int8", method=method)
        model = compress(source, recipe, calibration)
        assert model.spec == spec
        served[method] = relative(Llama(model, as_served=True).forward(tokens), exact)
    assert served["smooth"] < 0.3 * served["rtn"]


@pytest.mark.parametrize("family", ["qwen2", "gemma"])
def test_artifacts_of_tied_models(family: str, tmp_path: Path) -> None:
    """A smoothed head is no longer the embedding, and other tools read what we run."""
    from transformers import AutoModelForCausalLM

    spec = tiny_spec(family)
    source = with_outliers(spec)
    tokens = np.random.default_rng(99).integers(0, spec.vocab_size, 50)
    model = compress(source, W8A8, [text.tolist() for text in texts(spec)])
    write_tokenizer(tmp_path, spec.vocab_size)
    out = save_artifact(model, Tokenizer.from_folder(tmp_path), tmp_path / "artifact", {})
    again, _, _ = load_artifact(out)
    assert again.spec == spec
    ours = Llama(model, as_served=True).forward(tokens)
    torch.testing.assert_close(Llama(again, as_served=True).forward(tokens), ours, rtol=0, atol=0)
    exact = Llama(source).forward(tokens)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        read = theirs(torch.from_numpy(tokens)[None]).logits[0]
    # They span 127.5 steps and keep keys and values as floats, so both differ from the original alike.
    assert relative(read, exact) < 1.5 * relative(ours, exact)


def test_progress_and_repeatability() -> None:
    spec = tiny_spec("llama")
    steps: list[tuple[str, int, int]] = []
    a = smooth(tiny_source(spec), W8A8, texts(spec), lambda *step: steps.append(step))
    b = smooth(tiny_source(spec), W8A8, texts(spec))
    assert [step[1:] for step in steps] == [(i, 9) for i in range(9)]
    for name, factors in a.rows.items():
        np.testing.assert_array_equal(factors, b.rows[name])


def test_short_and_many_documents() -> None:
    spec = tiny_spec("llama")
    documents = [np.array([i % 300]) for i in range(40)] + [np.array([], dtype=np.int64)]
    smoothed = smooth(tiny_source(spec), W8A8, documents)
    assert all(np.isfinite(factors).all() for factors in smoothed.rows.values())


def test_text_is_needed() -> None:
    with pytest.raises(ConfigError, match="method smooth needs calibration text"):
        tiny_model(tiny_spec(), uniform("w8a8", method="smooth"))
    with pytest.raises(ConfigError, match="smoothing needs calibration text"):
        smooth(tiny_source(tiny_spec()), W8A8, [np.array([], dtype=np.int64)])
    with pytest.raises(ConfigError, match="the method is one of rtn, gptq, tune, smooth, smooth-gptq"):
        uniform("w8a8", method="magic")
