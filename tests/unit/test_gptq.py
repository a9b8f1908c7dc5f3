"""compress/gptq.py against the method's definition, transformers' activations and round-to-nearest."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import tiny_checkpoint_folder, tiny_model, tiny_source, tiny_spec

from flatout.compress import inputs as calibration
from flatout.compress.apply import compress
from flatout.compress.gptq import (
    _inverse_upper,
    gptq,
    gptq_layers,
    search_on_device,
    triangle_of,
    upper_of,
)
from flatout.compress.method import data_of
from flatout.compress.rtn import group_rows, round_to_nearest, search_grid
from flatout.core.formats import Format, Recipe, parse_format, uniform
from flatout.errors import ConfigError
from flatout.models.llama import Llama


def problem(n: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A random weight and the second moments of correlated inputs."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((k, k)) * np.exp(rng.standard_normal(k))
    x = rng.standard_normal((4 * k, k // 2)) @ mixing[: k // 2] + 0.1 * rng.standard_normal((4 * k, k))
    return rng.standard_normal((n, k)).astype(np.float32), (x.T @ x / len(x)).astype(np.float32)


def loss(weight: np.ndarray, rounded: np.ndarray, hessian: np.ndarray) -> float:
    error = (weight - rounded).astype(np.float64)
    return float(np.einsum("nk,kj,nj->", error, hessian.astype(np.float64), error))


def by_definition(weight: np.ndarray, hessian: np.ndarray, name: str, damping: float) -> np.ndarray:
    """Optimal brain quantisation in a given order, straight from its formulas: after each column the
    inverse Hessian of the remaining ones is computed afresh."""
    fmt = parse_format(name)
    h = hessian.astype(np.float64) + np.eye(len(hessian)) * damping * np.diag(hessian).mean()
    importance = np.diag(h).astype(np.float32)
    grouped = group_rows(weight, fmt)
    grid = search_grid(grouped, fmt, importance.reshape(grouped.shape[1:]))
    w = weight.astype(np.float64)
    order = list(np.argsort(-np.diag(hessian), kind="stable"))
    result = np.empty_like(w)
    while order:
        j = order[0]
        inverse = np.linalg.inv(h[np.ix_(order, order)])
        scale, zero = grid.scales[:, j // fmt.group], grid.zeros[:, j // fmt.group]
        code = np.clip(np.rint(w[:, j] / scale) + zero, grid.low, grid.high)
        result[:, j] = scale * (code - zero)
        w[:, order] -= np.outer((w[:, j] - result[:, j]) / inverse[0, 0], inverse[0])
        order = order[1:]
    return result


@pytest.mark.parametrize("name", ["w4a8-g32", "w4a16-g32-asym", "w8a8-g32", "w5a8-g32", "w6a8-g64"])
@pytest.mark.parametrize("seed", [0, 1])
def test_follows_the_definition(name: str, seed: int) -> None:
    weight, hessian = problem(5, 64, seed)
    ours = gptq(weight, hessian, parse_format(name), damping=0.01).dequantize()
    expected = by_definition(weight, hessian, name, 0.01)
    # One early tie broken the other way changes what follows, so a few codes may differ.
    assert np.mean(ours != expected) < 0.02
    assert loss(weight, ours, hessian) == pytest.approx(loss(weight, expected, hessian), rel=0.02)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["w4a8-g32", "w4a8-g64-asym", "w8a8"]), st.booleans())
def test_independent_inputs_leave_nothing_to_spread(seed: int, name: str, order: bool) -> None:
    weight = np.random.default_rng(seed).standard_normal((4, 192)).astype(np.float32)
    fmt = parse_format(name)
    ours = gptq(weight, np.eye(192, dtype=np.float32), fmt, order=order)
    expected = round_to_nearest(weight, fmt, search_clip=True)
    np.testing.assert_array_equal(ours.codes, expected.codes)
    np.testing.assert_array_equal(ours.scales, expected.scales)


@pytest.mark.parametrize("name", ["w4a8-g32", "w4a16-g64-asym", "w8a8"])
def test_smaller_error_than_rounding(name: str) -> None:
    weight, hessian = problem(32, 256, 3)  # two blocks of columns
    fmt = parse_format(name)
    nearest = loss(weight, round_to_nearest(weight, fmt, search_clip=True).dequantize(), hessian)
    assert loss(weight, gptq(weight, hessian, fmt).dequantize(), hessian) < 0.5 * nearest


def test_inputs_that_never_fire() -> None:
    weight, hessian = problem(4, 64, 0)
    hessian[:, 10] = hessian[10, :] = 0
    assert np.isfinite(gptq(weight, hessian, parse_format("w4a8-g32")).dequantize()).all()
    silent = gptq(weight, np.zeros((64, 64), np.float32), parse_format("w4a8-g32"))
    assert np.isfinite(silent.dequantize()).all()


def test_bad_hessian() -> None:
    weight, hessian = problem(4, 64, 0)
    with pytest.raises(ConfigError, match=r"the Hessian is finite and \(64, 64\)"):
        gptq(weight, hessian[:32], parse_format("w4a8-g32"))
    with pytest.raises(ConfigError, match="the Hessian is finite"):
        gptq(weight, hessian * np.nan, parse_format("w4a8-g32"))
    with pytest.raises(ConfigError, match="positive definite"):
        gptq(weight, -hessian, parse_format("w4a8-g32"))


def test_hessians_are_those_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Second moments of what each linear receives in transformers' own forward pass over separate documents,
    for o and down of inputs divided by the size of the layer's. Rounding is left out, so that later layers
    receive the same."""
    from transformers import AutoModelForCausalLM

    spec = tiny_spec("qwen3")
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint_folder(tmp_path / "m", spec), dtype=torch.float32
    )
    documents = [np.random.default_rng(i).integers(0, spec.vocab_size, 17 + i) for i in range(3)]
    seen: dict[str, list[torch.Tensor]] = {}
    states: dict[int, list[torch.Tensor]] = {}
    for i, layer in enumerate(theirs.model.layers):
        before = states.setdefault(i, [])
        layer.register_forward_pre_hook(lambda _, x, before=before: before.append(x[0][0]))
        modules = (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.up_proj, layer.mlp.down_proj)
        for name, module in zip(spec.linears(), modules, strict=True):
            inputs = seen.setdefault(f"layers.{i}.{name}", [])
            module.register_forward_pre_hook(lambda _, x, inputs=inputs: inputs.append(x[0][0]))
    with torch.no_grad():
        for document in documents:
            theirs(torch.from_numpy(document)[None])
    hessians = []

    def unrounded(
        weight: torch.Tensor, hessian: torch.Tensor, fmt: Format, factor: object = None
    ) -> torch.Tensor:
        hessians.append(hessian.numpy())
        return weight

    monkeypatch.setattr("flatout.compress.gptq.gptq", unrounded)
    steps: list[int] = []
    monkeypatch.setattr("flatout.compress.layers.dequantized", lambda weight, device: weight)
    monkeypatch.setattr("flatout.compress.layers.fast_products", nullcontext)
    data = data_of(documents, lambda _, done, total: steps.append(done))
    gptq_layers(tiny_source(spec), data, uniform("w8a8"))
    assert steps == list(range(8))
    for (name, inputs), ours in zip(seen.items(), hessians, strict=True):
        x = torch.cat(inputs).numpy()
        if name.endswith((".o", ".down")):
            size = torch.cat(states[int(name.split(".")[1])]).square().mean(dim=1, keepdim=True).sqrt()
            x = x / size.numpy()
        np.testing.assert_allclose(
            ours, x.T @ x / len(x), rtol=1e-3, atol=1e-3 * np.abs(ours).max(), err_msg=name
        )


def test_whole_model_is_closer_than_rounding() -> None:
    spec = tiny_spec("llama", num_layers=3)
    source = tiny_source(spec)
    documents = [np.random.default_rng(i).integers(0, spec.vocab_size, 96).tolist() for i in range(12)]
    tokens = np.random.default_rng(99).integers(0, spec.vocab_size, 96)
    exact = Llama(source).forward(tokens)
    recipe = Recipe(
        name="r", layers="w4a16-g64", overrides=(("layers.1.o", "bf16"), ("layers.2.down", "w8a8"))
    )
    steps: list[tuple[str, int, int]] = []
    errors = {}
    for method in ("rtn", "gptq"):
        chosen = Recipe(name=method, layers=recipe.layers, method=method, overrides=recipe.overrides)
        model = compress(source, chosen, documents, lambda *step: steps.append(step))
        errors[method] = float((Llama(model).forward(tokens) - exact).norm())
    assert errors["gptq"] < 0.9 * errors["rtn"]
    assert all(done <= total for _, done, total in steps)
    assert steps[-1][0] == "rounded"


def test_gptq_is_repeatable() -> None:
    spec = tiny_spec("llama")
    documents = [list(range(50)), list(range(40, 90))]
    a, b = (compress(tiny_source(spec), uniform("w4a8-g32", method="gptq"), documents) for _ in range(2))
    for name, weight in a.weights.items():
        other = b.weights[name]
        np.testing.assert_array_equal(getattr(weight, "codes", weight), getattr(other, "codes", other))


def test_gptq_needs_text() -> None:
    with pytest.raises(ConfigError, match="method gptq needs calibration text"):
        tiny_model(tiny_spec(), uniform("w4a8-g32", method="gptq"))


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.integers(1, 40))
def test_a_triangle_is_half_of_the_square(k: int) -> None:
    square = np.triu(np.random.default_rng(k).standard_normal((k, k)))
    triangle = triangle_of(square)
    assert triangle.shape == (k * (k + 1) // 2,)
    assert np.array_equal(upper_of(triangle, k), square)


@pytest.mark.parametrize("name", ["w3a16-g64-asym", "w4a16-g32", "w8a16"])
def test_the_search_of_a_device_finds_the_processors_grid(name: str) -> None:
    fmt, rng = parse_format(name), np.random.default_rng(5)
    weight, importance = rng.standard_normal((40, 192), np.float32), rng.random(192, np.float32)
    grouped = group_rows(weight, fmt)
    grid = search_grid(grouped, fmt, importance.reshape(grouped.shape[1:]))
    found = search_on_device(torch.from_numpy(weight), fmt, torch.from_numpy(importance))
    np.testing.assert_array_equal(found.scales, grid.scales)
    np.testing.assert_array_equal(found.zeros, grid.zeros)
    assert (found.low, found.high) == (grid.low, grid.high)


@pytest.mark.parametrize("k", [1, 64, 300, 513])
def test_an_inverse_by_halves_is_the_inverse(k: int) -> None:
    draw = torch.Generator().manual_seed(k)
    upper = torch.randn(k, k, generator=draw, dtype=torch.float64).triu(1) / k + torch.eye(k)
    found = _inverse_upper(upper)
    torch.testing.assert_close(found @ upper, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)
    assert not found.tril(-1).any()


@pytest.mark.parametrize("k", [1, 65, 320])
def test_second_moments_by_blocks_are_those_of_the_whole(k: int) -> None:
    x = torch.randn(50, k, generator=torch.Generator().manual_seed(k))
    found = calibration.gram(x)
    torch.testing.assert_close(found, x.T @ x, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.T)


def test_products_are_narrow_only_where_calibration_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_multiplies_by_hand", lambda: True)
    a, b = torch.full((1, 1), 1 + 2.0**-12), torch.ones(1, 1)
    with calibration.fast_products(), calibration.kept_memory():
        assert calibration.product(a, b).item() == 1.0
        with calibration.exact_products():
            assert calibration.product(a, b).item() == 1 + 2.0**-12
    assert calibration.product(a, b).item() == 1 + 2.0**-12
