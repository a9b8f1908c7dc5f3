"""llama.cpp as a peer, through the C interface that llama-cpp-python binds.

Batches are numpy arrays that the C structure points into, so that a step costs Python a few microseconds.
The KV cache is float16 (the default), every sequence has a cache stream of its own, and a context is as long
as its work needs: what llama.cpp's own benchmarks do. Flash attention is on or off, whichever is faster for
the work at hand: on a CPU it can halve the decode speed at long contexts and still help everywhere else.
"""

from __future__ import annotations

import ctypes
import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from . import greedy

_STEP = 512  # tokens of a batch, logical and physical
_TRIES = 3


class Peer:
    """See `serve`."""

    def __init__(self) -> None:
        # By name: the package is in this peer's environment only.
        self._llama: Any = importlib.import_module("llama_cpp")
        self._llama.llama_backend_init()
        self._contexts: dict[tuple[str, int, int], _Context] = {}

    def convert(self, source: str, target: str, threads: int, ftype: str, pure: bool) -> bool:
        """Write `source` as `target` with the weights rounded to LLAMA_FTYPE_MOSTLY_<ftype>."""
        params = self._llama.llama_model_quantize_default_params()
        params.ftype = getattr(self._llama, f"LLAMA_FTYPE_MOSTLY_{ftype}")
        params.allow_requantize = True
        params.pure = pure
        params.nthread = threads
        if self._llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)) != 0:
            raise RuntimeError(f"llama_model_quantize could not make {ftype}")
        return True

    def load(self, path: str, threads: int) -> dict[str, object]:
        params = self._llama.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = self._llama.llama_model_load_from_file(path.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._threads = threads
        self._vocab = self._llama.llama_vocab_n_tokens(self._llama.llama_model_get_vocab(self._model))
        return {
            "vocab_size": self._vocab,
            "version": f"llama-cpp-python {self._llama.__version__}",
            "details": self._llama.llama_print_system_info().decode(errors="replace").strip()
            + " flash attention where it is faster",
        }

    def first(self, prompt: list[int]) -> bool:
        """With flash attention, which is not compared with anything here: that would be two starts."""
        self._new(1, _rounded(len(prompt)), flash=True).take_in([prompt])
        return True

    def prefill(self, prompts: list[list[int]]) -> float:
        def work(context: _Context) -> float:
            context.clear()
            start = time.perf_counter()
            context.take_in(prompts)
            return time.perf_counter() - start

        return work(self._fastest("prefill", len(prompts), max(map(len, prompts)), work))

    def decode(self, prompts: list[list[int]], tokens: int) -> float:
        count = len(prompts)

        def work(context: _Context) -> float:
            context.clear()
            following = context.take_in(prompts)
            sequences, outputs = np.arange(count), np.ones(count)
            positions = np.array([len(prompt) for prompt in prompts])
            start = time.perf_counter()
            for _ in range(tokens):
                following = context.step(following, positions, sequences, outputs).argmax(-1)
                positions += 1
            return time.perf_counter() - start

        return work(self._fastest("decode", count, max(map(len, prompts)) + tokens, work))

    def score(self, document: list[int]) -> list[float]:
        key = "score", 1, _rounded(len(document))
        if key not in self._contexts:
            self._contexts[key] = self._new(*key[1:], flash=True)
        context = self._contexts[key]
        context.clear()
        inputs, targets = np.array(document[:-1]), np.array(document[1:])
        scores: list[float] = []
        for start in range(0, len(inputs), _STEP):
            chunk = inputs[start : start + _STEP]
            count = len(chunk)
            positions = np.arange(start, start + count)
            logits = context.step(chunk, positions, np.zeros(count), np.ones(count))
            scores += greedy.log_probabilities(logits, targets[start : start + count])
        return scores

    def _fastest(
        self, kind: str, sequences: int, positions: int, work: Callable[[_Context], float]
    ) -> _Context:
        """The context for this kind of work. The first time, both are tried and the slower one is dropped."""
        key = kind, sequences, _rounded(positions)
        if key not in self._contexts:
            with_flash, without = (self._new(*key[1:], flash) for flash in (True, False))
            keep = min(work(with_flash) for _ in range(_TRIES)) <= min(work(without) for _ in range(_TRIES))
            self._contexts[key] = with_flash if keep else without
            (without if keep else with_flash).free()
        return self._contexts[key]

    def _new(self, sequences: int, positions: int, flash: bool) -> _Context:
        return _Context(self._llama, self._model, self._vocab, sequences, positions, self._threads, flash)


def _rounded(positions: int) -> int:
    return -(-positions // 256) * 256  # llama.cpp's own granule


class _Context:
    """A llama_context of `sequences` streams of `positions` tokens each, with the batch that feeds it."""

    def __init__(
        self, llama: Any, model: Any, vocab: int, sequences: int, positions: int, threads: int, flash: bool
    ) -> None:
        params = llama.llama_context_default_params()
        params.n_ctx = sequences * positions
        params.n_batch = params.n_ubatch = _STEP
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = (
            llama.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.kv_unified = False
        params.no_perf = True
        self._handle = llama.llama_init_from_model(model, params)
        if not self._handle:
            raise RuntimeError(f"llama.cpp cannot hold {sequences} sequences of {positions} tokens")
        self._llama, self._vocab = llama, vocab
        self._token, self._position, self._sequence = (np.zeros(_STEP, dtype=np.int32) for _ in range(3))
        self._one = np.ones(_STEP, dtype=np.int32)
        self._output = np.zeros(_STEP, dtype=np.int8)
        # Each token has a list of its sequences; all lists are one long and lie in one array.
        self._lists = self._sequence.ctypes.data + 4 * np.arange(_STEP, dtype=np.uint64)
        self._batch = llama.llama_batch(
            token=_pointer(self._token, ctypes.c_int32),
            embd=None,
            pos=_pointer(self._position, ctypes.c_int32),
            n_seq_id=_pointer(self._one, ctypes.c_int32),
            seq_id=_pointer(self._lists, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(self._output, ctypes.c_int8),
        )

    def free(self) -> None:
        self._llama.llama_free(self._handle)

    def clear(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._handle), False)

    def take_in(self, prompts: list[list[int]]) -> np.ndarray:
        """Prefill each sequence and return its greedy next token, (S,)."""
        following = np.zeros(len(prompts), dtype=np.int32)
        for sequence, prompt in enumerate(prompts):
            for start in range(0, len(prompt), _STEP):
                chunk = np.array(prompt[start : start + _STEP])
                count = len(chunk)
                outputs = np.zeros(count)
                outputs[-1] = 1
                positions = np.arange(start, start + count)
                logits = self.step(chunk, positions, np.full(count, sequence), outputs)
                following[sequence] = logits[-1].argmax()
        return following

    def step(
        self, tokens: np.ndarray, positions: np.ndarray, sequences: np.ndarray, outputs: np.ndarray
    ) -> np.ndarray:
        """float32 logits (outputs, V) of the tokens whose output is asked for; valid until the next step."""
        count = len(tokens)
        self._batch.n_tokens = count
        self._token[:count], self._position[:count] = tokens, positions
        self._sequence[:count], self._output[:count] = sequences, outputs
        code = self._llama.llama_decode(self._handle, self._batch)
        if code != 0:
            raise RuntimeError(f"llama_decode gave {code}")
        logits = self._llama.llama_get_logits(self._handle)
        return np.ctypeslib.as_array(logits, (int(outputs.sum()), self._vocab))


def _pointer(array: np.ndarray, kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))
