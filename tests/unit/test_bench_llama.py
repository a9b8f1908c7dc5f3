"""The llama.cpp worker over a made-up binding: what its batches hold, and which attention it keeps."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flatout.bench.workers import llama

VOCABULARY = 11
INT = ctypes.POINTER(ctypes.c_int32)


class Batch(ctypes.Structure):
    """llama_batch as the C header declares it."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", INT),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", INT),
        ("n_seq_id", INT),
        ("seq_id", ctypes.POINTER(INT)),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class FakeLlama:
    """A model that predicts token + 1, once for every output asked for; it reads batches as C would."""

    LLAMA_FLASH_ATTN_TYPE_ENABLED = 1
    LLAMA_FLASH_ATTN_TYPE_DISABLED = 0
    llama_batch = Batch

    def __init__(self) -> None:
        self.seen: list[list[tuple[int, int, int, int]]] = []
        self.contexts: list[SimpleNamespace] = []
        self._logits: Any = None

    def llama_context_default_params(self) -> SimpleNamespace:
        return SimpleNamespace()

    def llama_init_from_model(self, model: object, params: SimpleNamespace) -> SimpleNamespace:
        params.freed = False
        self.contexts.append(params)
        return params

    def llama_free(self, context: SimpleNamespace) -> None:
        context.freed = True

    def llama_get_memory(self, context: object) -> None:
        """Nothing to forget."""

    def llama_memory_clear(self, memory: object, data: bool) -> None:
        """Nothing to forget."""

    def llama_decode(self, context: SimpleNamespace, batch: Batch) -> int:
        assert not context.freed
        rows = []
        for i in range(batch.n_tokens):
            assert batch.n_seq_id[i] == 1
            rows.append((batch.token[i], batch.pos[i], batch.seq_id[i][0], batch.logits[i]))
        self.seen.append(rows)
        wanted = [(token + 1) % VOCABULARY for token, _, _, output in rows if output]
        self._logits = np.eye(VOCABULARY, dtype=np.float32)[wanted]
        return 0

    def llama_get_logits(self, context: object) -> Any:
        return self._logits.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> llama.Peer:
    monkeypatch.setattr(llama, "_STEP", 4)
    monkeypatch.setattr(llama, "_TRIES", 1)
    made = llama.Peer.__new__(llama.Peer)
    made._llama, made._model, made._vocab, made._threads, made._contexts = (
        FakeLlama(),
        None,
        VOCABULARY,
        2,
        {},
    )
    return made


def test_decode_feeds_each_sequence_its_own_last_prediction(peer: llama.Peer) -> None:
    assert peer.decode([[1, 2, 3], [7, 8, 9]], 2) > 0
    seen = peer._llama.seen[-4:]  # the last run: two prompts, two steps
    assert seen[0] == [(1, 0, 0, 0), (2, 1, 0, 0), (3, 2, 0, 1)]
    assert seen[1] == [(7, 0, 1, 0), (8, 1, 1, 0), (9, 2, 1, 1)]
    assert seen[2] == [(4, 3, 0, 1), (10, 3, 1, 1)]
    assert seen[3] == [(5, 4, 0, 1), (0, 4, 1, 1)]


def test_prompts_longer_than_a_batch_come_in_chunks(peer: llama.Peer) -> None:
    peer.prefill([[1, 2, 3, 4, 5, 6]])
    assert [len(rows) for rows in peer._llama.seen[-2:]] == [4, 2]
    assert peer._llama.seen[-1] == [(5, 4, 0, 0), (6, 5, 0, 1)]


def test_scores_are_log_probabilities_of_the_next_tokens(peer: llama.Peer) -> None:
    total = np.log(np.e + VOCABULARY - 1)  # one logit of 1, the others 0
    scores = peer.score([1, 2, 3, 4, 5, 9])
    assert scores == pytest.approx([1 - total] * 4 + [-total])


@pytest.mark.parametrize("flash_is_faster", [True, False])
def test_the_faster_attention_is_kept_for_each_kind_of_work(peer: llama.Peer, flash_is_faster: bool) -> None:
    def work(context: Any) -> float:
        return 1.0 if (context._handle.flash_attn_type == 1) == flash_is_faster else 2.0

    kept: Any = peer._fastest("decode", 1, 96, work)
    assert kept._handle.flash_attn_type == int(flash_is_faster)
    assert [context.freed for context in peer._llama.contexts] == [not flash_is_faster, flash_is_faster]
    assert peer._fastest("decode", 1, 200, work) is kept  # a context of the same size
    assert peer._fastest("prefill", 1, 96, work) is not kept
    assert (kept._handle.n_ctx, kept._handle.n_seq_max, kept._handle.n_threads) == (256, 1, 2)


def test_a_first_token_needs_one_context_and_one_try(peer: llama.Peer) -> None:
    assert peer.first([1, 2, 3]) is True
    assert peer._llama.seen == [[(1, 0, 0, 0), (2, 1, 0, 0), (3, 2, 0, 1)]]
    (context,) = peer._llama.contexts
    assert (context.n_ctx, context.flash_attn_type) == (256, 1)
