"""Draft model: a second, cheaper model of the same vocabulary that guesses what the first will say.

It runs on its own runner and its own pages. A guess is drawn with the sequence's own parameters and seed: the
likeliest token where decoding is greedy, and otherwise by the random number that the model will draw with. A
draft model that is close then comes to the same token more often than the likeliest one is drawn. Like every
guess it is judged by the model (`speculate`), so the draft model changes the time of an answer and nothing
else.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from flatout.engine.cache import PagePool, extend_digests
from flatout.engine.runner import Runner, StepInput
from flatout.engine.scheduler import Sequence, agreement
from flatout.engine.speculate import StepTimes

_USUAL = 2  # unseen tokens after a draft that came true whole: its last, and the one drawn on top
_REHEARSALS = 3  # steps of each size that are timed before anything is guessed


@dataclass(slots=True, eq=False)
class _Copy:
    """A sequence as the draft model has it: in its pages are the first `computed` of the sequence's first
    `start` tokens and the guesses that follow them. digests: names of full pages, of which the first `named`
    are known to the pool."""

    sequence: Sequence
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    start: int = 0
    guesses: list[int] = field(default_factory=list)
    wanted: int = 0
    digests: list[bytes] = field(default_factory=list)
    named: int = 0

    def unseen(self, most: int) -> list[int]:
        """The next tokens to compute, at most so many."""
        last = self.computed + most
        if self.computed >= self.start:
            return self.guesses[self.computed - self.start : last - self.start]
        return self.sequence.tokens[self.computed : min(last, self.start)]


class DraftProposer:
    """Guesses with `runner`, whose model has the vocabulary of the one that judges.

    The cache follows what was accepted: positions of rejected guesses are written anew, tokens never seen are
    caught up on in chunks, and pages of sequences that no longer decode go back at the next call. Where pages
    or positions do not suffice for a sequence, it gets no guesses. unsettled: as in StepTimes.
    """

    def __init__(self, runner: Runner, unsettled: int = 0) -> None:
        self.runner = runner
        self.pool = PagePool(runner.num_pages)
        self._copies: dict[int, _Copy] = {}
        self._times = StepTimes(unsettled)
        for size in (min(runner.page_size, 16), 1):
            for _ in range(unsettled + _REHEARSALS):
                nothing = Sequence(id=-1, tokens=[0] * size, limit=size)
                self._step([_Copy(nothing, pages=[0], start=size)])

    def propose(self, sequences: list[Sequence], longest: int) -> list[list[int]]:
        copies = self._follow(sequences)
        for copy in copies:
            copy.wanted = self._room(copy, longest)
        active = [copy for copy in copies if copy.wanted > 0]
        while active:
            self._step(active)
            active = [copy for copy in active if len(copy.guesses) < copy.wanted]
        for copy in copies:
            self._name_pages(copy)
        return [list(copy.guesses) for copy in copies]

    def seconds(self, sequences: list[Sequence]) -> tuple[float, float]:
        """What a draft for `sequences` is thought to cost: once, and for each of its tokens.

        The first is a sequence's share of the time that catching up on it takes: as many more tokens as it
        has been given will carry that, for want of a better forecast, or fewer if its limit comes first.
        """
        once = 0.0
        for copy in self._follow(sequences):
            sequence = copy.sequence
            length = len(sequence.tokens)
            behind = length - copy.computed
            if behind > _USUAL:
                answered = max(1, length - sequence.prompt_length)
                most = self.runner.max_step_tokens
                chunks, rest = divmod(behind, most)
                seconds = chunks * self._times.estimate(most) if chunks else 0.0
                seconds += self._times.estimate(rest) if rest else 0
                once += seconds / max(1, min(answered, sequence.limit - length))
        return once, self._times.estimate(len(sequences))

    def _follow(self, sequences: list[Sequence]) -> list[_Copy]:
        """The copies of `sequences`, back at the tokens that are truly theirs; all others are given up."""
        for gone in self._copies.keys() - {sequence.id for sequence in sequences}:
            self.pool.release(self._copies.pop(gone).pages)
        return [self._agreed(self._copies.get(s.id) or self._begin(s)) for s in sequences]

    def _begin(self, sequence: Sequence) -> _Copy:
        """A copy that has taken over cached pages of the same beginning."""
        copy = self._copies[sequence.id] = _Copy(sequence)
        size = self.runner.page_size
        extend_digests(copy.digests, sequence.tokens, size)
        copy.pages = self.pool.match(copy.digests[: (len(sequence.tokens) - 1) // size])
        self.pool.hold(copy.pages)
        copy.named = len(copy.pages)
        copy.computed = copy.start = copy.named * size
        return copy

    def _agreed(self, copy: _Copy) -> _Copy:
        tokens = copy.sequence.tokens
        agreed = copy.start + agreement(copy.guesses, tokens[copy.start :])
        # The last token is always computed, because what comes after it is wanted.
        copy.computed = min(copy.computed, agreed, len(tokens) - 1)
        copy.start = len(tokens)
        copy.guesses = []
        return copy

    def _room(self, copy: _Copy, longest: int) -> int:
        """How many guesses the sequence has use for, at most `longest`, with pages taken for all but the
        last; 0 where they do not suffice."""
        size = self.runner.page_size
        ends = min(copy.sequence.limit - 1, self.runner.spec.max_positions + 1)
        wanted = min(longest, ends - copy.start)
        missing = -(-(copy.start + wanted - 1) // size) - len(copy.pages)
        if wanted <= 0 or missing > self.pool.free:
            return 0
        copy.pages += [self.pool.take() for _ in range(missing)]
        return wanted

    def _name_pages(self, copy: _Copy) -> None:
        """Make full pages known that hold the sequence's own tokens, for later sequences that begin so."""
        extend_digests(copy.digests, copy.sequence.tokens, self.runner.page_size)
        full = min(copy.computed, copy.start) // self.runner.page_size
        for j in range(copy.named, full):
            self.pool.name(copy.pages[j], copy.digests[j])
        copy.named = max(copy.named, full)

    def _step(self, copies: list[_Copy]) -> None:
        """Compute what is unseen, as far as one step goes; a copy that has seen all gets another guess."""
        chunks = []
        budget = self.runner.max_step_tokens
        for copy in copies:
            chunks.append(copy.unseen(budget))
            budget -= len(chunks[-1])
        copies = [copy for copy, chunk in zip(copies, chunks, strict=True) if chunk]
        chunks = [chunk for chunk in chunks if chunk]
        of = [copy.sequence for copy in copies]
        pages = np.full((len(copies), max(len(copy.pages) for copy in copies)), -1, dtype=np.int32)
        for row, copy in zip(pages, copies, strict=True):
            row[: len(copy.pages)] = copy.pages
        batch = StepInput(
            np.array([token for chunk in chunks for token in chunk], dtype=np.int32),
            np.array([copy.computed for copy in copies], dtype=np.int32),
            np.array([len(chunk) for chunk in chunks], dtype=np.int32),
            pages,
        )
        begin = time.perf_counter()
        drawn = self.runner.sample(
            batch,
            np.array([s.temperature for s in of], dtype=np.float32),
            np.array([s.top_k for s in of], dtype=np.int32),
            np.array([s.top_p for s in of], dtype=np.float32),
            np.array([s.seed for s in of], dtype=np.uint64),
        )
        self._times.add(len(batch.tokens), time.perf_counter() - begin)
        for copy, chunk, token in zip(copies, chunks, drawn.tolist(), strict=True):
            copy.computed += len(chunk)
            if copy.computed == copy.start + len(copy.guesses):
                copy.guesses.append(token)
