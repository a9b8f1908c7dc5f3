"""Speculation on the C++ runner: the same tokens as plain decoding, whatever is guessed."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare
from tests.guess import Always, Oracle
from tests.tiny import tiny_model, tiny_spec
from tests.toy import ByteTokenizer

from flatout.core.formats import Recipe, uniform
from flatout.engine.cpu import CpuRunner
from flatout.engine.draft import DraftProposer
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


DRAFTS = [
    ("llama", uniform("w8a8"), uniform("w4a8-g32")),
    ("llama", uniform("w8a16"), uniform("w4a8-g32-asym", kv_cache="bf16")),
    ("llama", uniform("w4a8-g32"), Recipe(name="bf16")),
    ("qwen3", uniform("w8a8"), uniform("w8a16")),
    ("mistral", uniform("w8a8"), uniform("w4a8-g32")),
]


@pytest.mark.parametrize(
    ("family", "recipe", "cheaper"), DRAFTS, ids=[f"{f}-{a.layers}-{b.layers}" for f, a, b in DRAFTS]
)
def test_a_draft_model_changes_no_token(family, recipe, cheaper):
    """The same weights rounded otherwise: greedy and drawn by several seeds, batches of different lengths,
    stop tokens, too few pages, and a request that is cancelled."""
    spec = tiny_spec(family, max_positions=192, eos_token_ids=tuple(range(2, 320, 20)))
    judge, draft = tiny_model(spec, recipe, seed=3), tiny_model(spec, cheaper, seed=3)
    prompts, params = requests(spec.vocab_size)
    for seed in range(4):  # these come first, and outgrow a page each
        prompts.insert(seed, prompts[-2][: 9 + 4 * seed])
        heat = 0.3 + 0.3 * seed
        drawn = SamplingParams(max_tokens=100, temperature=heat, top_p=0.95, seed=seed, ignore_eos=True)
        params.insert(seed, drawn)
    plain = Engine(CpuRunner(judge, 1, num_pages=40), ByteTokenizer()).generate(prompts, params)
    assert {r.finish_reason for r in plain} == {"stop", "length"}
    for pages, draft_pages, options in (
        (40, 40, {}),
        (40, 40, {"max_batch": 1}),
        (40, 5, {"max_batch": 4}),
        (7, 7, {}),
    ):
        proposer = DraftProposer(CpuRunner(draft, 1, num_pages=draft_pages))
        runner = CpuRunner(judge, 2, num_pages=pages)
        engine = Engine(runner, ByteTokenizer(), speculator=Always(proposer), **options)
        doomed = engine.add_request(prompts[1], params[0])
        engine.step()
        engine.step()
        engine.cancel(doomed)
        drafted = engine.generate(prompts, params)
        for a, b in zip(plain, drafted, strict=True):
            assert (b.token_ids, b.finish_reason) == (a.token_ids, a.finish_reason)
        stats = engine.stats()
        assert 0 < stats.tokens_accepted < stats.tokens_drafted
        proposer.propose([], 1)
        proposer.pool.check()
        assert proposer.pool.held == stats.pages_held == 0


def test_the_same_model_as_its_own_draft_is_always_right():
    model = tiny_model(tiny_spec(), RECIPES[0])
    proposer = DraftProposer(CpuRunner(model, 1, num_pages=40))
    engine = Engine(CpuRunner(model, 1, num_pages=40), ByteTokenizer(), speculator=Always(proposer))
    engine.generate(*requests(320))
    stats = engine.stats()
    assert stats.tokens_accepted > 0.9 * stats.tokens_drafted, "but for drafts that run past an end"


def test_drawn_tokens_have_the_models_distribution():
    """Chi-square of the pairs of tokens 2 and 3 after a prompt, guessed by a draft model, over 3000 seeds."""
    spec = tiny_spec(vocab_size=265)
    judge, draft = (tiny_model(spec, uniform(name), seed=5) for name in ("w8a8", "w4a8-g32"))
    prompt, kept, temperature, runs = [9, 8, 7], 3, 2.0, 3000
    runner = CpuRunner(judge, 1, num_pages=64)

    def likeliest(tokens):
        """(token, probability) of the `kept` tokens that top_k leaves."""
        pages = np.zeros((1, 1), np.int32)
        none, count = np.zeros(1, np.int32), np.array([len(tokens)], np.int32)
        step = StepInput(np.array(tokens, np.int32), none, count, pages)
        logits = runner.forward(step, "last")[0].astype(np.float64) / temperature
        top = np.argsort(-logits, kind="stable")[:kept]
        weights = np.exp(logits[top] - logits[top[0]])
        return list(zip(top.tolist(), weights / weights.sum(), strict=True))

    expected = {}
    for a, p in likeliest(prompt):
        for b, q in likeliest([*prompt, a]):
            for c, r in likeliest([*prompt, a, b]):
                expected[a, b, c] = runs * p * q * r
    proposer = DraftProposer(CpuRunner(draft, 1, num_pages=64))
    engine = Engine(runner, ByteTokenizer(), speculator=Always(proposer))
    params = [
        SamplingParams(max_tokens=4, temperature=temperature, top_k=kept, seed=seed, ignore_eos=True)
        for seed in range(runs)
    ]
    seen = Counter(tuple(r.token_ids[:3]) for r in engine.generate([prompt] * runs, params))
    stats = engine.stats()
    assert 0.3 < stats.tokens_accepted / stats.tokens_drafted < 0.999
    assert seen.keys() <= expected.keys()
    assert min(expected.values()) > 5
    assert chisquare([seen[k] for k in expected], list(expected.values())).pvalue > 0.01


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
