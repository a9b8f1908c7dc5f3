"""compress/prune.py and its methods: formulas against plain ones, patterns, errors, and whole models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import TinySource, tiny_checkpoint_folder, tiny_source, tiny_spec

from flatout.compress import prune_folder as prune_folder_module
from flatout.compress.gptq import factorise
from flatout.compress.magnitude import magnitude
from flatout.compress.prune import Statistics, prune, prune_weight, pruned_layers
from flatout.compress.prune_folder import prune_folder
from flatout.compress.sparsegpt import sparsegpt
from flatout.compress.wanda import wanda
from flatout.core.checkpoint import open_checkpoint
from flatout.core.safetensors import from_bfloat16, open_safetensors, to_bfloat16
from flatout.core.sparsity import METHODS, parse_sparsity
from flatout.core.spec import weight_names
from flatout.errors import ConfigError, EvidenceError
from flatout.models.llama import Llama

NAMES = [f"{method}-{how}" for method in METHODS for how in ("50%", "2:4", "4:8")]


def documents(vocab_size: int = 320, count: int = 3, length: int = 60) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, vocab_size, length + i) for i in range(count)]


def random_problem(n: int, k: int, tokens: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights (n, k) and inputs (tokens, k) that are correlated and of very different sizes."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((tokens, max(1, k // 2))) @ rng.standard_normal((max(1, k // 2), k))
    inputs = (shared / np.sqrt(k / 2) + 0.3 * rng.standard_normal((tokens, k))) * np.exp(
        0.5 * rng.standard_normal(k)
    )
    return rng.standard_normal((n, k)).astype(np.float32), inputs.astype(np.float32)


def output_error(weight: np.ndarray, pruned: np.ndarray, inputs: np.ndarray) -> float:
    return float((((weight - pruned) @ inputs.T).astype(np.float64) ** 2).sum())


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("wanda", "a sparsity is"),
        ("wanda-", "a sparsity is"),
        ("movement-50%", "a sparsity is"),
        ("wanda-100%", "a sparsity is"),
        ("wanda-0%", "takes weights away"),
        ("wanda-4:4", "not all"),
        ("wanda-0:4", "at least one"),
    ],
)
def test_names_that_are_none(name: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        parse_sparsity(name)


def test_names() -> None:
    two = parse_sparsity("sparsegpt-2:4")
    assert (two.method, two.fraction, two.kept, two.of) == ("sparsegpt", 0.5, 2, 4)
    assert parse_sparsity("wanda-62.5%").fraction == 0.625
    assert [parse_sparsity(f"{m}-50%").needs_calibration for m in METHODS] == [False, True, True]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n", "k"), [(1, 8), (5, 24), (16, 200)])
def test_the_pattern_holds(name: str, n: int, k: int) -> None:
    sparsity = parse_sparsity(name)
    weight, inputs = random_problem(n, k)
    moments = inputs.T @ inputs / len(inputs)
    pruned = prune_weight(weight, Statistics.of_moments(moments, sparsity, "x"), sparsity)
    assert pruned.dtype == np.float32
    if sparsity.of:
        groups = (pruned.reshape(-1, sparsity.of) != 0).sum(axis=1)
        np.testing.assert_array_equal(groups, sparsity.kept)
    elif sparsity.method == "wanda":
        np.testing.assert_array_equal((pruned == 0).sum(axis=1), k // 2)
    else:
        assert (pruned == 0).sum() == n * k // 2
    kept = pruned != 0
    if sparsity.method != "sparsegpt":
        np.testing.assert_array_equal(pruned[kept], weight[kept])


def test_magnitude_and_wanda_by_hand() -> None:
    weight = np.array([[4, -3, 2, 1], [0.5, 5, -6, 0.1]], dtype=np.float32)
    half, two = parse_sparsity("magnitude-50%"), parse_sparsity("magnitude-2:4")
    np.testing.assert_array_equal(magnitude(weight, half), [[1, 1, 0, 0], [0, 1, 1, 0]])
    np.testing.assert_array_equal(magnitude(weight, two), [[1, 1, 0, 0], [0, 1, 1, 0]])
    energy = np.array([0.01, 0.01, 1, 100], dtype=np.float32)  # the last input is loud
    np.testing.assert_array_equal(wanda(weight, energy, half), [[0, 0, 1, 1], [0, 0, 1, 1]])


@pytest.mark.parametrize("name", ["sparsegpt-50%", "sparsegpt-2:4"])
def test_sparsegpt_is_optimal_given_its_choices(name: str) -> None:
    """With one block and the pattern fixed, no other values of the weights that stay could do better by more
    than damping explains: the least-squares optimum of each row bounds it from below, and it beats leaving
    them as they were."""
    sparsity = parse_sparsity(name)
    weight, inputs = random_problem(6, 32)
    moments = inputs.T @ inputs / len(inputs)
    pruned = sparsegpt(weight, factorise(moments, damping=1e-4, order=False), sparsity)
    masked = np.where(pruned != 0, weight, 0)
    best = np.zeros_like(pruned)
    for row, kept in enumerate(pruned != 0):
        target = inputs @ weight[row]
        best[row, kept] = np.linalg.lstsq(inputs[:, kept], target, rcond=None)[0]
    ours, left, least = (output_error(weight, p, inputs) for p in (pruned, masked, best))
    assert least <= ours * (1 + 1e-4)
    assert ours < 0.8 * left


def test_sparsegpt_takes_one_column_by_the_formula() -> None:
    """One weight of four goes: the best one, and the rest changes as the closed form says."""
    weight, inputs = random_problem(3, 4, seed=3)
    moments = (inputs.T @ inputs / len(inputs)).astype(np.float64)
    factor = factorise(moments.astype(np.float32), damping=0.0, order=False)
    pruned = sparsegpt(weight, factor, parse_sparsity("sparsegpt-3:4"))
    upper = np.linalg.cholesky(np.linalg.inv(moments)).T  # inverse(H) = U^T U, upper triangular
    for row in range(3):
        j = int(np.argmin(weight[row] ** 2 / np.diag(upper) ** 2))
        expected = weight[row].astype(np.float64) - weight[row, j] / upper[j, j] * upper[j]
        expected[j] = 0
        np.testing.assert_allclose(pruned[row], expected, rtol=1e-4, atol=1e-5)


def test_methods_are_ordered_on_correlated_inputs() -> None:
    weight, inputs = random_problem(40, 96, tokens=800)
    moments = inputs.T @ inputs / len(inputs)
    errors = {}
    for name in NAMES:
        sparsity = parse_sparsity(name)
        pruned = prune_weight(weight, Statistics.of_moments(moments, sparsity, "x"), sparsity)
        errors[name] = output_error(weight, pruned, inputs)
    for how in ("50%", "2:4", "4:8"):
        assert errors[f"sparsegpt-{how}"] < errors[f"wanda-{how}"] < errors[f"magnitude-{how}"]
    assert errors["wanda-50%"] < errors["wanda-4:8"] < errors["wanda-2:4"]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 1000))
def test_constant_and_zero_weights_are_pruned_like_others(n: int, fours: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.integers(-1, 2, (n, 4 * fours)).astype(np.float32)  # many ties and zeros
    pruned = np.where(magnitude(weight, parse_sparsity("magnitude-2:4")), weight, 0)
    assert ((pruned.reshape(-1, 4) != 0).sum(axis=1) <= 2).all()
    kept = wanda(weight, np.ones(4 * fours, np.float32), parse_sparsity("wanda-50%"))
    np.testing.assert_array_equal(kept.sum(axis=1), 2 * fours)


@pytest.mark.parametrize("name", ["magnitude-50%", "wanda-2:4", "sparsegpt-50%"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_whole_model(name: str, family: str) -> None:
    spec = tiny_spec(family)
    source = tiny_source(spec)
    seen: list[tuple[str, int, int]] = []
    pruned = prune(source, parse_sparsity(name), documents(), lambda *args: seen.append(args))
    linears = [n for n, shape in weight_names(spec).items() if len(shape) == 2 and ".layers." in n]
    assert sorted(pruned.tensors) == sorted(linears)
    for linear in linears:
        assert (pruned.array(linear) == 0).mean() == 0.5
        assert pruned.native(linear) is None
    assert {report.name for report in pruned.reports} == set(linears)
    assert seen[0][1:] == (0, 8)
    assert seen[-1][1:] == (8, 8)
    np.testing.assert_array_equal(
        pruned.array("model.embed_tokens.weight"), source.array("model.embed_tokens.weight")
    )
    logits = Llama(pruned).forward(documents()[0])
    assert bool(torch.isfinite(logits).all())


def test_later_layers_see_what_earlier_ones_became() -> None:
    """The second layer's statistics are those of the pruned first layer, not of the original."""
    spec = tiny_spec()
    source, sparsity = tiny_source(spec), parse_sparsity("wanda-2:4")
    text = documents()
    pruned = prune(source, sparsity, text)
    halfway = {n: w for n, w in pruned.tensors.items() if ".layers.0." in n}
    again = prune(TinySource(spec, {**source.tensors, **halfway}), sparsity, text)
    name = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(again.array(name), pruned.array(name))
    alone = prune(source, sparsity, [np.asarray(text[0]), np.asarray(text[1]), np.asarray(text[2][:8])])
    assert not np.array_equal(alone.array(name), pruned.array(name))


def test_bad_calibration_is_refused_before_any_work() -> None:
    source, sparsity = tiny_source(tiny_spec()), parse_sparsity("wanda-50%")
    for text in ([], [np.arange(5)], [np.zeros(0, np.int64)]):
        with pytest.raises(ConfigError, match="calibration needs at least 128 tokens"):
            prune(source, sparsity, text)
    with pytest.raises(ConfigError, match=r"token ids are 0\.\.319"):
        prune(source, sparsity, [np.full(200, 320)])


def test_text_of_another_tokenizer_is_refused() -> None:
    """A model that is sure of one token, and text that holds others."""
    spec = tiny_spec()
    source = tiny_source(spec)
    head = source.tensors["lm_head.weight"] * 40
    with pytest.raises(EvidenceError, match="better than random tokens"):
        prune(
            TinySource(spec, {**source.tensors, "lm_head.weight": head}),
            parse_sparsity("wanda-50%"),
            documents(),
        )


def test_a_pattern_that_does_not_divide_is_named_before_any_work() -> None:
    spec = tiny_spec(intermediate_size=130)
    with pytest.raises(ConfigError, match=r"2:4 needs rows of a multiple of 4 weights.*down of width 130"):
        prune(tiny_source(spec), parse_sparsity("magnitude-2:4"))


@pytest.mark.parametrize("name", ["magnitude-50%", "wanda-50%", "sparsegpt-50%"])
def test_weights_that_are_not_finite_are_named(name: str) -> None:
    spec = tiny_spec()
    source = tiny_source(spec)
    bad = source.tensors["model.layers.1.mlp.up_proj.weight"].copy()
    bad[3, 5] = np.nan
    broken = TinySource(spec, {**source.tensors, "model.layers.1.mlp.up_proj.weight": bad})
    with pytest.raises(ConfigError, match="up_proj"):
        prune(broken, parse_sparsity(name), documents())


def test_activations_that_overflow_are_named() -> None:
    spec = tiny_spec()
    source = tiny_source(spec)
    changed = {**source.tensors, "model.layers.1.mlp.up_proj.weight": np.full((128, 64), 1e38, np.float32)}
    layers = pruned_layers(TinySource(spec, changed), parse_sparsity("wanda-50%"), documents())
    with pytest.raises(ConfigError, match=r"activations must be finite.*layers\.1\.down"):
        list(layers)


def test_a_weight_of_which_nothing_is_left_is_named() -> None:
    spec = tiny_spec()
    source = tiny_source(spec)
    name = "model.layers.0.self_attn.o_proj.weight"
    lonely = np.zeros_like(source.tensors[name])
    lonely[0, 0] = 1e-3
    changed = TinySource(spec, {**source.tensors, name: lonely})
    pruned = prune(changed, parse_sparsity("magnitude-50%"))  # keeps the one that is there
    assert pruned.array(name)[0, 0] == np.float32(1e-3)
    with pytest.raises(EvidenceError, match=r"must keep something.*layers\.0\.self_attn\.q_proj"):
        list(pruned_layers(changed, parse_sparsity("magnitude-50%"), stored=np.zeros_like))


def checkpoint(folder: Path, **changes: object) -> Path:
    return tiny_checkpoint_folder(folder, tiny_spec("llama", **changes))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_folder_loads_and_holds_the_same_weights(tmp_path: Path, packed: bool, tied: bool) -> None:
    source = open_checkpoint(checkpoint(tmp_path / "m", tie_embeddings=tied))
    sparsity = parse_sparsity("wanda-2:4")
    reports = prune_folder(source, "wanda-2:4", sparsity, documents(), tmp_path / "out", packed=packed)
    assert len(reports) == 14
    again = open_checkpoint(tmp_path / "out")
    assert replace(again.spec) == source.spec
    rounded = {n: from_bfloat16(to_bfloat16(source.array(n))) for n in source.names}
    for name in source.names:
        weight = again.array(name)
        kept = weight != 0
        if ".layers." in name and weight.ndim == 2:
            assert ((weight.reshape(-1, 4) != 0).sum(axis=1) == 2).all()
        np.testing.assert_array_equal(weight[kept], rounded[name][kept])
    names = open_safetensors(tmp_path / "out" / "model-00001-of-00003.safetensors").names
    assert ("model.layers.0.mlp.up_proj.bitmask" in names) == packed
    assert ("model.layers.0.mlp.up_proj.weight" in names) != packed
    bytes_of = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    if packed:
        prune_folder(source, "wanda-2:4", sparsity, documents(), tmp_path / "dense")
        dense = sum(path.stat().st_size for path in (tmp_path / "dense").glob("*.safetensors"))
        assert bytes_of < dense


def test_transformers_loads_the_dense_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = open_checkpoint(checkpoint(tmp_path / "m"))
    prune_folder(source, "sparsegpt-50%", parse_sparsity("sparsegpt-50%"), documents(), tmp_path / "out")
    tokens = documents()[0]
    ours = Llama(open_checkpoint(tmp_path / "out")).forward(tokens)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = other(torch.from_numpy(tokens)[None]).logits[0]
    # Both compute in float32 from the same bf16 weights; sums are taken in another order.
    assert float((ours - theirs).abs().max()) < 1e-4 * float(ours.abs().max())


@pytest.mark.parametrize("method", ["wanda-50%", "sparsegpt-2:4"])
def test_a_killed_run_goes_on_and_ends_the_same(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(checkpoint(tmp_path / "m", num_layers=3))
    sparsity = parse_sparsity(method)
    prune_folder(source, method, sparsity, documents(), tmp_path / "whole")

    class Killed(BaseException):
        pass

    def dies(what: str, done: int, total: int) -> None:
        if what.startswith("pruning layers.1.gate_up"):
            raise Killed

    with pytest.raises(Killed):
        prune_folder(source, method, sparsity, documents(), tmp_path / "out", progress=dies)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model-00001-of-00004.safetensors"]
    pruned: list[str] = []
    real = prune_folder_module._write_layer

    def watched(path: Path, layer: object, key: str, packed: bool) -> None:
        pruned.append(path.name)
        real(path, layer, key, packed)  # type: ignore[arg-type]

    monkeypatch.setattr(prune_folder_module, "_write_layer", watched)
    prune_folder(source, method, sparsity, documents(), tmp_path / "out")
    assert pruned == ["model-00002-of-00004.safetensors", "model-00003-of-00004.safetensors"]
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_damaged_layer_is_pruned_again(tmp_path: Path) -> None:
    source = open_checkpoint(checkpoint(tmp_path / "m", num_layers=3))
    sparsity, out = parse_sparsity("magnitude-2:4"), tmp_path / "out"
    prune_folder(source, "magnitude-2:4", sparsity, [], tmp_path / "whole")
    prune_folder(source, "magnitude-2:4", sparsity, [], out)
    second = out / "model-00002-of-00004.safetensors"
    second.write_bytes(second.read_bytes()[:-7])
    for name in ("config.json", "model.safetensors.index.json"):
        (out / name).unlink()
    prune_folder(source, "magnitude-2:4", sparsity, [], out)
    assert second.read_bytes() == (tmp_path / "whole" / second.name).read_bytes()


def test_folders_that_are_not_its_own_are_refused(tmp_path: Path) -> None:
    source = open_checkpoint(checkpoint(tmp_path / "m"))
    sparsity = parse_sparsity("magnitude-50%")
    with pytest.raises(ConfigError, match="a new folder, or an unfinished one"):
        prune_folder(source, "magnitude-50%", sparsity, [], tmp_path / "m")
    with pytest.raises(ConfigError, match="packed files hold two of four"):
        prune_folder(source, "magnitude-50%", sparsity, [], tmp_path / "o", packed=True)
    prune_folder(source, "magnitude-50%", sparsity, [], tmp_path / "o")
    (tmp_path / "o" / "config.json").unlink()
    (tmp_path / "o" / "model.safetensors.index.json").unlink()
    with pytest.raises(ConfigError, match="of the same pruning"):
        prune_folder(source, "magnitude-2:4", parse_sparsity("magnitude-2:4"), [], tmp_path / "o")
