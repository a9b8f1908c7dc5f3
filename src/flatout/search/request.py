"""What the user asked the search for, checked before anything is read or measured."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from flatout.core.portable import ENGINES
from flatout.core.types import Workload
from flatout.errors import ConfigError
from flatout.search.traffic import Trace

_WORKLOAD = re.compile(r"(?P<prompt>\d{1,7})\+(?P<output>\d{1,7})(x(?P<batch>\d{1,4}))?")
_BYTES = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[kMGT]?i?B?)")
_DEFAULT_BATCH = {"throughput": 8, "money": 8}  # otherwise 1
_LEAST_MEMORY = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One search. max_loss is a fraction: 0.01 allows the perplexity to grow by one per cent. trace: requests
    that the workload stands for (search/traffic.py). portable: a program that must load the result too
    (core/portable.py). max_memory: bytes of weights and cache. dollars_per_hour: what the machine costs."""

    model: str
    out: Path
    max_loss: float
    workload: Workload
    recipe: str | None = None
    text: Path | None = None
    threads: int | None = None
    trace: Path | None = None
    portable: str | None = None
    max_memory: int | None = None
    dollars_per_hour: float | None = None

    def __post_init__(self) -> None:
        if self.portable is not None and self.portable not in ENGINES:
            raise ConfigError(
                f"--portable is one of {', '.join(ENGINES)}", repr(self.portable), f"--portable {ENGINES[0]}"
            )
        if self.dollars_per_hour is not None and not 0 < self.dollars_per_hour < math.inf:
            raise ConfigError(
                "a price is dollars an hour above 0", str(self.dollars_per_hour), "--dollars-per-hour 0.50"
            )
        if self.workload.objective == "money" and self.dollars_per_hour is None:
            raise ConfigError(
                "the objective money needs a price", "none", "--dollars-per-hour with this machine's price"
            )
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


def parse_bytes(text: str | int) -> int:
    """'800MB', '1.5 GiB' or a number of bytes. Raises ConfigError for anything else, or less than 1 MiB."""
    match = _BYTES.fullmatch(str(text).strip())
    if match is not None:
        unit = match["unit"].rstrip("B")
        base = 1024.0 if unit.endswith("i") else 1000.0
        value = round(float(match["number"]) * base ** " kMGT".index(unit[:1] or " "))
        if value >= _LEAST_MEMORY:
            return value
    raise ConfigError("--max-memory is a size of at least 1MiB", repr(str(text)), "--max-memory 800MB")


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
