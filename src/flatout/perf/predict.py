"""predict(): how long will a prefill and a decode step take under a recipe that was not run yet?

    seconds = interaction * sum over ops and formats of floor / efficiency

Efficiency is a fraction of floor as profiles measured it. Profiles of the same machine give it per (phase,
op, format) (tier "measured") or, for formats not run yet, per arithmetic (tier "calibrated"); without
profiles typical values stand in (tier "datasheet"). The interaction is what a whole step takes over the sum
of its ops: norms, sampling, barriers.

The interval comes from residuals by split conformal quantiles (Romano et al. 2019): log(measured /
predicted) of earlier predictions or, where a format was not measured, how far each measured one is from what
the others say of it. With fewer than nine of them the tier's default width stands in: nine is the least
number from which a 90 % interval with finite-sample coverage exists. Predictions get better as a search
corrects its table, so old residuals would make intervals too wide: the newest ones count, at a level that
moves with how many of their own intervals held (adaptive conformal inference, Gibbs & Candes 2021).
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flatout.core.formats import Recipe
from flatout.core.spec import ModelSpec
from flatout.core.types import Hardware, Prediction, Workload
from flatout.perf.profile import Profile, phase_parts
from flatout.perf.roofline import IMPOSSIBLE, Part, step_floor

_TIERS = ("measured", "calibrated", "datasheet")  # best first
_WIDTH = {"measured": 1.15, "calibrated": 1.5, "datasheet": 3.0}  # mid / width to mid * width
_TYPICAL = {"memory": 0.7, "compute": 0.4}
"""Fractions of floor that well-made kernels reach: a guess, which is why the tier's interval is wide."""
_NOTABLE_SHARE = 0.01  # of a phase's floor; smaller parts do not decide the tier
_COVERAGE = 0.9
ENOUGH = math.ceil(_COVERAGE / (1 - _COVERAGE) - 1e-9)
_NEWEST = 20  # residuals that a quantile is taken of
_STEP = 0.1  # of the level a held or missed interval: large, for a search makes few predictions


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Predicted seconds: prefill of all prompts, and one decode step (one token a sequence, mid-output)."""

    prefill: Prediction
    decode: Prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What profiles of this machine and runner say.

    fractions: (phase, op, format, arithmetic) -> fraction of floor. interactions: phase -> whole step over
    the sum of its ops. residuals: log(measured / predicted) of earlier predictions. transfer: phase -> the
    same of formats that were measured, had they not been.
    """

    fractions: dict[tuple[str, str, str, str], float]
    interactions: dict[str, float]
    residuals: tuple[float, ...] = ()
    transfer: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


def calibrate(profiles: Iterable[Profile], residuals: Sequence[float] = ()) -> Calibration:
    """The medians over `profiles`, which must come from one machine, runner and thread count."""
    fractions: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    interactions: dict[str, list[float]] = defaultdict(list)
    for profile in profiles:
        for phase in profile.phases:
            seconds = {o.op: o.seconds for o in profile.ops if o.phase == phase.phase}
            fraction = {o.op: o.fraction for o in profile.ops if o.phase == phase.phase}
            counted = {part.op for part in phase.parts if fraction.get(part.op)}
            for part in phase.parts:
                if part.op in counted:
                    key = (phase.phase, part.op, part.format, part.arithmetic)
                    fractions[key].append(fraction[part.op] or 0.0)
            interactions[phase.phase].append(phase.measured.median / sum(seconds[op] for op in counted))
    return Calibration(
        fractions={key: statistics.median(values) for key, values in fractions.items()},
        interactions={phase: statistics.median(values) for phase, values in interactions.items()},
        residuals=tuple(residuals),
    )


def refit(table: Calibration, profiles: Iterable[Profile], residuals: Sequence[float] = ()) -> Calibration:
    """A table measured on stand-ins, corrected by whole steps of real candidates: the interaction of a phase
    is the median of measured seconds over what the table's ops add up to. Formats that the table lacks are
    taken from the profiles, and so is how fast heads are: a stand-in's random logits are flat, and a head
    whose rows are screened then reads them all (kernels/cpu/screen.cpp)."""
    profiles = list(profiles)
    real = calibrate(profiles).fractions
    known = real | _real_heads(table.fractions, real)
    alone = Calibration(fractions=known, interactions={})
    ratios: dict[str, list[float]] = defaultdict(list)
    for profile in profiles:
        for phase in profile.phases:
            added = sum(part_seconds(phase.phase, part, alone) for part in phase.parts)
            ratios[phase.phase].append(phase.measured.median / added)
    fitted = {phase: statistics.median(values) for phase, values in ratios.items()}
    return replace(
        table, fractions=known, interactions=table.interactions | fitted, residuals=tuple(residuals)
    )


def _real_heads(
    table: Mapping[tuple[str, str, str, str], float], real: Mapping[tuple[str, str, str, str], float]
) -> dict[tuple[str, str, str, str], float]:
    """The fractions of `table`, those of heads times what real heads of the same phase reach over theirs."""
    found = dict(table)
    for phase in {key[0] for key in table}:
        heads = [key for key in table if key[:2] == (phase, "head")]
        ratios = [real[key] / table[key] for key in heads if key in real]
        if ratios:
            found |= {key: table[key] * statistics.median(ratios) for key in heads}
    return found


def marginal_seconds(
    spec: ModelSpec,
    reference: Recipe,
    op: str,
    format_name: str,
    hardware: Hardware,
    workload: Workload,
    calibration: Calibration,
    threads: int,
) -> float:
    """Seconds of the whole workload that one layer spends in `op` with this format, in a model whose other
    layers follow `reference`; for the head and attention (its format is the cache's) of all layers."""
    if op == "head":
        recipe = replace(reference, head=format_name, embedding=format_name)
    elif op == "attention":
        recipe = replace(reference, kv_cache=format_name)
    else:
        recipe = replace(reference, overrides=(*reference.overrides, (f"layers.0.{op}", format_name)))
    shared = 1
    if op in spec.linears():
        shared = sum(recipe.format_of(i, op).name == format_name for i in range(spec.num_layers))
    seconds = {
        phase: sum(
            part_seconds(phase, p, calibration) for p in parts if (p.op, p.format) == (op, format_name)
        )
        for phase, parts in phase_parts(spec, recipe, hardware, workload, threads).items()
    }
    return workload.seconds(seconds["prefill"], seconds["decode"]) / shared


def predict(
    spec: ModelSpec,
    recipe: Recipe,
    hardware: Hardware,
    workload: Workload,
    *,
    calibration: Calibration | None = None,
    threads: int | None = None,
) -> StepTimes:
    """Seconds of prefill and of a decode step. Raises ConfigError when `hardware` lacks ceilings."""
    calibration = calibration or Calibration(fractions={}, interactions={})
    parts = phase_parts(spec, recipe, hardware, workload, threads or hardware.cores)
    return StepTimes(
        prefill=_predict_phase("prefill", parts["prefill"], calibration),
        decode=_predict_phase("decode", parts["decode"], calibration),
    )


def workload_prediction(workload: Workload, times: StepTimes) -> Prediction:
    """Seconds of the whole workload, of the worse tier of its two phases."""
    low, mid, high = (
        workload.seconds(getattr(times.prefill, edge), getattr(times.decode, edge))
        for edge in ("low", "mid", "high")
    )
    tier = max(times.prefill.tier, times.decode.tier, key=_TIERS.index)
    return Prediction(low=low, mid=mid, high=high, unit="s", tier=tier)


def part_seconds(phase: str, part: Part, calibration: Calibration) -> float:
    """Seconds of one part of a step, its share of the interaction included."""
    fraction, _ = _efficiency(phase, part, calibration)
    return part.floor.floor_s / fraction * calibration.interactions.get(phase, 1.0)


def _predict_phase(phase: str, parts: tuple[Part, ...], calibration: Calibration) -> Prediction:
    seconds, tier = 0.0, "measured"
    notable = _NOTABLE_SHARE * sum(part.floor.floor_s for part in parts)
    for part in parts:
        fraction, known = _efficiency(phase, part, calibration)
        seconds += part.floor.floor_s / fraction
        if part.floor.floor_s >= notable:
            tier = max(tier, known, key=_TIERS.index)
    mid = seconds * calibration.interactions.get(phase, 1.0)
    width = _width(calibration.residuals, calibration.transfer.get(phase, ()), tier)
    least = step_floor(parts).floor_s / IMPOSSIBLE  # no kernel beats its floor by more than the ceilings err
    low = min(mid, max(mid / width, least))
    return Prediction(low=low, mid=mid, high=mid * width, unit="s", tier=tier)


def _efficiency(phase: str, part: Part, calibration: Calibration) -> tuple[float, str]:
    """Fraction of floor of one part, and the tier of that knowledge."""
    key = (phase, part.op, part.format, part.arithmetic)
    if key in calibration.fractions:
        return calibration.fractions[key], "measured"
    found = _transferred(calibration.fractions, *key)
    return (found, "calibrated") if found is not None else (_TYPICAL[part.floor.bound], "datasheet")


def _transferred(
    fractions: Mapping[tuple[str, str, str, str], float], phase: str, op: str, name: str, arithmetic: str
) -> float | None:
    """Median fraction of floor of other formats with this arithmetic: of the same op, or else of any."""
    for same in (op, None):
        found = [
            fraction
            for (its_phase, its_op, its_name, its_arithmetic), fraction in fractions.items()
            if (its_phase, its_arithmetic) == (phase, arithmetic)
            and same in (its_op, None)
            and (its_op, its_name) != (op, name)
        ]
        if found:
            return statistics.median(found)
    return None


def transfer_residuals(
    fractions: Mapping[tuple[str, str, str, str], float],
) -> dict[str, tuple[float, ...]]:
    """Phase -> log(measured / predicted) seconds of everything measured, each predicted from the others."""
    found: dict[str, list[float]] = defaultdict(list)
    for (phase, op, name, arithmetic), fraction in fractions.items():
        others = _transferred(fractions, phase, op, name, arithmetic)
        if others is not None:
            found[phase].append(math.log(others / fraction))
    return {phase: tuple(values) for phase, values in found.items()}


def _width(residuals: Sequence[float], transfer: Sequence[float], tier: str) -> float:
    """Factor between the middle and an end of the interval. `residuals` are in the order they were made."""
    if tier == "calibrated" and len(transfer) >= max(ENOUGH, len(residuals)):
        return math.exp(_quantile([abs(residual) for residual in transfer], 1 - _COVERAGE))
    if len(residuals) < ENOUGH:
        return _WIDTH[tier]
    sizes, missed = [abs(residual) for residual in residuals], 1 - _COVERAGE
    for i in range(ENOUGH, len(sizes)):
        held = sizes[i] <= _quantile(sizes[max(0, i - _NEWEST) : i], missed)
        missed = min(max(missed + _STEP * (1 - _COVERAGE - (not held)), 0.0), 0.5)
    return math.exp(_quantile(sizes[-_NEWEST:], missed))


def _quantile(sizes: Sequence[float], missed: float) -> float:
    """What the next one exceeds with probability `missed`, as far as these can say."""
    rank = math.ceil((1 - missed) * (len(sizes) + 1) - 1e-9)
    return sorted(sizes)[min(rank, len(sizes)) - 1]
