"""Losses of two models on the same tokens: clusters of text, their scores, and how the predictions differ.

Scores are log-probabilities in nats that a runner computes for given tokens (`engine.score`). The optimised
model is scored on the runner, kernels and cache format that will serve it, the original in its stored
precision.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from flatout.core.spec import ModelSpec
from flatout.data.passages import Passage
from flatout.engine.runner import Runner, StepInput
from flatout.engine.score import score_documents
from flatout.errors import EvidenceError

BLOCK = 1024
"""Most tokens of a cluster: a longer document becomes several clusters, each with a context of its own."""

Progress = Callable[[int, int], None]
"""progress(done, total)."""


class Encoder(Protocol):
    """What clusters need of a tokenizer. adds_bos: the model was trained with a first token before every
    text."""

    @property
    def adds_bos(self) -> bool: ...

    def encode(self, text: str, add_bos: bool = False) -> list[int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A unit of the sample: a document, or a block of one. The first token is context only."""

    id: str
    domain: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterLoss:
    """One cluster under both models, in nats: tokens scored, the original's summed NLL, and what is lost on
    top."""

    id: str
    domain: str
    tokens: int
    nll_original: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """How predictions differ: KL(original || optimised) in nats a token, and greedy tokens that changed."""

    mean_kl: float
    p99_kl: float
    flip_rate: float
    tokens: int


def token_clusters(tokenizer: Encoder, passages: Sequence[Passage], block: int = BLOCK) -> list[Cluster]:
    """The passages as clusters of at most `block` tokens, in the fixed order in which they are judged.

    A longer passage is cut into equal blocks. The order is that of a hash, so that the first n clusters are
    a random sample that nobody chose. A repeated text counts once: copies would pose as independent
    evidence.
    """
    found: dict[tuple[int, ...], Cluster] = {}
    prefix = tuple(tokenizer.encode("", add_bos=True)) if tokenizer.adds_bos else ()
    room = block - len(prefix)
    for passage in passages:
        tokens = tokenizer.encode(passage.text)
        blocks = math.ceil(len(tokens) / room)
        for i in range(blocks):
            whole = (*prefix, *tokens[i * len(tokens) // blocks : (i + 1) * len(tokens) // blocks])
            name = passage.id if blocks == 1 else f"{passage.id}/{i}"
            if len(whole) > 1:
                found.setdefault(whole, Cluster(id=name, domain=passage.book, tokens=whole))
    return sorted(found.values(), key=lambda cluster: tokens_sha256([cluster]))


def tokens_sha256(clusters: Sequence[Cluster]) -> str:
    """Hash of the token ids of clusters in order."""
    digest = hashlib.sha256()
    for cluster in clusters:
        digest.update(len(cluster.tokens).to_bytes(8, "little"))
        digest.update(np.asarray(cluster.tokens, dtype="<i8").tobytes())
    return digest.hexdigest()


def score_model(
    runner: Runner, clusters: Sequence[Cluster], progress: Progress | None = None, sound: bool = False
) -> list[np.ndarray]:
    """log p of tokens 1.. of each cluster, float32 (n - 1,), checked. sound: this runner's logits have been
    checked before. Raises EvidenceError for broken logits."""
    if clusters and not sound:
        check_logits(runner, clusters[0].tokens[:64])
    scores = score_documents(runner, [cluster.tokens for cluster in clusters], progress=progress)
    check_scores(clusters, scores)
    return scores


def check_scores(clusters: Sequence[Cluster], scores: Sequence[np.ndarray]) -> None:
    """Raise EvidenceError unless every token after the first has a finite log-probability of at most 0."""
    if len(scores) != len(clusters):
        raise EvidenceError(
            "every cluster must be scored", f"{len(scores)} of {len(clusters)}", "score again"
        )
    for cluster, score in zip(clusters, scores, strict=True):
        if score.shape != (len(cluster.tokens) - 1,):
            raise EvidenceError(
                "every token after the first must be scored",
                f"{score.shape} for {len(cluster.tokens)} tokens of {cluster.id}",
                "the full logits",
            )
        if not np.isfinite(score).all():
            raise EvidenceError(
                "log-probabilities must be finite", f"not so in {cluster.id}", "check the model's weights"
            )
        if score.max() > 1e-3:
            raise EvidenceError(
                "log-probabilities are at most 0",
                f"{score.max():.4f} in {cluster.id}",
                "a softmax over all tokens",
            )


def check_logits(runner: Runner, tokens: Sequence[int]) -> None:
    """Raise EvidenceError unless the runner's logits cover the vocabulary and agree with its scores.

    Scores from a truncated or wrongly normalised softmax look better than they are; they do not agree.
    """
    logits = logits_of(runner, tokens)
    expected = (len(tokens), runner.spec.vocab_size)
    if logits.shape != expected or np.isnan(logits).any():
        found = "NaN" if logits.shape == expected else str(logits.shape)
        raise EvidenceError(f"logits must be numbers of shape {expected}", found, "check the model's weights")
    log_p = _log_softmax(logits[:-1])[np.arange(len(tokens) - 1), np.asarray(tokens[1:])]
    scores = score_documents(runner, [tokens])[0]
    if scores.shape != log_p.shape or not np.allclose(scores, log_p, rtol=0, atol=1e-3):
        raise EvidenceError(
            "scores must be the log-softmax of the logits",
            "they differ by more than 0.001 nats",
            "another runner",
        )


def logits_of(runner: Runner, tokens: Sequence[int]) -> np.ndarray:
    """float32 (T, V) logits of one document, as one step."""
    count = len(tokens)
    batch = StepInput(
        tokens=np.asarray(tokens, dtype=np.int32),
        starts=np.zeros(1, dtype=np.int32),
        lengths=np.asarray([count], dtype=np.int32),
        pages=np.arange(-(-count // runner.page_size), dtype=np.int32)[None, :],
    )
    return runner.forward(batch, "all")


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def pair_scores(
    clusters: Sequence[Cluster], original: Sequence[np.ndarray], optimised: Sequence[np.ndarray]
) -> list[ClusterLoss]:
    """Both models' scores of the same clusters as paired losses. Raises EvidenceError for unusable scores."""
    check_scores(clusters, original)
    check_scores(clusters, optimised)
    losses = []
    for cluster, before, after in zip(clusters, original, optimised, strict=True):
        nll = -float(before.sum(dtype=np.float64))
        loss = float((before.astype(np.float64) - after).sum())
        losses.append(
            ClusterLoss(id=cluster.id, domain=cluster.domain, tokens=len(before), nll_original=nll, loss=loss)
        )
    return losses


def arrays(losses: Sequence[ClusterLoss]) -> tuple[np.ndarray, np.ndarray]:
    """(D, n) of `statistics`: summed losses in nats and token counts, float64."""
    return (
        np.array([cluster.loss for cluster in losses], dtype=np.float64),
        np.array([cluster.tokens for cluster in losses], dtype=np.float64),
    )


def perplexities(losses: Sequence[ClusterLoss]) -> tuple[float, float]:
    """exp(mean NLL a token) of the original and of the optimised model; infinite for a hopeless one."""
    tokens = sum(cluster.tokens for cluster in losses)
    if tokens == 0:
        raise EvidenceError("a perplexity needs scored tokens", "none", "a longer text")
    nll = sum(cluster.nll_original for cluster in losses)
    after = nll + sum(cluster.loss for cluster in losses)
    return exp_or_inf(nll / tokens), exp_or_inf(after / tokens)


def exp_or_inf(value: float) -> float:
    """exp(value), infinite where that overflows."""
    return math.exp(value) if value < 700 else math.inf


def loss_by_domain(losses: Sequence[ClusterLoss]) -> dict[str, float]:
    """Loss in nats a token of each domain, worst first."""
    sums: dict[str, tuple[float, int]] = {}
    for cluster in losses:
        loss, tokens = sums.get(cluster.domain, (0.0, 0))
        sums[cluster.domain] = (loss + cluster.loss, tokens + cluster.tokens)
    means = {domain: loss / tokens for domain, (loss, tokens) in sums.items()}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def refuse_different(
    reference: Sequence[np.ndarray], engine: Sequence[np.ndarray], tolerance: float = 1e-4
) -> None:
    """Raise EvidenceError unless an engine path scores the original as the reference does, within
    `tolerance` nats a token on average; then it may stand in for the slow reference."""
    difference = np.abs(np.concatenate(list(reference)).astype(np.float64) - np.concatenate(list(engine)))
    if not difference.mean() <= tolerance:
        raise EvidenceError(
            f"whatever scores the original must agree with the reference within {tolerance} nats a token",
            f"{difference.mean():.6f}",
            "the reference runner",
        )


def divergence(
    original: Runner, optimised: Runner, clusters: Sequence[Cluster], tokens: int = 1024
) -> Divergence:
    """Compare predictions on the first `tokens` tokens of the clusters, at most 256 of each. Not gated,
    reported."""
    kl: list[np.ndarray] = []
    flips = 0
    left = tokens
    for cluster in clusters:
        piece = cluster.tokens[: min(left, 256)]
        if not piece:
            break
        left -= len(piece)
        before, after = logits_of(original, piece), logits_of(optimised, piece)
        flips += int((before.argmax(-1) != after.argmax(-1)).sum())
        for start in range(0, len(piece), 64):  # bounds the float64 copies
            p, q = _log_softmax(before[start : start + 64]), _log_softmax(after[start : start + 64])
            with np.errstate(invalid="ignore"):  # tokens that both models rule out contribute nothing
                kl.append(np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q)).sum(-1))
    if not kl:
        raise EvidenceError("a comparison of predictions needs tokens", "none", "a longer text")
    values = np.concatenate(kl)
    return Divergence(
        mean_kl=float(values.mean()),
        p99_kl=float(np.quantile(values, 0.99)),
        flip_rate=flips / len(values),
        tokens=len(values),
    )


def fits(spec: ModelSpec, block: int = BLOCK) -> int:
    """`block`, or the model's positions where they are fewer."""
    return min(block, spec.max_positions)
