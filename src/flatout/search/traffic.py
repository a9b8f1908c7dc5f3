"""Traffic: the requests of a trace, which few candidates serve them best, and where one takes over.

A request of P prompt and O output tokens takes a candidate P p + O d seconds, p and d its measured seconds a
prompt and an output token. Divided by O these are lines over the ratio P / O, so each of a set of candidates
is best on one interval of it, and sets differ by the lower envelope of their lines. More variants cost memory
and a certificate each: another one is taken only where it saves `worth` of the time of all requests.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from flatout.core.files import shown
from flatout.errors import ConfigError

_COLUMNS = (("ContextTokens", "GeneratedTokens"), ("prompt_tokens", "output_tokens"))
_MOST_TOKENS = 10_000_000  # of a request
_REMEDY = "a CSV file with a header and the columns ContextTokens, GeneratedTokens"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Requests: prompt and output tokens, int64 (R,) each."""

    prompt: np.ndarray
    output: np.ndarray

    def median(self) -> tuple[int, int]:
        """(prompt, output) tokens of the median request, each at least 1."""
        return max(1, round(float(np.median(self.prompt)))), max(1, round(float(np.median(self.output))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """A candidate's seconds a prompt token and an output token."""

    name: str
    prompt_s: float
    output_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A candidate that serves requests whose prompt is `low` to `high` times as long as their output.

    share: of all requests; seconds: of those together.
    """

    name: str
    low: float
    high: float
    share: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """How a trace is served. saving: of the time that the best single candidate takes, as a fraction."""

    variants: tuple[Variant, ...]
    seconds: float
    saving: float


def read_trace(path: Path) -> Trace:
    """Requests of a CSV file: columns ContextTokens and GeneratedTokens, as in the Azure LLM inference traces
    (Patel et al., "Splitwise", ISCA 2024), or prompt_tokens and output_tokens; others are ignored. Raises
    ConfigError naming file and line."""
    where = shown(str(path), 300)
    prompts: list[int] = []
    outputs: list[int] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = next((c for c in _COLUMNS if set(c) <= set(reader.fieldnames or ())), None)
            if columns is None:
                found = shown(", ".join(reader.fieldnames or ()) or "an empty file", 120)
                raise ConfigError("a trace names its columns", f"{found} in {where}", _REMEDY)
            for row in reader:
                prompt, output = (_tokens(row[column], where, reader.line_num) for column in columns)
                prompts.append(prompt)
                outputs.append(output)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            "a trace must be readable", f"{where}: {shown(str(error), 120)}", _REMEDY
        ) from error
    if not prompts:
        raise ConfigError("a trace holds at least one request", where, _REMEDY)
    return Trace(prompt=np.array(prompts, dtype=np.int64), output=np.array(outputs, dtype=np.int64))


def _tokens(text: str | None, where: str, line: int) -> int:
    try:
        value = int(text or "")
    except ValueError:
        value = -1
    if not 0 <= value <= _MOST_TOKENS:
        raise ConfigError(
            f"a request has 0 to {_MOST_TOKENS} tokens each way",
            f"{shown(repr(text), 40)} in line {line} of {where}",
            _REMEDY,
        )
    return value


def serve(trace: Trace, speeds: Sequence[Speed], most: int = 3, worth: float = 0.05) -> Service:
    """The best set of 1 to `most` candidates for the trace: as few as possible, one more only where it saves
    at least `worth` of the time. Raises ConfigError without candidates."""
    if not speeds or most < 1 or not 0 <= worth < 1:
        raise ConfigError(
            "a trace is served by 1 or more of at least one candidate",
            f"{len(speeds)} candidates, at most {most}, worth {worth:g}",
            "the defaults",
        )
    times = np.stack([s.prompt_s * trace.prompt + s.output_s * trace.output for s in speeds])
    best: tuple[int, ...] = ()
    least = single = math.inf
    for count in range(1, min(most, len(speeds)) + 1):
        totals = {
            chosen: float(times[list(chosen)].min(axis=0).sum())
            for chosen in combinations(range(len(speeds)), count)
        }
        chosen = min(totals, key=lambda c: totals[c])
        if count == 1:
            single = totals[chosen]
        elif totals[chosen] > (1 - worth) * least:
            break
        best, least = chosen, totals[chosen]
    variants = _variants([speeds[i] for i in best], times[list(best)])
    return Service(variants=variants, seconds=least, saving=1 - least / single if single else 0.0)


def _variants(speeds: Sequence[Speed], times: np.ndarray) -> tuple[Variant, ...]:
    """Those that are best somewhere, by rising ratio. times: seconds (len(speeds), R)."""
    spans = envelope(speeds)
    winners = times[[i for i, _, _ in spans]].argmin(axis=0)
    return tuple(
        Variant(
            name=speeds[i].name,
            low=low,
            high=high,
            share=float((winners == at).mean()),
            seconds=float(times[i][winners == at].sum()),
        )
        for at, (i, low, high) in enumerate(spans)
        if (winners == at).any()
    )


def envelope(speeds: Sequence[Speed]) -> list[tuple[int, float, float]]:
    """(index, low, high): where each candidate's line prompt_s * ratio + output_s is the lowest."""
    now = min(range(len(speeds)), key=lambda i: (speeds[i].output_s, speeds[i].prompt_s))
    spans: list[tuple[int, float, float]] = []
    low = 0.0
    while True:
        crossings = [
            ((speeds[i].output_s - speeds[now].output_s) / (speeds[now].prompt_s - speeds[i].prompt_s), i)
            for i in range(len(speeds))
            if speeds[i].prompt_s < speeds[now].prompt_s
        ]
        if not crossings:
            return [*spans, (now, low, math.inf)]
        high = min(at for at, _ in crossings)
        following = min((speeds[i].prompt_s, i) for at, i in crossings if at == high)[1]
        if high > low:
            spans.append((now, low, high))
        low, now = high, following
