"""Documents packed into rows of one length, and the rows of each step.

Documents lie one behind the other and are cut every `length` tokens, so no token is padding but the last
row's. Neighbouring rows share one token: with T inputs and the T tokens after them in each row, every token
but the first of its document is predicted exactly once an epoch, and never from another document.

Legend: R rows, B rows of a batch, T tokens of a row that predict.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flatout.errors import ConfigError

IGNORED = -100
"""Target of a position that predicts nothing."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """tokens, targets int64 (B, T); documents int32 (B, T): which document each token is of. mixed: so many
    rows, the first ones, are of more than one document; the others need no mask."""

    tokens: Tensor
    targets: Tensor
    documents: Tensor
    mixed: int

    @property
    def count(self) -> int:
        """Positions that predict something."""
        return int((self.targets != IGNORED).sum())

    def split(self, rows: int, device: torch.device) -> Iterator[Batch]:
        """The batch in parts of `rows` rows, on `device`."""
        for at in range(0, len(self.tokens), rows):
            part = slice(at, at + rows)
            yield Batch(
                tokens=self.tokens[part].to(device),
                targets=self.targets[part].to(device),
                documents=self.documents[part].to(device),
                mixed=min(max(self.mixed - at, 0), rows),
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packed:
    """tokens, documents int32 (R, T + 1). Padding belongs to document -1."""

    tokens: np.ndarray
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.tokens.tobytes() + self.documents.tobytes()).hexdigest()

    def take(self, rows: np.ndarray) -> Batch:
        """The rows of these indices as a batch."""
        inputs = self.documents[rows, :-1]
        mixed = (inputs != inputs[:, :1]).any(axis=1)
        rows = rows[np.argsort(~mixed, kind="stable")]
        tokens = torch.from_numpy(self.tokens[rows].astype(np.int64))
        documents = torch.from_numpy(self.documents[rows])
        following = documents[:, 1:]
        predicted = (following == documents[:, :-1]) & (following >= 0)
        return Batch(
            tokens=tokens[:, :-1],
            targets=torch.where(predicted, tokens[:, 1:], IGNORED),
            documents=documents[:, :-1],
            mixed=int(mixed.sum()),
        )

    def step(self, step: int, rows: int, seed: int) -> Batch:
        """The batch of a step: epochs one behind the other, each in an order drawn from `seed` and its
        number. Nothing but the step decides, so a run that goes on finds the same rows."""
        samples = np.arange(step * rows, (step + 1) * rows)
        epochs = samples // len(self)
        orders = {e: np.random.default_rng([seed, e]).permutation(len(self)) for e in np.unique(epochs)}
        return self.take(np.array([orders[e][s % len(self)] for e, s in zip(epochs, samples, strict=True)]))


def pack(documents: Sequence[Sequence[int] | np.ndarray], length: int) -> Packed:
    """Token ids of `documents` in rows of `length` + 1. Raises ConfigError when there is nothing to
    predict."""
    arrays = [np.asarray(document, dtype=np.int32) for document in documents if len(document)]
    if length < 1 or not any(len(array) > 1 for array in arrays):
        raise ConfigError(
            "training needs rows of at least one token and a document of at least two",
            f"length {length}, {len(arrays)} documents",
            "a longer text",
        )
    tokens = np.concatenate(arrays)
    owners = np.repeat(np.arange(len(arrays), dtype=np.int32), [len(array) for array in arrays])
    count = -(-(len(tokens) - 1) // length)
    missing = count * length + 1 - len(tokens)
    tokens = np.concatenate([tokens, np.zeros(missing, dtype=np.int32)])
    owners = np.concatenate([owners, np.full(missing, -1, dtype=np.int32)])
    places = np.arange(count)[:, None] * length + np.arange(length + 1)[None, :]
    return Packed(tokens=tokens[places], documents=owners[places])
