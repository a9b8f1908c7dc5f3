"""What a benchmark times, what a row of it says, and how the rows compare. Pure: no clock, no processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flatout.core.types import Workload, measurement
from flatout.verify.drivers import tokens_per_second
from flatout.verify.speed import Sample

MARGIN = 0.01
"""Largest perplexity increase at which a model counts as of equal quality."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """name: its key in results. kind: "prefill" times the prompts, "decode" the tokens after them."""

    name: str
    kind: str
    workload: Workload


PHASES = (
    Phase(name="prefill", kind="prefill", workload=Workload(batch=1, prompt=512, output=1)),
    Phase(name="decode", kind="decode", workload=Workload(batch=1, prompt=32, output=64)),
    Phase(name="decode_ctx1024", kind="decode", workload=Workload(batch=1, prompt=1024, output=32)),
    Phase(name="batch_8", kind="decode", workload=Workload(batch=8, prompt=32, output=32)),
    Phase(name="batch_32", kind="decode", workload=Workload(batch=32, prompt=32, output=32)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """An engine with one format, and what it costs in quality against the original in its stored precision.

    loss: relative increase of the perplexity; loss_upper: its one-sided 95 % bound, None for fewer
    passages than a spread can be estimated from.
    """

    engine: str
    format: str
    version: str
    details: str
    perplexity: float
    loss: float
    loss_upper: float | None

    @property
    def name(self) -> str:
        return f"{self.engine} {self.format}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender in one phase, in tokens/s of all sequences together.

    n: samples used; thrown_away: those left out because others used the machine; kept_noisy: such samples
    that had to be used; foreign_load: median cores kept busy by others, None without a meter.
    floor_fraction: floor / time, ours only.
    """

    engine: str
    format: str
    phase: str
    batch: int
    prompt: int
    output: int
    unit: str
    median: float
    p20: float
    p80: float
    n: int
    thrown_away: int
    kept_noisy: int
    foreign_load: float | None
    floor_fraction: float | None
    perplexity: float
    loss: float

    @property
    def name(self) -> str:
        return f"{self.engine} {self.format}"


def make_row(
    contender: Contender, phase: Phase, samples: Sequence[Sample], rounds: int, floor_s: float | None = None
) -> Row:
    """Clean samples count; when they are fewer than half of the rounds, all do, and the row says so."""
    clean = [sample for sample in samples if not sample.noisy]
    used = clean if 2 * len(clean) >= rounds else list(samples)
    work = phase.workload
    rates = [tokens_per_second(work, phase.kind, sample.seconds) for sample in used]
    rate = measurement(phase.name, "token/s", rates)
    loads = sorted(sample.foreign for sample in used if sample.foreign is not None)
    floor_rate = None if floor_s is None else tokens_per_second(work, phase.kind, floor_s)
    return Row(
        engine=contender.engine,
        format=contender.format,
        phase=phase.name,
        batch=work.batch,
        prompt=work.prompt,
        output=work.output,
        unit=rate.unit,
        median=rate.median,
        p20=rate.p20,
        p80=rate.p80,
        n=rate.samples,
        thrown_away=len(samples) - len(used),
        kept_noisy=sum(sample.noisy for sample in used),
        foreign_load=loads[len(loads) // 2] if loads else None,
        floor_fraction=None if floor_rate is None else rate.median / floor_rate,
        perplexity=contender.perplexity,
        loss=contender.loss,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Our median over that of the fastest peer of a phase."""

    value: float
    peer: str


def ratios(rows: Sequence[Row], ours: str, margin: float | None = None) -> dict[str, Ratio | None]:
    """For every phase, `ours` (an engine) against the fastest of the others; None where either is missing.

    margin: only rows that lose at most this much count, ours included: a fast engine that lost quality is not
    compared at equal quality.
    """
    allowed = [row for row in rows if margin is None or row.loss <= margin]
    found: dict[str, Ratio | None] = {}
    for phase in PHASES:
        same = [row for row in allowed if row.phase == phase.name]
        mine = max((row for row in same if row.engine == ours), key=lambda row: row.median, default=None)
        best = max((row for row in same if row.engine != ours), key=lambda row: row.median, default=None)
        found[phase.name] = (
            None if mine is None or best is None else Ratio(value=mine.median / best.median, peer=best.name)
        )
    return found
