"""Proposers for tests of speculation: as often right as asked for, and always computed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flatout.engine.scheduler import Sequence
from flatout.engine.speculate import LONGEST_DRAFT, Speculator


class Oracle:
    """Guesses each token right with the chance `right`, else any token. follow(sequence, tokens): the token
    that comes after `tokens`."""

    def __init__(
        self, follow: Callable[[Sequence, list[int]], int], vocabulary: int, right: float, seed: int = 0
    ) -> None:
        self.right = right
        self._follow, self._vocabulary = follow, vocabulary
        self._rng = np.random.default_rng(seed)

    def propose(self, sequences: list[Sequence], longest: int) -> list[list[int]]:
        return [self._guess(sequence, longest) for sequence in sequences]

    def _guess(self, sequence: Sequence, longest: int) -> list[int]:
        tokens = list(sequence.tokens)
        for _ in range(longest):
            follows = self._follow(sequence, tokens)
            wrong = (follows + int(self._rng.integers(1, self._vocabulary))) % self._vocabulary
            tokens.append(follows if self._rng.random() < self.right else wrong)
        return tokens[len(sequence.tokens) :]


class Always(Speculator):
    """Has everything computed that is guessed, whether it pays or not."""

    def propose(self, sequences: list[Sequence]) -> list[list[int]]:
        return self._proposer.propose(sequences, LONGEST_DRAFT)
