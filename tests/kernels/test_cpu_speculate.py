"""Speculation on the C++ runner: the same tokens as plain decoding, whatever is guessed."""

import dataclasses

import numpy as np
import pytest
from tests.guess import Always, Oracle
from tests.tiny import tiny_model, tiny_spec
from tests.toy import ByteTokenizer

from flatout.core.formats import uniform
from flatout.engine.cpu import CpuRunner
from flatout.engine.engine import Engine
from flatout.engine.request import SamplingParams
from flatout.engine.runner import StepInput, sampled_rows
from flatout.engine.sampler import sample
from flatout.engine.speculate import NgramProposer, Speculator

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma"]
RECIPES = [uniform("w8a8"), uniform("w4a8-g32-asym"), uniform("q4_1", kv_cache="bf16"), uniform("w8a16")]


def requests(vocabulary):
    """Prompts that end near the edges of pages of 64 and one that repeats itself; greedy and drawn."""
    rng = np.random.default_rng(8)
    prompts = [rng.integers(3, vocabulary, n).tolist() for n in (62, 5, 64, 127)]
    prompts.append(rng.integers(3, vocabulary, 12).tolist() * 4)
    params = [
        SamplingParams(max_tokens=80, temperature=t, top_p=p, seed=i)
        for i, (t, p) in enumerate([(0, 1), (0.4, 0.9), (0, 1), (1.0, 1), (0, 1)])
    ]
    return prompts, params


@pytest.mark.parametrize(
    ("family", "recipe"),
    [*((f, RECIPES[0]) for f in FAMILIES), *(("llama", r) for r in RECIPES[1:])],
    ids=lambda v: v if isinstance(v, str) else f"{v.name}-{v.kv_cache}",
)
def test_tokens_are_those_of_plain_decoding(family, recipe):
    spec = tiny_spec(family, max_positions=192)
    model = tiny_model(spec, recipe, seed=3)
    prompts, params = requests(spec.vocab_size)
    free = Engine(CpuRunner(model, 1, num_pages=40), ByteTokenizer()).generate(
        prompts, [dataclasses.replace(p, ignore_eos=True) for p in params]
    )
    # Ends in the middle of an answer, of a drawn one and perhaps of others.
    spec = dataclasses.replace(spec, eos_token_ids=(free[3].token_ids[20],))
    model = dataclasses.replace(model, spec=spec)
    plain = Engine(CpuRunner(model, 1, num_pages=40), ByteTokenizer()).generate(prompts, params)
    said = {tuple(p): p + r.token_ids for p, r in zip(prompts, free, strict=True)}

    def follow(sequence, tokens):
        whole = said[tuple(sequence.tokens[: sequence.prompt_length])]
        return whole[len(tokens)] if len(tokens) < len(whole) else 0

    assert any(r.finish_reason == "stop" for r in plain)
    assert len(plain[3].token_ids) <= 21
    assert len(prompts[3]) + len(free[3].token_ids) == 192, "one reaches the end of the context"
    for speculator, options in (
        (Speculator(NgramProposer()), {}),
        (Always(NgramProposer()), {"max_batch": 1}),
        (Always(Oracle(follow, spec.vocab_size, 0.0)), {}),
        (Always(Oracle(follow, spec.vocab_size, 0.9)), {"max_batch": 3}),
        (Always(Oracle(follow, spec.vocab_size, 0.9)), {"num_pages": 7}),
        (Always(Oracle(follow, spec.vocab_size, 1.0)), {"max_batch": 2, "max_step_tokens": 23}),
    ):
        num_pages = options.pop("num_pages", 40)
        runner = CpuRunner(model, 2, num_pages=num_pages)
        engine = Engine(runner, ByteTokenizer(), speculator=speculator, **options)
        drafted = engine.generate(prompts, params)
        for a, b in zip(plain, drafted, strict=True):
            assert (b.token_ids, b.text, b.finish_reason) == (a.token_ids, a.text, a.finish_reason)
        stats = engine.stats()
        assert stats.pages_held == 0
        if isinstance(speculator, Always):
            assert stats.tokens_drafted > 0


@pytest.mark.parametrize("seed", range(3))
def test_every_row_is_drawn_as_the_specification_says(seed):
    model = tiny_model(tiny_spec(), RECIPES[0])
    rng = np.random.default_rng(seed)
    lengths = np.array([1, 5, 17, 2], np.int32)
    pages = np.arange(4, dtype=np.int32)[:, None]
    starts = np.array([0, 3, 0, 40], np.int32)
    runner = CpuRunner(model, 2, num_pages=4)
    before = rng.integers(0, 320, int(starts.sum()) + 2).astype(np.int32)
    runner.forward(StepInput(before, starts * 0, np.maximum(starts, 1), pages), "last")
    batch = StepInput(rng.integers(0, 320, lengths.sum()).astype(np.int32), starts, lengths, pages)
    temperature = np.array([0.0, 0.7, 1.0, 2.0], np.float32)
    top_k, top_p = np.array([0, 0, 5, 0], np.int32), np.array([1, 0.9, 1, 1], np.float32)
    seeds = rng.integers(0, 2**64 - 1, 4, dtype=np.uint64)
    drawn = runner.sample(batch, temperature, top_k, top_p, seeds, "all")
    of, positions = sampled_rows(batch, "all")
    logits = runner.forward(batch, "all")
    expected = sample(logits, positions, temperature[of], top_k[of], top_p[of], seeds[of])
    np.testing.assert_array_equal(drawn, expected)
    last = np.cumsum(lengths) - 1
    np.testing.assert_array_equal(runner.sample(batch, temperature, top_k, top_p, seeds), drawn[last])
    np.testing.assert_array_equal(positions[last], starts + lengths)
