"""What a step would take, and cost in joules, on a card with a lower power limit. Predicted, never set.

A power limit acts through the clock: the card lowers it until it draws no more. A step with B bytes and F
operations at the clock f, with x = f / (highest clock):

    seconds = sum over ops of max(bytes / read rate, operations / (rate at the highest clock * x))
              + what else a step takes at the highest clock / x
    joules  = seconds * (idle + awake * x^a)
              + B * (memory + core * x^(a - 1)) + F * operation * (f / clock it was measured at)^(a - 1)

and f is the highest clock at which joules / seconds is within the limit. Voltage makes a: power goes with
f V^2, and V stays flat at low clocks and rises with f at high ones (measured by Guerreiro et al., HPCA 2018),
so a is between 1 and 3; 2 is taken, and both ends are in the interval. What the memory itself takes does not
depend on the clock: 3.92 pJ a bit (HBM2, O'Connor et al., MICRO 2017).

The other numbers of a card are measured there or chosen so that measured rows come out (`H100`). Nobody has
lowered a limit to check. What speaks for it: decode, which waits for memory, loses about a third of its
joules and little time at a lower clock, and 32 % were measured on an H200 (Ma et al., arXiv:2605.11999).
What kernels cost to start is not counted, so a small model takes longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flatout.core.costs import step_costs
from flatout.core.formats import Recipe
from flatout.core.spec import ModelSpec
from flatout.core.types import Cost, Prediction, Workload
from flatout.errors import ConfigError

MEMORY_J = 3.92e-12 * 8
"""Joules a byte inside the memory."""
_STEEPNESS = (1.0, 2.0, 3.0)  # a: low, middle, high


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerModel:
    """A card. Rates and joules an operation by what the tensor cores multiply: "bf16" or "fp8"."""

    name: str
    least_limit_w: float
    limit_w: float
    idle_w: float
    awake_w: float  # more, at the highest clock, without work
    lowest_hz: float
    highest_hz: float
    read_bytes_per_s: float
    ops_per_s: Mapping[str, float]  # at the highest clock, which a limit does not allow for long
    core_j: float  # a byte on its way from the memory to the registers, at the highest clock
    op_j: Mapping[str, float]
    op_hz: float  # the clock that op_j was measured at
    share: float  # of a step's time that is its floor's
    width: float  # mid / width to mid * width: what measured rows lie within


H100 = PowerModel(
    name="NVIDIA H100 80GB HBM3",
    # Idle and limit as NVML shows them; awake: steps that wait for the host's memory draw 157 W. 4,096 tokens
    # through the vendor's products at 1,450 MHz: 705 (bf16) and 1,330 TFLOP/s (e4m3), 700 W.
    least_limit_w=200.0,
    limit_w=700.0,
    idle_w=76.0,
    awake_w=81.0,
    lowest_hz=345e6,
    highest_hz=1980e6,
    read_bytes_per_s=3.03e12,
    ops_per_s={"bf16": 705e12 * 1980 / 1450, "fp8": 1330e12 * 1980 / 1450},
    op_hz=1450e6,
    # Chosen by hand for the 26 rows of decode and prefill in `gpuall` and `gpuheads` of benchmarks/results,
    # whose seconds come out at 0.73 to 1.11 of what was measured, their joules at 0.73 to 1.20.
    core_j=125e-12,
    op_j={"bf16": 0.85e-12, "fp8": 0.5e-12},
    share=0.85,
    width=1.4,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CappedStep:
    """A step under a power limit. Tokens are the prompt's in prefill, new ones in decode."""

    clock_hz: float
    watts: float
    seconds: Prediction
    joules_per_token: Prediction
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CappedTimes:
    """All prompts, and one decode step in the middle of the outputs."""

    limit_w: float
    prefill: CappedStep
    decode: CappedStep


@dataclass(frozen=True, slots=True)
class _Point:
    clock: float
    seconds: float
    joules: float


def capped(
    spec: ModelSpec, recipe: Recipe, card: PowerModel, workload: Workload, limit_w: float
) -> CappedTimes:
    """What is expected under a limit of `limit_w`. Raises ConfigError for one that the card does not take."""
    if not card.least_limit_w <= limit_w <= card.limit_w:
        raise ConfigError(
            f"a power limit of an {card.name} is {card.least_limit_w:.0f} to {card.limit_w:.0f} W",
            f"{limit_w:g} W",
            f"--power-cap {card.limit_w:.0f}",
        )
    context = workload.prompt + workload.output // 2
    batch, prompt = workload.batch, workload.prompt
    prefill = step_costs(spec, recipe, batch=batch, tokens=prompt, context=0)
    decode = step_costs(spec, recipe, batch=batch, tokens=1, context=context)
    return CappedTimes(
        limit_w=limit_w,
        prefill=_step(prefill, spec, recipe, card, limit_w, batch * prompt),
        decode=_step(decode, spec, recipe, card, limit_w, batch),
    )


def _step(
    costs: Mapping[str, Cost], spec: ModelSpec, recipe: Recipe, card: PowerModel, limit_w: float, tokens: int
) -> CappedStep:
    work = [(cost.bytes, _operations(op, cost, spec, recipe)) for op, cost in costs.items()]
    points = [_within(work, card, limit_w, steepness) for steepness in _STEEPNESS]
    middle = points[1]

    def prediction(unit: str, values: list[float]) -> Prediction:
        low, high = min(values) / card.width, max(values) * card.width
        return Prediction(low=low, mid=values[1], high=high, unit=unit, tier="calibrated")

    return CappedStep(
        clock_hz=middle.clock,
        watts=middle.joules / middle.seconds,
        seconds=prediction("s", [point.seconds for point in points]),
        joules_per_token=prediction("J", [point.joules / tokens for point in points]),
        tokens_per_s=tokens / middle.seconds,
    )


def _operations(op: str, cost: Cost, spec: ModelSpec, recipe: Recipe) -> dict[str, float]:
    """By what is multiplied: e4m3 only where weights are; all other formats are unpacked to bfloat16."""
    if op in spec.linears():
        eight = sum(recipe.format_of(i, op).name == "fp8" for i in range(spec.num_layers)) / spec.num_layers
    else:
        eight = float(op == "head" and recipe.head == "fp8")
    return {"bf16": cost.flops * (1 - eight), "fp8": cost.flops * eight}


def _within(
    work: list[tuple[float, dict[str, float]]], card: PowerModel, limit_w: float, steepness: float
) -> _Point:
    """At the highest clock within the limit, or the lowest there is."""
    low, high = card.lowest_hz, card.highest_hz
    best = _at(high, work, card, steepness)
    if best.joules <= limit_w * best.seconds:
        return best
    for _ in range(50):  # watts rise with the clock
        middle = (low + high) / 2
        point = _at(middle, work, card, steepness)
        low, high = (middle, high) if point.joules <= limit_w * point.seconds else (low, middle)
    return _at(low, work, card, steepness)


def _at(
    clock: float, work: list[tuple[float, dict[str, float]]], card: PowerModel, steepness: float
) -> _Point:
    x = clock / card.highest_hz
    floor, full = 0.0, 0.0
    joules = 0.0
    for size, operations in work:
        memory = size / card.read_bytes_per_s
        compute = sum(count / card.ops_per_s[kind] for kind, count in operations.items())
        floor += max(memory, compute / x)
        full += max(memory, compute)
        joules += size * (MEMORY_J + card.core_j * x ** (steepness - 1))
        joules += sum(count * card.op_j[kind] for kind, count in operations.items()) * (
            clock / card.op_hz
        ) ** (steepness - 1)
    seconds = floor + full * (1 / card.share - 1) / x
    return _Point(clock, seconds, joules + seconds * (card.idle_w + card.awake_w * x**steepness))
