"""A draft model over toy runners: it follows what was accepted, gives pages back, and changes no answer."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from tests.guess import Always
from tests.toy import (
    EOS,
    PROMPTS,
    VOCABULARY,
    ByteTokenizer,
    ToyRunner,
    toy_generate,
    toy_spec,
)

from flatout.core.spec import ModelSpec
from flatout.engine.draft import DraftProposer
from flatout.engine.engine import Engine
from flatout.engine.request import SamplingParams
from flatout.engine.runner import MAX_STEP_TOKENS, StepInput, sampled_rows
from flatout.engine.scheduler import Sequence, Step
from flatout.engine.speculate import LONGEST_DRAFT, NgramProposer, Speculator

MIXED = [
    SamplingParams(max_tokens=17),
    SamplingParams(max_tokens=40, temperature=1.0, seed=1),
    SamplingParams(max_tokens=1),
    SamplingParams(max_tokens=13, temperature=0.7, top_k=5, seed=2),
    SamplingParams(max_tokens=30, temperature=2.0, top_p=0.9, seed=2**64 - 1),
    SamplingParams(max_tokens=25, temperature=1.0, seed=1, ignore_eos=True),
]
LONG = SamplingParams(max_tokens=60, ignore_eos=True)


class Doubtful(ToyRunner):
    """The toy model, but every `wrong`-th position draws another token; 0: none, 1: all."""

    def __init__(
        self, wrong: int, num_pages: int = 64, page_size: int = 4, spec: ModelSpec | None = None
    ) -> None:
        super().__init__(num_pages, page_size, spec)
        self.wrong = wrong

    def sample(
        self,
        batch: StepInput,
        temperature: np.ndarray,
        top_k: np.ndarray,
        top_p: np.ndarray,
        seeds: np.ndarray,
        rows: Literal["last", "all"] = "last",
    ) -> np.ndarray:
        drawn = super().sample(batch, temperature, top_k, top_p, seeds, rows)
        if self.wrong == 0:
            return drawn
        off = sampled_rows(batch, rows)[1] % self.wrong == 0
        return np.where(off, (drawn + 1) % VOCABULARY, drawn).astype(np.int32)


def drafting(runner: ToyRunner) -> DraftProposer:
    """With an empty record of steps."""
    proposer = DraftProposer(runner)
    runner.steps.clear()
    return proposer


def guesses(sequence: Sequence, count: int) -> list[int]:
    """What the toy model says next."""
    return toy_generate(sequence.tokens, SamplingParams(max_tokens=count), stop_ids=())


def held(proposer: DraftProposer) -> int:
    proposer.pool.check()
    return proposer.pool.held


def pages(length: int, size: int = 4) -> int:
    return -(-length // size)


@pytest.mark.parametrize("wrong", [0, 3, 1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch": 1},
        {"max_batch": 2, "max_step_tokens": 2},
        {"num_pages": 17, "max_batch": 6, "max_step_tokens": 20},
        {"draft_pages": 9},
        {"draft_pages": 1},
        {"draft_positions": 30},
        {"page_size": 1, "num_pages": 100},
        {"page_size": 64},
        {"draft_size": 16},
        {"positions": 44},
    ],
    ids=str,
)
def test_answers_do_not_depend_on_the_draft(options: dict[str, int], wrong: int) -> None:
    """Batches of different lengths, greedy and drawn, with stop tokens, over page edges, short of pages on
    either side, preempted, at the end of either context."""
    rest = dict(options)
    num_pages, page_size = rest.pop("num_pages", 64), rest.pop("page_size", 4)
    positions = rest.pop("positions", 4096)
    draft = Doubtful(
        wrong,
        rest.pop("draft_pages", num_pages),
        rest.pop("draft_size", page_size),
        toy_spec(rest.pop("draft_positions", positions)),
    )
    proposer = DraftProposer(draft)
    e = Engine(
        ToyRunner(num_pages, page_size, toy_spec(positions)),
        ByteTokenizer(),
        speculator=Always(proposer),
        **rest,
    )
    for _ in range(2):  # the second time with whatever prefixes are cached
        results = e.generate(PROMPTS, MIXED)
        for prompt, params, result in zip(PROMPTS, MIXED, results, strict=True):
            assert result.token_ids == toy_generate(prompt, params, capacity=e.scheduler.capacity)
            stopped = result.token_ids[-1] == EOS and not params.ignore_eos
            assert result.finish_reason == ("stop" if stopped else "length")
        proposer.pool.check()
        e.scheduler.pool.check()
        assert e.stats().pages_held == 0
    stats = e.stats()
    if options.get("max_step_tokens") != 2 and "draft_pages" not in options:
        assert (stats.tokens_accepted > 0) == (wrong != 1)
        assert (stats.tokens_accepted == stats.tokens_drafted) == (wrong == 0)
    if options.get("num_pages") == 17:
        assert stats.preemptions > 0


def test_steps_of_the_draft_model() -> None:
    """A prompt in chunks, then one guess a step for all sequences; and what was drawn since, in one step."""
    runner = Doubtful(0, 256)
    proposer = drafting(runner)
    long, short = (
        Sequence(id=i, tokens=[i + 1] * n, limit=4096) for i, n in enumerate((MAX_STEP_TOKENS + 9, 3))
    )
    drafts = proposer.propose([long, short], 4)
    assert drafts == [
        toy_generate(s.tokens, SamplingParams(max_tokens=4), stop_ids=()) for s in (long, short)
    ]
    assert runner.steps == [(1, MAX_STEP_TOKENS), (2, 9 + 3), (2, 2), (2, 2), (2, 2)]

    runner.steps.clear()
    long.tokens += [*drafts[0], 5]  # all came true: its last was never computed
    short.tokens += [*drafts[1][:1], 6]  # the second did not
    drafts = proposer.propose([long, short], 2)
    assert drafts == [
        toy_generate(s.tokens, SamplingParams(max_tokens=2), stop_ids=()) for s in (long, short)
    ]
    assert runner.steps == [(2, 3), (2, 2)]


def test_chunks_are_as_long_as_its_runner_takes() -> None:
    runner = Doubtful(0, 256)
    runner.max_step_tokens = 40
    proposer = drafting(runner)
    sequence = Sequence(id=0, tokens=[1] * 95, limit=4096)
    assert proposer.seconds([sequence])[0] > 0
    proposer.propose([sequence], 1)
    assert runner.steps == [(1, 40), (1, 40), (1, 15)]


def test_a_step_that_failed_is_proposed_for_again() -> None:
    proposer = drafting(Doubtful(0))
    sequence = Sequence(id=0, tokens=[1] * 8, limit=99)
    assert proposer.propose([sequence], 5) == proposer.propose([sequence], 5)
    proposer.runner.fail_next = True  # type: ignore[attr-defined]
    sequence.tokens += [3, 4]
    with pytest.raises(RuntimeError):
        proposer.propose([sequence], 5)
    assert proposer.propose([sequence], 5) == [guesses(sequence, 5)]


def test_it_stops_before_the_limit_and_where_room_ends() -> None:
    proposer = drafting(Doubtful(0, num_pages=4, spec=toy_spec(14)))
    near, far = (Sequence(id=i, tokens=[i] * 7, limit=limit) for i, limit in enumerate((10, 99)))
    assert [len(d) for d in proposer.propose([near, far], 9)] == [2, 0], "no pages for the second"
    assert held(proposer) == 2
    assert [len(d) for d in proposer.propose([far], 9)] == [8], "the last guess needs no position"
    far.tokens += [1] * 8
    assert [len(d) for d in proposer.propose([far], 9)] == [0]


def test_pages_go_back_when_sequences_end_are_cancelled_or_preempted() -> None:
    proposer = drafting(Doubtful(1))
    e = Engine(ToyRunner(12, 4), ByteTokenizer(), speculator=Always(proposer))
    first = e.add_request([1, 2, 3], LONG)
    e.add_request([4] * 9, LONG)
    while e.stats().preemptions == 0:
        e.step()
    e.step()
    (alone,) = e.scheduler.running
    assert alone.id == first
    assert held(proposer) <= pages(len(alone.tokens) + LONGEST_DRAFT)
    e.cancel(first)
    while len(e.scheduler.running) != 1 or e.scheduler.running[0].id == first:
        e.step()
    e.step()
    e.step()
    (other,) = e.scheduler.running
    assert list(proposer._copies) == [other.id]
    assert held(proposer) <= pages(len(other.tokens) + LONGEST_DRAFT)
    proposer.propose([], 1)
    assert held(proposer) == 0


def test_a_beginning_that_is_cached_is_not_computed_again() -> None:
    runner = Doubtful(0)
    proposer = drafting(runner)
    first = Sequence(id=0, tokens=list(range(17)), limit=99)
    proposer.propose([first], 1)
    runner.steps.clear()
    second = Sequence(id=1, tokens=[*range(16), 40, 41], limit=99)
    third = Sequence(id=2, tokens=list(range(16)), limit=99)
    drafts = proposer.propose([second, third], 1)
    assert runner.steps == [(2, 2 + 4)], "the last token is always computed, in a page of its own"
    assert drafts == [guesses(second, 1), guesses(third, 1)]
    proposer.pool.check()


# What is worth it


class Paid:
    """Guesses right with a fixed chance, for a price."""

    def __init__(self, right: float, once: float, each: float) -> None:
        self.right, self.price = right, (once, each)
        self.asked: list[int] = []
        self._rng = np.random.default_rng(0)

    def seconds(self, sequences: list[Sequence]) -> tuple[float, float]:
        return self.price

    def propose(self, sequences: list[Sequence], longest: int) -> list[list[int]]:
        self.asked.append(longest)
        length = len(sequences[0].tokens)
        return [[(length + i) % 250 if self._rng.random() < self.right else 251 for i in range(longest)]]


def simulate(paid: Paid, steps: int, cost: float = 0.1, lookup: bool = False) -> float:
    """Tokens a second of one sequence that counts, when a step takes a second, and `cost` for each token of a
    draft. `lookup`: prompt lookup can guess as well."""
    speculator = Speculator(NgramProposer(), paid)
    tokens = [i % 250 for i in range(500 if lookup else 1)]
    sequence = Sequence(id=0, tokens=tokens, limit=1 << 18)
    begin, seconds = len(tokens), 0.0
    one, none = np.ones(1, dtype=np.int32), np.zeros(1)
    for _ in range(steps):
        asked = len(paid.asked)
        draft = speculator.propose([sequence])[0]
        if not lookup:
            assert len(draft) == sum(paid.asked[asked:]), "counting below 250 never repeats"
        took = 1.0 + cost * len(draft)
        seconds += took + sum(n * paid.price[1] for n in paid.asked[asked:])
        batch = StepInput(np.zeros(1 + len(draft), np.int32), one, one, one[None])
        step = Step(batch, none, none, none, none, [], [1 + len(draft)], [draft])
        speculator.record(step, took)
        truth = [(len(sequence.tokens) + i) % 250 for i in range(len(draft) + 1)]
        right = 0
        while right < len(draft) and draft[right] == truth[right]:
            right += 1
        sequence.tokens += truth[: right + 1]
    return (len(sequence.tokens) - begin) / seconds


def test_a_cheap_draft_that_is_right_is_used_at_length() -> None:
    paid = Paid(1.0, 0.0, 0.02)
    assert simulate(paid, 15) > 5
    assert paid.asked[-5:] == [LONGEST_DRAFT] * 5


@pytest.mark.parametrize(("right", "each"), [(0.7, 1.0), (0.0, 0.2), (1.0, 1.1)])
def test_a_draft_whose_own_time_eats_the_gain_is_dropped(right: float, each: float) -> None:
    paid = Paid(right, 0.0, each)
    gained = simulate(paid, 200, cost=0.0)
    assert len(paid.asked) <= 20
    assert gained > 0.9


def test_trials_of_a_draft_that_does_not_pay_become_rare() -> None:
    paid = Paid(0.0, 0.0, 2.0)
    speculator = Speculator(NgramProposer(), paid)
    sequence = Sequence(id=0, tokens=[0], limit=1 << 18)
    speculator._times.add(1, 1.0)
    for i in range(2000):
        speculator.propose([sequence])
        sequence.tokens.append(1000 + i)
    assert len(paid.asked) == 4, "after 128, 256, 512 and 1024 more"


def test_catching_up_waits_until_the_answer_is_long() -> None:
    spec = toy_spec(8192)
    proposer = DraftProposer(Doubtful(0, 2048, 4, spec))
    sequence = Sequence(id=0, tokens=[1] * 2001, limit=8000, prompt_length=2000)
    early, _ = proposer.seconds([sequence])
    sequence.tokens += [2] * 99
    late, each = proposer.seconds([sequence])
    assert early > 50 * late > 0
    sequence.limit = len(sequence.tokens) + 1
    assert proposer.seconds([sequence])[0] == pytest.approx(100 * late), "one token is left to carry it"
    sequence.limit = 8000
    proposer.propose([sequence], 1)
    sequence.tokens.append(3)
    assert proposer.seconds([sequence])[0] == 0
    assert each > 0


def test_lookup_costs_nothing_and_goes_first_where_it_is_as_good() -> None:
    paid = Paid(1.0, 0.0, 0.5)
    simulate(paid, 60, lookup=True)
    assert len(paid.asked) <= 20


def test_no_room_for_the_draft_leaves_what_was_looked_up() -> None:
    proposer = DraftProposer(Doubtful(0, num_pages=1))
    speculator = Speculator(NgramProposer(), proposer)
    sequence = Sequence(id=0, tokens=[1, 2, 3] * 10, limit=99)
    speculator._times.add(1, 1.0)
    assert speculator.propose([sequence]) == [[1]]
