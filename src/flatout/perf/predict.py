"""predict(): how long will a prefill and a decode step take under a recipe that was not run yet?

    seconds = interaction * sum over ops and formats of floor / efficiency

Efficiency is a fraction of floor as profiles measured it. Profiles of the same machine give it per (phase,
op, format) (tier "measured") or, for formats not run yet, per arithmetic (tier "calibrated"); without
profiles typical values stand in (tier "datasheet"). The interaction is what a whole step takes over the sum
of its ops: norms, sampling, barriers.

The interval comes from residuals log(measured / predicted) of earlier predictions by split conformal
quantiles (Romano et al. 2019), or from the tier's default width while there are fewer than nine of them:
nine is the least number from which a 90 % interval with finite-sample coverage exists.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
_ENOUGH = math.ceil(_COVERAGE / (1 - _COVERAGE) - 1e-9)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Predicted seconds: prefill of all prompts, and one decode step (one token a sequence, mid-output)."""

    prefill: Prediction
    decode: Prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What profiles of this machine and runner say.

    fractions: (phase, op, format, arithmetic) -> fraction of floor. interactions: phase -> whole step over
    the sum of its ops. residuals: log(measured / predicted) of earlier predictions.
    """

    fractions: dict[tuple[str, str, str, str], float]
    interactions: dict[str, float]
    residuals: tuple[float, ...] = ()


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


def _predict_phase(phase: str, parts: tuple[Part, ...], calibration: Calibration) -> Prediction:
    seconds, tier = 0.0, "measured"
    notable = _NOTABLE_SHARE * sum(part.floor.floor_s for part in parts)
    for part in parts:
        fraction, known = _efficiency(phase, part, calibration)
        seconds += part.floor.floor_s / fraction
        if part.floor.floor_s >= notable:
            tier = max(tier, known, key=_TIERS.index)
    mid = seconds * calibration.interactions.get(phase, 1.0)
    width = _width(calibration.residuals, tier)
    least = step_floor(parts).floor_s / IMPOSSIBLE  # no kernel beats its floor by more than the ceilings err
    low = min(mid, max(mid / width, least))
    return Prediction(low=low, mid=mid, high=mid * width, unit="s", tier=tier)


def _efficiency(phase: str, part: Part, calibration: Calibration) -> tuple[float, str]:
    """Fraction of floor of one part, and the tier of that knowledge."""
    key = (phase, part.op, part.format, part.arithmetic)
    if key in calibration.fractions:
        return calibration.fractions[key], "measured"
    for same in (part.op, None):  # the same op with the same arithmetic, then any op with it
        found = [
            fraction
            for (its_phase, op, _, arithmetic), fraction in calibration.fractions.items()
            if its_phase == phase and arithmetic == part.arithmetic and same in (op, None)
        ]
        if found:
            return statistics.median(found), "calibrated"
    return _TYPICAL[part.floor.bound], "datasheet"


def _width(residuals: Sequence[float], tier: str) -> float:
    """Factor between the middle and an end of the interval."""
    if len(residuals) < _ENOUGH:
        return _WIDTH[tier]
    sizes = sorted(abs(r) for r in residuals)
    rank = math.ceil(_COVERAGE * (len(sizes) + 1) - 1e-9)
    return math.exp(sizes[min(rank, len(sizes)) - 1])
