"""Is an optimised encoder as good as its original? Vectors beside vectors, and a task that only needs text.

    vectors   1 - cosine of the two models' vectors of the same piece of text
    task      of every piece: does the nearest other piece, by cosine, come from the same passage? Pieces are
              stretches of the shipped passages, of which each model looks up its own vectors

The sample is the passage, whose pieces belong together: both are ratios over passages with a one-sided bound
(verify/statistics.py). Both must lie below the margin; asking for two needs no correction, since a false pass
of both needs one of each. Openings of the sealed passages are counted like those of perplexity.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flatout.core.types import to_json
from flatout.data.passages import Passage
from flatout.errors import EvidenceError
from flatout.verify.statistics import FEWEST_CLUSTERS, ratio_bound, share_bound

WORDS = 28
"""Of a piece: a sentence or two."""

Encode = Callable[[Sequence[str]], np.ndarray]
"""Texts -> vectors (n, D) of length 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassageVectors:
    """One passage under both models: its pieces, the sum of 1 - cosine over them, and the pieces that the
    original places and the optimised model does not (lost), or the other way round (gained)."""

    id: str
    pieces: int
    distance: float
    lost: int
    gained: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorVerdict:
    """distance, lost_share: means, with their upper bounds at 1 - alpha; both bounds must be below margin."""

    verdict: str
    reason: str
    margin: float
    alpha: float
    distance: float
    distance_upper: float
    lost_share: float
    lost_upper: float
    accuracy_original: float
    accuracy_optimised: float
    pieces: int
    worst_passage: str
    passages: tuple[PassageVectors, ...]

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"


def pieces_of(passages: Sequence[Passage], words: int = WORDS) -> list[tuple[str, str]]:
    """(passage id, text) of stretches of `words` words; what is left over at the end goes to the last one."""
    found = []
    for passage in passages:
        all_words = passage.text.split()
        count = max(len(all_words) // words, 1)
        for i in range(count):
            stop = (i + 1) * words if i + 1 < count else len(all_words)
            found.append((passage.id, " ".join(all_words[i * words : stop])))
    return found


def placed(vectors: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """bool (n,): whether the nearest other vector belongs to the same owner. vectors (n, D) of length 1."""
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -math.inf)
    right: np.ndarray = owners[similarity.argmax(axis=1)] == owners
    return right


def compare(
    pieces: Sequence[tuple[str, str]], original: np.ndarray, optimised: np.ndarray
) -> tuple[list[PassageVectors], np.ndarray, np.ndarray]:
    """Rows by passage, and which pieces each model places. Raises EvidenceError for vectors that are none."""
    for vectors in (original, optimised):
        if vectors.shape != (len(pieces), original.shape[1]) or not np.isfinite(vectors).all():
            found = "infinity or NaN" if vectors.shape == original.shape else str(vectors.shape)
            raise EvidenceError("every text needs a vector of numbers", found, "check the model's weights")
        if np.abs(np.linalg.norm(vectors, axis=1) - 1).max() > 1e-3:
            raise EvidenceError("vectors that are compared have length 1", "others", "normalize=True")
    names = list(dict.fromkeys(owner for owner, _ in pieces))
    owners = np.array([names.index(owner) for owner, _ in pieces])
    distances = 1 - (original.astype(np.float64) * optimised).sum(axis=1)
    before, after = placed(original, owners), placed(optimised, owners)
    rows = []
    for i, name in enumerate(names):
        own = owners == i
        rows.append(
            PassageVectors(
                id=name,
                pieces=int(own.sum()),
                distance=float(distances[own].sum()),
                lost=int((before & ~after)[own].sum()),
                gained=int((~before & after)[own].sum()),
            )
        )
    return rows, before, after


def judge_vectors(
    rows: Sequence[PassageVectors], accuracy: tuple[float, float], margin: float, alpha: float
) -> VectorVerdict:
    """The verdict on `rows` at level `alpha`; accuracy: of the original and of the optimised model."""
    if len(rows) < FEWEST_CLUSTERS:
        raise EvidenceError(
            f"a verdict on vectors needs at least {FEWEST_CLUSTERS} passages", str(len(rows)), "more text"
        )
    n = np.array([row.pieces for row in rows], dtype=np.float64)
    far = ratio_bound(np.array([row.distance for row in rows]), n, alpha)
    lost = share_bound(np.array([float(row.lost - row.gained) for row in rows]), n, alpha)
    shown = f"1 - cosine at most {far.upper:.2%}, {lost.upper:.2%} of the pieces lost, margin {margin:.2%}"
    if far.upper < margin and lost.upper < margin:
        verdict, reason = "passed", shown
    elif far.delta >= margin or lost.delta >= margin:
        verdict, reason = (
            "failed",
            f"1 - cosine {far.delta:.2%}, {lost.delta:.2%} misplaced, margin {margin:.2%}",
        )
    else:
        verdict, reason = "cannot_decide", f"cannot decide with this text: {shown}"
    return VectorVerdict(
        verdict=verdict,
        reason=reason,
        margin=margin,
        alpha=alpha,
        distance=far.delta,
        distance_upper=far.upper,
        lost_share=lost.delta,
        lost_upper=lost.upper,
        accuracy_original=accuracy[0],
        accuracy_optimised=accuracy[1],
        pieces=int(n.sum()),
        worst_passage=max(rows, key=lambda row: row.distance / row.pieces).id,
        passages=tuple(rows),
    )


def examine_vectors(
    passages: Sequence[Passage], original: np.ndarray, optimised: np.ndarray, margin: float, alpha: float
) -> VectorVerdict:
    """The verdict of both models' vectors of `pieces_of(passages)`."""
    rows, before, after = compare(pieces_of(passages), original, optimised)
    return judge_vectors(rows, (float(before.mean()), float(after.mean())), margin, alpha)


def judged_sha256(*parts: object) -> str:
    """What an opening of the sealed passages is known by."""
    return hashlib.sha256("\0".join(str(to_json(part)) for part in parts).encode()).hexdigest()
