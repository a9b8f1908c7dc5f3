"""Speculative decoding: guess the next tokens cheaply and let the model judge several of them in one step.

A step that reads all weights for one token costs little more for a few. So tokens that are likely to come
next, a *draft*, are computed together with the last one, and the model draws at each position what it would
have drawn there anyway. The draft's tokens up to the first that differs from that draw are accepted, and the
draw there comes on top (`scheduler.Scheduler.commit`).

Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding" (2023), and Chen
et al., "Accelerating large language model decoding with speculative sampling" (2023), accept a draft's token
with a probability that keeps the model's distribution. Here the random number of a draw depends on seed and
position alone (`sampler`), so accepting exactly the drafts that equal the draw keeps more than that: every
token is the one that plain decoding with the same seed gives, whoever guessed and however well. It rests on
logits that do not depend on how a sequence was cut into steps, which integer formats promise on the cpu
runner; with float weights a near tie may fall the other way, as it may in another batch.

Prompt lookup is Saxena's (2023, github.com/apoorvumang/prompt-lookup-decoding): what followed the last
tokens when they occurred before is likely to follow again. A draft model (`draft`) guesses anywhere, but
takes time of its own.
"""

from __future__ import annotations

from bisect import bisect, insort
from collections import Counter, deque
from itertools import accumulate
from operator import mul
from typing import Protocol

from flatout.core.formats import Recipe, parse_format
from flatout.core.spec import ModelSpec
from flatout.engine.scheduler import MAX_DRAFTED_ROWS, Sequence, Step, agreement

LONGEST_DRAFT = 15
"""With the token it follows it fills the 16 rows of a tile."""
_LENGTHS = (0, 1, 2, 3, 5, 7, 11, LONGEST_DRAFT)  # few, so that the seconds of each are soon known
_NGRAMS = (3, 2)  # tokens that must have occurred before, in order of preference
_MEMORY = 5  # measurements of a step size that are kept; their median is believed
_WEIGHT = 0.1  # least weight of a new observation in the chance that a guess comes true
_GROWTH = 0.25  # how much slower a step of twice the tokens is thought to be before it is measured
_PATIENCE = 128  # steps with a draft that did not seem to pay before one is tried all the same; doubles
_LOOKUP_CHANCE = 0.5  # that a guess comes true, before anything is known
_DRAFT_CHANCE = 0.8


class Proposer(Protocol):
    """Guesses. Any guess is safe: a wrong one costs time, never a different answer."""

    def propose(self, sequences: list[Sequence], longest: int) -> list[list[int]]:
        """For each sequence at most `longest` tokens that may follow `sequence.tokens`, or none."""
        ...


class CostlyProposer(Proposer, Protocol):
    """One whose guesses take time that counts."""

    def seconds(self, sequences: list[Sequence]) -> tuple[float, float]:
        """What a draft for all of `sequences` costs: once, and for each of its tokens."""
        ...


def is_exact(spec: ModelSpec, recipe: Recipe) -> bool:
    """Whether logits on the cpu runner are the same bits however steps are cut: all products are of
    integers."""
    linears = [recipe.format_of(i, linear) for i in range(spec.num_layers) for linear in spec.linears()]
    return all(fmt.is_integer for fmt in (*linears, parse_format(recipe.head)))


class NgramProposer:
    """Prompt lookup: what followed the latest earlier occurrence of a sequence's last 3 tokens, or else 2.

    An occurrence that runs into the end of the sequence is continued as a cycle.
    """

    def __init__(self) -> None:
        self._indexes: dict[int, NgramIndex] = {}

    def propose(self, sequences: list[Sequence], longest: int) -> list[list[int]]:
        # Only sequences that still decode are kept.
        self._indexes = {s.id: self._indexes.get(s.id) or NgramIndex() for s in sequences}
        return [self._indexes[s.id].guess(s.tokens, longest) for s in sequences]


class NgramIndex:
    """Where each n-gram of one growing sequence was last seen; a constant number of look-ups a token."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._end = _NGRAMS[-1]

    def guess(self, tokens: list[int], longest: int) -> list[int]:
        """What may follow `tokens`, which begin with those of the last call."""
        # The n-grams at the very end are looked for, so they are entered with the next token only.
        for end in range(self._end, len(tokens)):
            for n in _NGRAMS:
                if n <= end:
                    self._after[tuple(tokens[end - n : end])] = end
        self._end = max(self._end, len(tokens))
        for n in _NGRAMS:
            start = self._after.get(tuple(tokens[-n:]))
            if start is not None:
                cycle = len(tokens) - start
                return [tokens[start + i % cycle] for i in range(longest)]
        return []


class StepTimes:
    """Seconds of decoding steps by their number of tokens: the median of the last few. unsettled: the first
    steps of a size that do not count, where a runner compiles or captures in them."""

    def __init__(self, unsettled: int = 0) -> None:
        self._unsettled, self._seen = unsettled, Counter[int]()
        self._samples: dict[int, deque[float]] = {}
        self._sizes: list[int] = []
        self._seconds: dict[int, float] = {}

    def __contains__(self, tokens: int) -> bool:
        return tokens in self._seconds

    def add(self, tokens: int, seconds: float) -> None:
        self._seen[tokens] += 1
        if self._seen[tokens] <= self._unsettled:
            return
        if tokens not in self._samples:
            self._samples[tokens] = deque(maxlen=_MEMORY)
            insort(self._sizes, tokens)
        self._samples[tokens].append(seconds)
        samples = sorted(self._samples[tokens])
        self._seconds[tokens] = samples[(len(samples) - 1) // 2]

    def estimate(self, tokens: int) -> float:
        """Of a size never measured: on the line between its neighbours; beyond all, a cautious growth from
        the largest. Call only for sizes from the smallest that was added."""
        if tokens in self._seconds:
            return self._seconds[tokens]
        i = bisect(self._sizes, tokens)
        if i == len(self._sizes):
            largest = self._sizes[-1]
            return self._seconds[largest] * (1 + _GROWTH * (tokens - largest) / largest)
        low, high = self._sizes[i - 1], self._sizes[i]
        share = (tokens - low) / (high - low)
        return self._seconds[low] * (1 - share) + self._seconds[high] * share


class Record:
    """How often a proposer's guesses came true, and how often they did not seem to pay."""

    def __init__(self, chance: float) -> None:
        # The chance that a draft's token i comes true once those before it have.
        self._chances = [chance] * LONGEST_DRAFT
        self._judged = [1] * LONGEST_DRAFT
        # By sequence, where a draft began, and the draft: until it is known how much of it came true.
        self._open: dict[int, tuple[int, list[int]]] = {}
        self._declined, self._patience = 0, _PATIENCE

    def gains(self) -> list[float]:
        """Tokens that drafts of length 0, 1, ... are expected to bring."""
        return [0.0, *accumulate(accumulate(self._chances, mul))]

    def enter(self, sequences: list[Sequence], drafts: list[list[int]]) -> None:
        """Note drafts, to be judged by the tokens that come, whether they are computed or not."""
        for sequence, draft in zip(sequences, drafts, strict=True):
            if draft:
                self._open.setdefault(sequence.id, (len(sequence.tokens), draft))

    def judge(self, sequences: list[Sequence]) -> None:
        """Learn from the tokens that came; drafts of other sequences are forgotten."""
        self._open = {s.id: self._open[s.id] for s in sequences if s.id in self._open}
        for sequence in sequences:
            if sequence.id in self._open:
                self._judge(sequence, *self._open[sequence.id])

    def _judge(self, sequence: Sequence, start: int, draft: list[int]) -> None:
        came = sequence.tokens[start : start + len(draft)]
        agreed = agreement(draft, came)
        if agreed == len(came) < len(draft):
            return  # right so far
        del self._open[sequence.id]
        last = min(agreed, len(draft) - 1)
        for i in range(last + 1):
            self._judged[i] += 1
            weight = max(_WEIGHT, 1 / self._judged[i])
            self._chances[i] += weight * ((i < agreed) - self._chances[i])
        for i in range(last + 1, LONGEST_DRAFT):
            if self._judged[i] == 1:  # never judged: thought to be as good as what comes before it
                self._chances[i] = self._chances[i - 1]

    def choose(self, rates: list[float]) -> int:
        """The index of the best rate, where the first is that of doing without; and now and then the best of
        the others all the same."""
        best = rates.index(max(rates))
        if best:
            self._declined, self._patience = 0, _PATIENCE
            return best
        self._declined += 1
        if self._declined < self._patience:
            return 0
        self._declined, self._patience = 0, 2 * self._patience
        return rates.index(max(rates[1:]), 1)


class Speculator:
    """Decides, step by step, how much of what is guessed is worth computing, and worth guessing.

    Of n tokens guessed, those up to the first wrong one come on top of the step's own token, so the best cut
    is the one with the most expected tokens a second: chances from how often guesses came true, seconds from
    the steps of that size and, for a draft model, from its own. Guesses of `proposer` cost nothing, so they
    are always made and judged, and only the time of larger steps has to be tried again now and then. `draft`
    is asked in steps where its guesses promise more than those. unsettled: as in StepTimes.
    """

    def __init__(self, proposer: Proposer, draft: CostlyProposer | None = None, unsettled: int = 0) -> None:
        self._proposer = proposer
        self.draft = draft
        self._times = StepTimes(unsettled)
        self._looked_up, self._drafted = Record(_LOOKUP_CHANCE), Record(_DRAFT_CHANCE)

    def propose(self, sequences: list[Sequence]) -> list[list[int]]:
        """A draft, or none, for each sequence of a step (`scheduler.Propose`)."""
        self._looked_up.judge(sequences)
        self._drafted.judge(sequences)
        found = self._proposer.propose(sequences, LONGEST_DRAFT)
        self._looked_up.enter(sequences, found)
        count = len(sequences)
        if count not in self._times:
            return [[] for _ in sequences]
        rates = self._rates(self._looked_up, [len(draft) for draft in found])
        best = self._looked_up.choose(rates) if any(found) else 0
        longest = min(LONGEST_DRAFT, MAX_DRAFTED_ROWS // count - 1)
        if self.draft is not None and longest > 0:
            lengths = [min(longest, s.limit - len(s.tokens) - 1) for s in sequences]
            drafted = self._rates(self._drafted, lengths, *self.draft.seconds(sequences))
            length = _LENGTHS[self._drafted.choose([max(rates), *drafted[1:]])]
            drafts = self.draft.propose(sequences, min(length, longest)) if length else []
            if any(drafts):
                self._drafted.enter(sequences, drafts)
                return drafts
        return [draft[: _LENGTHS[best]] for draft in found]

    def record(self, step: Step, seconds: float) -> None:
        """Learn what a step of decoding sequences cost."""
        if step.decodes:
            self._times.add(len(step.batch.tokens), seconds)

    def _rates(self, record: Record, lengths: list[int], once: float = 0.0, each: float = 0.0) -> list[float]:
        """Tokens a second when drafts of `lengths` are cut to each of _LENGTHS; seconds of guessing are
        `once`, and `each` for a token."""
        gains = record.gains()
        rates = []
        for longest in _LENGTHS:
            cut = [min(length, longest) for length in lengths]
            tokens = len(lengths) + sum(gains[n] for n in cut)
            seconds = self._times.estimate(len(lengths) + sum(cut))
            rates.append(tokens / (seconds + (once + each * max(cut) if longest else 0)))
        return rates
