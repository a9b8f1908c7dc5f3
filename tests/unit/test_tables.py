"""Latency tables: what is stored, when it is measured again, and what predictions make of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.timed import SPEC, TimedRunner, machine, own_clock

from flatout.core.formats import Recipe, uniform
from flatout.core.spec import ModelSpec
from flatout.core.types import Hardware, Workload
from flatout.engine.runner import StepInput
from flatout.perf.predict import Calibration, marginal_seconds, predict, refit, transfer_residuals
from flatout.perf.profile import Profile, profile_model
from flatout.perf.tables import (
    add_residuals,
    latency_table,
    random_model,
    residuals,
    stand_in_layers,
    table_of,
)

WORKLOAD = Workload(batch=1, prompt=40, output=8)
FORMATS = ("w8a8", "w8a8-g32", "w4a8-g32")
BYTES = {"w8a8": 1.0, "w8a8-g32": 1.0625, "w4a8-g32": 0.5625}


def stand_in(monkeypatch: pytest.MonkeyPatch, slow: float = 1.0, head: float = 1.0) -> Any:
    """Profiles by a clock of the test's own: seconds follow the bytes of the format, unevenly by op."""

    def profile(
        spec: ModelSpec, recipe: Recipe, workload: Workload, hardware: Hardware, threads: int
    ) -> Profile:
        def seconds_of(step: StepInput) -> dict[str, float]:
            tokens, size = len(step.tokens), BYTES[recipe.layers]
            linears = dict(zip(("qkv", "o", "gate_up", "down"), (2.0, 1.0, 5.0, 3.0), strict=True))
            ops = {op: slow * 1e-4 * cost * (size + 0.01 * tokens) for op, cost in linears.items()}
            return {
                **ops,
                "embedding": 1e-7,
                "attention": 3e-5 * tokens,
                "head": 4e-4 * size * head,
                "other": 5e-5,
            }

        runner = TimedRunner(own_clock(monkeypatch), seconds_of, overhead=2e-5)
        return profile_model(runner, recipe, hardware, workload, threads=threads, max_seconds=0.01)

    return profile


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    recipes = [uniform(name, head=name) for name in FORMATS]
    return latency_table(
        SPEC, recipes, WORKLOAD, machine(), 2, directory=tmp_path, measure=stand_in(monkeypatch)
    )


def test_a_uniform_model_is_predicted_as_its_stand_in_took(
    table: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in FORMATS:
        recipe = uniform(name, head=name)
        measured = stand_in(monkeypatch)(SPEC, recipe, WORKLOAD, machine(), 2)
        # the interaction is a median over formats, so it is fitted to the one in question here
        calibration = refit(table.calibration(), [measured])
        times = predict(SPEC, recipe, machine(), WORKLOAD, calibration=calibration, threads=2)
        assert (times.prefill.mid, times.decode.mid) == pytest.approx(measured.seconds)
        assert times.decode.tier == "measured"


def test_a_mixed_model_is_the_sum_of_its_parts(table: Any) -> None:
    """The step of a model whose first layers have 4 bits lies where its share of them puts it, and choices
    that are priced one by one add up to it."""
    calibration = table.calibration()
    mixed = replace(uniform("w8a8", head="w8a8"), overrides=(("layers.0", "w4a8-g32"),))

    def seconds(recipe: Recipe) -> float:
        times = predict(SPEC, recipe, machine(), WORKLOAD, calibration=calibration, threads=2)
        return WORKLOAD.seconds(times.prefill.mid, times.decode.mid)

    ends = [seconds(uniform(name, head="w8a8")) for name in ("w8a8", "w4a8-g32")]
    share = 1 / SPEC.num_layers
    assert seconds(mixed) == pytest.approx((1 - share) * ends[0] + share * ends[1], rel=0.02)
    gain = sum(
        marginal_seconds(SPEC, mixed, op, "w8a8", machine(), WORKLOAD, calibration, 2)
        - marginal_seconds(SPEC, mixed, op, "w4a8-g32", machine(), WORKLOAD, calibration, 2)
        for op in SPEC.linears()
    )
    assert ends[0] - seconds(mixed) == pytest.approx(gain, rel=0.05)


def test_whole_steps_correct_the_sum(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has become a half slower since: one measured candidate moves every prediction."""
    slower = stand_in(monkeypatch, slow=1.5)(SPEC, uniform("w8a8", head="w8a8"), WORKLOAD, machine(), 2)
    before, after = (
        predict(
            SPEC, uniform("w4a8-g32", head="w8a8"), machine(), WORKLOAD, calibration=calibration, threads=2
        )
        for calibration in (table.calibration(), refit(table.calibration(), [slower]))
    )
    assert 1.2 < after.decode.mid / before.decode.mid < 1.6


def test_real_heads_correct_those_of_stand_ins(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head whose rows are screened takes a third of what random weights took, in every format."""
    real = stand_in(monkeypatch, head=1 / 3)(SPEC, uniform("w8a8", head="w8a8"), WORKLOAD, machine(), 2)
    fitted = refit(table.calibration(), [real])

    def head(calibration: Calibration, name: str) -> float:
        recipe = uniform("w8a8", head="w8a8")
        options = (machine(), WORKLOAD, replace(calibration, interactions={}), 2)
        return marginal_seconds(SPEC, recipe, "head", name, *options)

    for name in FORMATS:
        assert head(fitted, name) == pytest.approx(head(table.calibration(), name) / 3)
    times = predict(SPEC, uniform("w8a8", head="w8a8"), machine(), WORKLOAD, calibration=fitted, threads=2)
    assert (times.prefill.mid, times.decode.mid) == pytest.approx(real.seconds)


def test_a_table_is_kept_for_the_same_question_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []
    profile = stand_in(monkeypatch)

    def counted(spec: ModelSpec, recipe: Recipe, *rest: Any) -> Profile:
        calls.append(recipe.name)
        found: Profile = profile(spec, recipe, *rest)
        return found

    def ask(threads: int = 2, **changes: Any) -> Any:
        options = {"directory": tmp_path, "measure": counted} | changes
        return latency_table(SPEC, [uniform("w8a8")], WORKLOAD, machine(), threads, **options)

    first = ask()
    assert ask() == first
    rounds = len(calls)
    assert rounds > 1, "machines drift: every format is timed more than once"
    ask(threads=1)
    assert len(calls) == 2 * rounds
    ask(fresh=True)
    assert len(calls) == 3 * rounds
    for path in tmp_path.glob("tables-*.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"measured_at": record["measured_at"] - 2 * 86400}))
    ask()
    assert len(calls) == 4 * rounds, "it was too old"
    for path in tmp_path.glob("tables-*.json"):
        path.write_text('{"version": 2, "entries"')
    ask()
    assert len(calls) == 5 * rounds, "a file that cannot be read counts as absent"
    assert not list(tmp_path.glob(".*")), "nothing half written stays"


def test_how_far_an_unmeasured_format_may_be_off() -> None:
    """Each of ten formats predicted from the other nine: the residual is against their median."""
    fractions = {("decode", "qkv", f"f{i}", "int8"): 0.5 * 1.1**i for i in range(10)}
    found = transfer_residuals(fractions)["decode"]
    assert len(found) == 10
    assert found[0] == pytest.approx(math.log(1.1**5))
    assert found[9] == pytest.approx(math.log(1.1**-5))


def test_stand_ins_are_as_cold_as_the_model() -> None:
    """With half the bytes a layer there are twice the layers."""
    spec = replace(SPEC, num_layers=12, vocab_size=64)
    assert stand_in_layers(spec, uniform("w8a8", head="w8a8")) == 12
    assert stand_in_layers(spec, uniform("w4a8-g32", head="w8a8")) in (20, 21, 22)
    assert stand_in_layers(spec, uniform("fp32", kv_cache="bf16", head="fp32")) in (2, 3)


@pytest.mark.parametrize("name", ["w8a8", "w4a8-g32", "w4a8-g32-asym", "q4_1", "q8_0", "bf16"])
def test_random_weights_keep_activations_near_one(name: str) -> None:
    model = random_model(SPEC, Recipe(name=name, layers=name, head=name, embedding=name))
    for linear in SPEC.linears():
        weight = model.weights[f"layers.0.{linear}"]
        values = weight if isinstance(weight, np.ndarray) else weight.dequantize()
        assert np.isfinite(values).all()
        assert 0.3 < float(np.square(values).sum(axis=1).mean()) < 3


def test_residuals_are_collected_and_bounded(tmp_path: Path) -> None:
    assert residuals(machine(), tmp_path) == []
    add_residuals(machine(), [0.1, -0.2], tmp_path)
    add_residuals(machine(), [0.3], tmp_path)
    assert residuals(machine(), tmp_path) == [0.1, -0.2, 0.3]
    add_residuals(machine(), [float(i) for i in range(500)], tmp_path)
    kept = residuals(machine(), tmp_path)
    assert len(kept) == 400
    assert kept[-1] == 499
    next(tmp_path.glob("residuals-*")).write_text("{")
    assert residuals(machine(), tmp_path) == []


def test_seconds_are_those_of_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = stand_in(monkeypatch)(SPEC, uniform("w8a8", head="w8a8"), WORKLOAD, machine(), 2)
    entries = {(e.phase, e.op): e for e in table_of([profile]).entries}
    whole = {(o.phase, o.op): o.seconds for o in profile.ops}
    for op in ("qkv", "o", "gate_up", "down", "attention"):
        assert entries["decode", op].seconds == pytest.approx(whole["decode", op] / SPEC.num_layers)
    assert entries["decode", "head"].seconds == pytest.approx(whole["decode", "head"])
