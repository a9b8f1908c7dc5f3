"""What a benchmark times, what a row of it says, and how the rows compare. Pure: no clock, no processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flatout.core.types import Workload, measurement
from flatout.verify.drivers import tokens_per_second
from flatout.verify.speed import Sample

MARGIN = 0.01
"""Largest perplexity increase at which a model counts as of equal quality."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """name: its key in results. kind: "prefill" times the prompts, "decode" the tokens after them, "load" a
    fresh process until its first token, "memory" the most that this process held."""

    name: str
    kind: str
    workload: Workload

    @property
    def unit(self) -> str:
        return {"load": "s", "memory": "byte"}.get(self.kind, "token/s")

    @property
    def lower_is_better(self) -> bool:
        return self.kind in ("load", "memory")

    @property
    def positions(self) -> int:
        """Of the longest sequence."""
        return self.workload.prompt + (0 if self.kind == "prefill" else self.workload.output)


TIMED = (
    Phase(name="prefill", kind="prefill", workload=Workload(batch=1, prompt=512, output=1)),
    Phase(name="decode", kind="decode", workload=Workload(batch=1, prompt=32, output=64)),
    Phase(name="decode_ctx1024", kind="decode", workload=Workload(batch=1, prompt=1024, output=32)),
    Phase(name="batch_8", kind="decode", workload=Workload(batch=8, prompt=32, output=32)),
    Phase(name="batch_32", kind="decode", workload=Workload(batch=32, prompt=32, output=32)),
)
"""Phases of loaded models, which take turns (`turns`)."""

_START = Workload(batch=1, prompt=32, output=1)
LOAD = Phase(name="load", kind="load", workload=_START)
PEAK_MEMORY = Phase(name="peak_memory", kind="memory", workload=_START)
PHASES = (*TIMED, LOAD, PEAK_MEMORY)
"""All rows of a result; the last two are of fresh processes (`starts`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """An engine with one format, and what it costs in quality against the original in its stored precision.

    source: what it loads: our model as it was named, a peer's file. loss: relative increase of the
    perplexity; loss_upper: its one-sided 95 % bound, None for fewer passages than a spread can be estimated
    from. All three are None when nothing was scored.
    """

    engine: str
    format: str
    source: str
    version: str
    details: str
    perplexity: float | None
    loss: float | None
    loss_upper: float | None

    @property
    def name(self) -> str:
        return f"{self.engine} {self.format}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender in one phase: tokens/s of all sequences together, or seconds or bytes of a start.

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
    perplexity: float | None
    loss: float | None

    @property
    def name(self) -> str:
        return f"{self.engine} {self.format}"


@dataclass(frozen=True, slots=True)
class Start:
    """One fresh process: its time until the first token, and the most bytes that it held, None where the
    system does not count them."""

    sample: Sample
    peak_bytes: int | None


def make_row(
    contender: Contender, phase: Phase, samples: Sequence[Sample], rounds: int, floor_s: float | None = None
) -> Row:
    """Clean samples count; when they are fewer than half of the rounds, all do, and the row says so."""
    clean = [sample for sample in samples if not sample.noisy]
    used = clean if 2 * len(clean) >= rounds else list(samples)
    values = [_value(phase, sample.seconds) for sample in used]
    row = _row(contender, phase, values, None if floor_s is None else _value(phase, floor_s))
    loads = sorted(sample.foreign for sample in used if sample.foreign is not None)
    return replace(
        row,
        thrown_away=len(samples) - len(used),
        kept_noisy=sum(sample.noisy for sample in used),
        foreign_load=loads[len(loads) // 2] if loads else None,
    )


def make_start_rows(contender: Contender, starts: Sequence[Start], rounds: int) -> list[Row]:
    """Rows `load` and `peak_memory`; the second is left out where a peak was not counted."""
    rows = [make_row(contender, LOAD, [start.sample for start in starts], rounds)]
    peaks = [float(start.peak_bytes) for start in starts if start.peak_bytes is not None]
    if len(peaks) == len(starts):
        rows.append(_row(contender, PEAK_MEMORY, peaks))
    return rows


def _value(phase: Phase, seconds: float) -> float:
    return seconds if phase.kind == "load" else tokens_per_second(phase.workload, phase.kind, seconds)


def _row(contender: Contender, phase: Phase, values: list[float], floor: float | None = None) -> Row:
    """The row of `values`, none of them disturbed. floor: the best possible value."""
    work = phase.workload
    measured = measurement(phase.name, phase.unit, values)
    return Row(
        engine=contender.engine,
        format=contender.format,
        phase=phase.name,
        batch=work.batch,
        prompt=work.prompt,
        output=work.output,
        unit=measured.unit,
        median=measured.median,
        p20=measured.p20,
        p80=measured.p80,
        n=measured.samples,
        thrown_away=0,
        kept_noisy=0,
        foreign_load=None,
        floor_fraction=None if floor is None else measured.median / floor,
        perplexity=contender.perplexity,
        loss=contender.loss,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How many times better the best of ours is than the best peer of a phase: tokens/s over theirs, or their
    seconds or bytes over ours."""

    value: float
    peer: str


def ratios(rows: Sequence[Row], ours: str, margin: float | None = None) -> dict[str, Ratio | None]:
    """For every phase, the best of `ours` (an engine) against the best of the others; None where either is
    missing.

    margin: only rows that lose at most this much count, ours included: a fast engine that lost quality is not
    compared at equal quality, nor is one that was not scored.
    """
    allowed = [row for row in rows if margin is None or (row.loss is not None and row.loss <= margin)]
    return {phase.name: _ratio(phase, allowed, ours) for phase in PHASES}


def _ratio(phase: Phase, rows: Sequence[Row], ours: str) -> Ratio | None:
    best = min if phase.lower_is_better else max
    same = [row for row in rows if row.phase == phase.name]
    mine = best((row for row in same if row.engine == ours), key=lambda row: row.median, default=None)
    peer = best((row for row in same if row.engine != ours), key=lambda row: row.median, default=None)
    if mine is None or peer is None:
        return None
    value = peer.median / mine.median if phase.lower_is_better else mine.median / peer.median
    return Ratio(value=value, peer=peer.name)
