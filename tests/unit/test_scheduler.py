"""The scheduler alone and with a toy runner: order, priority, preemption, pages, and answers that never
depend on them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.guess import Oracle
from tests.toy import EOS, VOCABULARY, ToyRunner, toy_generate, toy_next

from flatout.engine.request import SamplingParams
from flatout.engine.scheduler import Propose, Scheduler, Sequence, Step
from flatout.errors import ConfigError


def scheduler(num_pages: int = 8, page_size: int = 4, **options: int | bool) -> Scheduler:
    settings = {"max_positions": 4096, "max_batch": 4, "max_step_tokens": 8, **options}
    return Scheduler(num_pages=num_pages, page_size=page_size, **settings)  # type: ignore[arg-type]


def sequence(number: int, tokens: list[int], max_tokens: int = 5, **fields: float) -> Sequence:
    return Sequence(id=number, tokens=tokens, limit=len(tokens) + max_tokens, **fields)  # type: ignore[arg-type]


def run_step(s: Scheduler, token: int = 7) -> list[tuple[int, int]]:
    """One step in which every sample is `token`; (id, tokens advanced) of everyone in it."""
    step = s.schedule()
    if step is None:
        return []
    s.commit(step, np.full(len(step.sequences), token, dtype=np.int32))
    return [(q.id, n) for q, n in zip(step.sequences, step.counts, strict=True)]


def test_prompts_are_cut_to_the_budget_and_decodes_go_first() -> None:
    s = scheduler()
    s.add(sequence(0, [1] * 3))
    assert run_step(s) == [(0, 3)]
    s.add(sequence(1, [2] * 10))
    assert run_step(s) == [(0, 1), (1, 7)]
    assert run_step(s) == [(0, 1), (1, 3)]
    assert run_step(s) == [(0, 1), (1, 1)]


def test_first_come_first_served_without_overtaking() -> None:
    s = scheduler(num_pages=4, prefix_reuse=False)
    s.add(sequence(0, [1] * 9, 3))
    s.add(sequence(1, [2] * 9, 3))  # does not fit beside 0
    s.add(sequence(2, [3], 1))  # would fit, but came later
    served = [entry for _ in range(4) for entry in run_step(s)]
    assert served == [(0, 8), (0, 1), (0, 1), (0, 1)], "2 must not overtake 1"
    assert run_step(s) == [(1, 8)]


def test_batch_is_bounded() -> None:
    s = scheduler(num_pages=32)
    for i in range(6):
        s.add(sequence(i, [i], 2))
    assert [i for i, _ in run_step(s)] == [0, 1, 2, 3]
    assert [i for i, _ in run_step(s)] == [0, 1, 2, 3]
    assert [i for i, _ in run_step(s)] == [4, 5]


def test_last_to_arrive_is_preempted_and_resumes_with_its_tokens() -> None:
    s = scheduler(num_pages=4, page_size=2, prefix_reuse=False)
    s.add(sequence(0, [1], 7))
    assert run_step(s, 10) == [(0, 1)]
    s.add(sequence(1, [2], 5))
    while s.stats().preemptions == 0:
        run_step(s, 11)
    first, second = s.running[0], s.waiting[0]
    assert (first.id, second.id) == (0, 1)
    assert second.computed == 0
    assert second.pages == []
    assert len(second.tokens) > 1
    kept = list(second.tokens)
    while first.finish_reason is None:
        run_step(s, 12)
    assert run_step(s, 13) == [(1, len(kept))], "recomputed in one go, prompt and answer alike"
    assert second.tokens == [*kept, 13]


def test_the_urgent_overtake_those_that_wait() -> None:
    s = scheduler(num_pages=32, max_batch=1)
    for number, priority in enumerate((0, 5, 0, -2, 5)):
        s.add(sequence(number, [number], 1, priority=priority))
    assert run_step(s) == [(3, 1)], "nobody ran yet, so the order is priority's"
    s.add(sequence(5, [5], 1, priority=-7))
    assert [run_step(s)[0][0] for _ in range(5)] == [5, 0, 2, 1, 4]


def test_an_urgent_prompt_comes_before_a_long_one_under_way() -> None:
    s = scheduler(num_pages=32)
    s.add(sequence(0, [1] * 30, 3, priority=1))
    assert run_step(s) == [(0, 8)]
    s.add(sequence(1, [2] * 5, 3, priority=1))
    s.add(sequence(2, [3] * 10, 3))
    assert run_step(s) == [(2, 8)]
    assert run_step(s) == [(2, 2), (0, 6)]
    assert run_step(s) == [(2, 1), (0, 7)]


def test_an_urgent_one_that_does_not_fit_holds_up_later_ones_only() -> None:
    s = scheduler(num_pages=5, prefix_reuse=False)
    s.add(sequence(0, [1] * 12, 2, priority=3))
    assert run_step(s) == [(0, 8)]
    s.add(sequence(1, [2] * 9, 2))
    s.add(sequence(2, [3], 2, priority=3))  # would fit
    assert [run_step(s) for _ in range(2)] == [[(0, 4)], [(0, 1)]], "what runs goes on, nobody is admitted"
    assert run_step(s) == [(1, 8)]


def test_the_least_urgent_is_preempted_though_it_came_first() -> None:
    s = scheduler(num_pages=4, page_size=2, prefix_reuse=False)
    background = sequence(0, [1], 7, priority=9)
    s.add(background)
    run_step(s, 10)
    s.add(sequence(1, [2], 5))
    while s.stats().preemptions == 0:
        run_step(s, 11)
    assert [q.id for q in s.running] == [1]
    assert [q.id for q in s.waiting] == [0]
    s.add(sequence(2, [3], 2, priority=8))
    finished = []
    while step := s.schedule():
        s.commit(step, np.full(len(step.sequences), 12, dtype=np.int32))
        finished += [q.id for q in step.sequences if q.finish_reason]
    assert finished == [1, 2, 0]
    assert len(background.tokens) == 8


def test_finishes_at_stop_token_and_at_limit() -> None:
    s = scheduler()
    a, b = sequence(0, [1], 3), sequence(1, [1], 3)
    a.stop_ids = frozenset({7})
    s.add(a)
    s.add(b)
    while run_step(s):
        pass
    assert (a.finish_reason, a.tokens) == ("stop", [1, 7])
    assert (b.finish_reason, b.tokens) == ("length", [1, 7, 7, 7])
    assert s.pool.held == 0


def test_limit_is_cut_to_capacity() -> None:
    for s, capacity in ((scheduler(num_pages=2), 8), (scheduler(max_positions=6), 6)):
        q = sequence(0, [1] * 3, 100)
        s.add(q)
        while run_step(s):
            pass
        assert (q.finish_reason, len(q.tokens)) == ("length", capacity)


def test_a_prompt_that_can_never_run_is_refused() -> None:
    s = scheduler(num_pages=2)
    s.add(sequence(0, [1] * 7))
    with pytest.raises(
        ConfigError, match=r"must fit into 8 tokens.* found: a prompt of 8 tokens; try: a shorter"
    ):
        s.add(sequence(1, [1] * 8))
    with pytest.raises(ConfigError, match="at least one token"):
        s.add(sequence(2, []))
    assert [q.id for q in s.waiting] == [0]


@pytest.mark.parametrize(("max_batch", "max_step_tokens"), [(9, 8), (0, 8)])
def test_impossible_sizes_are_refused(max_batch: int, max_step_tokens: int) -> None:
    with pytest.raises(ConfigError, match=f"max_batch {max_batch}, max_step_tokens {max_step_tokens}"):
        scheduler(max_batch=max_batch, max_step_tokens=max_step_tokens)


def test_prefix_is_taken_over_but_the_last_token_is_computed() -> None:
    s = scheduler(num_pages=16)
    prompt = list(range(8))
    s.add(sequence(0, prompt[:], 1))
    assert run_step(s) == [(0, 8)]
    same, longer, other = (
        sequence(1, prompt[:], 1),
        sequence(2, [*prompt, 9, 9], 1),
        sequence(3, [5, *prompt], 1),
    )
    for q in (same, longer, other):
        s.add(q)
    assert run_step(s) == [(1, 4), (2, 2), (3, 2)], "the second page holds the last token of `same`"
    assert [q.reused for q in (same, longer, other)] == [4, 8, 0]
    assert s.stats().tokens_reused == 12


def test_pages_of_a_running_sequence_are_shared() -> None:
    s = scheduler(num_pages=16)
    s.add(sequence(0, list(range(8)), 6))
    run_step(s)
    q = sequence(1, [*list(range(8)), 1], 6)
    s.add(q)
    run_step(s)
    assert q.pages[:2] == s.running[0].pages[:2]
    assert s.pool.held == 4, "2 shared pages and one of growth each"
    s.finish(s.running[0], "cancelled")
    assert s.pool.held == 3
    s.finish(q, "cancelled")
    assert s.pool.held == 0


def test_answers_are_found_again_as_prompts() -> None:
    s = scheduler(num_pages=16)
    q = sequence(0, [1, 2, 3], 7)
    s.add(q)
    while run_step(s):
        pass
    follow = sequence(1, [*q.tokens, 4], 1)
    s.add(follow)
    run_step(s)
    assert follow.reused == 8, "tokens 0 to 8 were computed, 0 to 7 fill two pages"


def test_a_step_that_failed_is_scheduled_again() -> None:
    s = scheduler()
    s.add(sequence(0, list(range(10)), 2))
    first = s.schedule()
    again = s.schedule()
    assert first is not None
    assert again is not None
    assert again.batch.tokens.tolist() == first.batch.tokens.tolist() == list(range(8))
    assert again.batch.pages.tolist() == first.batch.pages.tolist()
    s.commit(again, np.zeros(1, dtype=np.int32))
    assert run_step(s) == [(0, 2)]


def test_finish_is_final() -> None:
    s = scheduler()
    q = sequence(0, [1, 2], 4)
    s.add(q)
    run_step(s)
    s.finish(q, "stop")
    s.finish(q, "cancelled")
    assert q.finish_reason == "stop"
    assert s.schedule() is None


class Traffic(RuleBasedStateMachine):
    """Random arrivals, steps, failures and cancellations over few pages. Whatever happens, the pages add up
    and every answer is the one the toy model gives alone."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = ToyRunner(num_pages=7, page_size=3)
        self.s = Scheduler(num_pages=7, page_size=3, max_positions=18, max_batch=3, max_step_tokens=5)
        self.all: list[tuple[Sequence, list[int], SamplingParams]] = []

    @rule(
        # Few different pages, so that whole prompts, beginnings and middles coincide.
        pages=st.lists(st.sampled_from([[1, 2, 3], [4, 5, 6]]), max_size=4),
        rest=st.sampled_from([[], [7], [8, 9]]),
        max_tokens=st.integers(1, 12),
        temperature=st.sampled_from([0.0, 1.0]),
        priority=st.sampled_from([0, 0, 1, -3]),
    )
    def arrive(
        self, pages: list[list[int]], rest: list[int], max_tokens: int, temperature: float, priority: int
    ) -> None:
        prompt = [token for page in pages for token in page] + rest or [0]
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=len(self.all))
        q = sequence(
            len(self.all), prompt[:], max_tokens, temperature=temperature, seed=params.seed, priority=priority
        )
        q.stop_ids = frozenset({EOS})
        self.s.add(q)
        self.all.append((q, prompt, params))

    @rule(longest=st.integers(0, 6), right=st.sampled_from([0.0, 0.8, 1.0]))
    def advance(self, longest: int, right: float) -> None:
        def guess(sequences: list[Sequence]) -> list[list[int]]:
            return Oracle(toy_next, VOCABULARY, right, len(self.all)).propose(sequences, longest)

        step = self.schedule(guess)
        if step is not None:
            self.s.commit(step, self.execute(step))

    @rule()
    def fail(self) -> None:
        step = self.schedule(lambda s: Oracle(toy_next, VOCABULARY, 0.5).propose(s, 3))
        if step is not None:
            self.execute(step)  # the pages are written, the samples are lost

    @precondition(lambda self: self.s.running or self.s.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        live = [*self.s.running, *self.s.waiting]
        self.s.finish(live[data.draw(st.integers(0, len(live) - 1))], "cancelled")

    def schedule(self, propose: Propose | None = None) -> Step | None:
        """A step, having looked at who was let in and who had to go for it."""
        before = list(self.s.running)
        step = self.s.schedule(propose)
        entered = [q.order for q in self.s.running if q not in before]
        left = [q.order for q in before if q not in self.s.running]
        assert not (entered and left), "no pages change hands twice in a step"
        assert all(q.order > max(entered) for q in self.s.waiting if entered), "nobody is passed over"
        assert all(q.order < min(left) for q in self.s.running if left), "the last in order are the victims"
        assert step is None or self.s.running[0] in step.sequences, "the first in order always advances"
        return step

    def execute(self, step: Step) -> np.ndarray:
        return self.runner.sample(step.batch, step.temperature, step.top_k, step.top_p, step.seeds, step.rows)

    @invariant()
    def pages_add_up(self) -> None:
        self.s.pool.check()
        holders = [page for q in self.s.running for page in q.pages]
        assert self.s.pool.held == len(set(holders))
        for page in range(7):
            assert self.s.pool._holders[page] == holders.count(page)
        for q in self.s.running:
            assert self.s._tables[q.row].tolist() == q.pages + [-1] * (6 - len(q.pages))
            assert len(q.tokens) <= 18
            assert q.computed < len(q.tokens)
        assert sorted([q.row for q in self.s.running] + self.s._free_rows) == [0, 1, 2]
        assert all(not q.pages and q.row == -1 for q in self.s.waiting)
        for queue in (self.s.running, self.s.waiting):
            order = [(q.priority, q.id) for q in queue]
            assert order == sorted(order)
        for equal in {q.priority for q in self.s.running}:
            order = [q.id for q in (*self.s.running, *self.s.waiting) if q.priority == equal]
            assert order == sorted(order), "among equals first come, first served"

    def teardown(self) -> None:
        for _ in range(2000):
            step = self.schedule()
            if step is None:
                break
            self.s.commit(step, self.execute(step))
        assert self.s.pool.held == 0, "nothing runs, so nothing is held"
        for q, prompt, params in self.all:
            assert q.finish_reason is not None, "every sequence ends"
            expected = prompt + toy_generate(prompt, params, capacity=18)
            if q.finish_reason == "cancelled":
                expected = expected[: len(q.tokens)]
            assert q.tokens == expected


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(deadline=None, derandomize=True, max_examples=100, stateful_step_count=40)
