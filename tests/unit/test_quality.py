"""Clusters, scores and paired losses, and every way in which a model's scores can be broken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.table import TableRunner, WordTokenizer, table
from tests.toy import ToyRunner, toy_logits, toy_spec

from flatout.data.passages import Passage
from flatout.engine.runner import StepInput
from flatout.errors import EvidenceError
from flatout.verify.quality import (
    Cluster,
    ClusterLoss,
    arrays,
    check_logits,
    divergence,
    fits,
    loss_by_domain,
    pair_scores,
    perplexities,
    refuse_different,
    score_model,
    token_clusters,
    tokens_sha256,
)


def passages(texts: Sequence[str], book: str = "b") -> list[Passage]:
    return [Passage(id=f"p{i}", book=book, text=text) for i, text in enumerate(texts)]


def cluster(tokens: Sequence[int], name: str = "c", domain: str = "d") -> Cluster:
    return Cluster(id=name, domain=domain, tokens=tuple(tokens))


@given(
    lengths=st.lists(st.integers(0, 70), max_size=12),
    block=st.integers(3, 40),
    adds_bos=st.booleans(),
)
@settings(deadline=None, derandomize=True)
def test_clusters_cover_the_text_once(lengths: list[int], block: int, adds_bos: bool) -> None:
    """Each passage's tokens come back in order from its blocks, of nearly equal length and none above
    `block`."""
    tokenizer = WordTokenizer(adds_bos)
    start = 0
    texts = []
    for length in lengths:  # every token is different, so no two clusters are the same
        texts.append(" ".join(str(i) for i in range(start, start + length)))
        start += length
    clusters = token_clusters(tokenizer, passages(texts), block)
    for i, text in enumerate(texts):
        own = [c for c in clusters if c.id.partition("/")[0] == f"p{i}"]
        own.sort(key=lambda c: int(c.id.partition("/")[2] or 0))
        expected = tokenizer.encode(text)
        if adds_bos:
            assert all(c.tokens[0] == tokenizer.bos for c in own), "each block begins as a text does"
        bare = [c.tokens[adds_bos:] for c in own]
        if all(len(b) > 1 - adds_bos for b in bare) and len(expected) > 1 - adds_bos:
            assert [t for b in bare for t in b] == expected
        sizes = [len(c.tokens) for c in own]
        assert not sizes or (max(sizes) <= block and max(sizes) - min(sizes) <= 1)
    assert all(len(c.tokens) > 1 for c in clusters)


def test_order_is_fixed_and_nobody_s_choice() -> None:
    texts = [f"{i} {i + 1} {i * 7} word" for i in range(50)]
    forward = token_clusters(WordTokenizer(), passages(texts))
    backward = token_clusters(WordTokenizer(), passages(texts)[::-1])
    assert forward == backward
    assert [c.id for c in forward] != [f"p{i}" for i in range(50)]
    fewer = token_clusters(WordTokenizer(), passages(texts)[:30])
    kept = {c.id for c in fewer}
    assert fewer == [c for c in forward if c.id in kept], "more text does not reorder the rest"


def test_copies_count_once() -> None:
    """A text repeated a hundred times is one observation, not a hundred."""
    assert len(token_clusters(WordTokenizer(), passages(["a b c"] * 100))) == 1


def test_hash_covers_cluster_borders() -> None:
    assert tokens_sha256([cluster([1, 2]), cluster([3, 4])]) != tokens_sha256([cluster([1, 2, 3, 4])])
    assert tokens_sha256([cluster([1, 2], "x")]) == tokens_sha256([cluster([1, 2], "y")])


def test_scores_are_log_probabilities_of_the_next_token() -> None:
    runner = ToyRunner(num_pages=64)
    clusters = [cluster([5, 6, 7, 250, 9]), cluster(range(40), "e")]
    for c, scores in zip(clusters, score_model(runner, clusters), strict=True):
        for i in range(1, len(c.tokens)):
            logits = toy_logits(c.tokens[:i]).astype(np.float64)
            expected = logits[c.tokens[i]] - math.log(np.exp(logits).sum())
            assert scores[i - 1] == pytest.approx(expected, abs=1e-4)


def test_progress_is_reported() -> None:
    seen: list[tuple[int, int]] = []
    score_model(TableRunner(table(0)), [cluster([1, 2, 3])] * 3, lambda *step: seen.append(step))
    assert seen[-1] == (3, 3)


class Broken(TableRunner):
    """A TableRunner with one fault."""

    def __init__(self, fault: str) -> None:
        super().__init__(table(0))
        self.fault = fault

    def forward(self, batch: StepInput, rows: Literal["last", "all"]) -> np.ndarray:
        logits = super().forward(batch, rows)
        if self.fault == "nan logits":
            logits[len(logits) // 2, 3] = np.nan
        if self.fault == "truncated logits":
            return logits[:, :-10]
        return logits

    def score(self, batch: StepInput, targets: np.ndarray) -> np.ndarray:
        scores = super().score(batch, targets)
        if self.fault == "nan scores":
            scores[-1] = np.nan
        if self.fault == "infinite scores":
            scores[-1] = -np.inf
        if self.fault == "probabilities":  # exp forgotten to be undone
            return np.exp(scores)
        if self.fault == "truncated softmax":  # normalised over half of the vocabulary
            half = self.logits[batch.tokens][:, : self.spec.vocab_size // 2].astype(np.float64)
            return (self.logits[batch.tokens, targets] - np.log(np.exp(half).sum(1))).astype(np.float32)
        if self.fault == "shifted":  # the score of the token before
            return np.roll(scores, 1)
        return scores


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan logits", "logits must be numbers"),
        ("truncated logits", "logits must be numbers of shape"),
        ("nan scores", "log-softmax|finite"),
        ("infinite scores", "log-softmax|finite"),
        ("probabilities", "log-softmax"),
        ("truncated softmax", "log-softmax"),
        ("shifted", "log-softmax"),
    ],
)
def test_broken_logits_are_refused(fault: str, message: str) -> None:
    with pytest.raises(EvidenceError, match=message):
        score_model(Broken(fault), [cluster(range(1, 30))])


def test_sound_logits_are_not_refused() -> None:
    check_logits(Broken("none"), list(range(1, 30)))
    check_logits(ToyRunner(num_pages=64), list(range(1, 30)))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([np.zeros(2, np.float32)], "every cluster must be scored"),
        ([np.zeros(2, np.float32), np.zeros(2, np.float32)], "every token after the first"),
        ([np.zeros(2, np.float32), np.array([0, -1, np.nan], np.float32)], "finite"),
        ([np.zeros(2, np.float32), np.array([0, -1, -np.inf], np.float32)], "finite"),
        ([np.zeros(2, np.float32), np.array([0, -1, 0.5], np.float32)], "at most 0"),
    ],
)
def test_unusable_scores_are_refused_on_either_side(scores: list[np.ndarray], message: str) -> None:
    clusters = [cluster([1, 2, 3]), cluster([1, 2, 3, 4], "e")]
    good = [np.full(2, -1.0, np.float32), np.full(3, -1.0, np.float32)]
    for pair in ((good, scores), (scores, good)):
        with pytest.raises(EvidenceError, match=message):
            pair_scores(clusters, *pair)


def test_paired_losses_and_perplexities() -> None:
    clusters = [cluster([1, 2, 3], "a", "x"), cluster([1, 2, 3, 4], "b", "y"), cluster([5, 6], "c", "x")]
    before = [np.array([-1.0, -2.0]), np.array([-1.0, -1.0, -1.0]), np.array([-3.0])]
    after = [np.array([-1.5, -2.0]), np.array([-1.0, -1.0, -0.7]), np.array([-3.4])]
    losses = pair_scores(clusters, before, after)
    assert losses[0] == ClusterLoss(id="a", domain="x", tokens=2, nll_original=3.0, loss=0.5)
    D, n = arrays(losses)
    assert pytest.approx([0.5, -0.3, 0.4]) == D
    assert n.tolist() == [2, 3, 1]
    assert perplexities(losses) == pytest.approx((math.exp(9 / 6), math.exp(9.6 / 6)))
    assert list(loss_by_domain(losses).items()) == [("x", pytest.approx(0.3)), ("y", pytest.approx(-0.1))]


def test_hopeless_perplexity_is_infinite() -> None:
    losses = [ClusterLoss(id="a", domain="x", tokens=1, nll_original=1.0, loss=1e6)]
    assert perplexities(losses) == (pytest.approx(math.e), math.inf)
    with pytest.raises(EvidenceError, match="scored tokens"):
        perplexities([])


def test_divergence_against_a_direct_computation() -> None:
    before, after = TableRunner(table(0)), TableRunner(table(0, noise=0.5))
    clusters = [cluster(np.random.default_rng(i).integers(0, 64, 300), f"c{i}") for i in range(3)]
    found = divergence(before, after, clusters, tokens=500)
    tokens = np.concatenate([np.array(c.tokens[:256]) for c in clusters])[:500]

    def log_p(runner: TableRunner) -> np.ndarray:
        logits = runner.logits[tokens].astype(np.float64)
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    p, q = log_p(before), log_p(after)
    kl = (np.exp(p) * (p - q)).sum(1)
    assert found.tokens == 500
    assert found.mean_kl == pytest.approx(kl.mean())
    assert found.p99_kl == pytest.approx(np.quantile(kl, 0.99))
    assert found.flip_rate == pytest.approx((p.argmax(1) != q.argmax(1)).mean())
    same = divergence(before, before, clusters)
    assert (same.mean_kl, same.flip_rate) == (0.0, 0.0)
    with pytest.raises(EvidenceError):
        divergence(before, after, [])


def test_tokens_ruled_out_by_both_models_do_not_count() -> None:
    logits = table(0)
    logits[:, 60:] = -np.inf
    runner = TableRunner(logits)
    found = divergence(runner, runner, [cluster(range(50))])
    assert found.mean_kl == 0.0


def test_an_engine_may_stand_in_only_when_it_agrees() -> None:
    reference = [np.full(100, -2.0, np.float32)]
    refuse_different(reference, [reference[0] + np.float32(5e-5)])
    with pytest.raises(EvidenceError, match=r"within 0\.0001 nats"):
        refuse_different(reference, [reference[0] + np.float32(3e-4)])
    alternating = np.tile(np.array([1e-3, -1e-3], np.float32), 50)
    with pytest.raises(EvidenceError):
        refuse_different(reference, [reference[0] + alternating])
    with pytest.raises(EvidenceError):
        refuse_different(reference, [np.full(100, np.nan, np.float32)])


def test_blocks_fit_the_model() -> None:
    assert fits(toy_spec(max_positions=300)) == 300
    assert fits(toy_spec(max_positions=5000)) == 1024
