"""Continuous batching: which sequences advance by how many tokens in the next step, and in which pages.

Rules, in order of importance:
  1. Order is priority, the lower number first, and among equals arrival. `running` and `waiting` are both
     kept in it. Nobody is admitted while somebody earlier in it waits.
  2. Every step advances each caught-up sequence by one token (decode) and fills the rest of the token budget
     with prompt chunks in order. So a long prompt delays others by one bounded step at a time.
  3. A sequence is admitted when there are pages for all the tokens it has, after taking over cached pages of
     the same prefix, and one page of growth is left for every running sequence. So only decoding can run out
     of pages.
  4. When it does, the last in order of those that run gives up its pages and waits at its place in the queue
     with its tokens; it is recomputed later. Nobody is preempted for one that merely waits: what was computed
     would be thrown away, for no more than the time until somebody ends.
  5. A step in which every sequence decodes may also carry drafts: tokens guessed to follow, computed in the
     same step. They take no page that preempts anyone, and pages beyond what was accepted go back at once.

Progress: the first in order of those that run is never the victim while another runs, so it gains a token
with every step once its prompt is computed, and ends; and when nobody runs, the first that waits fits. So
whatever has arrived ends, as long as no more urgent sequences keep arriving. Starvation: while they do, and
take all there is, less urgent ones wait without bound. Priority does not age; whoever wants a bound gives
the same priority, under which nobody is overtaken.

Whether a sequence was batched, chunked, drafted for, overtaken, preempted or had its prefix reused changes
what is computed when, never which tokens and positions it attends to. Pure Python over a page pool: no
weights, and tests need none. vLLM's scheduler (v1) treats prefill and decode alike in the same way, and
orders by priority and arrival likewise; this one allocates prompts whole.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

import numpy as np

from flatout.engine.cache import PagePool, extend_digests
from flatout.engine.runner import MAX_STEP_TOKENS, StepInput
from flatout.errors import ConfigError

MAX_DRAFTED_ROWS = 64
"""Most tokens of a step that carries drafts: each costs a row of logits over the vocabulary."""


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """One sequence's state. tokens is prompt and output; computed counts those whose keys and values are in
    pages.

    limit is the number of tokens at which it ends. order: its priority, the lower number first, and the
    scheduler's count of arrivals. row is its row in the scheduler's tables, -1 while it waits. reused counts
    prompt tokens that were taken over from cached pages when it was first admitted.
    """

    id: int
    tokens: list[int]
    limit: int
    stop_ids: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    priority: int = 0
    order: tuple[int, int] = (0, 0)
    prompt_length: int = 0
    computed: int = 0
    reused: int = 0
    preemptions: int = 0
    row: int = -1
    finish_reason: str | None = None
    pages: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)


@dataclass(slots=True, frozen=True, eq=False)
class Step:
    """A step to run: the batch, the sampling parameters of its sequences, and who takes part with how many
    tokens, the last of which are its draft. rows: after which new tokens to sample; "all" when there are
    drafts."""

    batch: StepInput
    temperature: np.ndarray  # float32 (S,)
    top_k: np.ndarray  # int32 (S,)
    top_p: np.ndarray  # float32 (S,)
    seeds: np.ndarray  # uint64 (S,)
    sequences: list[Sequence]
    counts: list[int]
    drafts: list[list[int]]

    @property
    def rows(self) -> Literal["last", "all"]:
        return "all" if any(self.drafts) else "last"

    @property
    def decodes(self) -> bool:
        """Whether each sequence computes its last token and its draft only: no prompts."""
        return all(count == 1 + len(draft) for count, draft in zip(self.counts, self.drafts, strict=True))


Propose = Callable[[list[Sequence]], list[list[int]]]
"""Tokens guessed to come next, of each of the sequences that decode in a step; may be none."""


@dataclass(slots=True, frozen=True, kw_only=True)
class SchedulerStats:
    """Counters since the start, and the state now. tokens_drafted of tokens_computed were guesses, in
    drafted_steps of all steps; tokens_accepted of them came true."""

    running: int
    waiting: int
    pages_held: int
    pages_total: int
    steps: int
    tokens_computed: int
    tokens_reused: int
    preemptions: int
    drafted_steps: int
    tokens_drafted: int
    tokens_accepted: int


_in_order = attrgetter("order")


def agreement(draft: list[int], drawn: list[int]) -> int:
    """How many tokens of a draft came true: the length of the common beginning."""
    agreed = 0
    while agreed < min(len(draft), len(drawn)) and draft[agreed] == drawn[agreed]:
        agreed += 1
    return agreed


class Scheduler:
    """Owns the page pool and every live sequence. Not thread-safe."""

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_positions: int,
        max_batch: int = 32,
        max_step_tokens: int = MAX_STEP_TOKENS,
        prefix_reuse: bool = True,
    ) -> None:
        if not 1 <= max_batch <= max_step_tokens:
            raise ConfigError(
                "a step has at least one token for each of max_batch sequences",
                f"max_batch {max_batch}, max_step_tokens {max_step_tokens}",
                f"max_batch=32, max_step_tokens={MAX_STEP_TOKENS}",
            )
        self.pool = PagePool(num_pages)
        self.page_size = page_size
        self.capacity = min(max_positions, num_pages * page_size)
        self.max_batch = max_batch
        self.max_step_tokens = max_step_tokens
        self.prefix_reuse = prefix_reuse
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self._arrivals = 0
        self._steps = self._computed = self._reused = self._preemptions = 0
        self._drafted_steps = self._drafted = self._accepted = 0
        self._tables = np.full((max_batch, -(-self.capacity // page_size)), -1, dtype=np.int32)
        self._temperature = np.zeros(max_batch, dtype=np.float32)
        self._top_k = np.zeros(max_batch, dtype=np.int32)
        self._top_p = np.ones(max_batch, dtype=np.float32)
        self._seeds = np.zeros(max_batch, dtype=np.uint64)
        self._free_rows = list(range(max_batch - 1, -1, -1))
        self._ones = np.ones(max_batch, dtype=np.int32)
        # Sampling parameters gathered for the rows of the last step; None when a row has changed hands since.
        self._gathered: tuple[list[int], np.ndarray, tuple[np.ndarray, ...]] | None = None

    def check_prompt(self, length: int) -> None:
        """Raise ConfigError when a prompt of `length` tokens could never run: none, or no room for one new
        token."""
        if length == 0:
            raise ConfigError("a prompt must hold at least one token", "none", "a longer prompt")
        if length >= self.capacity:
            raise ConfigError(
                f"prompt and answer must fit into {self.capacity} tokens, the lesser of the model's "
                "positions and the KV cache, so the prompt must be shorter than that",
                f"a prompt of {length} tokens",
                "a shorter prompt, or a larger cache if the model's context allows",
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises ConfigError as check_prompt does."""
        length = len(sequence.tokens)
        self.check_prompt(length)
        sequence.prompt_length = length
        sequence.limit = min(max(sequence.limit, length + 1), self.capacity)
        sequence.order = sequence.priority, self._arrivals
        self._arrivals += 1
        insort(self.waiting, sequence, key=_in_order)

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence and give back its pages; their contents stay known for later prompts."""
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        if sequence.row >= 0:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self, propose: Propose | None = None) -> Step | None:
        """The next step, or None when nothing is left to do. Each step must be committed before the next is
        asked for; a step whose execution failed may be dropped instead and is scheduled again. `propose` is
        asked for drafts when every sequence of the step decodes; what does not fit of them is cut."""
        preempted = self._grow()
        sequences: list[Sequence] = []
        counts: list[int] = []
        prompts: list[Sequence] = []
        for sequence in self.running:
            if len(sequence.tokens) - sequence.computed == 1:
                sequences.append(sequence)
                counts.append(1)
            else:
                prompts.append(sequence)
        budget = self.max_step_tokens - len(sequences)
        prompts.reverse()  # the first in order is at the end
        open_door = not preempted
        while budget:
            open_door = open_door and bool(self.waiting) and len(self.running) < self.max_batch
            entered = None
            if open_door and not (prompts and prompts[-1].order < self.waiting[0].order):
                entered = self._admit()
                open_door = entered is not None
            if entered is None and not prompts:
                break
            budget -= self._advance(entered or prompts.pop(), budget, sequences, counts)
        if not sequences:
            return None
        drafts: list[list[int]] = [[] for _ in sequences]
        if propose is not None and all(s.computed == len(s.tokens) - 1 for s in sequences):
            drafts = self._fit(sequences, propose(sequences))
            counts = [1 + len(draft) for draft in drafts]
        return self._step(sequences, counts, drafts)

    def commit(self, step: Step, sampled: np.ndarray) -> list[tuple[Sequence, int]]:
        """Take in the tokens a step sampled: (S,), or (T,) of a step with drafts. Returns the sequences that
        have new tokens and how many, in step order; those at a stop token or at their limit are finished.

        Of a draft those tokens are accepted that equal the model's own draw, up to the first that does not;
        the draw there is the next token. What the sequence is given is therefore what it would have drawn
        without drafts: a draw depends on seed and position only, and rejected tokens' keys and values are
        overwritten before anything attends to them.
        """
        advanced: list[tuple[Sequence, int]] = []
        drawn = iter(sampled.tolist())
        for sequence, count, draft in zip(step.sequences, step.counts, step.drafts, strict=True):
            draws = [next(drawn) for _ in range(1 + len(draft))]
            agreed = agreement(draft, draws)
            self._computed += count
            self._drafted += len(draft)
            computed = sequence.computed + count - len(draft)
            if computed < len(sequence.tokens):
                self._keep(sequence, computed)
                continue  # a chunk that does not end the prompt: its sample means nothing
            new = self._until_end(sequence, draws[: agreed + 1])
            self._accepted += len(new) - 1
            sequence.tokens += new
            self._keep(sequence, computed + len(new) - 1)
            advanced.append((sequence, len(new)))
            if new[-1] in sequence.stop_ids:
                self.finish(sequence, "stop")
            elif len(sequence.tokens) >= sequence.limit:
                self.finish(sequence, "length")
        self._steps += 1
        self._drafted_steps += any(step.drafts)
        return advanced

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            running=len(self.running),
            waiting=len(self.waiting),
            pages_held=self.pool.held,
            pages_total=self.pool.num_pages,
            steps=self._steps,
            tokens_computed=self._computed,
            tokens_reused=self._reused,
            preemptions=self._preemptions,
            drafted_steps=self._drafted_steps,
            tokens_drafted=self._drafted,
            tokens_accepted=self._accepted,
        )

    def _fit(self, sequences: list[Sequence], drafts: list[list[int]]) -> list[list[int]]:
        """As much of each draft as has room: before the sequence's limit, in the step, and in pages that
        nobody holds, which are taken."""
        budget = min(self.max_step_tokens, max(MAX_DRAFTED_ROWS, len(sequences))) - len(sequences)
        fitted = []
        for sequence, draft in zip(sequences, drafts, strict=True):
            length = len(sequence.tokens)
            wanted = min(len(draft), budget, sequence.limit - length - 1)
            while length + wanted > len(sequence.pages) * self.page_size and self.pool.free:
                self._take_page(sequence)
            wanted = min(wanted, len(sequence.pages) * self.page_size - length)
            fitted.append(draft[:wanted])
            budget -= wanted
        return fitted

    def _until_end(self, sequence: Sequence, tokens: list[int]) -> list[int]:
        """`tokens` up to the first at which the sequence ends."""
        tokens = tokens[: sequence.limit - len(sequence.tokens)]
        for i, token in enumerate(tokens):
            if token in sequence.stop_ids:
                return tokens[: i + 1]
        return tokens

    def _keep(self, sequence: Sequence, computed: int) -> None:
        """Note that the first `computed` tokens are in pages: name those now full, and give back pages that
        were taken for what a draft did not come to."""
        page_size = self.page_size
        first, last = sequence.computed // page_size, computed // page_size
        sequence.computed = computed
        if last > first and self.prefix_reuse:
            extend_digests(sequence.digests, sequence.tokens, page_size)
            for j in range(first, last):
                self.pool.name(sequence.pages[j], sequence.digests[j])
        needed = -(-len(sequence.tokens) // page_size)
        if len(sequence.pages) > needed:
            self.pool.release(sequence.pages[needed:])
            self._tables[sequence.row, needed : len(sequence.pages)] = -1
            del sequence.pages[needed:]

    def _take_page(self, sequence: Sequence) -> None:
        page = self.pool.take()
        self._tables[sequence.row, len(sequence.pages)] = page
        sequence.pages.append(page)

    def _grow(self) -> bool:
        """Give each running sequence the page its next token goes to. True when one had to give up its
        pages."""
        preempted = False
        i = 0
        while i < len(self.running):
            sequence = self.running[i]
            i += 1
            if sequence.computed < len(sequence.pages) * self.page_size:
                continue
            while self.pool.free == 0 and sequence.row >= 0:
                self._preempt(self.running.pop())
                preempted = True
            if sequence.row >= 0:
                self._take_page(sequence)
        return preempted

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.computed = 0
        sequence.preemptions += 1
        self._preemptions += 1
        insort(self.waiting, sequence, key=_in_order)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        self._tables[sequence.row, : len(sequence.pages)] = -1
        self._free_rows.append(sequence.row)
        sequence.row = -1
        sequence.pages.clear()

    def _admit(self) -> Sequence | None:
        """Give the head of the queue its pages and a row and let it run, or return None and change
        nothing."""
        sequence = self.waiting[0]
        length = len(sequence.tokens)
        matched: list[int] = []
        if self.prefix_reuse:
            extend_digests(sequence.digests, sequence.tokens, self.page_size)
            # The last token is always computed, because its logits are needed.
            matched = self.pool.match(sequence.digests[: (length - 1) // self.page_size])
        needed = -(-length // self.page_size) - len(matched)
        if needed + len(self.running) > self.pool.free - self.pool.idle(matched):
            return None
        self.pool.hold(matched)
        sequence.pages.extend(matched)
        sequence.pages.extend(self.pool.take() for _ in range(needed))
        sequence.computed = len(matched) * self.page_size
        self._reused += sequence.computed
        if sequence.preemptions == 0:
            sequence.reused = sequence.computed
        row = sequence.row = self._free_rows.pop()
        self._tables[row, : len(sequence.pages)] = sequence.pages
        self._temperature[row] = sequence.temperature
        self._top_k[row] = sequence.top_k
        self._top_p[row] = sequence.top_p
        self._seeds[row] = sequence.seed
        self._gathered = None
        insort(self.running, self.waiting.pop(0), key=_in_order)
        return sequence

    def _advance(self, sequence: Sequence, budget: int, sequences: list[Sequence], counts: list[int]) -> int:
        count = min(len(sequence.tokens) - sequence.computed, budget)
        sequences.append(sequence)
        counts.append(count)
        return count

    def _step(self, sequences: list[Sequence], counts: list[int], drafts: list[list[int]]) -> Step:
        size = len(sequences)
        rows = [s.row for s in sequences]
        if self._gathered is None or self._gathered[0] != rows:
            index = np.array(rows)
            parameters = (self._temperature, self._top_k, self._top_p, self._seeds)
            self._gathered = rows, index, tuple(p[index] for p in parameters)
        _, index, (temperature, top_k, top_p, seeds) = self._gathered
        width = max(len(s.pages) for s in sequences)
        # One row is a contiguous view of the table; several are gathered into a fresh contiguous array.
        pages = self._tables[rows[0] : rows[0] + 1, :width] if size == 1 else self._tables[index, :width]
        if sum(counts) == size:
            tokens = np.array([s.tokens[s.computed] for s in sequences], dtype=np.int32)
            lengths = self._ones[:size]
        else:
            flat: list[int] = []
            for s, count, draft in zip(sequences, counts, drafts, strict=True):
                flat += s.tokens[s.computed : s.computed + count - len(draft)]
                flat += draft
            tokens = np.array(flat, dtype=np.int32)
            lengths = np.array(counts, dtype=np.int32)
        starts = np.array([s.computed for s in sequences], dtype=np.int32)
        batch = StepInput(tokens, starts, lengths, pages)
        return Step(batch, temperature, top_k, top_p, seeds, sequences, counts, drafts)
