"""What workers share: prompts of one length in, greedy tokens out, and log-probabilities of a text."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

import numpy as np

_ROWS = 64  # of logits turned into probabilities at a time


class Session(ABC):
    """A model with a KV cache, and what a peer is asked for."""

    @abstractmethod
    def begin(self, sequences: int, positions: int) -> None:
        """Forget everything; `positions` tokens of each sequence will come."""

    @abstractmethod
    def step(self, tokens: np.ndarray, past: int, wanted: np.ndarray) -> np.ndarray:
        """Take in tokens (S, N), which follow `past` others, and give float32 logits (S, W, V) of the W
        positions of the N in `wanted`; valid until the next step."""

    def first(self, prompt: list[int]) -> bool:
        """True when the token after the prompt is there."""
        self.prefill([prompt])
        return True

    def prefill(self, prompts: list[list[int]]) -> float:
        """Seconds until the logits after the last token of every prompt are there."""
        tokens = _batch(prompts)
        self.begin(*tokens.shape)
        start = time.perf_counter()
        self._take_in(tokens)
        return time.perf_counter() - start

    def decode(self, prompts: list[list[int]], tokens: int) -> float:
        """Seconds to generate `tokens` tokens for each prompt, after an untimed prefill."""
        batch = _batch(prompts)
        sequences, past = batch.shape
        self.begin(sequences, past + tokens)
        following = self._take_in(batch)
        only = np.zeros(1, dtype=np.int64)  # wanted
        start = time.perf_counter()
        for _ in range(tokens):
            following = _likeliest(self.step(following, past, only))
            past += 1
        return time.perf_counter() - start

    def score(self, document: list[int]) -> list[float]:
        """log p of tokens 1.. of the document, from one forward pass."""
        inputs = np.array([document[:-1]], dtype=np.int64)
        self.begin(*inputs.shape)
        logits = self.step(inputs, 0, np.arange(inputs.shape[1]))
        return log_probabilities(logits[0], np.array(document[1:]))

    def _take_in(self, tokens: np.ndarray) -> np.ndarray:
        """Prefill all sequences and return the greedy next tokens (S, 1)."""
        return _likeliest(self.step(tokens, 0, np.array([tokens.shape[1] - 1], dtype=np.int64)))


def log_probabilities(logits: np.ndarray, targets: np.ndarray) -> list[float]:
    """log p of `targets` (N,) by logits (N, V), computed in float64."""
    found: list[float] = []
    for first in range(0, len(targets), _ROWS):
        rows = logits[first : first + _ROWS].astype(np.float64)
        rows -= rows.max(axis=-1, keepdims=True)
        wanted = targets[first : first + len(rows)]
        found += (rows[np.arange(len(rows)), wanted] - np.log(np.exp(rows).sum(axis=-1))).tolist()
    return found


def _likeliest(logits: np.ndarray) -> np.ndarray:
    """(S, 1) tokens of logits (S, 1, V)."""
    tokens: np.ndarray = logits.argmax(-1)
    return tokens


def _batch(prompts: list[list[int]]) -> np.ndarray:
    lengths = {len(prompt) for prompt in prompts}
    if len(lengths) != 1:
        raise ValueError(f"prompts of one batch must have one length, not {sorted(lengths)}")
    return np.array(prompts, dtype=np.int64)
