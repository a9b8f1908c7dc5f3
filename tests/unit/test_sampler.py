"""Sampling against its definition written out slowly, against the distribution it must have, and against bad
logits."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatout.engine.sampler import log_probabilities, sample, sample_row, uniform
from flatout.errors import BackendError


def slow_row(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, seed: int, position: int
) -> int:
    """The definition in the contract, one candidate at a time."""
    if temperature <= 0:
        return max(range(len(logits)), key=lambda i: (logits[i], -i))
    scaled = [np.float32(x) / np.float32(temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-scaled[i], i))
    if 0 < top_k < len(order):
        order = order[:top_k]
    cumulative, total = [], 0.0
    for i in order:
        total += np.exp(np.float64(scaled[i]) - np.float64(scaled[order[0]]))
        cumulative.append(total)
    kept = next((n for n, c in enumerate(cumulative, 1) if c / total >= float(np.float32(top_p))), len(order))
    threshold = uniform(seed, position) * cumulative[kept - 1]
    return next(i for i, c in zip(order, cumulative, strict=True) if c > threshold)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    values=st.lists(st.integers(-6, 6).map(lambda v: v / 2), min_size=1, max_size=12),
    temperature=st.sampled_from([0.0, 0.01, 0.3, 1.0, 7.0, 100.0]),
    top_k=st.integers(0, 13),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 10_000),
)
def test_row_equals_the_definition(
    values: list[float], temperature: float, top_k: int, top_p: float, seed: int, position: int
) -> None:
    logits = np.array(values, dtype=np.float32)
    chosen = sample_row(logits, temperature, top_k, top_p, seed, position)
    assert chosen == slow_row(logits, temperature, top_k, top_p, seed, position)


def test_uniform_is_the_published_splitmix64() -> None:
    # First outputs of splitmix64 seeded with 1234567 (Vigna's reference implementation), as 53-bit fractions.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [uniform(1234567, i) for i in range(3)] == [(x >> 11) * 2.0**-53 for x in expected]
    assert 0 <= uniform(2**64 - 1, 2**31) < 1


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    assert sample_row(np.array([1, 3, 3, 2], dtype=np.float32), 0.0, 0, 1.0, 0, 0) == 1


def test_top_k_of_one_and_tiny_top_p_are_greedy() -> None:
    logits = np.array([0.0, 2.0, 1.0, 2.0], dtype=np.float32)
    for seed in range(20):
        assert sample_row(logits, 1.0, 1, 1.0, seed, 3) == 1
        assert sample_row(logits, 1.0, 0, 1e-9, seed, 3) == 1


def test_minus_infinity_is_never_drawn() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.5], dtype=np.float32)
    assert {sample_row(logits, 100.0, 0, 1.0, seed, 0) for seed in range(200)} == {1, 3}


def test_frequencies_follow_the_softmax() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05])).astype(np.float32)
    draws = 4000
    for top_p, expected in ((1.0, [0.5, 0.3, 0.15, 0.05]), (0.7, [0.625, 0.375, 0, 0])):
        counts = Counter(sample_row(logits, 1.0, 0, top_p, 17, position) for position in range(draws))
        for token, p in enumerate(expected):
            # Five standard errors of a binomial count; the draws are a fixed sequence.
            assert abs(counts[token] - draws * p) <= 5 * math.sqrt(draws * p * (1 - p))


def test_a_batch_is_its_rows() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((5, 33), dtype=np.float32)
    temperature = np.array([0, 0.5, 1, 2, 1], dtype=np.float32)
    top_k = np.array([0, 3, 0, 40, 33], dtype=np.int32)
    top_p = np.array([1, 1, 0.8, 0.9, 0.1], dtype=np.float32)
    seeds = np.array([0, 1, 2**64 - 1, 3, 4], dtype=np.uint64)
    positions = np.array([1, 2, 3, 4, 5], dtype=np.int32)
    got = sample(logits, positions, temperature, top_k, top_p, seeds)
    assert got.dtype == np.int32
    for i in range(5):
        row = sample(*(a[i : i + 1] for a in (logits, positions, temperature, top_k, top_p, seeds)))
        assert got[i] == row[0]


@pytest.mark.parametrize("bad", [[0.0, np.nan], [np.inf, 0.0], [-np.inf, -np.inf]], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_logits_are_an_error(bad: list[float], temperature: float) -> None:
    with pytest.raises(
        BackendError, match=r"logits without NaN and with a finite maximum; found: .* at token"
    ):
        sample_row(np.array(bad, dtype=np.float32), temperature, 0, 1.0, 0, 0)


def test_log_probabilities_against_exact_sums() -> None:
    logits = np.array([[0, 1, 2], [80, -80, 0], [-1e4, -1e4, -1e4]], dtype=np.float32)
    got = log_probabilities(logits, np.array([2, 0, 1], dtype=np.int32))
    for row, target, value in zip(logits.tolist(), (2, 0, 1), got.tolist(), strict=True):
        top = max(row)
        total = sum(Fraction(math.exp(x - top)) for x in row)
        assert value == pytest.approx(row[target] - top - math.log(total), abs=1e-6)
    assert got.dtype == np.float32
