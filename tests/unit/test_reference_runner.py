"""The reference runner over pages against models/llama.py without pages, on tiny models of every family."""

from __future__ import annotations

import numpy as np
import pytest
from tests.tiny import tiny_model, tiny_source, tiny_spec
from tests.toy import ByteTokenizer

from flatout.core.formats import Recipe, uniform
from flatout.core.fuse import float_recipe
from flatout.core.model import Model
from flatout.engine.engine import Engine
from flatout.engine.reference import _HEAD_ROWS, ReferenceRunner
from flatout.engine.request import SamplingParams
from flatout.engine.runner import StepInput
from flatout.engine.sampler import log_probabilities, sample_row
from flatout.engine.score import score_documents
from flatout.errors import ConfigError
from flatout.models.llama import Cache, Llama

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")


def alone(model: Model, prompt: list[int], params: SamplingParams) -> list[int]:
    """The answer token by token through one cache without pages."""
    llama, cache, tokens = Llama(model, as_served=True), Cache(), list(prompt)
    fresh = tokens
    while len(tokens) < len(prompt) + params.max_tokens:
        logits = llama.forward(fresh, cache, last_only=True)[0].numpy()
        chosen = (params.temperature, params.top_k, params.top_p, params.seed)
        tokens.append(sample_row(logits, *chosen, len(tokens)))
        fresh = tokens[-1:]
    return tokens[len(prompt) :]


FLOAT, INTEGER = float_recipe("fp32", kv_cache="bf16"), uniform("w8a8-g32")


@pytest.mark.parametrize(
    ("family", "recipe"),
    [*((family, FLOAT) for family in FAMILIES), ("llama", INTEGER), ("mistral", INTEGER)],
    ids=lambda v: v.name if isinstance(v, Recipe) else v,
)
def test_engine_over_pages_is_the_model_alone(family: str, recipe: Recipe) -> None:
    model = tiny_model(tiny_spec(family), recipe)
    rng = np.random.default_rng(1)
    common = rng.integers(3, 320, 20).tolist()
    prompts = [common, [*common, 5], rng.integers(3, 320, 3).tolist(), [*common[:16], *common]]
    params = [
        SamplingParams(max_tokens=24, temperature=t, seed=i, ignore_eos=True)
        for i, t in enumerate((0.0, 1.0, 0.8, 0.0))
    ]
    runner = ReferenceRunner(model, num_pages=8, page_size=8)
    engine = Engine(runner, ByteTokenizer(), max_batch=3, max_step_tokens=9)
    for _ in range(2):
        results = engine.generate(prompts, params)
        for prompt, one, result in zip(prompts, params, results, strict=True):
            assert result.token_ids == alone(model, prompt, one)
    assert engine.stats().tokens_reused > 0
    assert engine.stats().preemptions > 0
    assert engine.stats().pages_held == 0


def test_checkpoint_runs_exactly_and_scores() -> None:
    source = tiny_source(tiny_spec("llama"), seed=2)
    runner = ReferenceRunner(source, num_pages=8, page_size=8)
    assert runner.name == "reference (exact)"
    docs = [np.random.default_rng(i).integers(0, 320, n).tolist() for i, n in enumerate((30, 2, 9))]
    for doc, got in zip(docs, score_documents(runner, docs, step_tokens=16), strict=True):
        logits = Llama(source).forward(doc[:-1]).numpy()
        np.testing.assert_allclose(got, log_probabilities(logits, np.array(doc[1:])), atol=1e-5)


def test_scores_of_a_long_step_are_those_of_its_logits() -> None:
    """More tokens than the head takes at a time, of two sequences, one with a sliding window in its way."""
    for family in ("llama", "mistral"):
        runner = ReferenceRunner(tiny_source(tiny_spec(family), seed=2), num_pages=8, page_size=64)
        rng = np.random.default_rng(3)
        lengths = np.array([_HEAD_ROWS + 30, 47], dtype=np.int32)
        batch = StepInput(
            rng.integers(0, 320, lengths.sum(), dtype=np.int32),
            np.zeros(2, dtype=np.int32),
            lengths,
            np.array([[3, 1, 0], [7, -1, -1]], dtype=np.int32),
        )
        targets = rng.integers(0, 320, lengths.sum(), dtype=np.int32)
        expected = log_probabilities(runner.forward(batch, "all"), targets)
        # Both round to float32, and products of other shapes add up in another order.
        np.testing.assert_allclose(runner.score(batch, targets), expected, rtol=0, atol=1e-5)


def test_forward_rows() -> None:
    runner = ReferenceRunner(tiny_source(tiny_spec("qwen2")), num_pages=4, page_size=4)
    batch = StepInput(
        np.array([5, 6, 7, 8, 9], dtype=np.int32),
        np.zeros(2, dtype=np.int32),
        np.array([2, 3], dtype=np.int32),
        np.array([[2], [0]], dtype=np.int32),
    )
    every = runner.forward(batch, "all")
    assert every.shape == (5, 320)
    np.testing.assert_allclose(runner.forward(batch, "last"), every[[1, 4]], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pages": [[4]]}, "pages in use lie between 0 and 3; found: 4 to 4"),
        ({"pages": [[-1]]}, "pages in use lie between 0 and 3; found: -1 to -1"),
        ({"tokens": [1, 320]}, "token ids lie between 0 and 319; found: 1 to 320"),
        ({"starts": [3]}, "inside the page table; found: 5"),
        ({"lengths": [3]}, "lengths >= 1 that sum to its tokens"),
        ({"lengths": [0], "tokens": []}, "lengths >= 1 that sum to its tokens"),
    ],
    ids=str,
)
def test_malformed_steps_are_refused(change: dict[str, list[int]], message: str) -> None:
    runner = ReferenceRunner(tiny_source(tiny_spec("llama")), num_pages=4, page_size=4)
    fields = {"tokens": [1, 2], "starts": [0], "lengths": [2], "pages": [[0]], **change}
    with pytest.raises(ConfigError, match=message):
        runner.forward(StepInput(**{k: np.array(v, dtype=np.int32) for k, v in fields.items()}), "last")


def test_a_cache_has_pages() -> None:
    with pytest.raises(ConfigError, match="found: 0 x 64"):
        ReferenceRunner(tiny_source(tiny_spec("llama")), num_pages=0)
