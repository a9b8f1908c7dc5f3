"""What the user asked the search for, checked before anything is read or measured."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from flatout.core.types import Workload
from flatout.errors import ConfigError
from flatout.search.traffic import Trace

_WORKLOAD = re.compile(r"(?P<prompt>\d{1,7})\+(?P<output>\d{1,7})(x(?P<batch>\d{1,4}))?")
_DEFAULT_BATCH = {"latency": 1, "throughput": 8, "memory": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One search. max_loss is a fraction: 0.01 allows the perplexity to grow by one per cent. trace: requests
    that the workload stands for (search/traffic.py)."""

    model: str
    out: Path
    max_loss: float
    workload: Workload
    recipe: str | None = None
    text: Path | None = None
    threads: int | None = None
    trace: Path | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise ConfigError("threads lie between 1 and 1024", str(self.threads), "the number of cores")


def parse_max_loss(text: str | float) -> float:
    """'1%', '0.5 %' or a fraction such as 0.01, as a fraction between 0 and 1.

    Raises ConfigError for anything else; that a loss is exactly 0 cannot be proven with a finite text.
    """
    shown = str(text).strip()
    number, percent = (shown[:-1].strip(), True) if shown.endswith("%") else (shown, False)
    rule = "--max-loss is a perplexity increase above 0% and below 100%"
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError as error:
        raise ConfigError(rule, repr(shown), "--max-loss 1%") from error
    if not 0 < value < 1:  # NaN fails too
        remedy = f"--max-loss {number}%" if not percent and 1 <= value < 100 else "--max-loss 1%"
        raise ConfigError(rule, repr(shown), remedy)
    return value


def parse_workload(text: str | None, objective: str, trace: Trace | None = None) -> Workload:
    """'512+64x8': 512 prompt tokens, 64 generated, 8 sequences at a time. None is the median request of the
    trace, or the objective's default."""
    batch = _DEFAULT_BATCH.get(objective, 1)
    if text is None and trace is not None:
        prompt, output = trace.median()
        return Workload(prompt=prompt, output=output, batch=batch, objective=objective)
    if text is None:
        return Workload(batch=batch, objective=objective)
    match = _WORKLOAD.fullmatch(text.strip())
    if match is None:
        raise ConfigError("a workload is PROMPT+OUTPUT or PROMPT+OUTPUTxBATCH tokens", repr(text), "512+64")
    return Workload(
        prompt=int(match["prompt"]),
        output=int(match["output"]),
        batch=int(match["batch"] or batch),
        objective=objective,
    )
