"""Expected losses against plain autograd, and against what rounding really does to predictions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from tests.tiny import tiny_source, tiny_spec

from flatout.compress.library import Library
from flatout.core.formats import parse_format
from flatout.core.fuse import float_weight
from flatout.core.spec import ModelSpec
from flatout.models.llama import rms_norm
from flatout.search.divergences import divergences, rounded_inputs
from flatout.search.expected import _nearest_bits, expected_losses
from flatout.search.sensitivity import sensitivities

SPEC = tiny_spec("llama")
KINDS = ("qkv", "o", "gate_up", "down")


def documents(spec: ModelSpec, count: int, tokens: int) -> list[list[int]]:
    return [np.random.default_rng(i).integers(0, spec.vocab_size, tokens).tolist() for i in range(count)]


def choices(spec: ModelSpec, *formats: str) -> dict[str, tuple[str, ...]]:
    layers = {f"layers.{i}.{kind}": formats for i in range(spec.num_layers) for kind in KINDS}
    return {**layers, "head": ("w8a16", "w8a8-g32"), "kv_cache": ("int8", "bf16")}


@pytest.fixture(scope="module")
def library() -> Library:
    return Library(tiny_source(SPEC), documents(SPEC, 4, 64))


def test_the_head_by_autograd(library: Library) -> None:
    """One document, the head's weights: F is the squared gradient of the drawn tokens' likelihood, taken here
    by PyTorch from the logits."""
    text = documents(SPEC, 1, 24)
    weights, _, _ = sensitivities(library, text, choices(SPEC, "w8a16"))
    from flatout.models.llama import Llama

    hidden = Llama(library.source).hidden(text[0])
    weight = torch.from_numpy(float_weight(library.source, "head")).requires_grad_()
    logits = hidden @ weight.T
    drawn = torch.multinomial(
        torch.softmax(logits.detach(), dim=1), 1, generator=torch.Generator().manual_seed(0)
    )
    (-torch.log_softmax(logits, dim=1).gather(1, drawn).sum()).backward()
    assert weight.grad is not None
    steps = weight.detach().abs().amax(dim=1, keepdim=True) / 127
    expected = 0.5 * float((weight.grad.square() * steps.square() / 12).sum()) / 24
    assert weights["head", "w8a16"] == pytest.approx(expected, rel=2e-3)  # scales are stored as float16


def summed(losses: Mapping[tuple[str, str], float], kind: str, name: str) -> float:
    return sum(loss for (place, f), loss in losses.items() if place.endswith(kind) and f == name)


def test_expected_losses_are_near_measured_ones(library: Library) -> None:
    """Second order, other text, one draw a token: within a factor of 1.6 for every kind and format, and
    within 15 % on average."""
    formats = ("w8a8-g32", "w8a16", "w4a8-g32")
    weights, activations, _ = sensitivities(library, documents(SPEC, 24, 48), choices(SPEC, *formats))
    kinds = [(kind, name) for kind in KINDS for name in formats] + [
        ("head", "w8a8-g32"),
        ("kv_cache", "int8"),
    ]
    probes = [text[8:] for text in documents(SPEC, 8, 72)]
    measured = divergences(library, probes, kinds)
    logs = []
    for kind, name in kinds:
        total = summed(weights, kind, name) + summed(activations, kind, name)
        if kind in ("head", "kv_cache"):
            total *= 0.5 if kind == "head" else 1.0  # the embedding is in it too
            assert 0.4 < measured[kind, name] / total < 2.5
            continue
        logs.append(np.log(measured[kind, name] / total))
    assert np.abs(logs).max() < np.log(1.6), dict(zip(kinds, np.exp(logs).round(2), strict=False))
    assert abs(np.mean(logs)) < 0.15


def test_finer_formats_lose_less(library: Library) -> None:
    text = documents(SPEC, 6, 48)
    spread, nearest = expected_losses(library, text, choices(SPEC, "w8a8-g32", "w8a16", "w4a8-g32", "bf16"))
    for i in range(SPEC.num_layers):
        for kind in KINDS:
            place = f"layers.{i}.{kind}"
            assert nearest[place, "w4a8-g32"] > 20 * nearest[place, "w8a8-g32"]
            assert nearest[place, "w8a8-g32"] > nearest[place, "bf16"]
    assert summed(spread, "", "w4a8-g32") < summed(nearest, "", "w4a8-g32")
    assert spread["kv_cache", "int8"] == nearest["kv_cache", "int8"] > spread["kv_cache", "bf16"] > 0


@pytest.mark.parametrize("name", ["w5a16", "w5a8", "w4a8-g32"])
def test_what_gptq_leaves_is_what_was_measured(library: Library, name: str) -> None:
    """In the layers whose turn the format has: each as far off as 0.25 to 4 times, or else at that."""
    text = documents(SPEC, 6, 48)
    spread, _ = expected_losses(library, text, choices(SPEC, "w8a16", name))
    measured = divergences(library, text[-4:], [(kind, name) for kind in KINDS], by_gptq=True)
    turn = {"w5a16": 0, "w5a8": 1, "w4a8-g32": 0}[name]
    for kind in KINDS:
        expected = sum(spread[f"layers.{i}.{kind}", name] for i in range(turn, SPEC.num_layers, 2))
        assert expected == pytest.approx(measured[kind, name], rel=0.01)


def test_formats_that_are_not_measured_take_the_nearest_bits() -> None:
    ratios = {("down", "w6a16"): 1.1, ("down", "w5a16"): 2.0, ("down", "w5a8"): 3.0, ("o", "w4a8-g32"): 4.0}
    expected = {"w8a16": 1.1, "w6a16": 1.1, "w5a16": 2.0, "w4a8-g32": 2.0, "w6a8": 3.0}
    for name, ratio in expected.items():
        assert _nearest_bits(ratios, "layers.7.down", parse_format(name)) == ratio
    assert _nearest_bits(ratios, "layers.7.o", parse_format("w8a8")) == 1.0


def test_blocks_of_the_file_lose_nothing_by_their_weights() -> None:
    source = tiny_source(SPEC, layers="q4_1", head="q8_0")
    library = Library(source, documents(SPEC, 2, 48))
    asked = choices(SPEC, "q4_1", "w8a8-g32") | {"head": ("q8_0",)}
    weights, activations, _ = sensitivities(library, documents(SPEC, 2, 32), asked)
    assert all(weights[place, "q4_1"] == 0 for place in asked if place.startswith("layers"))
    assert all(activations[place, "q4_1"] > 0 for place in asked if place.startswith("layers"))
    assert weights["layers.0.o", "w8a8-g32"] > 0
    assert weights["head", "q8_0"] == 0


def test_what_a_linear_receives() -> None:
    x = rms_norm(torch.randn(5, 64, generator=torch.Generator().manual_seed(1)), torch.ones(64), 1e-6)
    errors = {}
    for name in ("fp32", "bf16", "w8a8", "w8a8-g32", "w8a16"):
        rounded = rounded_inputs(x, parse_format(name))
        errors[name] = float((rounded - x).abs().max())
        step = float(x.abs().max()) / {"w8a16": 127 * 128}.get(name, 127)
        assert errors[name] <= step / 2 * 1.01
    assert errors["fp32"] == 0 < errors["w8a16"] < errors["bf16"] < errors["w8a8"]
    assert errors["w8a8-g32"] <= errors["w8a8"]
