"""The three texts of a search: what calibrates, what chooses, and what stays sealed until a candidate is
judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flatout.core.spec import ModelSpec
from flatout.data.passages import load_passages, load_text, split_text
from flatout.errors import EvidenceError
from flatout.verify.examination import Holdout, seal
from flatout.verify.quality import Cluster, Encoder, fits, token_clusters
from flatout.verify.statistics import FEWEST_CLUSTERS, FEWEST_FOR_SPREAD


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Calibration and validation clusters, and the sealed hold-out."""

    calibration: tuple[Cluster, ...]
    validation: tuple[Cluster, ...]
    holdout: Holdout


def read_texts(tokenizer: Encoder, tokenizer_sha256: str, spec: ModelSpec, path: Path | None = None) -> Texts:
    """The shipped passages, or the user's file dealt to the three splits.

    Raises EvidenceError for a text too short to decide anything, or whose hold-out also stands in the other
    splits.
    """
    if path is None:
        splits = {name: load_passages(name) for name in ("calibration", "validation", "holdout")}
    else:
        splits = split_text(load_text(path))
    block = fits(spec)
    texts = Texts(
        calibration=tuple(token_clusters(tokenizer, splits["calibration"], block)),
        validation=tuple(token_clusters(tokenizer, splits["validation"], block)),
        holdout=seal(
            splits["holdout"],
            [*splits["calibration"], *splits["validation"]],
            tokenizer,
            tokenizer_sha256=tokenizer_sha256,
            source="shipped" if path is None else str(path),
            block=block,
        ),
    )
    validation, sealed = len(texts.validation), len(texts.holdout.clusters)
    if validation < FEWEST_FOR_SPREAD or sealed < FEWEST_CLUSTERS or not texts.calibration:
        raise EvidenceError(
            f"validation needs at least {FEWEST_FOR_SPREAD} passages and the hold-out {FEWEST_CLUSTERS}",
            f"{validation} for validation, {sealed} for hold-out",
            "a text of at least 200 kB, or the shipped one (no --text)",
        )
    return texts


def tokens_of(clusters: Sequence[Cluster]) -> int:
    """Scored tokens: all but the first of each cluster."""
    return sum(len(cluster.tokens) - 1 for cluster in clusters)
