"""Log-probabilities of given texts by the runner that serves: what certificates and perplexities are made
of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from flatout.engine.runner import MAX_STEP_TOKENS, Runner, StepInput
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
    if not 1 <= step_tokens <= MAX_STEP_TOKENS:
        raise ConfigError(
            f"a step holds 1 to {MAX_STEP_TOKENS} tokens", str(step_tokens), f"step_tokens={MAX_STEP_TOKENS}"
        )
    tokens = [np.asarray(doc, dtype=np.int64) for doc in docs]
    for i, doc in enumerate(tokens):
        _check(runner, i, doc)
    scores = [np.empty(max(len(doc) - 1, 0), dtype=np.float32) for doc in tokens]
    step = _ScoreStep(runner, step_tokens)
    for i, doc in enumerate(tokens):
        inputs, targets = doc[:-1].astype(np.int32), doc[1:].astype(np.int32)
        for start in range(0, len(inputs), step_tokens):
            stop = min(start + step_tokens, len(inputs))
            if not step.fits(len(inputs), start, stop):
                step.run()
            step.add(inputs, targets, start, stop, scores[i])
        if progress is not None:
            progress(i + 1, len(tokens))
    step.run()
    return scores


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
        self._chunks: list[tuple[np.ndarray, np.ndarray, int, list[int], np.ndarray]] = []
        self._count = 0

    def _pages(self, length: int) -> int:
        return -(-length // self._runner.page_size)

    def fits(self, length: int, start: int, stop: int) -> bool:
        """Whether the chunk start..stop of a document of `length` tokens can join the step."""
        needed = self._pages(length) if start == 0 else 0
        return self._count + stop - start <= self._step_tokens and needed <= len(self._free)

    def add(self, inputs: np.ndarray, targets: np.ndarray, start: int, stop: int, out: np.ndarray) -> None:
        if start == 0:
            self._open = [self._free.pop() for _ in range(self._pages(len(inputs)))]
        self._chunks.append((inputs[start:stop], targets[start:stop], start, self._open, out[start:stop]))
        self._count += stop - start
        if stop == len(inputs):
            self._done += self._open
            self._open = []

    def run(self) -> None:
        """Score what was collected, if anything."""
        if not self._chunks:
            return
        width = max(len(pages) for _, _, _, pages, _ in self._chunks)
        table = np.full((len(self._chunks), width), -1, dtype=np.int32)
        for row, (_, _, _, pages, _) in zip(table, self._chunks, strict=True):
            row[: len(pages)] = pages
        batch = StepInput(
            np.concatenate([chunk[0] for chunk in self._chunks]),
            np.array([chunk[2] for chunk in self._chunks], dtype=np.int32),
            np.array([len(chunk[0]) for chunk in self._chunks], dtype=np.int32),
            table,
        )
        scored = self._runner.score(batch, np.concatenate([chunk[1] for chunk in self._chunks]))
        at = 0
        for chunk in self._chunks:
            chunk[4][:] = scored[at : at + len(chunk[0])]
            at += len(chunk[0])
        self._free += reversed(self._done)
        self._done, self._chunks, self._count = [], [], 0
