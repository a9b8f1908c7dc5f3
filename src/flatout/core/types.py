"""Types that cross rooms. Frozen, keyword-only, units in the names; each turns into JSON by `to_json`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from flatout.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """One measured or sourced peak. name: e.g. "read_dram", "int8", "bf16"; unit: "byte/s" or "op/s"
    (multiply and add count as two)."""

    name: str
    value: float
    unit: str
    threads: int
    tier: str = "measured"  # measured | calibrated | datasheet
    working_set_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One described machine. Sizes in bytes; features are ISA names such as "avx512_vnni"."""

    name: str
    kind: str  # cpu | gpu | fpga
    cores: int
    features: tuple[str, ...]
    l1d_bytes: int
    l2_bytes: int
    l3_bytes: int
    memory_bytes: int
    ceilings: tuple[Ceiling, ...] = ()
    fingerprint: str = ""

    def ceiling(self, name: str, threads: int) -> Ceiling:
        """The ceiling called `name` at `threads` threads (or the nearest lower thread count measured)."""
        found = [c for c in self.ceilings if c.name == name and c.threads <= threads]
        if not found:
            raise ConfigError(
                f"a floor needs the ceiling {name!r}", "not measured", "run `flatout profile` first"
            )
        return max(found, key=lambda c: c.threads)


OBJECTIVES = ("latency", "throughput", "energy", "memory", "money")
"""What a search makes less of: seconds (of one sequence, or of several), joules above idle, bytes, or
dollars, which on one machine are seconds again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is run: batch sequences of `prompt` tokens each generate `output` tokens, and what has to be won.

    The default is the median request of the Azure LLM inference trace 2023 (Patel et al., "Splitwise", ISCA
    2024; conversation and code together: 1,046 tokens in, 90 out), rounded.
    """

    batch: int = 1
    prompt: int = 1024
    output: int = 96
    objective: str = "latency"  # one of OBJECTIVES

    def __post_init__(self) -> None:
        for name in ("batch", "prompt", "output"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1", str(getattr(self, name)), f"{name}=1")
        if self.objective not in OBJECTIVES:
            raise ConfigError(
                f"the objective is {', '.join(OBJECTIVES[:-1])} or {OBJECTIVES[-1]}",
                repr(self.objective),
                "latency",
            )

    def seconds(self, prefill_s: float, decode_s: float) -> float:
        """Seconds of all of it from a prefill of all prompts and one decode step of all sequences."""
        return prefill_s + self.output * decode_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Work of one op: bytes moved to and from memory, floating or integer operations (mul + add = 2)."""

    bytes_read: float
    bytes_written: float
    flops: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            bytes_read=self.bytes_read + other.bytes_read,
            bytes_written=self.bytes_written + other.bytes_written,
            flops=self.flops + other.flops,
        )

    @property
    def bytes(self) -> float:
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A predicted value with its interval; never printed like a measurement."""

    low: float
    mid: float
    high: float
    unit: str
    tier: str  # measured | calibrated | datasheet


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Median and spread of n samples, with what was measured where."""

    name: str
    unit: str
    median: float
    p20: float
    p80: float
    samples: int
    tier: str = "measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One evaluated candidate of a search: a pure function of `key` (the hash of its inputs)."""

    key: str
    recipe: str
    stage: str
    result: dict[str, Any] = field(default_factory=dict)


def measurement(name: str, unit: str, samples: list[float]) -> Measurement:
    """Summarise samples by their median, 20th and 80th percentile (nearest rank)."""
    if not samples:
        raise ConfigError("a measurement needs at least one sample", "none", "more repetitions")
    ordered = sorted(samples)

    def rank(q: float) -> float:
        return ordered[min(len(ordered) - 1, max(0, math.ceil(q * len(ordered)) - 1))]

    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return Measurement(
        name=name, unit=unit, median=median, p20=rank(0.2), p80=rank(0.8), samples=len(ordered)
    )


def to_json(value: Any) -> Any:
    """Dataclasses, tuples, paths and numpy scalars as plain JSON values; NaN and infinity become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json(v) for v in value]
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "item") and not isinstance(value, str | bytes):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
