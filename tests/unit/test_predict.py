"""perf/predict.py: predictions agree with what they were calibrated on, and say how much they know."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from tests.timed import SPEC, TimedRunner, machine, own_clock

from flatout.core.formats import Recipe, uniform
from flatout.core.types import Workload
from flatout.engine.runner import StepInput
from flatout.perf.predict import Calibration, calibrate, predict
from flatout.perf.profile import Profile, profile_model
from flatout.perf.roofline import step_floor, step_parts

WORKLOAD = Workload(batch=2, prompt=40, output=8)
NOTHING = Calibration(fractions={}, interactions={})


def seconds_of(step: StepInput) -> dict[str, float]:
    """Uneven fractions of floor, and work that has no floor."""
    tokens = len(step.tokens)
    return {
        "embedding": 1e-7 * tokens,
        "qkv": 2e-4 + 1e-5 * tokens,
        "attention": 3e-5 * tokens,
        "o": 1e-4 + 1e-5 * tokens,
        "gate_up": 3e-4 + 2e-5 * tokens,
        "down": 2e-4 + 3e-5 * tokens,
        "head": 4e-4,
        "other": 5e-5,
    }


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch) -> Profile:
    runner = TimedRunner(own_clock(monkeypatch), seconds_of, overhead=2e-5)
    return profile_model(runner, uniform("w8a8"), machine(), WORKLOAD)


def test_what_was_measured_is_predicted_back(profiled: Profile) -> None:
    times = predict(SPEC, uniform("w8a8"), machine(), WORKLOAD, calibration=calibrate([profiled]))
    assert times.prefill.mid == pytest.approx(profiled.phase("prefill").measured.median)
    assert times.decode.mid == pytest.approx(profiled.phase("decode").measured.median)
    assert (times.prefill.tier, times.decode.tier) == ("measured", "measured")
    assert times.decode.low < times.decode.mid < times.decode.high
    assert times.decode.unit == "s"


def test_knowledge_decreases_from_measured_to_datasheet(profiled: Profile) -> None:
    known = calibrate([profiled])
    same = predict(SPEC, uniform("w8a8"), machine(), WORKLOAD, calibration=known).decode
    near = predict(SPEC, uniform("w4a8-g32"), machine(), WORKLOAD, calibration=known).decode
    far = predict(SPEC, uniform("bf16", kv_cache="bf16"), machine(), WORKLOAD, calibration=known).decode
    none = predict(SPEC, uniform("w8a8"), machine(), WORKLOAD).decode
    assert [p.tier for p in (same, near, far, none)] == ["measured", "calibrated", "datasheet", "datasheet"]
    assert same.high / same.mid < near.high / near.mid < far.high / far.mid
    assert none.high / none.mid == pytest.approx(far.high / far.mid)


def test_one_new_format_in_one_layer_lowers_the_tier(profiled: Profile) -> None:
    mixed = replace(uniform("w8a8"), overrides=(("layers.0.down", "w4a8-g64"),))
    times = predict(SPEC, mixed, machine(), WORKLOAD, calibration=calibrate([profiled]))
    assert times.decode.tier == "calibrated"


def test_fewer_bytes_take_less_time_where_bytes_are_the_bound() -> None:
    machine_ = machine(read=1e9, ops=1e15)
    mids = [
        predict(SPEC, uniform(name, head=name), machine_, WORKLOAD).decode.mid
        for name in ("fp32", "bf16", "w8a8-g32", "w4a8-g32")
    ]
    assert mids == sorted(mids, reverse=True)


def test_without_profiles_a_prediction_stays_above_its_floor() -> None:
    for recipe in (uniform("fp32"), uniform("w8a8"), Recipe(name="plain")):
        times = predict(SPEC, recipe, machine(), WORKLOAD)
        parts = step_parts(SPEC, recipe, machine(), batch=2, tokens=1, context=43)
        floor_s = step_floor(parts).floor_s
        assert times.decode.mid > floor_s
        assert times.decode.low >= floor_s / 1.05


def test_threads_choose_the_ceilings() -> None:
    slow = machine(read=1e9, ops=1e9)
    fast = tuple(replace(c, threads=4, value=c.value * 10) for c in slow.ceilings)
    both = replace(slow, ceilings=slow.ceilings + fast)
    one = predict(SPEC, uniform("w8a8"), both, WORKLOAD, threads=1)
    four = predict(SPEC, uniform("w8a8"), both, WORKLOAD, threads=4)
    assert one.decode.mid == pytest.approx(10 * four.decode.mid)
    assert predict(SPEC, uniform("w8a8"), both, WORKLOAD) == four  # all of its 4 cores


def test_medians_over_profiles(profiled: Profile) -> None:
    slower = replace(
        profiled,
        ops=tuple(
            replace(o, seconds=3 * o.seconds, fraction=None if o.fraction is None else o.fraction / 3)
            for o in profiled.ops
        ),
        phases=tuple(
            replace(p, measured=replace(p.measured, median=3 * p.measured.median)) for p in profiled.phases
        ),
    )
    mid = profiled.phase("decode").measured.median
    three = predict(
        SPEC, uniform("w8a8"), machine(), WORKLOAD, calibration=calibrate([slower, profiled, slower])
    )
    assert three.decode.mid == pytest.approx(3 * mid)


@pytest.mark.parametrize(
    ("residuals", "half_width"),
    [
        ([0.01] * 8, None),  # too few: the tier's default
        ([0.01 * i for i in range(1, 10)], 0.09),  # nine: the largest
        # fourteen: the last five were each the largest, so none of their intervals held
        ([-0.01 * i for i in range(1, 15)], 0.14),
        # after nine all zero: thirty intervals held, so fewer than nine in ten need hold now
        ([0.3, *[0.0] * 39], 0.0),
    ],
)
def test_residuals_set_the_width(residuals: list[float], half_width: float | None) -> None:
    known = replace(NOTHING, residuals=tuple(residuals))
    got = predict(SPEC, uniform("w8a8"), machine(), WORKLOAD, calibration=known).decode
    default = predict(SPEC, uniform("w8a8"), machine(), WORKLOAD).decode
    assert got.mid == default.mid
    if half_width is None:
        assert (got.low, got.high) == (default.low, default.high)
    else:
        assert math.log(got.high / got.mid) == pytest.approx(half_width)
        assert math.log(got.mid / got.low) == pytest.approx(half_width)


@pytest.mark.parametrize("settled", [True, False])
def test_intervals_cover_nine_in_ten(settled: bool) -> None:
    """Of skewed residuals, all alike or a tenth as large by and by, as when a table is corrected: over a
    series, nine in ten lie inside their intervals. Adaptive conformal inference bounds the share's distance
    from 0.9 by 1 / (step * length) (Gibbs & Candes 2021, proposition 4.1), 0.2 here; the mean comes nearer.
    """
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(20):
        scale = np.full(60, 0.1) if settled else np.geomspace(0.2, 0.02, 60)
        draws = rng.gumbel(0.0, 1.0, 60) * scale
        widths = [_log_width(draws[:i]) for i in range(9, 60)]
        shares.append(np.mean(np.abs(draws[9:]) <= widths))
        assert abs(shares[-1] - 0.9) <= 0.2
    assert 0.87 < np.mean(shares) < 0.95


def _log_width(residuals: np.ndarray) -> float:
    known = replace(NOTHING, residuals=tuple(residuals))
    found = predict(SPEC, uniform("w8a8"), machine(), WORKLOAD, calibration=known).decode
    return math.log(found.high / found.mid)
