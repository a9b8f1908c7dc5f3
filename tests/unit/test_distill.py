"""Distillation and constraints: gradients against closed forms, and students that recover."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import native_blocks, tiny_source, tiny_spec
from torch import Tensor

from flatout.compress.apply import compress
from flatout.compress.rtn import round_to_nearest
from flatout.core.formats import Recipe, parse_format
from flatout.core.model import Model
from flatout.core.quantized import QuantizedTensor
from flatout.errors import ConfigError
from flatout.train.config import TrainConfig
from flatout.train.constraints import Constraint, Levels, Mask, inside, levels_of
from flatout.train.data import IGNORED, pack
from flatout.train.distill import Distillation, distillation, divergence
from flatout.train.trainable import make_trainable, source_weights, to_model
from flatout.train.trainer import mean_loss, train

SPEC = tiny_spec("llama", tie_embeddings=True)
CONFIG = TrainConfig(
    steps=40, rows=4, length=24, learning_rate=2e-3, weight_decay=0.0, precision="fp32", device="cpu"
)


def logits(rows: int, size: int, seed: int) -> Tensor:
    return 3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def merged(log_p: np.ndarray, likely: np.ndarray) -> np.ndarray:
    """Probabilities of the tokens `likely` and of all others together."""
    p = np.exp(log_p)
    return np.append(p[likely], p.sum() - p[likely].sum())


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(2, 33), temperature=st.floats(0.5, 4), top_k=st.integers(0, 40), seed=st.integers(0, 99)
)
def test_divergence_is_the_formula(size: int, temperature: float, top_k: int, seed: int) -> None:
    student, teacher = logits(3, size, seed), logits(3, size, seed + 1000)
    found = divergence(student, teacher, temperature, top_k)
    for row in range(3):
        s, t = (x[row].numpy() / temperature for x in (student, teacher))
        log_q, log_p = (x - np.log(np.exp(x).sum()) for x in (s, t))
        likely = np.argsort(-log_p)[: top_k or size]
        p, q = np.exp(log_p), np.exp(log_q)
        if top_k and top_k < size:
            p, q = merged(log_p, likely), merged(log_q, likely)
        expected = temperature**2 * float((p * np.log(p / q)).sum())
        # float32 logarithms of sums; where almost nothing is left for the others, of their rounding error
        assert float(found[row]) == pytest.approx(expected, rel=1e-3, abs=1e-4 * temperature**2)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradient_of_divergence_is_the_difference_of_probabilities(temperature: float) -> None:
    """d(T^2 KL) / d student = T (softmax(student / T) - softmax(teacher / T))."""
    student, teacher = logits(5, 17, 1).float().requires_grad_(), logits(5, 17, 2).float()
    divergence(student, teacher, temperature).sum().backward()
    soft = [torch.softmax(x.detach().double() / temperature, dim=-1) for x in (student, teacher)]
    assert student.grad is not None
    torch.testing.assert_close(student.grad.double(), temperature * (soft[0] - soft[1]), rtol=1e-4, atol=1e-6)


def test_gradient_of_top_k_is_that_of_the_merged_distribution() -> None:
    """All others share one gradient's worth: q_i (1 - (1 - P) / (1 - Q)); a likely token has q_i - p_i."""
    student, teacher = logits(1, 12, 3).float().requires_grad_(), logits(1, 12, 4).float()
    divergence(student, teacher, 1.0, top_k=4).sum().backward()
    q, p = (torch.softmax(x.detach().double()[0], dim=0) for x in (student, teacher))
    likely = torch.zeros(12, dtype=torch.bool)
    likely[p.topk(4).indices] = True
    others = q * (1 - p[~likely].sum() / q[~likely].sum())
    assert student.grad is not None
    torch.testing.assert_close(
        student.grad[0].double(), torch.where(likely, q - p, others), rtol=1e-3, atol=1e-6
    )


def texts(count: int = 8, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, SPEC.vocab_size, 40) for _ in range(count)]


def test_hidden_states_are_compared_layer_by_layer_over_what_is_predicted() -> None:
    teacher = make_trainable(SPEC, source_weights(tiny_source(SPEC)), frozen=True)
    spec = replace(SPEC, num_layers=1)
    student = make_trainable(spec, source_weights(tiny_source(spec, seed=1)))
    packed = pack(texts(), 24)
    batch = packed.take(np.arange(4))
    found = distillation(teacher, Distillation(logits=0.0, hidden=2.0, layers=(1,)))(student, batch)
    (theirs,), (mine,) = (model.hidden(batch, [layer])[1] for model, layer in ((teacher, 1), (student, 0)))
    h, g = (x.detach().double().numpy() for x in (theirs, mine))
    kept = batch.targets.flatten().numpy() != IGNORED
    assert 0 < kept.sum() < len(kept)
    errors = np.mean((h - g) ** 2, axis=1)[kept]
    expected = 2.0 * errors.sum() / np.mean(h[kept] ** 2)
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)
    same = distillation(teacher, Distillation(hidden=1.0, text=0.0, layers=(0, 1)))
    assert float(same(teacher, batch)) == pytest.approx(0.0, abs=1e-4)


def test_settings_of_a_distillation_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="not all zero"):
        Distillation(logits=0.0)
    with pytest.raises(ConfigError, match="the temperature is positive"):
        Distillation(temperature=0.0)
    teacher = make_trainable(SPEC, source_weights(tiny_source(SPEC)), frozen=True)
    with pytest.raises(ConfigError, match="layers name one of the teacher's 2"):
        distillation(teacher, Distillation(hidden=1.0, layers=(0, 2)))
    batch = pack(texts(), 24).take(np.arange(2))
    with pytest.raises(ConfigError, match="for each of the student's 2"):
        distillation(teacher, Distillation(hidden=1.0, layers=(1,)))(teacher, batch)


FORMATS = ["w4a8-g64", "w4a16-g32", "w4a8-g32-asym", "w8a8", "w8a16-g64-asym", "w8a8-g32"]


def rounded(name: str, n: int = 7, k: int = 192, seed: int = 0) -> tuple[Tensor, QuantizedTensor]:
    weight = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    weight[0, 0] = 9.0  # an outlier, which a searched range clips
    return torch.from_numpy(weight), round_to_nearest(weight, parse_format(name), search_clip=True)


@pytest.mark.parametrize("name", FORMATS)
def test_training_starts_at_the_rounded_model_and_delivers_what_it_trains(name: str) -> None:
    original, tensor = rounded(name)
    levels, start = levels_of(tensor), inside(original, tensor)
    assert torch.equal(levels(start), torch.from_numpy(tensor.dequantize()))
    packed = levels.pack(start)
    np.testing.assert_array_equal(packed.codes, tensor.codes)
    np.testing.assert_array_equal(packed.scales, tensor.scales)
    # Where the original lies in the range of its code it is the start.
    near = np.abs(original.numpy() - tensor.dequantize()) < 0.4 * tensor.scales.astype(np.float32).max()
    assert (start.numpy() == original.numpy())[near].mean() > 0.5
    rng = torch.Generator().manual_seed(0)
    moved = start + 0.05 * torch.randn(start.shape, generator=rng)
    with torch.no_grad():
        levels.stretch.add_(0.1 * torch.randn(levels.stretch.shape, generator=rng))
    assert torch.equal(levels(moved), torch.from_numpy(levels.pack(moved).dequantize()))


def test_gradients_of_levels_are_those_of_a_learned_step() -> None:
    """Esser et al., 2020: dw is 1 inside the range and 0 outside; dlog s is s (code - z), less w inside."""
    original, tensor = rounded("w4a8-g64")
    levels = levels_of(tensor)
    weight = (1.3 * original).requires_grad_()
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    levels(weight).backward(upstream)
    scale = np.repeat(tensor.scales.astype(np.float64), 64, axis=1)
    w = weight.detach().double().numpy()
    level = np.rint(w / scale) + 8
    within = (level >= 0) & (level <= 15)
    assert 0 < (~within).sum() < within.size / 2
    value = scale * (np.clip(level, 0, 15) - 8)
    assert weight.grad is not None
    np.testing.assert_allclose(weight.grad.numpy(), np.where(within, upstream, 0.0), rtol=1e-6)
    each = upstream.double().numpy() * (value - np.where(within, w, 0.0))
    assert levels.stretch.grad is not None
    np.testing.assert_allclose(
        levels.stretch.grad.numpy(), each.reshape(7, 3, 64).sum(axis=2), rtol=1e-4, atol=1e-4
    )


def test_blocks_of_a_file_are_no_levels_to_train() -> None:
    with pytest.raises(ConfigError, match="can be trained"):
        levels_of(native_blocks("q4_1", 4, 64, seed=0))


def quantised_student(method: str = "rtn") -> tuple[Recipe, Model, dict[str, Constraint], dict[str, Tensor]]:
    """A 4-bit model of the tiny source, and what to train of it."""
    source = tiny_source(SPEC)
    recipe = Recipe(name="w4", layers="w4a8-g64", method=method)
    model = compress(source, recipe, texts(4, seed=7))
    weights, constraints = source_weights(source), {}
    for name, tensor in model.weights.items():
        if isinstance(tensor, QuantizedTensor):
            constraints[name] = levels_of(tensor)
            weights[name] = inside(weights[name], tensor)
    return recipe, model, dict(constraints), weights


@pytest.mark.parametrize("rank", [0, 4], ids=["all weights", "low rank"])
def test_a_rounded_student_recovers_and_stays_on_its_levels(rank: int, tmp_path: Path) -> None:
    recipe, before, constraints, weights = quantised_student()
    teacher = make_trainable(SPEC, source_weights(tiny_source(SPEC)), frozen=True)
    student = make_trainable(SPEC, weights, constraints=constraints, rank=rank)
    objective = distillation(teacher, Distillation())
    packed = pack(texts(12), 24)
    started = to_model(student, recipe)
    for name, weight in before.weights.items():
        if isinstance(weight, QuantizedTensor):
            again = started.weights[name]
            assert isinstance(again, QuantizedTensor)
            np.testing.assert_array_equal(again.codes, weight.codes)
    lost = mean_loss(student, objective, packed)
    train(student, objective, packed, replace(CONFIG, learning_rate=4e-3 if rank else 2e-3), tmp_path)
    assert mean_loss(student, objective, packed) < 0.7 * lost
    delivered = to_model(student, recipe)
    name = "layers.1.down"
    stored = delivered.weights[name]
    assert isinstance(stored, QuantizedTensor)
    assert torch.equal(student.weight(name).detach(), torch.from_numpy(stored.dequantize()))
    assert (stored.codes != before.weights[name].codes).any()  # type: ignore[union-attr]
    if rank:
        np.testing.assert_array_equal(delivered.weights["norm"], before.weights["norm"])


def test_a_pruned_student_recovers_and_stays_pruned(tmp_path: Path) -> None:
    weights = source_weights(tiny_source(SPEC))
    keep = {}
    for name, weight in weights.items():
        if weight.ndim == 2 and name.startswith("layers."):
            fours = weight.abs().reshape(-1, 4)
            kept = torch.zeros_like(fours).scatter_(1, fours.topk(2, dim=1).indices, 1.0)
            keep[name] = Mask(kept.reshape(weight.shape))
    teacher = make_trainable(SPEC, weights, frozen=True)
    student = make_trainable(SPEC, weights, constraints=keep)
    objective = distillation(teacher, Distillation())
    packed = pack(texts(12), 24)
    lost = mean_loss(student, objective, packed)
    train(student, objective, packed, CONFIG, tmp_path)
    assert mean_loss(student, objective, packed) < 0.7 * lost
    for name, mask in keep.items():
        assert bool((student.weight(name).detach()[mask.keep == 0] == 0).all())
        assert bool((student.weight(name).detach()[mask.keep == 1] != 0).all())


def test_integers_need_levels() -> None:
    student = make_trainable(SPEC, source_weights(tiny_source(SPEC)))
    with pytest.raises(ConfigError, match="needs weights trained on its levels"):
        to_model(student, Recipe(name="w4", layers="w4a8-g64"))
    assert isinstance(levels_of(rounded("w4a8-g64")[1]), Levels)
