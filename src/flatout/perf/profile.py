"""profile_model(): what each op of a runner takes, beside its floor.

A fraction of floor above 1.05 cannot be: the ceilings were too low, for example because another tenant of
the machine was busy while they were measured. They are then measured again, once, and if the fraction stays
the profile says so.
"""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flatout.core.costs import kv_bytes_per_token, weight_bytes
from flatout.core.formats import Recipe
from flatout.core.spec import ModelSpec
from flatout.core.types import Hardware, Measurement, Workload, measurement, to_json
from flatout.engine.runner import Runner
from flatout.errors import BackendError
from flatout.hardware.ceilings import measure_ceilings
from flatout.perf.roofline import IMPOSSIBLE, Floor, Part, op_floors, step_floor, step_parts
from flatout.perf.timing import MIN_REPEATS, PhaseSamples, Progress, TimedRunner, chunks, run_workload

_PAGE_TOKENS = 64
_NOTABLE_SHARE = 0.05  # ops below this share of a step are too short to blame the ceilings


@dataclass(frozen=True, slots=True, kw_only=True)
class OpTime:
    """One op in one phase.

    seconds: median over whole prefills or over decode steps. fraction: floor / seconds. Ops without a floor
    are those the cost model does not count: "other" (norms, activation functions, sampling) and "outside"
    (the step's time beyond the runner's ops: the call, Python).
    """

    phase: str  # prefill | decode
    op: str
    seconds: float
    share: float  # of the phase's time
    floor: Floor | None
    fraction: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTime:
    """A whole prefill (all prompts), or one decode step (one token a sequence). parts: floor in detail."""

    phase: str
    measured: Measurement
    floor: Floor
    fraction: float
    tokens_per_s: float
    read_bytes_per_s: float
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Everything measured, and what it was measured on."""

    runner: str
    spec: ModelSpec
    recipe: Recipe
    workload: Workload
    threads: int
    hardware: Hardware
    phases: tuple[PhaseTime, ...]
    ops: tuple[OpTime, ...]
    weight_bytes: int
    kv_bytes_per_token: float  # of all layers
    peak_resident_bytes: int  # of this process so far, Python and loading included
    warnings: tuple[str, ...]

    def phase(self, name: str) -> PhaseTime:
        """The phase called "prefill" or "decode"."""
        return next(p for p in self.phases if p.phase == name)

    @property
    def seconds(self) -> tuple[float, float]:
        """Medians of a prefill of all prompts and of one decode step."""
        return self.phase("prefill").measured.median, self.phase("decode").measured.median


def rescaled(profile: Profile, factors: Mapping[str, float]) -> Profile:
    """The profile with the seconds of each phase times its factor: as it would have been in another minute of
    a shared machine."""

    def phase(one: PhaseTime) -> PhaseTime:
        factor, seconds = factors.get(one.phase, 1.0), one.measured
        return replace(
            one,
            measured=replace(
                seconds,
                median=seconds.median * factor,
                p20=seconds.p20 * factor,
                p80=seconds.p80 * factor,
            ),
            fraction=one.fraction / factor,
            tokens_per_s=one.tokens_per_s / factor,
            read_bytes_per_s=one.read_bytes_per_s / factor,
        )

    def op(one: OpTime) -> OpTime:
        factor = factors.get(one.phase, 1.0)
        fraction = None if one.fraction is None else one.fraction / factor
        return replace(one, seconds=one.seconds * factor, fraction=fraction)

    phases = tuple(phase(one) for one in profile.phases)
    return replace(profile, phases=phases, ops=tuple(op(one) for one in profile.ops))


def profile(
    model: str | Path,
    workload: Workload | None = None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Load `model` (anything flatout.load takes), measure the machine unless done before, profile the steps.

    threads: default all cores. Raises the errors of flatout.load, measure_ceilings and profile_model.
    """
    from flatout.engine.cpu import CpuRunner
    from flatout.engine.load import load

    workload = workload or Workload()
    hardware = measure_ceilings(progress)
    # A page a sequence more than the tokens need, whatever the page size.
    room = workload.batch * (workload.prompt + workload.output + _PAGE_TOKENS)
    runner = load(model, runner="cpu", threads=threads, max_tokens=room).runner
    assert isinstance(runner, CpuRunner)
    return profile_model(
        runner,
        runner.recipe,
        hardware,
        workload,
        threads=runner.threads,
        remeasure=lambda: measure_ceilings(progress, fresh=True),
        progress=progress,
    )


def profile_model(
    runner: Runner,
    recipe: Recipe,
    hardware: Hardware,
    workload: Workload,
    *,
    threads: int | None = None,
    max_seconds: float = 10.0,
    steps: int | None = None,
    min_repeats: int = MIN_REPEATS,
    shares: bool = False,
    remeasure: Callable[[], Hardware] | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Run the workload for about max_seconds (at least `min_repeats`) and relate every op to its floor.

    recipe and threads: those of the runner; threads default to all cores. steps: decode steps that are timed,
    from the middle of the output; all by default. shares: it is for these, and whole phases are timed with
    the timers on. remeasure: renews the ceilings when a fraction of floor comes out above 1.05. Raises
    BackendError for a runner without timers, ConfigError and ResourceError for a workload that does not fit.
    """
    if not isinstance(runner, TimedRunner):
        raise BackendError("a profile needs a runner that times its ops", runner.name, "the cpu runner")
    tell = progress or (lambda what, done, of: None)
    samples = run_workload(runner, workload, max_seconds, tell, steps, min_repeats, shares)
    threads = threads or hardware.cores
    result = _assess(runner, recipe, hardware, workload, threads, samples)
    if result.warnings and remeasure is not None:
        result = _assess(runner, recipe, remeasure(), workload, threads, samples)
    return result


def phase_parts(
    spec: ModelSpec, recipe: Recipe, hardware: Hardware, workload: Workload, threads: int
) -> dict[str, tuple[Part, ...]]:
    """Parts of a whole prefill (all prompts, chunk by chunk) and of the decode step at mid-output."""
    prefill: list[Part] = []
    for start, length in chunks(workload.prompt):
        prefill += step_parts(spec, recipe, hardware, batch=1, tokens=length, context=start, threads=threads)
    middle = workload.prompt + (workload.output - 1) // 2
    decode = step_parts(
        spec, recipe, hardware, batch=workload.batch, tokens=1, context=middle, threads=threads
    )
    return {"prefill": tuple(prefill * workload.batch), "decode": decode}


def _assess(
    runner: Runner,
    recipe: Recipe,
    hardware: Hardware,
    workload: Workload,
    threads: int,
    samples: dict[str, PhaseSamples],
) -> Profile:
    """Measured seconds beside floors."""
    phases: list[PhaseTime] = []
    ops: list[OpTime] = []
    for phase, parts in phase_parts(runner.spec, recipe, hardware, workload, threads).items():
        measured = measurement(f"{phase} time", "s", samples[phase].whole)
        phases.append(_phase_time(phase, parts, measured, workload))
        ops += _op_times(phase, parts, samples[phase].ops)
    return Profile(
        runner=runner.name,
        spec=runner.spec,
        recipe=recipe,
        workload=workload,
        threads=threads,
        hardware=hardware,
        phases=tuple(phases),
        ops=tuple(ops),
        weight_bytes=weight_bytes(runner.spec, recipe),
        kv_bytes_per_token=runner.spec.num_layers * kv_bytes_per_token(runner.spec, recipe.kv_cache),
        peak_resident_bytes=_peak_resident_bytes(),
        warnings=_warnings(phases, ops),
    )


def profile_to_json(profile: Profile) -> dict[str, Any]:
    """What was measured, as plain JSON; the rest follows from what it was measured on."""
    measured = ("runner", "peak_resident_bytes", "warnings")
    return {
        **{name: to_json(getattr(profile, name)) for name in measured},
        "phases": {phase.phase: to_json(phase.measured) for phase in profile.phases},
        "ops": [[op.phase, op.op, op.seconds, op.share] for op in profile.ops],
    }


def profile_from_json(
    value: Mapping[str, Any],
    spec: ModelSpec,
    recipe: Recipe,
    hardware: Hardware,
    workload: Workload,
    threads: int,
) -> Profile:
    """The profile that `profile_to_json` was given, of the same model, recipe, machine and workload."""
    parts = phase_parts(spec, recipe, hardware, workload, threads)
    floors = {phase: op_floors(those) for phase, those in parts.items()}
    return Profile(
        runner=value["runner"],
        spec=spec,
        recipe=recipe,
        workload=workload,
        threads=threads,
        hardware=hardware,
        phases=tuple(
            _phase_time(phase, parts[phase], Measurement(**measured), workload)
            for phase, measured in value["phases"].items()
        ),
        ops=tuple(
            _op_time(phase, op, seconds, share, floors[phase].get(op))
            for phase, op, seconds, share in value["ops"]
        ),
        weight_bytes=weight_bytes(spec, recipe),
        kv_bytes_per_token=spec.num_layers * kv_bytes_per_token(spec, recipe.kv_cache),
        peak_resident_bytes=value["peak_resident_bytes"],
        warnings=tuple(value["warnings"]),
    )


def _peak_resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage's unit
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _phase_time(phase: str, parts: tuple[Part, ...], measured: Measurement, workload: Workload) -> PhaseTime:
    floor = step_floor(parts)
    tokens = workload.batch * (workload.prompt if phase == "prefill" else 1)
    return PhaseTime(
        phase=phase,
        measured=measured,
        floor=floor,
        fraction=floor.floor_s / measured.median,
        tokens_per_s=tokens / measured.median,
        read_bytes_per_s=floor.bytes / measured.median,
        parts=parts,
    )


def _op_times(
    phase: str, parts: tuple[Part, ...], samples: list[tuple[dict[str, float], float]]
) -> list[OpTime]:
    rows = [ops | {"outside": max(0.0, whole - sum(ops.values()))} for ops, whole in samples]
    whole = statistics.median(whole for _, whole in samples)
    floors = op_floors(parts)
    times = []
    for op in dict.fromkeys(name for row in rows for name in row):
        seconds = statistics.median(row.get(op, 0.0) for row in rows)
        share = seconds / whole if whole > 0 else 0.0
        times.append(_op_time(phase, op, seconds, share, floors.get(op)))
    return times


def _op_time(phase: str, op: str, seconds: float, share: float, floor: Floor | None) -> OpTime:
    fraction = floor.floor_s / seconds if floor is not None and seconds > 0 else None
    return OpTime(phase=phase, op=op, seconds=seconds, share=share, floor=floor, fraction=fraction)


def _warnings(phases: list[PhaseTime], ops: list[OpTime]) -> tuple[str, ...]:
    rows = [(p.phase, "step", p.fraction, p.floor.bound) for p in phases]
    for op in ops:
        if op.floor is not None and op.fraction is not None and op.share >= _NOTABLE_SHARE:
            rows.append((op.phase, op.op, op.fraction, op.floor.bound))
    return tuple(
        f"{phase} {op} ran at {fraction:.2f} of its floor, which cannot be: the {bound} ceiling is too low "
        "(the machine was busy while it was measured, or data stayed in a nearer cache)"
        for phase, op, fraction, bound in rows
        if fraction > IMPOSSIBLE
    )
