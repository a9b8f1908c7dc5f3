"""Speculation over toy runners: whatever is guessed, every answer is the one that plain decoding gives; and
guesses are made only where they pay."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.guess import Always, Oracle
from tests.tiny import tiny_spec
from tests.toy import (
    EOS,
    PROMPTS,
    VOCABULARY,
    ByteTokenizer,
    ScriptedRunner,
    ToyRunner,
    toy_generate,
    toy_next,
    toy_spec,
)

from flatout.core.formats import Recipe, uniform
from flatout.engine.engine import Engine
from flatout.engine.request import SamplingParams
from flatout.engine.runner import StepInput
from flatout.engine.scheduler import Sequence, Step
from flatout.engine.speculate import (
    LONGEST_DRAFT,
    NgramIndex,
    NgramProposer,
    Speculator,
    StepTimes,
    is_exact,
)

MIXED = [
    SamplingParams(max_tokens=7),
    SamplingParams(max_tokens=40, temperature=1.0, seed=1),
    SamplingParams(max_tokens=1),
    SamplingParams(max_tokens=13, temperature=0.7, top_k=5, seed=2),
    SamplingParams(max_tokens=30, temperature=2.0, top_p=0.9, seed=2**64 - 1),
    SamplingParams(max_tokens=25, temperature=1.0, seed=1, ignore_eos=True),
]


@pytest.mark.parametrize("right", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch": 1},
        {"max_batch": 2, "max_step_tokens": 2},
        {"max_step_tokens": 33},
        {"num_pages": 17, "max_batch": 6, "max_step_tokens": 20},
        {"page_size": 1, "num_pages": 100},
        {"page_size": 64},
        {"prefix_reuse": False},
        {"positions": 44},
    ],
    ids=str,
)
def test_answers_do_not_depend_on_guesses(options: dict[str, int | bool], right: float) -> None:
    """Each token guessed right with the chance `right`: greedy and drawn, over page edges, short of pages, at
    the end of the context."""
    sizes = {"num_pages": 64, "page_size": 4, "positions": 4096}
    num_pages, page_size, positions = (int(options.get(k, v)) for k, v in sizes.items())
    runner = ToyRunner(num_pages, page_size, toy_spec(positions))
    rest = {k: v for k, v in options.items() if k not in sizes}
    e = Engine(
        runner,
        ByteTokenizer(),
        speculator=Always(Oracle(toy_next, VOCABULARY, right)),
        **rest,  # type: ignore[arg-type]
    )
    for _ in range(2):  # the second time with whatever prefixes are cached
        results = e.generate(PROMPTS, MIXED)
        for prompt, params, result in zip(PROMPTS, MIXED, results, strict=True):
            assert result.token_ids == toy_generate(prompt, params, capacity=e.scheduler.capacity)
            stopped = result.token_ids[-1] == EOS and not params.ignore_eos
            assert result.finish_reason == ("stop" if stopped else "length")
        e.scheduler.pool.check()
        assert e.stats().pages_held == 0
    stats = e.stats()
    if options.get("max_step_tokens") != 2:
        assert stats.drafted_steps > 0
        assert (stats.tokens_accepted > 0) == (right > 0)
        assert (stats.tokens_accepted == stats.tokens_drafted) == (right == 1)


def test_a_right_guess_saves_steps() -> None:
    runner = ToyRunner(64, 4)
    e = Engine(runner, ByteTokenizer(), speculator=Always(Oracle(toy_next, VOCABULARY, 1.0)))
    params = SamplingParams(max_tokens=1 + 2 * (LONGEST_DRAFT + 1), ignore_eos=True)
    assert e.generate([[1, 2]], params)[0].token_ids == toy_generate([1, 2], params)
    assert runner.steps == [(1, 2), (1, LONGEST_DRAFT + 1), (1, LONGEST_DRAFT + 1)]


def test_guesses_wait_while_a_prompt_is_read_and_take_no_page_from_others() -> None:
    runner = ToyRunner(8, 4)
    e = Engine(runner, ByteTokenizer(), speculator=Always(Oracle(toy_next, VOCABULARY, 0.0)))
    long = SamplingParams(max_tokens=40, ignore_eos=True)
    e.add_request([1, 2, 3], long)
    e.step()
    e.add_request([4] * 9, long)
    e.step()
    assert runner.steps == [(1, 3), (2, 10)]
    held = [0]
    while e.stats().preemptions == 0:
        e.step()
        e.scheduler.pool.check()
        held.append(e.stats().pages_held)
        assert held[-1] <= sum(-(-len(s.tokens) // 4) for s in e.scheduler.running)
    assert held[-2] == 8, "accepted tokens alone filled the cache before anyone had to give way"


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    text=st.text(alphabet="ab é漢", max_size=24),
    stop=st.lists(st.text(alphabet="ab é漢", min_size=1, max_size=4), max_size=3).map(tuple),
    max_tokens=st.integers(1, 60),
    right=st.sampled_from([0.7, 1.0]),
)
def test_stop_strings_and_ends_cut_an_accepted_run(
    text: str, stop: tuple[str, ...], max_tokens: int, right: float
) -> None:
    said = [*list(text.encode()), EOS, EOS]
    params = SamplingParams(max_tokens=max_tokens, stop=stop)
    oracle = Oracle(lambda _, tokens: said[min(len(tokens) - 1, len(said) - 1)], VOCABULARY, right)
    engines = [
        Engine(ScriptedRunner(list(text.encode())), ByteTokenizer(), speculator=s)
        for s in (None, Always(oracle))
    ]
    plain, drafted = (e.generate(["?"], params)[0] for e in engines)
    assert (drafted.text, drafted.token_ids, drafted.finish_reason) == (
        plain.text,
        plain.token_ids,
        plain.finish_reason,
    )
    assert "".join(engines[1].stream("?", params)) == plain.text
    assert engines[1].stats().pages_held == 0


def test_a_stream_gives_all_of_an_accepted_run() -> None:
    script = list(b"one two three four five six seven eight")
    oracle = Oracle(lambda _, tokens: [*script, EOS, EOS][min(len(tokens) - 1, len(script))], VOCABULARY, 1.0)
    e = Engine(ScriptedRunner(script), ByteTokenizer(), speculator=Always(oracle))
    pieces = list(e.stream("?", SamplingParams(max_tokens=100)))
    assert "".join(pieces) == bytes(script).decode()
    assert len(pieces) == 3, "twice 16, and the rest"


# What is guessed


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    tokens=st.lists(st.integers(0, 3), max_size=40), cuts=st.lists(st.integers(1, 40)), k=st.integers(1, 9)
)
def test_prompt_lookup_is_the_latest_earlier_occurrence(tokens: list[int], cuts: list[int], k: int) -> None:
    def expected(seen: list[int]) -> list[int]:
        for n in (3, 2):
            for end in range(len(seen) - 1, n - 1, -1):
                if len(seen) >= n and seen[end - n : end] == seen[-n:]:
                    followed = list(seen)
                    for i in range(k):
                        followed.append(followed[end + i])
                    return followed[len(seen) :]
        return []

    index = NgramIndex()
    for cut in sorted({min(c, len(tokens)) for c in cuts} | {len(tokens)}):
        assert index.guess(tokens[:cut], k) == expected(tokens[:cut])


def test_indexes_go_with_their_sequences() -> None:
    proposer = NgramProposer()
    a, b = (Sequence(id=i, tokens=[1, 2, 3, 1, 2], limit=9) for i in range(2))
    assert proposer.propose([a, b], 3) == [[3, 1, 2]] * 2
    assert proposer.propose([b], 1) == [[3]]
    assert list(proposer._indexes) == [1]


def test_exact_is_integer_throughout() -> None:
    spec = tiny_spec()
    assert is_exact(spec, uniform("w8a8"))
    assert is_exact(spec, uniform("q4_1", kv_cache="bf16"))
    assert not is_exact(spec, uniform("w8a8", head="bf16"))
    assert not is_exact(
        spec, Recipe(name="x", layers="w8a8", head="w8a8", overrides=(("layers.1.o", "fp32"),))
    )
    assert not is_exact(spec, Recipe(name="bf16"))


# What is worth it


class Simulation:
    """One sequence, a cost in seconds for a step by its tokens, guesses right with a fixed chance."""

    def __init__(self, cost: list[float], right: float) -> None:
        self.cost = cost
        self.runner = ToyRunner(4096, 64, toy_spec(1 << 18))
        self.speculator = Speculator(Oracle(lambda s, tokens: len(tokens) % 250, 250, right))
        self.sequence = Sequence(id=0, tokens=[0], limit=1 << 18)
        self.seconds = 0.0

    def run(self, steps: int) -> list[int]:
        """Lengths of the drafts of so many steps."""
        lengths = []
        for _ in range(steps):
            draft = self.speculator.propose([self.sequence])[0]
            lengths.append(len(draft))
            seconds = self.cost[len(draft)]
            self.seconds += seconds
            self.speculator.record(step_of(1 + len(draft)), seconds)
            tokens = self.sequence.tokens
            truth = [(len(tokens) + i) % 250 for i in range(len(draft) + 1)]
            right = 0
            while right < len(draft) and draft[right] == truth[right]:
                right += 1
            tokens += truth[: right + 1]
        return lengths


def step_of(tokens: int) -> Step:
    one = np.ones(1, dtype=np.int32)
    none = np.zeros(1)
    batch = StepInput(np.zeros(tokens, np.int32), one, one * tokens, one[None])
    return Step(batch, none, none, none, none, [], [tokens], [[0] * (tokens - 1)])


FLAT = [1.0] * (LONGEST_DRAFT + 1)
STEEP = [1.0 + i for i in range(LONGEST_DRAFT + 1)]


def test_the_whole_draft_is_tried_when_more_tokens_cost_nothing() -> None:
    lengths = Simulation(FLAT, 0.98).run(50)
    assert lengths[0] == 0, "the first step is measured alone"
    assert lengths[30:] == [LONGEST_DRAFT] * 20


@pytest.mark.parametrize(("cost", "right"), [(STEEP, 0.9), ([1.0, *[9.0] * LONGEST_DRAFT], 0.2)])
def test_it_switches_itself_off_where_it_does_not_pay(cost: list[float], right: float) -> None:
    simulation = Simulation(cost, right)
    simulation.run(100)
    simulation.seconds, before = 0.0, len(simulation.sequence.tokens)
    lengths = simulation.run(2000)
    assert 1 <= sum(n > 0 for n in lengths) <= 20, "tried again now and then"
    gained = (len(simulation.sequence.tokens) - before) / simulation.seconds
    assert gained > 0.93, "trying costs a few per cent at most"


def test_the_length_follows_the_chances() -> None:
    cost = [1.0, 1.2, *[1.4 + 0.1 * i for i in range(LONGEST_DRAFT - 1)]]
    good, poor = Simulation(cost, 0.95), Simulation(cost, 0.3)
    assert np.median(good.run(400)[200:]) >= 6
    assert np.median(poor.run(400)[200:]) <= 2


def test_it_comes_back_when_guesses_come_true_again() -> None:
    simulation = Simulation([1.0 + 0.2 * i for i in range(LONGEST_DRAFT + 1)], 0.0)
    assert sum(simulation.run(300)[100:]) <= 2 * LONGEST_DRAFT
    oracle = simulation.speculator._proposer
    assert isinstance(oracle, Oracle)
    oracle.right = 1.0
    assert np.median(simulation.run(300)[200:]) > 5, "judged by what came, without being computed"


def test_times_are_medians_and_lines_between() -> None:
    times = StepTimes()
    assert 1 not in times
    for seconds in (9.0, 1.0, 1.2, 1.1, 1.0):
        times.add(1, seconds)
    times.add(5, 3.1)
    assert 1 in times
    assert times.estimate(1) == 1.1
    assert times.estimate(3) == pytest.approx(2.1)
    assert times.estimate(10) == pytest.approx(3.1 * 1.25)


def test_steps_that_compile_do_not_count() -> None:
    times = StepTimes(unsettled=2)
    for seconds in (30.0, 0.5, 0.1):
        assert 4 not in times
        times.add(4, seconds)
    assert times.estimate(4) == 0.1
    times.add(1, 30.0)
    assert 1 not in times, "of every size"


def test_prompt_steps_are_not_measured() -> None:
    e = Engine(ToyRunner(64, 4), ByteTokenizer(), speculator=Speculator(NgramProposer()))
    assert e.speculator is not None
    e.add_request([1] * 9, SamplingParams(max_tokens=5))
    e.step()
    assert 9 not in e.speculator._times
    e.step()
    assert 1 in e.speculator._times
