"""Running a workload on a runner, step by step, with and without the runner's own timers.

The workload runs as the engine would run it: every prompt in chunks of at most MAX_STEP_TOKENS tokens, then
one token for all sequences at a time, sampled greedily. After a warm-up by the prompts' first tokens each
repetition runs it twice: with the timers off, for the seconds of whole phases, and with them on, for the
shares of the ops; once the time given is spent, with the timers off alone. Where only the shares matter, it
runs with the timers on alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from flatout.core.types import Workload
from flatout.engine.runner import MAX_STEP_TOKENS, Runner, StepInput
from flatout.errors import ConfigError, ResourceError

Progress = Callable[[str, int, int], None]

PHASES = ("prefill", "decode")
_WARM = 64  # tokens of a prompt that warm up: they touch every weight
MIN_REPEATS, _MAX_REPEATS = 3, 15


@runtime_checkable
class TimedRunner(Runner, Protocol):
    """A runner that can tell where a step's time went."""

    def profile(self, enable: bool) -> None: ...

    def timings(self) -> dict[str, float]:
        """Op -> seconds since the last call."""
        ...


@dataclass(slots=True)
class PhaseSamples:
    """Seconds of one phase: a whole prefill of all prompts, or one decode step of all sequences.

    whole: one entry a run with the timers off. ops: (op -> seconds, seconds of the whole) a run with the
    timers on.
    """

    whole: list[float] = field(default_factory=list)
    ops: list[tuple[dict[str, float], float]] = field(default_factory=list)


def chunks(prompt: int) -> list[tuple[int, int]]:
    """(start, length) of the steps that a prompt is prefilled in."""
    return [(start, min(MAX_STEP_TOKENS, prompt - start)) for start in range(0, prompt, MAX_STEP_TOKENS)]


def run_workload(
    runner: TimedRunner,
    workload: Workload,
    max_seconds: float,
    progress: Progress,
    steps: int | None = None,
    min_repeats: int = MIN_REPEATS,
    shares: bool = False,
) -> dict[str, PhaseSamples]:
    """Samples of "prefill" and "decode" for about max_seconds, at least `min_repeats` after a warm-up, one of
    them with timers. steps: of the decode steps only so many, from the middle of the output; all by default.
    shares: all of them with timers, and none without.

    Raises ConfigError for a workload longer than the model allows, ResourceError when its pages do not fit.
    """
    pages = _page_table(runner, workload)
    shape = (workload.batch, workload.prompt + workload.output)
    tokens = np.random.default_rng(0).integers(0, runner.spec.vocab_size, shape, dtype=np.int32)
    samples = {phase: PhaseSamples() for phase in PHASES}
    skipped = max(workload.output - (steps or workload.output), 0) // 2
    decoded = (workload.prompt + skipped, workload.prompt + workload.output - skipped)
    for row in range(len(tokens)):  # what lies between the prompt and the steps that are timed, once
        _prefill(runner, tokens[row], pages[row : row + 1], workload.prompt, decoded[0])
    warm = min(_WARM, workload.prompt)
    _repetition(runner, tokens, pages, warm, decoded, {phase: PhaseSamples() for phase in PHASES}, False)
    start = time.perf_counter()
    for repeat in range(_MAX_REPEATS):
        elapsed = time.perf_counter() - start
        if repeat >= min_repeats and elapsed * (repeat + 1) / repeat > max_seconds:
            break
        progress("steps", repeat, _MAX_REPEATS)
        if not shares:
            _repetition(runner, tokens, pages, workload.prompt, decoded, samples, timed=False)
        if repeat == 0 or time.perf_counter() - start < max_seconds:
            _repetition(runner, tokens, pages, workload.prompt, decoded, samples, timed=True)
    for phase in samples.values() if shares else ():
        phase.whole = [seconds for _, seconds in phase.ops]
    progress("steps", _MAX_REPEATS, _MAX_REPEATS)
    return samples


def _page_table(runner: Runner, workload: Workload) -> np.ndarray:
    tokens = workload.prompt + workload.output
    if tokens > runner.spec.max_positions:
        raise ConfigError(
            f"prompt and output must fit {runner.spec.max_positions} positions",
            str(tokens),
            "a shorter prompt",
        )
    pages_each = -(-tokens // runner.page_size)
    needed = workload.batch * pages_each
    if needed > runner.num_pages:
        raise ResourceError(
            f"the workload needs {needed} pages of {runner.page_size} tokens",
            str(runner.num_pages),
            "a smaller batch or a larger max_tokens",
        )
    return np.arange(needed, dtype=np.int32).reshape(workload.batch, pages_each)


def _repetition(
    runner: TimedRunner,
    tokens: np.ndarray,
    pages: np.ndarray,
    prompt: int,
    decoded: tuple[int, int],
    samples: dict[str, PhaseSamples],
    timed: bool,
) -> None:
    """All prefills, then decode steps at the positions from decoded[0] to before decoded[1]."""

    def record(phase: str, seconds: float) -> None:
        if timed:
            samples[phase].ops.append((runner.timings(), seconds))
        else:
            samples[phase].whole.append(seconds)

    runner.profile(timed)
    runner.timings()  # forget what was counted before
    rows = range(len(tokens))
    seconds = sum(_prefill(runner, tokens[row], pages[row : row + 1], 0, prompt) for row in rows)
    record("prefill", seconds)
    ones = np.ones(len(tokens))
    for position in range(*decoded):
        column = np.ascontiguousarray(tokens[:, position])
        record("decode", _step(runner, column, ones * position, ones, pages))
    runner.profile(False)


def _prefill(runner: Runner, tokens: np.ndarray, pages: np.ndarray, first: int, last: int) -> float:
    """Seconds of the steps that read one sequence's tokens from position `first` to before `last`."""
    seconds = 0.0
    for start, length in chunks(last - first):
        chunk = np.ascontiguousarray(tokens[first + start : first + start + length])
        seconds += _step(runner, chunk, np.array([first + start]), np.array([length]), pages)
    return seconds


def _step(
    runner: Runner, tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, pages: np.ndarray
) -> float:
    """Seconds of one step with greedy sampling."""
    batch = StepInput(tokens, starts.astype(np.int32), lengths.astype(np.int32), pages)
    sequences = len(lengths)
    temperature, top_k = np.zeros(sequences, np.float32), np.zeros(sequences, np.int32)
    top_p, seeds = np.ones(sequences, np.float32), np.zeros(sequences, np.uint64)
    begin = time.perf_counter()
    runner.sample(batch, temperature, top_k, top_p, seeds)
    return time.perf_counter() - begin
