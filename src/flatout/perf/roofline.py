"""Floors: the least time that the work of a step can take on given hardware.

    floor = max(bytes / read ceiling at the step's working set, operations / arithmetic ceiling of the format)

Bytes and operations come from core.costs, ceilings from hardware.ceilings. A step streams all its weights
and its KV cache once and starts over with the next one, so what matters is the read rate at a working set
of that many bytes: a model of 20 MB may live in cache, one of 200 MB does not. Between measured working
sets the rate is interpolated in log-log scale.

The arithmetic ceiling of a format is the fastest instruction that multiplies it exactly: int8 for integer
weights times int8 activations, fp32 for integer weights times float activations, and so on; attention
counts at the rate of its cache format. A kernel may fall short of that for good reasons (a softmax, a scale
every 32 products), and the fraction then shows the price.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise

from flatout.core.costs import step_costs
from flatout.core.formats import Recipe, parse_format
from flatout.core.spec import ModelSpec
from flatout.core.types import Cost, Hardware
from flatout.errors import ConfigError

IMPOSSIBLE = 1.05
"""A fraction of floor above this means that a ceiling was measured too low; less may be noise."""

LINEARS = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """Least seconds for some work. bound: "memory" or "compute", whichever takes longer."""

    floor_s: float
    memory_s: float
    compute_s: float
    bound: str
    bytes: float
    flops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The share of an op that runs in one format, with its floor."""

    op: str
    format: str
    arithmetic: str  # int8 | bf16 | fp32
    floor: Floor


def read_ceiling(hardware: Hardware, working_set_bytes: float, threads: int) -> float:
    """Byte/s at which `threads` threads can read a working set over and over; ConfigError if not measured."""
    # Working set -> (threads, rate) of the nearest thread count from below.
    points: dict[int, tuple[int, float]] = {}
    for c in hardware.ceilings:
        if c.unit != "byte/s" or c.threads > threads or c.working_set_bytes <= 0:
            continue
        if c.threads >= points.get(c.working_set_bytes, (0, 0.0))[0]:
            points[c.working_set_bytes] = (c.threads, c.value)
    most = max((count for count, _ in points.values()), default=0)
    known = sorted((size, rate) for size, (count, rate) in points.items() if count == most)
    if not known:
        raise ConfigError("a floor needs a read ceiling", "none measured", "measure_ceilings()")
    if working_set_bytes <= known[0][0]:
        return known[0][1]
    for (small, fast), (large, slow) in pairwise(known):
        if working_set_bytes <= large:
            position = math.log(working_set_bytes / small) / math.log(large / small)
            return float(fast * (slow / fast) ** position)
    return known[-1][1]


def op_ceiling(hardware: Hardware, arithmetic: str, threads: int) -> float:
    """Op/s of int8, int16, bf16 or fp32 on `threads` threads by the fastest instructions, tiles included.

    int16 activations are two planes of int8 (kernels/linear.py), so two products for one.
    """
    if arithmetic == "int16":
        return op_ceiling(hardware, "int8", threads) / 2
    rates = [hardware.ceiling(arithmetic, threads).value]
    tile = f"{arithmetic}_amx"
    if any(c.name == tile and c.threads <= threads for c in hardware.ceilings):
        rates.append(hardware.ceiling(tile, threads).value)
    return max(rates)


def arithmetic_of(format_name: str) -> str:
    """int8, bf16 or fp32: what a format multiplies. KV cache formats ("int8", "bf16") name themselves."""
    return format_name if format_name in ("int8", "bf16") else parse_format(format_name).activation


def step_parts(
    spec: ModelSpec,
    recipe: Recipe,
    hardware: Hardware,
    *,
    batch: int,
    tokens: int,
    context: int,
    logits: int | None = None,
    threads: int | None = None,
) -> tuple[Part, ...]:
    """Every op of one forward step, split by format, with its floor; arguments as for costs.step_costs."""
    threads = threads or hardware.cores

    def costs_of(which: Recipe) -> dict[str, Cost]:
        return step_costs(spec, which, batch=batch, tokens=tokens, context=context, logits=logits)

    costs = costs_of(recipe)
    read_rate = read_ceiling(hardware, sum(cost.bytes for cost in costs.values()), threads)

    def part(op: str, format_name: str, cost: Cost) -> Part:
        arithmetic = arithmetic_of(format_name)
        rate = op_ceiling(hardware, arithmetic, threads)
        return Part(op=op, format=format_name, arithmetic=arithmetic, floor=_floor(cost, read_rate, rate))

    parts = []
    for op, cost in costs.items():
        if op == "attention":
            parts.append(part(op, recipe.kv_cache, cost))
        elif op not in LINEARS:
            parts.append(part(op, recipe.embedding if op == "embedding" else recipe.head, cost))
        else:
            counts = Counter(recipe.format_of(i, op).name for i in range(spec.num_layers))
            for format_name, count in counts.items():
                # Layers are alike: a format's part is its share of layers of a step that uses it everywhere.
                uniform = replace(recipe, layers=format_name, overrides=())
                whole = costs_of(uniform)[op]
                parts.append(part(op, format_name, _scaled(whole, count / spec.num_layers)))
    return tuple(parts)


def op_floors(parts: tuple[Part, ...]) -> dict[str, Floor]:
    """Floor of each op: its formats share the memory bus and the multipliers, in any order."""
    return {op: combine([p.floor for p in parts if p.op == op]) for op in dict.fromkeys(p.op for p in parts)}


def step_floor(parts: tuple[Part, ...]) -> Floor:
    """Floor of the whole step: max over memory and compute of the summed work."""
    return combine([p.floor for p in parts])


def combine(floors: list[Floor]) -> Floor:
    """Floor of doing several pieces of work, where one's reads may overlap another's arithmetic."""
    memory_s = sum(f.memory_s for f in floors)
    compute_s = sum(f.compute_s for f in floors)
    return Floor(
        floor_s=max(memory_s, compute_s),
        memory_s=memory_s,
        compute_s=compute_s,
        bound="memory" if memory_s >= compute_s else "compute",
        bytes=sum(f.bytes for f in floors),
        flops=sum(f.flops for f in floors),
    )


def _floor(cost: Cost, read_rate: float, op_rate: float) -> Floor:
    memory_s, compute_s = cost.bytes / read_rate, cost.flops / op_rate
    return Floor(
        floor_s=max(memory_s, compute_s),
        memory_s=memory_s,
        compute_s=compute_s,
        bound="memory" if memory_s >= compute_s else "compute",
        bytes=cost.bytes,
        flops=cost.flops,
    )


def _scaled(cost: Cost, share: float) -> Cost:
    return Cost(
        bytes_read=cost.bytes_read * share, bytes_written=cost.bytes_written * share, flops=cost.flops * share
    )
