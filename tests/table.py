"""A language model that is a table (the logits of the next token given the last one), and a tokenizer of
words.

For tests that need losses of a known size: two tables that differ by noise are an original and its
optimised form.
"""

from __future__ import annotations

import zlib
from typing import Literal

import numpy as np
from tests.toy import toy_spec

from flatout.engine.runner import StepInput
from flatout.engine.sampler import log_probabilities, sample

VOCABULARY = 64


def table(seed: int, noise: float = 0.0, rows: slice = slice(None)) -> np.ndarray:
    """float32 (V, V) logits; `noise` of that standard deviation is added to `rows`, the same for the same
    seed."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((VOCABULARY, VOCABULARY))
    disturbed = rng.standard_normal((VOCABULARY, VOCABULARY))
    logits[rows] += noise * disturbed[rows]
    return logits.astype(np.float32)


class TableRunner:
    """A Runner over such a table. It keeps nothing, so pages do not matter."""

    page_size = 64
    max_step_tokens = 512

    def __init__(self, logits: np.ndarray, name: str = "table", num_pages: int = 64) -> None:
        self.logits, self.name, self.num_pages = logits, name, num_pages
        self.spec = toy_spec(vocab_size=len(logits))
        self.scored = 0

    def forward(self, batch: StepInput, rows: Literal["last", "all"]) -> np.ndarray:
        logits = self.logits[batch.tokens]
        return logits if rows == "all" else logits[np.cumsum(batch.lengths) - 1]

    def score(self, batch: StepInput, targets: np.ndarray) -> np.ndarray:
        self.scored += len(targets)
        return log_probabilities(self.logits[batch.tokens], targets)

    def sample(
        self,
        batch: StepInput,
        temperature: np.ndarray,
        top_k: np.ndarray,
        top_p: np.ndarray,
        seeds: np.ndarray,
    ) -> np.ndarray:
        logits = self.forward(batch, "last")
        return sample(logits, batch.starts + batch.lengths, temperature, top_k, top_p, seeds)


class WordTokenizer:
    """A token a word: numbers are their own ids, other words are hashed into the vocabulary."""

    sha256 = "words"

    def __init__(self, adds_bos: bool = False, vocabulary: int = 1 << 30) -> None:
        self.adds_bos, self.bos, self._vocabulary = adds_bos, vocabulary - 1, vocabulary

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        numbers = [int(w) if w.isdigit() else zlib.crc32(w.encode()) for w in text.split()]
        return [self.bos] * add_bos + [number % (self._vocabulary - 1) for number in numbers]
