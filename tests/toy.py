"""A toy runner and tokenizer for engine tests: no weights, but a paging mistake changes the answer.

The toy's "keys and values" of a token are its position and a running hash of all tokens up to it, kept in the
pages the engine names. Its logits hash everything a sequence can see through its page table. So a page that
is shared wrongly, overwritten, lost or stale gives other tokens than `toy_generate`, which knows no pages.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from flatout.core.spec import ModelSpec
from flatout.engine.request import SamplingParams
from flatout.engine.runner import MAX_STEP_TOKENS, StepInput, check_step, sampled_rows
from flatout.engine.sampler import log_probabilities, sample, sample_row
from flatout.engine.scheduler import Sequence as EngineSequence

EOS = 256
VOCABULARY = 257
_MASK = (1 << 64) - 1
PROMPTS = [[7], [1, 2, 3, 4] * 3, [1, 2, 3, 4] * 3 + [9], [5] * 17, [1, 2, 3, 4], list(range(40))]
"""Short, long, a page's worth, with common beginnings, and repetitive."""


def toy_spec(max_positions: int = 4096, vocab_size: int = VOCABULARY) -> ModelSpec:
    return ModelSpec(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        max_positions=max_positions,
        eos_token_ids=(EOS,) if vocab_size > EOS else (),
    )


def _mix(state: int, token: int) -> int:
    x = ((state ^ token) * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & _MASK
    return x ^ (x >> 29)


def _logits(hashes: Sequence[int], vocabulary: int) -> np.ndarray:
    total = 0
    for position, value in enumerate(hashes):
        total = (total + value * (2 * position + 1)) & _MASK
    return 2 * np.random.default_rng(total).standard_normal(vocabulary, dtype=np.float32)


def toy_logits(tokens: Sequence[int], vocabulary: int = VOCABULARY) -> np.ndarray:
    """float32 (V,): the logits after `tokens`, computed without pages."""
    hashes: list[int] = []
    for token in tokens:
        hashes.append(_mix(hashes[-1] if hashes else 0, token))
    return _logits(hashes, vocabulary)


def toy_generate(
    prompt: Sequence[int],
    params: SamplingParams,
    capacity: int = 1 << 30,
    stop_ids: Sequence[int] = (EOS,),
    vocabulary: int = VOCABULARY,
) -> list[int]:
    """The new tokens the toy model gives alone, without an engine; stop strings are not looked at."""
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + params.max_tokens, capacity):
        logits = toy_logits(tokens, vocabulary)
        tokens.append(
            sample_row(logits, params.temperature, params.top_k, params.top_p, params.seed, len(tokens))
        )
        if tokens[-1] in stop_ids and not params.ignore_eos:
            break
    return tokens[len(prompt) :]


def toy_next(sequence: EngineSequence, tokens: list[int]) -> int:
    """What the toy model draws after `tokens` for this sequence."""
    s = sequence
    return sample_row(toy_logits(tokens), s.temperature, s.top_k, s.top_p, s.seed, len(tokens))


class ToyRunner:
    """See the module's text. `steps` keeps (number of sequences, number of tokens) of every step."""

    name = "toy"

    def __init__(self, num_pages: int, page_size: int = 4, spec: ModelSpec | None = None) -> None:
        self.spec = spec or toy_spec()
        self.page_size = page_size
        self.num_pages = num_pages
        self.max_step_tokens = MAX_STEP_TOKENS
        self.steps: list[tuple[int, int]] = []
        self.fail_next = False
        self._position = np.full((num_pages, page_size), -1, dtype=np.int64)
        self._hash = np.zeros((num_pages, page_size), dtype=np.uint64)

    def forward(self, batch: StepInput, rows: Literal["last", "all"]) -> np.ndarray:
        check_step(batch, self.spec, self.page_size, self.num_pages)
        for array in (batch.tokens, batch.starts, batch.lengths, batch.pages):
            assert array.dtype == np.int32
            assert array.flags.c_contiguous
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("the toy runner was told to fail")
        self.steps.append((len(batch.lengths), len(batch.tokens)))
        ends = np.cumsum(batch.lengths)
        for i, end in enumerate(ends):
            self._write(batch.tokens[end - batch.lengths[i] : end], int(batch.starts[i]), batch.pages[i])
        logits = []
        for i in range(len(ends)):
            start, length = int(batch.starts[i]), int(batch.lengths[i])
            first = start + length - 1 if rows == "last" else start
            logits += [self._read(batch.pages[i], stop) for stop in range(first + 1, start + length + 1)]
        return np.stack(logits)

    def score(self, batch: StepInput, targets: np.ndarray) -> np.ndarray:
        return log_probabilities(self.forward(batch, "all"), targets)

    def sample(
        self,
        batch: StepInput,
        temperature: np.ndarray,
        top_k: np.ndarray,
        top_p: np.ndarray,
        seeds: np.ndarray,
        rows: Literal["last", "all"] = "last",
    ) -> np.ndarray:
        of, positions = sampled_rows(batch, rows)
        logits = self.forward(batch, rows)
        return sample(logits, positions, temperature[of], top_k[of], top_p[of], seeds[of])

    def _write(self, tokens: np.ndarray, start: int, pages: np.ndarray) -> None:
        state = self._read_hashes(pages, start)[-1] if start else 0
        for position, token in enumerate(tokens.tolist(), start):
            state = _mix(state, token)
            page, slot = pages[position // self.page_size], position % self.page_size
            self._position[page, slot] = position
            self._hash[page, slot] = state

    def _read_hashes(self, pages: np.ndarray, stop: int) -> list[int]:
        used = pages[: -(-stop // self.page_size)]
        positions = self._position[used].reshape(-1)[:stop]
        assert (positions == np.arange(stop)).all(), f"pages {used} hold positions {positions}"
        return self._hash[used].reshape(-1)[:stop].tolist()  # type: ignore[no-any-return]

    def _read(self, pages: np.ndarray, stop: int) -> np.ndarray:
        return _logits(self._read_hashes(pages, stop), self.spec.vocab_size)


class ScriptedRunner:
    """Says `script` after a prompt of `prompt_length` tokens, whatever is asked; keeps nothing."""

    name = "scripted"

    def __init__(
        self, script: Sequence[int], prompt_length: int = 1, num_pages: int = 64, page_size: int = 64
    ) -> None:
        self.spec = toy_spec()
        self.page_size = page_size
        self.num_pages = num_pages
        self.max_step_tokens = MAX_STEP_TOKENS
        self._said = np.array([*[0] * prompt_length, *script, *[EOS] * 2], dtype=np.int32)

    def forward(self, batch: StepInput, rows: Literal["last", "all"]) -> np.ndarray:
        raise NotImplementedError

    def score(self, batch: StepInput, targets: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def sample(
        self,
        batch: StepInput,
        temperature: np.ndarray,
        top_k: np.ndarray,
        top_p: np.ndarray,
        seeds: np.ndarray,
        rows: Literal["last", "all"] = "last",
    ) -> np.ndarray:
        return self._said[np.minimum(sampled_rows(batch, rows)[1], len(self._said) - 1)]


class ByteStream:
    """Incremental UTF-8."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return "" if token >= EOS else self._decoder.decode(bytes([token]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteTokenizer:
    """A token a byte; ids past the bytes have no text."""

    eos: int | None = EOS
    adds_bos = False
    chat_template: str | None = "<role>content"

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(t for t in tokens if t < EOS).decode(errors="replace")

    def stream(self) -> ByteStream:
        return ByteStream()

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"
