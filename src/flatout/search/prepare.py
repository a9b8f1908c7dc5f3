"""What a search for mixed recipes measures before its first proposal: the machine's latency table and the
model's sensitivities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatout.core.files import sha256_of
from flatout.perf.predict import Calibration
from flatout.perf.tables import residuals
from flatout.search.context import Context, Losses
from flatout.search.joint import Joint, Space, formats_of, place_bytes, space_of, stand_ins
from flatout.search.portable import restrict_space
from flatout.search.recipes import ORIGINAL
from flatout.search.rows import memory_bytes
from flatout.verify.quality import tokens_sha256

_EXPECT = ("divergences.py", "expected.py", "sensitivity.py")  # code that expected losses depend on


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The latency table, log(measured / predicted) of earlier searches here, and the choice that is
    made from them: None for a model too large for sensitivities."""

    table: Calibration
    earlier: list[float]
    joint: Joint | None


def prepare(context: Context) -> Prepared | None:
    """Measure both, or None where a program that must load the result takes no mixed recipe."""
    space = space_of(context.bench.source)
    if context.request.portable is not None:
        restricted = restrict_space(space, context.request.portable)
        if restricted is None:
            return None
        space = restricted
    workload = context.request.workload
    with context.stages.stage("time every format"):
        table = context.bench.table(stand_ins(space), context.hardware, workload, context.stages.step)
    earlier = context.timed("residuals", "earlier", {}, lambda: {"earlier": residuals(context.hardware)})
    with context.stages.stage("find what is sensitive"):
        known = _expected_losses(context, space)
    joint = None
    if known is not None:
        joint = Joint(
            space,
            *known,
            context.hardware,
            workload,
            context.bench.threads,
            _room_for_choices(context),
        )
    return Prepared(table=table.calibration(), earlier=earlier["earlier"], joint=joint)


def _expected_losses(context: Context, space: Space) -> tuple[Losses, Losses] | None:
    """Under the space's method and rounded to nearest, computed once for a model and the code."""
    choices, calibration = space.choices(), context.texts.calibration
    parts = ("spread", "nearest")
    key = {
        "model": context.bench.sha256,
        "code": context.bench.code,
        "method": sha256_of([Path(__file__).with_name(name) for name in _EXPECT]),
        "rotated": space.rotated,
        "choices": choices,
        "calibration": tokens_sha256(calibration),
    }

    def compute() -> dict[str, Any]:
        found = context.bench.expected_losses(choices, calibration, context.stages.step, space.rotated)
        return {
            part: [[*choice, loss] for choice, loss in losses.items()]
            for part, losses in zip(parts, found or (), strict=False)
        }

    known = context.store.result("sensitivity", "all", key, compute)
    if not known:
        return None
    losses, nearest = ({(place, name): loss for place, name, loss in known[part]} for part in parts)
    return losses, nearest


def _room_for_choices(context: Context) -> float:
    """Bytes that the choices of a joint recipe may take together: the limit less norms and biases."""
    limit, spec = context.request.max_memory, context.bench.source.spec
    if limit is None:
        return math.inf
    chosen = formats_of(ORIGINAL, spec).items()
    counted = sum(place_bytes(spec, context.request.workload, place, name) for place, name in chosen)
    return limit - (memory_bytes(context, ORIGINAL) - counted)
