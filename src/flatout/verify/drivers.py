"""What an A/B test times: prefill and decode, greedy, end of sequence ignored, the same tokens on every side.

Prefill computes the logits of the last token only; decode counts the steps after an untimed prefill, each
giving one token a sequence. A decoder goes back to the end of one prefill for every sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from flatout.core.types import Workload
from flatout.data.passages import load_passages
from flatout.engine.runner import MAX_STEP_TOKENS, Runner, StepInput, greedy_tokens
from flatout.errors import ConfigError, EvidenceError
from flatout.verify.quality import Encoder


class Driver(Protocol):
    """A side of a speed test. `name` says what it is, for people."""

    @property
    def name(self) -> str: ...

    def prefill(self, prompts: Sequence[Sequence[int]]) -> float:
        """Seconds to take in all prompts (of one length) and predict the token after each."""
        ...

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """Seconds to generate `tokens` tokens for each prompt, after an untimed prefill."""
        ...

    def decoder(self, prompts: Sequence[Sequence[int]], tokens: int) -> Callable[[], float]:
        """A function that does what `decode` does, but shares one prefill among all of its calls and starts
        with one untimed step, which finds the weights wherever others left them. It serves until this side
        does something else."""
        ...


def workload_prompts(tokenizer: Encoder, workload: Workload) -> list[list[int]]:
    """`workload.batch` prompts of `workload.prompt` tokens: different stretches of the validation
    passages."""
    stream: list[int] = []
    for passage in load_passages("validation"):
        stream += tokenizer.encode(passage.text)
    while len(stream) < workload.batch * workload.prompt:  # enormous workloads read the text again
        stream += stream
    return [stream[i * workload.prompt : (i + 1) * workload.prompt] for i in range(workload.batch)]


class RunnerDriver:
    """Drives a flatout Runner as the engine does: prompts in chunks of at most `step_tokens`, then one
    token a step."""

    def __init__(self, runner: Runner, step_tokens: int = MAX_STEP_TOKENS) -> None:
        self._runner, self._step_tokens = runner, step_tokens

    @property
    def name(self) -> str:
        return self._runner.name

    def prefill(self, prompts: Sequence[Sequence[int]]) -> float:
        arrays, pages = self._prepare(prompts, 0)
        start = time.perf_counter()
        self._take_in(arrays, pages)
        return time.perf_counter() - start

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        arrays, pages = self._prepare(prompts, tokens)
        following = self._take_in(arrays, pages)
        starts = np.array([len(array) for array in arrays], dtype=np.int32)
        return self._generate(following, starts, pages, tokens)

    def decoder(self, prompts: Sequence[Sequence[int]], tokens: int) -> Callable[[], float]:
        arrays, pages = self._prepare(prompts, tokens)
        following = self._take_in(arrays, pages)
        starts = np.array([len(array) for array in arrays], dtype=np.int32)

        def run() -> float:
            self._generate(following, starts, pages, 1)
            return self._generate(following, starts, pages, tokens)

        return run

    def _generate(self, following: np.ndarray, starts: np.ndarray, pages: np.ndarray, tokens: int) -> float:
        """Seconds of `tokens` steps after the `starts` tokens that lie in the pages."""
        lengths = np.ones(len(starts), dtype=np.int32)
        begin = time.perf_counter()
        for _ in range(tokens):
            following = greedy_tokens(self._runner, StepInput(following, starts, lengths, pages))
            starts = starts + 1
        return time.perf_counter() - begin

    def _prepare(self, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Prompts as arrays, and a page table with pages of its own for every sequence."""
        arrays = [np.asarray(prompt, dtype=np.int32) for prompt in prompts]
        if not arrays or any(len(array) == 0 for array in arrays):
            raise ConfigError(
                "a speed test needs prompts with tokens", f"{len(arrays)} prompts", "prompt=512"
            )
        longest = max(len(array) for array in arrays) + tokens
        width = -(-longest // self._runner.page_size)
        if longest > self._runner.spec.max_positions or width * len(arrays) > self._runner.num_pages:
            raise ConfigError(
                f"the workload must fit {self._runner.spec.max_positions} positions "
                f"and {self._runner.num_pages} pages",
                f"{len(arrays)} sequences of {longest} tokens, {width} pages each",
                "a smaller workload or a larger cache",
            )
        pages = np.arange(width * len(arrays), dtype=np.int32).reshape(len(arrays), width)
        return arrays, pages

    def _take_in(self, arrays: list[np.ndarray], pages: np.ndarray) -> np.ndarray:
        """Prefill every sequence and return the greedy next tokens."""
        following = np.empty(len(arrays), dtype=np.int32)
        for i, array in enumerate(arrays):
            for start in range(0, len(array), self._step_tokens):
                chunk = array[start : start + self._step_tokens]
                sizes = np.array([start], dtype=np.int32), np.array([len(chunk)], dtype=np.int32)
                following[i : i + 1] = greedy_tokens(self._runner, StepInput(chunk, *sizes, pages[i : i + 1]))
        return following


def tokens_per_second(workload: Workload, phase: str, seconds: float) -> float:
    """Prompt tokens (phase "prefill") or generated tokens ("decode") of the whole batch a second."""
    if seconds <= 0:
        raise EvidenceError("a rate needs a positive time", f"{seconds} s", "measure again")
    return workload.batch * (workload.prompt if phase == "prefill" else workload.output) / seconds
