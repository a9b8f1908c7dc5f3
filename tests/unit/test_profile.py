"""perf/profile.py and perf/timing.py with a runner whose seconds are known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tests.timed import SPEC, TimedRunner, linear_in_tokens, machine, own_clock

from flatout.core.costs import step_costs
from flatout.core.formats import uniform
from flatout.core.types import Hardware, Workload
from flatout.engine.runner import StepInput
from flatout.errors import BackendError, ConfigError, ResourceError
from flatout.perf.profile import Profile, profile_model, rescaled

RECIPE = uniform("w8a8")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    return own_clock(monkeypatch)


def op(profile: Profile, phase: str, name: str) -> tuple[float, float | None]:
    found = next(o for o in profile.ops if o.phase == phase and o.op == name)
    return found.seconds, found.fraction


def test_seconds_shares_and_fractions(clock: list[float]) -> None:
    runner = TimedRunner(clock, linear_in_tokens, overhead=4e-4)
    profile = profile_model(runner, RECIPE, machine(), Workload(batch=2, prompt=10, output=5))
    prefill, decode = profile.phase("prefill"), profile.phase("decode")
    # Two prompts of 10 tokens one after the other; whole-step seconds come from runs with the timers off.
    assert prefill.measured.median == pytest.approx(2 * (10 * 1.5e-3 + 5e-4))
    assert decode.measured.median == pytest.approx(2 * 1.5e-3 + 5e-4)
    assert prefill.tokens_per_s == pytest.approx(20 / prefill.measured.median)
    assert decode.tokens_per_s == pytest.approx(2 / decode.measured.median)
    seconds, fraction = op(profile, "decode", "gate_up")
    assert seconds == pytest.approx(1.1 * 2e-3)
    cost = step_costs(SPEC, RECIPE, batch=2, tokens=1, context=12)["gate_up"]
    assert fraction == pytest.approx(max(cost.bytes / 1e9, cost.flops / 1e10) / seconds)
    assert op(profile, "decode", "other") == (pytest.approx(1.1e-4), None)
    assert op(profile, "decode", "outside") == (pytest.approx(1.1 * 4e-4), None)
    assert op(profile, "decode", "embedding") == (0.0, None)
    for phase in ("prefill", "decode"):
        shares = [o.share for o in profile.ops if o.phase == phase]
        assert sum(shares) == pytest.approx(1.0)
    assert decode.fraction == pytest.approx(decode.floor.floor_s / decode.measured.median)
    assert decode.read_bytes_per_s == pytest.approx(decode.floor.bytes / decode.measured.median)
    assert profile.warnings == ()


def test_a_profile_in_a_slower_minute(clock: list[float]) -> None:
    profile = profile_model(
        TimedRunner(clock, linear_in_tokens), RECIPE, machine(), Workload(prompt=10, output=5)
    )
    slower = rescaled(profile, {"decode": 2.0})
    assert slower.phase("prefill") == profile.phase("prefill")
    before, after = profile.phase("decode"), slower.phase("decode")
    assert after.measured.median == 2 * before.measured.median
    assert after.fraction == pytest.approx(after.floor.floor_s / after.measured.median)
    assert after.read_bytes_per_s == pytest.approx(after.floor.bytes / after.measured.median)
    (seconds, fraction), (was, of) = op(slower, "decode", "gate_up"), op(profile, "decode", "gate_up")
    assert (seconds, fraction) == (2 * was, pytest.approx((of or 0.0) / 2))
    assert [o.share for o in slower.ops] == [o.share for o in profile.ops]


def test_floors_follow_the_chunks_and_the_middle_of_the_output(clock: list[float]) -> None:
    runner = TimedRunner(clock, linear_in_tokens)
    profile = profile_model(runner, RECIPE, machine(), Workload(batch=3, prompt=700, output=9))
    flops = 0.0
    for length, context in ((512, 0), (188, 512)):
        costs = step_costs(SPEC, RECIPE, batch=1, tokens=length, context=context)
        flops += 3 * sum(c.flops for c in costs.values())
    assert profile.phase("prefill").floor.flops == pytest.approx(flops)
    middle = step_costs(SPEC, RECIPE, batch=3, tokens=1, context=704)
    assert profile.phase("decode").floor.bytes == pytest.approx(sum(c.bytes for c in middle.values()))


def test_the_workload_runs_as_the_engine_would_run_it(clock: list[float]) -> None:
    runner = TimedRunner(clock, linear_in_tokens)
    profile_model(runner, RECIPE, machine(), Workload(batch=2, prompt=1030, output=3), max_seconds=0.0)
    one = [([s], [n]) for _ in range(2) for s, n in ((0, 512), (512, 512), (1024, 6))]
    one += [([p, p], [1, 1]) for p in (1030, 1031, 1032)]
    # A warm-up by the first tokens, and three repetitions, the first of them with the timers off and on.
    warm = [([0], [64])] * 2 + one[-3:]
    assert [(starts, lengths) for starts, lengths, _ in runner.steps] == warm + one * 4
    timed = [timed for _, _, timed in runner.steps]
    assert timed == [False] * len(warm) + [on for on in (False, True, False, False) for _ in one]
    assert not runner.timing


def test_repetitions_fill_the_time_given(clock: list[float]) -> None:
    runner = TimedRunner(clock, lambda step: {"down": 0.1})
    profile = profile_model(runner, RECIPE, machine(), Workload(batch=1, prompt=4, output=4), max_seconds=6.0)
    # A repetition takes (1 + 4) * 0.1 s and a tenth more with timers: 1.05 s, so five fit.
    assert profile.phase("prefill").measured.samples == 5
    assert profile.phase("decode").measured.samples == 20
    where = (RECIPE, machine(), Workload(batch=1, prompt=4, output=4))
    for given, repeats in (({}, 3), ({"min_repeats": 1}, 1)):
        least = profile_model(runner, *where, max_seconds=0.0, **given)
        assert least.phase("prefill").measured.samples == repeats


def test_medians_ignore_an_outlier(clock: list[float]) -> None:
    calls = [0]

    def disturbed(step: StepInput) -> dict[str, float]:
        calls[0] += 1
        return {"down": 5.0 if calls[0] % 7 == 0 else 0.001}

    profile = profile_model(TimedRunner(clock, disturbed), RECIPE, machine(), Workload(prompt=3, output=8))
    assert profile.phase("decode").measured.median == pytest.approx(0.001)
    assert op(profile, "decode", "down")[0] == pytest.approx(0.0011)


def test_an_impossible_fraction_renews_the_ceilings_once(clock: list[float]) -> None:
    fresh: list[Hardware] = []

    def remeasure() -> Hardware:
        fresh.append(machine(read=1e12, ops=1e15))
        return fresh[-1]

    runner = TimedRunner(clock, lambda step: {"gate_up": 1e-6, "head": 1e-6})
    workload = Workload(batch=1, prompt=8, output=2)
    profile = profile_model(runner, RECIPE, machine(), workload, remeasure=remeasure)
    assert len(fresh) == 1
    assert profile.hardware is fresh[0]
    assert profile.warnings == ()
    assert profile.phase("decode").fraction <= 1.05


def test_a_fraction_that_stays_impossible_is_reported(clock: list[float]) -> None:
    runner = TimedRunner(clock, lambda step: {"gate_up": 1e-9, "head": 1e-3})
    profile = profile_model(
        runner,
        RECIPE,
        machine(read=1e7),
        Workload(batch=1, prompt=8, output=2),
        remeasure=lambda: machine(read=1e7),
    )
    assert any("decode step ran at" in w and "memory ceiling is too low" in w for w in profile.warnings)
    assert any("decode head ran at" in w for w in profile.warnings)
    assert not any("gate_up" in w for w in profile.warnings)  # far below a twentieth of the step


def test_a_runner_without_timers_is_refused() -> None:
    class Plain:
        name = "reference (float32)"
        spec = SPEC
        page_size = num_pages = 64

    with pytest.raises(BackendError, match="times its ops; found: reference"):
        profile_model(Plain(), RECIPE, machine(), Workload())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("workload", "error", "text"),
    [
        (Workload(prompt=2000, output=49), ConfigError, "must fit 2048 positions; found: 2049"),
        (Workload(batch=3, prompt=1600, output=64), ResourceError, "needs 78 pages of 64 tokens; found: 64"),
    ],
)
def test_a_workload_that_does_not_fit_is_refused_before_any_step(
    clock: list[float], workload: Workload, error: type[Exception], text: str
) -> None:
    runner = TimedRunner(clock, linear_in_tokens)
    with pytest.raises(error, match=text):
        profile_model(runner, RECIPE, machine(), workload)
    assert runner.steps == []


def test_memory_is_counted(clock: list[float]) -> None:
    runner = TimedRunner(clock, linear_in_tokens)
    profile = profile_model(runner, uniform("bf16", kv_cache="bf16"), machine(), Workload(prompt=4, output=2))
    assert profile.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2  # layers, k and v, heads, head size, bytes
    norms = 4 * (2 * 2 + 1) * 64
    linears = 2 * (128 * 64 + 64 * 64 + 256 * 64 + 64 * 128)
    assert profile.weight_bytes == 2 * (linears + 2 * 500 * 64) + norms
    assert profile.peak_resident_bytes > 1 << 24


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_prints_the_contract(
    clock: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    as_json: bool,
) -> None:
    from flatout.cli import profile as command
    from flatout.cli.main import main

    def run(model: str, workload: Workload, *, threads: int | None, progress: object) -> Profile:
        assert (model, workload, threads) == ("m", Workload(batch=2, prompt=8, output=4), 3)
        return profile_model(TimedRunner(clock, linear_in_tokens), RECIPE, machine(), workload)

    monkeypatch.setattr(command, "run_profile", run)
    flags = [
        "--batch",
        "2",
        "--prompt",
        "8",
        "--output",
        "4",
        "--threads",
        "3",
        *(["--json"] if as_json else []),
    ]
    assert main(["profile", "m", *flags]) == 0
    out = capsys.readouterr().out
    if not as_json:
        assert "one decode step: 3.100 ms" in out
        assert "read_dram" in out
        assert "gate_up" in out
        return
    record = json.loads(out)
    assert {"ceilings", "floor", "ops", "hardware", "workload", "memory", "warnings"} <= record.keys()
    assert {c["name"] for c in record["ceilings"]} == {"read_dram", "int8", "bf16", "fp32"}
    assert record["floor"]["decode"]["measured"]["median"] == pytest.approx(3.1e-3)
    assert record["floor"]["decode"]["bound"] in ("memory", "compute")
    down = [o for o in record["ops"] if o["op"] == "gate_up"]
    assert [o["phase"] for o in down] == ["prefill", "decode"]
    assert all(np.isfinite(o["fraction"]) and o["floor_s"] > 0 for o in down)
