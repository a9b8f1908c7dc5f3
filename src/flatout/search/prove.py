"""Steps 4 and 5 of the loop: race the candidates that passed, open the hold-out for the fastest, prove it is
not slower.

A recipe that was found and another that is about as fast by the screening's timings, a few pairs in turns,
are raced to say which one goes first: what is chosen from many predictions owes part of its lead to luck. A
candidate is delivered only if it beats the engine at original precision and transformers in interleaved A/B
tests of the user's workload and its certificate passes. Otherwise the next one is tried, and when none is
left the original comes back: a promise that cannot be kept is not made.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from flatout.core.formats import Recipe
from flatout.core.types import Workload
from flatout.search.context import Context
from flatout.search.recipes import ORIGINAL
from flatout.search.rows import Row
from flatout.search.screen import NEAR, Screen, original_side
from flatout.search.units import megabytes
from flatout.verify.certificate import Certificate, Side
from flatout.verify.examination import examine


@dataclass(frozen=True, slots=True)
class _Rules:
    """How long an A/B test may last, and the fewest pairs it takes."""

    max_seconds: float
    min_pairs: int


_ORIGINAL, _BASELINE = _Rules(8.0, 6), _Rules(16.0, 6)
"""What nobody uses today is raced for the shorter time. Six pairs give a 95 % interval; more are taken while
it is wide and time is left, which long prompts on a slow machine would overrun."""

_RIVAL = 1.1  # a candidate whose time is within this factor of the best one's may be as fast
_CERTAIN = 0.98  # lower bound of the time ratio that "not slower" needs where something else has to be won

Race = dict[str, Any]
"""JSON of a SpeedResult for "prefill" and "decode", their "workload" ratio, and "energy", the JSON of another
SpeedResult in joules of the whole workload above idle, where energy is the objective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What is delivered and the evidence for it. fallback: the original comes back, for `reason`.

    against_original is None when the delivered recipe is the original itself. against_other: an A/B test of
    it and the nearest other candidate, if there was one, whose recipes are recipe_a and recipe_b.
    """

    row: Row
    certificate: Certificate
    against_original: Race | None
    against_baseline: Race
    fallback: bool
    reason: str
    against_other: Race | None = None


def workload_ratio(race: Race, workload: Workload) -> dict[str, float]:
    """Ratio of the whole workload's times with its interval, from the phases'.

    The sums' ratio is the mean of the phases' ratios weighted by B's seconds; the interval's ends are
    combined alike.
    """
    weights = {phase: race[phase]["seconds_b"]["median"] for phase in ("prefill", "decode")}
    total = sum(weights.values())
    return {
        edge: sum(weights[phase] * race[phase][edge] for phase in weights) / total
        for edge in ("ratio", "low", "high")
    }


def run_race(context: Context, first: Recipe | None, second: Recipe, rules: _Rules) -> Race:
    """An A/B test of the workload, kept for this run. `first` None is transformers in bf16."""
    workload = context.request.workload

    def compute() -> Race:
        if first is not None:
            context.build(first)
        context.build(second)
        phases = context.bench.race(
            first, second, workload, rules.max_seconds, rules.min_pairs, context.stages.step
        )
        names = {"a": context.bench.runner_name(first), "b": context.bench.runner_name(second)}
        if workload.objective != "energy":
            return {**names, **phases}
        joules = context.bench.race_energy(
            first, second, workload, rules.max_seconds, rules.min_pairs, context.stages.step
        )
        return {**names, **phases, "energy": joules}

    sides = {"first": context.inputs(first) if first else "baseline", "second": context.inputs(second)}
    race = context.timed(
        "race", second.name, {**sides, "workload": workload, "code": context.bench.code}, compute
    )
    return {**race, "workload": workload_ratio(race, workload)}


def prove(screen: Screen, finalists: list[Row]) -> Proof:
    """Race and certify the finalists in turn; the original comes back when none is faster and certified."""
    context = screen.context
    reason = "no candidate is expected to keep the quality budget"
    if screen.context.request.max_memory is not None:
        reason += f" in {megabytes(screen.context.request.max_memory)}"
    if all(row.name == ORIGINAL.name for row in screen.rows):
        reason = "original precision was asked for"
    tried: set[str] = set()
    while finalists:
        with context.stages.stage("race the fastest"):
            row, against_other = _faster_of_two(screen, finalists)
            tried.add(row.name)
            against_original = run_race(context, ORIGINAL, row.recipe, _ORIGINAL)
        if not _wins(screen, row, against_original):
            reason = f"{row.name} is not {_better(context)} than the engine at original precision"
            screen.mark(row.name, "slower", "not better than original precision in an A/B test")
            finalists = _others(screen, tried)
            continue
        with context.stages.stage("certify on sealed text"):
            certificate = certify_row(screen, row)
        if not certificate.passed:
            reason = f"{row.name} did not get its certificate: {certificate.reason}"
            screen.mark(row.name, "failed", certificate.reason)
            finalists = _others(screen, tried)
            continue
        with context.stages.stage("compare with transformers"):
            against_baseline = run_race(context, None, row.recipe, _BASELINE)
        if _wins(screen, row, against_baseline):
            screen.mark(row.name, "chosen")
            return Proof(
                row=screen.row(row.name),
                certificate=certificate,
                against_original=against_original,
                against_baseline=against_baseline,
                fallback=False,
                reason="",
                against_other=against_other,
            )
        reason = f"{row.name} is not {_better(context)} than transformers bf16"
        screen.mark(row.name, "slower", "not better than transformers in an A/B test")
        finalists = _others(screen, tried)
    return _original(screen, reason)


def _faster_of_two(screen: Screen, finalists: Sequence[Row]) -> tuple[Row, Race | None]:
    """The first finalist, or the second if an A/B test of both is sure that it is faster by more than counts
    (`NEAR`); and that test, if a found one and another are near."""
    context = screen.context
    first = finalists[0]
    near = [
        row
        for row in finalists[1:]
        if screen.cost(row) <= _RIVAL * screen.cost(first)
        and (first.recipe.by_library or row.recipe.by_library)
    ]
    if not near or context.request.workload.objective in ("memory", "energy"):
        return first, None
    second = near[0]
    race = run_race(context, second.recipe, first.recipe, _ORIGINAL)
    named = {"recipe_a": second.name, "recipe_b": first.name, **race}
    return (second if race["workload"]["high"] < 1 / NEAR else first), named


def _others(screen: Screen, tried: Collection[str]) -> list[Row]:
    with screen.context.stages.stage("screen candidates"):
        return screen.again(tried)


def _original(screen: Screen, reason: str) -> Proof:
    """The original in bf16, certified like any other, with the reason why it comes back."""
    context = screen.context
    with context.stages.stage("certify on sealed text"):
        row = screen.row(ORIGINAL.name)
        certificate = certify_row(screen, row)
    with context.stages.stage("compare with transformers"):
        against_baseline = run_race(context, None, ORIGINAL, _BASELINE)
    screen.mark(row.name, "chosen", "the original comes back")
    return Proof(
        row=row,
        certificate=certificate,
        against_original=None,
        against_baseline=against_baseline,
        fallback=True,
        reason=reason,
    )


def _wins(screen: Screen, row: Row, race: Race) -> bool:
    """Whether the objective is won beyond doubt: time, or energy or memory at a time that is not worse."""
    objective, time_ratio = screen.context.request.workload.objective, race["workload"]["low"]
    if objective == "memory":
        smaller = row.memory_bytes < screen.row(ORIGINAL.name).memory_bytes
        return smaller and bool(time_ratio > _CERTAIN)
    if objective == "energy":
        return bool(race["energy"]["low"] > 1 and time_ratio > _CERTAIN)
    return bool(time_ratio > 1)


def _better(context: Context) -> str:
    objective = context.request.workload.objective
    if objective in ("memory", "energy"):
        return "smaller at the same speed" if objective == "memory" else "less hungry at the same speed"
    return "faster"


def certify_row(screen: Screen, row: Row) -> Certificate:
    """Open the hold-out for one candidate. Counts as an opening, even when it fails."""
    context = screen.context
    plan = row.plan or screen.plan(screen.losses(row.recipe))
    context.note(f"certificate of {row.name}: {plan}")
    context.build(row.recipe)
    out = context.request.out.absolute()
    certificate = examine(
        context.texts.holdout,
        plan,
        original=original_side(context),
        optimised=Side(
            source=str(out),
            sha256=context.bench.weights_sha256(row.recipe, out.parent),
            recipe=row.name,
            runner=context.bench.runner_name(row.recipe),
            derived_from=context.bench.sha256,
        ),
        score_original=context.original_scores,
        score_optimised=lambda clusters: context.scores(row.recipe, clusters),
        margin=context.request.max_loss,
        hardware=context.hardware.name,
        divergence=context.bench.divergence(row.recipe, context.texts.validation),
    )
    context.opened += 1
    return certificate
