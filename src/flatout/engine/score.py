"""Log-probabilities of given texts by the runner that serves: what certificates and perplexities are made
of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flatout.engine.runner import MAX_STEP_TOKENS, Runner, StepInput, greedy_tokens
from flatout.errors import ConfigError


def score_documents(
    runner: Runner,
    docs: Sequence[Sequence[int]],
    step_tokens: int = MAX_STEP_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """For each document of n tokens, float32 (n - 1,): log p(token i | tokens before it) for tokens 1 to n -
    1.

    Documents share steps of at most `step_tokens` tokens; one longer than a step is cut at multiples of
    `step_tokens`, so where it is cut depends on nothing but itself. All pages of the runner are written:
    while an Engine serves from the same runner, call Engine.score_documents instead. progress(done, total)
    counts documents. Raises ConfigError, before any work, for a document that does not fit or holds ids
    outside the vocabulary.
    """
    return _score(runner, docs, [len(doc) for doc in docs], step_tokens, progress)[0]


def score_continuations(
    runner: Runner,
    docs: Sequence[Sequence[int]],
    firsts: Sequence[int],
    step_tokens: int = MAX_STEP_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What `score_documents` gives, and for each document int32 (n - first,): the greedy token at positions
    first to n - 1, each after the document's own tokens before it.

    firsts: where each document's continuation begins, 1 to n. Only the continuation is run a second time,
    from the pages that the scores left behind.
    """
    for i, (doc, first) in enumerate(zip(docs, firsts, strict=True)):
        if not 1 <= first <= len(doc):
            raise ConfigError(
                "a continuation begins after the first token",
                f"{first} in document {i} of {len(doc)} tokens",
                "a context before it",
            )
    return _score(runner, docs, firsts, step_tokens, progress)


def _score(
    runner: Runner,
    docs: Sequence[Sequence[int]],
    firsts: Sequence[int],
    step_tokens: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    if not 1 <= step_tokens <= MAX_STEP_TOKENS:
        raise ConfigError(
            f"a step holds 1 to {MAX_STEP_TOKENS} tokens", str(step_tokens), f"step_tokens={MAX_STEP_TOKENS}"
        )
    tokens = [np.asarray(doc, dtype=np.int64) for doc in docs]
    for i, doc in enumerate(tokens):
        _check(runner, i, doc)
    scores = [np.empty(max(len(doc) - 1, 0), dtype=np.float32) for doc in tokens]
    greedy = [np.empty(len(doc) - first, dtype=np.int32) for doc, first in zip(tokens, firsts, strict=True)]
    step = _ScoreStep(runner, step_tokens)
    for i, doc in enumerate(tokens):
        inputs, targets = doc[:-1].astype(np.int32), doc[1:].astype(np.int32)
        for start in range(0, len(inputs), step_tokens):
            stop = min(start + step_tokens, len(inputs))
            if not step.fits(len(inputs), start, stop):
                step.run()
            # Inputs first - 1 to n - 2 predict the continuation.
            drawn = max(start, firsts[i] - 1), max(stop, firsts[i] - 1)
            out = greedy[i][drawn[0] - firsts[i] + 1 : drawn[1] - firsts[i] + 1]
            step.add(inputs, targets, start, stop, scores[i], out)
        if progress is not None:
            progress(i + 1, len(tokens))
    step.run()
    return scores, greedy


def _check(runner: Runner, number: int, doc: np.ndarray) -> None:
    capacity = min(runner.spec.max_positions, runner.num_pages * runner.page_size)
    if len(doc) - 1 > capacity:
        raise ConfigError(
            f"a document must fit into {capacity + 1} tokens (the model's positions or the KV cache)",
            f"document {number} with {len(doc)} tokens",
            "shorter documents or a larger cache",
        )
    if len(doc) and not 0 <= int(doc.min()) <= int(doc.max()) < runner.spec.vocab_size:
        raise ConfigError(
            f"token ids lie between 0 and {runner.spec.vocab_size - 1}",
            f"document {number} with {int(doc.min())} to {int(doc.max())}",
            "the model's own tokenizer",
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """A stretch of a document: its inputs from position `start` on, what follows each, its document's pages,
    where the scores go, and where the greedy tokens of its last len(greedy) positions go."""

    inputs: np.ndarray
    targets: np.ndarray
    start: int
    pages: list[int]
    scores: np.ndarray
    greedy: np.ndarray


class _ScoreStep:
    """Collects chunks of documents into one step and writes their scores back. A document's pages are kept
    until its last chunk has run; chunks of one document are in different steps, because all but the last fill
    a step."""

    def __init__(self, runner: Runner, step_tokens: int) -> None:
        self._runner = runner
        self._step_tokens = step_tokens
        self._free = list(range(runner.num_pages - 1, -1, -1))
        self._open: list[int] = []  # pages of the document being added
        self._done: list[int] = []  # pages of documents whose last chunk is in this step
        self._chunks: list[_Chunk] = []
        self._count = 0

    def _pages(self, length: int) -> int:
        return -(-length // self._runner.page_size)

    def fits(self, length: int, start: int, stop: int) -> bool:
        """Whether the chunk start..stop of a document of `length` tokens can join the step."""
        needed = self._pages(length) if start == 0 else 0
        return self._count + stop - start <= self._step_tokens and needed <= len(self._free)

    def add(
        self,
        inputs: np.ndarray,
        targets: np.ndarray,
        start: int,
        stop: int,
        scores: np.ndarray,
        greedy: np.ndarray,
    ) -> None:
        if start == 0:
            self._open = [self._free.pop() for _ in range(self._pages(len(inputs)))]
        self._chunks.append(
            _Chunk(inputs[start:stop], targets[start:stop], start, self._open, scores[start:stop], greedy)
        )
        self._count += stop - start
        if stop == len(inputs):
            self._done += self._open
            self._open = []

    def run(self) -> None:
        """Score what was collected, if anything, then draw where greedy tokens are wanted."""
        if not self._chunks:
            return
        batch = _step_of([(chunk.inputs, chunk.start, chunk.pages) for chunk in self._chunks])
        found = self._runner.score(batch, np.concatenate([chunk.targets for chunk in self._chunks]))
        _deal(found, [chunk.scores for chunk in self._chunks])
        drawing = [chunk for chunk in self._chunks if len(chunk.greedy)]
        if drawing:
            self._draw(drawing)
        self._free += reversed(self._done)
        self._done, self._chunks, self._count = [], [], 0

    def _draw(self, chunks: list[_Chunk]) -> None:
        tails = [
            (c.inputs[-len(c.greedy) :], c.start + len(c.inputs) - len(c.greedy), c.pages) for c in chunks
        ]
        drawn = greedy_tokens(self._runner, _step_of(tails), "all")
        _deal(drawn, [chunk.greedy for chunk in chunks])


def _step_of(parts: Sequence[tuple[np.ndarray, int, list[int]]]) -> StepInput:
    """One step of (new tokens, position of the first, pages) for each sequence."""
    width = max(len(pages) for _, _, pages in parts)
    table = np.full((len(parts), width), -1, dtype=np.int32)
    for row, (_, _, pages) in zip(table, parts, strict=True):
        row[: len(pages)] = pages
    return StepInput(
        np.concatenate([tokens for tokens, _, _ in parts]),
        np.array([start for _, start, _ in parts], dtype=np.int32),
        np.array([len(tokens) for tokens, _, _ in parts], dtype=np.int32),
        table,
    )


def _deal(values: np.ndarray, outs: Sequence[np.ndarray]) -> None:
    """Write consecutive stretches of `values` into `outs`."""
    at = 0
    for out in outs:
        out[:] = values[at : at + len(out)]
        at += len(out)
