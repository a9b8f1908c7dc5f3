"""From two models and a sealed hold-out to a certificate: plan, open, score, decide.

    1 leaks      no hold-out passage may stand in text that the search has seen
    2 plan       the validation clusters' spread says how many hold-out clusters give 90 % power
    3 opening    counted in the ledger before any hold-out token is scored; fixes alpha_k
    4 scoring    both models on the first n clusters of the fixed order
    5 verdict    `certificate.certify`

Only step 4 touches the hold-out, and n comes from validation alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from flatout.data.passages import Passage, passages_sha256
from flatout.errors import EvidenceError
from flatout.verify.certificate import Certificate, Side, Text, certify, check_levels, refuse_swapped
from flatout.verify.ledger import next_k, record_opening
from flatout.verify.overlap import refuse_leaks
from flatout.verify.quality import (
    BLOCK,
    Cluster,
    ClusterLoss,
    Divergence,
    Encoder,
    arrays,
    pair_scores,
    token_clusters,
    tokens_sha256,
)
from flatout.verify.statistics import (
    FEWEST_CLUSTERS,
    FEWEST_FOR_SPREAD,
    alpha_k,
    moments,
    needed_clusters,
    power,
)

Scorer = Callable[[Sequence[Cluster]], list[np.ndarray]]
"""Scores clusters with one model, e.g. `lambda clusters: quality.score_model(runner, clusters)`."""

FEWEST_SCORED = 64
"""Clusters scored even when the plan asks for fewer: from here on the bounds hold for skewed losses too."""

MOST_TOKENS = 60_000
"""Hold-out tokens scored at most; about 75 s of the float32 reference for a model of 135 million
parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the validation text says about the hold-out. needed: clusters for 90 % power, None when none
    would do; scored: clusters to score, as many as are needed when the loss is a standard error higher than
    seen; chance: of a pass with those; loss a token (delta) expected."""

    k: int
    alpha_k: float
    delta: float
    needed: int | None
    needed_tokens: int | None
    scored: int
    available: int
    available_tokens: int
    chance: float

    def __str__(self) -> str:
        """One line for people."""
        have = f"you have {self.available_tokens / 1000:.0f}k"
        if self.needed_tokens is None:
            return f"the expected loss leaves no room: no amount of text passes it; {have} tokens"
        return f"needs {self.needed_tokens / 1000:.0f}k tokens; {have} (chance to pass {self.chance:.0%})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdout:
    """A sealed text, cut into clusters in the order in which they are judged."""

    source: str
    sha256: str
    tokenizer_sha256: str
    block: int
    clusters: tuple[Cluster, ...]


def seal(
    holdout: Sequence[Passage],
    used: Sequence[Passage],
    tokenizer: Encoder,
    *,
    tokenizer_sha256: str,
    source: str = "shipped",
    block: int = BLOCK,
    most_tokens: int = MOST_TOKENS,
) -> Holdout:
    """The hold-out passages as clusters, as many as `most_tokens` allows. Raises EvidenceError when a
    passage also stands in `used` (calibration and validation text)."""
    refuse_leaks(holdout, used)
    clusters: list[Cluster] = []
    tokens = 0
    for cluster in token_clusters(tokenizer, holdout, block):
        tokens += len(cluster.tokens) - 1
        if tokens > most_tokens:
            break
        clusters.append(cluster)
    return Holdout(
        source=source,
        sha256=passages_sha256(holdout),
        tokenizer_sha256=tokenizer_sha256,
        block=block,
        clusters=tuple(clusters),
    )


def plan_opening(
    validation: Sequence[ClusterLoss],
    holdout: Holdout,
    original: Side,
    *,
    margin: float = 0.01,
    alpha: float = 0.05,
    ledger: Path | None = None,
    less: float = 0.0,
    k: int | None = None,
) -> Plan:
    """How many hold-out clusters the next opening should score, from validation losses only.

    less: nats a token by which the loss is taken to be smaller than seen, to ask what is still possible.
    k: number of the opening, by default the next one in the ledger.
    Raises EvidenceError for fewer validation clusters than a spread can be estimated from, or a worn-out
    hold-out.
    """
    check_levels(margin, alpha)
    if len(validation) < FEWEST_FOR_SPREAD:
        raise EvidenceError(
            f"cannot decide with this text: validation needs at least {FEWEST_FOR_SPREAD} passages",
            str(len(validation)),
            "a longer text",
        )
    k = next_k(holdout.sha256, original.sha256, ledger) if k is None else k
    level = alpha_k(k, alpha)
    seen = moments(*arrays(validation))
    seen = replace(seen, delta=seen.delta - less)
    needed = needed_clusters(seen, margin, level)
    doubted = replace(seen, delta=seen.delta + seen.spread / math.sqrt(len(validation)))
    careful = needed_clusters(doubted, margin, level)
    available = len(holdout.clusters)
    scored = available if careful is None else min(available, max(careful, FEWEST_SCORED))
    return Plan(
        k=k,
        alpha_k=level,
        delta=seen.delta,
        needed=needed,
        needed_tokens=None if needed is None else round(needed * seen.tokens),
        scored=scored,
        available=available,
        available_tokens=sum(len(cluster.tokens) - 1 for cluster in holdout.clusters),
        chance=float(power(scored, seen, margin, level)) if scored >= FEWEST_CLUSTERS else 0.0,
    )


def examine(
    holdout: Holdout,
    plan: Plan,
    *,
    original: Side,
    optimised: Side,
    score_original: Scorer,
    score_optimised: Scorer,
    margin: float = 0.01,
    alpha: float = 0.05,
    ledger: Path | None = None,
    hardware: str = "",
    divergence: Divergence | None = None,
    notes: Sequence[str] = (),
) -> Certificate:
    """Open the hold-out for one candidate and decide. This spends an opening, even when it fails.

    Raises EvidenceError for an empty hold-out, swapped models or unusable scores.
    """
    check_levels(margin, alpha)
    refuse_swapped(original, optimised)
    clusters = holdout.clusters[: plan.scored]
    if not clusters:
        raise EvidenceError("the hold-out must hold text", "no cluster", "a longer text")
    text = Text(
        source=holdout.source,
        sha256=holdout.sha256,
        clusters_sha256=tokens_sha256(clusters),
        tokenizer_sha256=holdout.tokenizer_sha256,
        block=holdout.block,
        available=len(holdout.clusters),
    )
    candidate = [optimised.sha256, optimised.recipe, optimised.runner, text.clusters_sha256]
    judged = hashlib.sha256("\0".join(candidate).encode()).hexdigest()
    k = record_opening(holdout.sha256, original.sha256, judged, ledger)
    losses = pair_scores(clusters, score_original(clusters), score_optimised(clusters))
    return certify(
        losses,
        original=original,
        optimised=optimised,
        text=text,
        k=k,
        margin=margin,
        alpha=alpha,
        hardware=hardware,
        divergence=divergence,
        notes=notes,
    )


def rerun(
    certificate: Certificate,
    passages: Sequence[Passage],
    tokenizer: Encoder,
    *,
    original: Side,
    optimised: Side,
    score_original: Scorer,
    score_optimised: Scorer,
    hardware: str = "",
) -> Certificate:
    """Score a certificate's clusters again with the same two models; the verdict on the new numbers, at the
    same k.

    passages: the hold-out passages that the certificate names. Raises EvidenceError when text, tokenizer or
    models are not the certified ones.
    """
    stored = certificate.text
    clusters = token_clusters(tokenizer, passages, stored.block)[: len(certificate.clusters)]
    for what, found, expected in (
        ("the original model", original.sha256, certificate.original.sha256),
        ("the optimised model", optimised.sha256, certificate.optimised.sha256),
        ("the hold-out text", passages_sha256(passages), stored.sha256),
        ("the hold-out's tokens", tokens_sha256(clusters), stored.clusters_sha256),
    ):
        if found != expected:
            raise EvidenceError(
                f"{what} must be the certified one", f"{found[:12]}, not {expected[:12]}", "the same files"
            )
    return certify(
        pair_scores(clusters, score_original(clusters), score_optimised(clusters)),
        original=original,
        optimised=optimised,
        text=stored,
        k=certificate.k,
        margin=certificate.margin,
        alpha=certificate.alpha,
        hardware=hardware,
        divergence=certificate.divergence,
        notes=certificate.notes,
    )
