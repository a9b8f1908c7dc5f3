"""A workload raced on two sides: its prefill, and decode steps from the middle of its output.

The time of a step grows linearly with its context, so steps in the middle stand for all of them, and a few
for a long output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from flatout.core.types import Workload
from flatout.hardware.energy import EnergyMeter
from flatout.verify.drivers import Driver, workload_prompts
from flatout.verify.quality import Encoder
from flatout.verify.speed import SpeedResult, ab_test, turns

DECODE_STEPS = 16
"""Decode steps of a sample: tens of milliseconds at least, which clock and meter resolve."""

DECODE_SHARE = 0.7
"""Of the time of a comparison."""


def decode_window(workload: Workload) -> tuple[int, int]:
    """(tokens before, steps): the steps in the middle of the output that a sample times."""
    steps = min(workload.output, DECODE_STEPS)
    return workload.prompt + (workload.output - steps) // 2, steps


def race_energy(
    a: Driver,
    b: Driver,
    tokenizer: Encoder,
    workload: Workload,
    meter: EnergyMeter,
    *,
    max_seconds: float,
    min_pairs: int = 9,
    progress: Callable[[int, int], None] | None = None,
) -> SpeedResult:
    """Interleaved A/B of the joules above idle that the whole workload takes, prefill included; wherever the
    result says seconds it means joules."""
    prompts = workload_prompts(tokenizer, workload)
    return ab_test(
        lambda: meter.joules(lambda: a.decode(prompts, workload.output)),
        lambda: meter.joules(lambda: b.decode(prompts, workload.output)),
        min_pairs=min_pairs,
        max_seconds=max_seconds,
        progress=progress,
    )


def turns_workload(
    a: Driver, b: Driver, tokenizer: Encoder, workload: Workload, *, max_seconds: float
) -> dict[str, float]:
    """Seconds of A / seconds of B of "prefill" and "decode" by a few pairs, to choose by."""
    before, steps = decode_window(workload)
    longer = workload_prompts(tokenizer, replace(workload, prompt=before))
    run_a, run_b = a.decoder(longer, steps), b.decoder(longer, steps)  # prompts warm both sides
    decode = turns(run_a, run_b, max_seconds=DECODE_SHARE * max_seconds)
    prompts = workload_prompts(tokenizer, workload)
    prefill = turns(
        lambda: a.prefill(prompts), lambda: b.prefill(prompts), max_seconds=(1 - DECODE_SHARE) * max_seconds
    )
    return {"prefill": prefill, "decode": decode}


def race_workload(
    a: Driver,
    b: Driver,
    tokenizer: Encoder,
    workload: Workload,
    *,
    prefill_s: float,
    decode_s: float,
    min_pairs: int = 9,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, SpeedResult]:
    """Interleaved A/B of "prefill" and "decode", each for about the seconds given; seconds of the results are
    those of the whole prefill and of the whole output. progress(phase, clean pairs, wanted)."""
    tell = progress or (lambda phase, done, total: None)
    prompts = workload_prompts(tokenizer, workload)
    prefill = ab_test(
        lambda: a.prefill(prompts),
        lambda: b.prefill(prompts),
        min_pairs=min_pairs,
        max_seconds=prefill_s,
        progress=lambda done, total: tell("prefill", done, total),
    )
    before, steps = decode_window(workload)
    longer = workload_prompts(tokenizer, replace(workload, prompt=before))
    decode = ab_test(
        a.decoder(longer, steps),
        b.decoder(longer, steps),
        min_pairs=min_pairs,
        max_seconds=decode_s,
        progress=lambda done, total: tell("decode", done, total),
    )
    return {"prefill": prefill, "decode": decode.of_whole(steps / workload.output)}
