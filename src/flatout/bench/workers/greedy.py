"""What workers share: prompts of one length in, greedy tokens out, and log-probabilities of a text."""

from __future__ import annotations

import time
from typing import Protocol

import numpy as np

_ROWS = 64  # of logits turned into probabilities at a time


class Session(Protocol):
    """A model with a KV cache."""

    def begin(self, sequences: int, positions: int) -> None:
        """Forget everything; `positions` tokens of each sequence will come."""
        ...

    def step(self, tokens: np.ndarray, past: int, wanted: np.ndarray) -> np.ndarray:
        """Take in tokens (S, N), which follow `past` others, and give float32 logits (S, W, V) of the W
        positions of the N in `wanted`; valid until the next step."""
        ...


def prefill(session: Session, prompts: list[list[int]]) -> float:
    """Seconds until the logits after the last token of every prompt are there."""
    tokens = _batch(prompts)
    session.begin(*tokens.shape)
    start = time.perf_counter()
    _take_in(session, tokens)
    return time.perf_counter() - start


def decode(session: Session, prompts: list[list[int]], count: int) -> float:
    """Seconds to generate `count` tokens for each prompt, after an untimed prefill."""
    tokens = _batch(prompts)
    sequences, past = tokens.shape
    session.begin(sequences, past + count)
    following = _take_in(session, tokens)
    only = np.zeros(1, dtype=np.int64)  # wanted
    start = time.perf_counter()
    for _ in range(count):
        following = _likeliest(session.step(following, past, only))
        past += 1
    return time.perf_counter() - start


def score(session: Session, document: list[int]) -> list[float]:
    """log p of tokens 1.. of the document, from one forward pass."""
    inputs = np.array([document[:-1]], dtype=np.int64)
    session.begin(*inputs.shape)
    logits = session.step(inputs, 0, np.arange(inputs.shape[1]))
    return log_probabilities(logits[0], np.array(document[1:]))


def log_probabilities(logits: np.ndarray, targets: np.ndarray) -> list[float]:
    """log p of `targets` (N,) by logits (N, V), computed in float64."""
    found: list[float] = []
    for first in range(0, len(targets), _ROWS):
        rows = logits[first : first + _ROWS].astype(np.float64)
        rows -= rows.max(axis=-1, keepdims=True)
        wanted = targets[first : first + len(rows)]
        found += (rows[np.arange(len(rows)), wanted] - np.log(np.exp(rows).sum(axis=-1))).tolist()
    return found


def _take_in(session: Session, tokens: np.ndarray) -> np.ndarray:
    """Prefill all sequences and return the greedy next tokens (S, 1)."""
    return _likeliest(session.step(tokens, 0, np.array([tokens.shape[1] - 1], dtype=np.int64)))


def _likeliest(logits: np.ndarray) -> np.ndarray:
    """(S, 1) tokens of logits (S, 1, V)."""
    tokens: np.ndarray = logits.argmax(-1)
    return tokens


def _batch(prompts: list[list[int]]) -> np.ndarray:
    lengths = {len(prompt) for prompt in prompts}
    if len(lengths) != 1:
        raise ValueError(f"prompts of one batch must have one length, not {sorted(lengths)}")
    return np.array(prompts, dtype=np.int64)
