"""What CTranslate2's worker asks its library for, and what it makes of the answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flatout.bench.workers import ctranslate

WORDS = ["a", "b", "c", "d"]


class FakeGenerator:
    """Calls back for every token of every sequence, a second later each step."""

    compute_type = "int8_float32"

    def __init__(self, clock: list[float], steps: int | None = None) -> None:
        self.asked: list[dict[str, Any]] = []
        self._clock, self._steps = clock, steps

    def generate_batch(
        self, prompts: Sequence[Sequence[str]], callback: Callable[[object], bool], **options: Any
    ) -> None:
        self.asked.append({"prompts": prompts, **options})
        self._clock[0] += 10.0  # the prompt
        for _ in range(self._steps or options["max_length"]):
            self._clock[0] += 1.0
            for _ in prompts:
                assert callback(None) is False

    def forward_batch(self, documents: Sequence[Sequence[int]]) -> np.ndarray:
        tokens = np.array(documents)
        return np.eye(len(WORDS), dtype=np.float32)[(tokens + 1) % len(WORDS)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(ctranslate.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def peer(clock: list[float], tmp_path: Path) -> ctranslate.Peer:
    (tmp_path / "vocabulary.json").write_text(json.dumps(WORDS))
    peer = ctranslate.Peer.__new__(ctranslate.Peer)
    generator = FakeGenerator(clock)
    peer._library = SimpleNamespace(Generator=lambda path, **options: generator, __version__="4")
    facts = peer.load(str(tmp_path), 2)
    assert facts["vocab_size"] == len(WORDS)
    return peer


def test_a_prefill_ends_with_the_first_token(peer: ctranslate.Peer) -> None:
    assert peer.prefill([[1, 2, 3]]) == 11.0
    (asked,) = peer._generator.asked
    assert asked["prompts"] == [["b", "c", "d"]]
    assert asked["min_length"] == asked["max_length"] == 1
    assert asked["include_prompt_in_result"] is False  # the prompt is taken in at once


def test_decoding_begins_when_every_sequence_has_its_first_token(peer: ctranslate.Peer) -> None:
    assert peer.decode([[1, 2], [3, 0]], 5) == 5.0
    assert peer._generator.asked[0]["max_length"] == 6
    assert peer.first([1]) is True


def test_sequences_that_end_early_are_an_error(peer: ctranslate.Peer, clock: list[float]) -> None:
    peer._generator = FakeGenerator(clock, steps=2)
    with pytest.raises(RuntimeError, match="2 sequences of 4 tokens must come, not 4 tokens"):
        peer.decode([[1], [2]], 3)


def test_scores_are_log_probabilities_of_the_next_tokens(peer: ctranslate.Peer) -> None:
    total = np.log(np.e + len(WORDS) - 1)  # one logit of 1, the others 0
    assert peer.score([0, 1, 2, 0]) == pytest.approx([1 - total, 1 - total, -total])
