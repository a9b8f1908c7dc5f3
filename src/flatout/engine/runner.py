"""The small protocol between the engine's front and whatever executes a forward step.

A step advances S sequences by one or more tokens each. There is no prefill or decode phase: a sequence that
has `starts` tokens in its pages gets `lengths` more, attends to all of them, and the runner writes the new
tokens' keys and values into the pages before it reads them. Legend: T tokens of the step, S sequences, P
pages a row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from flatout.core.spec import ModelSpec
from flatout.errors import ConfigError

MAX_STEP_TOKENS = 512
"""Most tokens of one step on a processor: enough to reach the arithmetic peak, short enough to interleave.
Runners size their buffers by it."""


@dataclass(frozen=True, slots=True, eq=False)
class StepInput:
    """One step. Arrays are int32, C-contiguous, and may be reused by the caller once the call returns.

    tokens (T,): the new tokens of all sequences, one after the other. starts (S,): position of each
    sequence's first new token, which is the number of tokens already in its pages. lengths (S,): new tokens
    of each sequence, at least 1; they sum to T. pages (S, P): page table; entry j holds positions j *
    page_size to (j + 1) * page_size - 1; -1 after the last page.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    pages: np.ndarray


class Runner(Protocol):
    """Executes steps over num_pages pages of page_size tokens each."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def name(self) -> str:
        """What runs, for people: "cpu (avx512, 2 threads)"."""
        ...

    @property
    def page_size(self) -> int: ...

    @property
    def num_pages(self) -> int: ...

    @property
    def max_step_tokens(self) -> int:
        """Most tokens of one step."""
        ...

    def forward(self, batch: StepInput, rows: Literal["last", "all"]) -> np.ndarray:
        """float32 logits: (S, V) of each sequence's last new token, or (T, V) of every new token."""
        ...

    def score(self, batch: StepInput, targets: np.ndarray) -> np.ndarray:
        """float32 (T,): log-probability of targets[t] (int32) as the token after new token t."""
        ...

    def sample(
        self,
        batch: StepInput,
        temperature: np.ndarray,
        top_k: np.ndarray,
        top_p: np.ndarray,
        seeds: np.ndarray,
        rows: Literal["last", "all"] = "last",
    ) -> np.ndarray:
        """int32 (S,) or (T,): the token after each sequence's last new token, or after every new token, drawn
        as `sampler.sample` does from the logits there.

        temperature and top_p are float32 (S,), top_k int32 (S,), seeds uint64 (S,), each for all of its
        sequence's rows; the RNG's position is that of the drawn token, starts + lengths for the last.
        """
        ...


def greedy_tokens(runner: Runner, batch: StepInput, rows: Literal["last", "all"] = "last") -> np.ndarray:
    """int32 (S,) or (T,): the likeliest token after each sequence's last new token, or after every one."""
    count = len(batch.lengths)
    return runner.sample(
        batch,
        temperature=np.zeros(count, dtype=np.float32),
        top_k=np.zeros(count, dtype=np.int32),
        top_p=np.ones(count, dtype=np.float32),
        seeds=np.zeros(count, dtype=np.uint64),
        rows=rows,
    )


def sampled_rows(batch: StepInput, rows: Literal["last", "all"]) -> tuple[np.ndarray, np.ndarray]:
    """Of each row that `Runner.sample` draws for: its sequence (R,), and the drawn token's position (R,)."""
    if rows == "last":
        return np.arange(len(batch.lengths)), batch.starts + batch.lengths
    of = np.repeat(np.arange(len(batch.lengths)), batch.lengths)
    first = np.cumsum(batch.lengths) - batch.lengths
    return of, batch.starts[of] + np.arange(len(of)) - first[of] + 1


def check_step(batch: StepInput, spec: ModelSpec, page_size: int, num_pages: int) -> None:
    """Raise ConfigError unless `batch` is well formed. For runners that would otherwise read or write out of
    bounds."""
    sequences = len(batch.lengths)
    ends = batch.starts.astype(np.int64) + batch.lengths
    sound = (
        sequences > 0
        and batch.starts.shape == batch.lengths.shape
        and batch.pages.shape[0] == sequences
        and bool((batch.lengths > 0).all() and (batch.starts >= 0).all())
        and int(batch.lengths.sum()) == len(batch.tokens)
    )
    if not sound:
        raise ConfigError(
            "a step needs starts >= 0 and lengths >= 1 that sum to its tokens, one row a sequence",
            f"tokens {batch.tokens.shape}, starts {batch.starts.shape}, lengths {batch.lengths.shape}, "
            f"pages {batch.pages.shape}",
            "build steps through flatout.engine",
        )
    if int(ends.max()) > min(spec.max_positions, batch.pages.shape[1] * page_size):
        raise ConfigError(
            f"positions must lie below {spec.max_positions} and inside the page table",
            str(int(ends.max())),
            "a shorter sequence",
        )
    if int(batch.tokens.min()) < 0 or int(batch.tokens.max()) >= spec.vocab_size:
        raise ConfigError(
            f"token ids lie between 0 and {spec.vocab_size - 1}",
            f"{int(batch.tokens.min())} to {int(batch.tokens.max())}",
            "the model's own tokenizer",
        )
    used = np.arange(batch.pages.shape[1])[None, :] * page_size < ends[:, None]
    entries = batch.pages[used]
    if int(entries.min()) < 0 or int(entries.max()) >= num_pages:
        raise ConfigError(
            f"pages in use lie between 0 and {num_pages - 1}",
            f"{int(entries.min())} to {int(entries.max())}",
            "build steps through flatout.engine",
        )
