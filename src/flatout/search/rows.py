"""Rows: a candidate with all that is known of it, and what the numbers in it mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flatout.core.costs import kv_bytes_per_token, weight_bytes
from flatout.core.formats import Recipe
from flatout.core.types import Prediction
from flatout.perf.predict import StepTimes
from flatout.search.context import Context
from flatout.search.recipes import Candidate
from flatout.verify.examination import Plan
from flatout.verify.quality import ClusterLoss, arrays
from flatout.verify.statistics import moments


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Perplexity increase on validation text, as a fraction: two standard errors down and up."""

    value: float
    low: float
    high: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A candidate with all that is known of it.

    status: waiting, slower, rejected, failed, passed, chosen or original. Times in seconds; predicted is None
    until the machine is known, times and loss until measured.
    """

    candidate: Candidate
    memory_bytes: int
    predicted: StepTimes | None = None
    workload: Prediction | None = None
    times: dict[str, float] | None = None
    loss: Loss | None = None
    expected_loss: tuple[float, float, float] | None = None
    plan: Plan | None = None
    status: str = "waiting"
    reason: str = ""

    @property
    def recipe(self) -> Recipe:
        return self.candidate.recipe

    @property
    def name(self) -> str:
        return self.candidate.recipe.name


def memory_bytes(context: Context, recipe: Recipe) -> int:
    """Weights as the runner holds them and the KV cache of the workload at its end."""
    spec, workload = recipe.child(context.bench.source.spec), context.request.workload
    tokens = workload.batch * (workload.prompt + workload.output)
    cache = tokens * spec.num_layers * kv_bytes_per_token(spec, recipe.kv_cache)
    return weight_bytes(spec, recipe) + round(cache)


def regret(row: Row, rows: Sequence[Row]) -> float:
    """How much slower `row` can be than the best of `rows` on any mix of prompt and output tokens: the larger
    of its prefill and decode times over the least there are (minimax regret, Savage 1951; the ratio of two
    sums lies between the ratios of their terms)."""
    times = [r.times for r in rows if r.times is not None]
    if row.times is None:
        return math.inf
    return max(row.times[phase] / min(t[phase] for t in times) for phase in ("prefill_s", "decode_s"))


def by_suitability(rows: Sequence[Row], *, tolerance: float) -> list[Row]:
    """`rows`, which come in the order of their cost, with those of least regret first.

    Regrets within the factor `tolerance` of the least count as equal, and those rows keep their order: times
    move by some per cent from run to run, and so would a choice by regret alone.
    """
    regrets = {row.name: regret(row, rows) for row in rows}
    bound = tolerance * min(regrets.values(), default=math.inf)
    return sorted(rows, key=lambda row: max(bound, regrets[row.name]))


def two_standard_errors(losses: list[ClusterLoss]) -> float:
    """Of the loss, in nats a token."""
    return 2 * moments(*arrays(losses)).spread / math.sqrt(len(losses))


def loss_of(losses: list[ClusterLoss]) -> Loss:
    """What paired losses say about the perplexity."""
    seen, error = moments(*arrays(losses)), two_standard_errors(losses)
    return Loss(
        value=math.expm1(seen.delta),
        low=math.expm1(seen.delta - error),
        high=math.expm1(seen.delta + error),
        tokens=sum(cluster.tokens for cluster in losses),
    )
