"""perf/power.py: power limits, predicted; what was measured without a lower limit comes out."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from flatout.cli.main import main
from flatout.core.formats import Recipe
from flatout.core.spec import ModelSpec
from flatout.core.types import Workload
from flatout.errors import ConfigError
from flatout.perf.power import H100, MEMORY_J, CappedStep, capped

ROOT = Path(__file__).parents[2]
SPEC = ModelSpec(
    family="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32,
    num_heads=32, num_kv_heads=8, head_dim=128, max_positions=131072,
)  # fmt: skip
BF16 = Recipe(name="bf16")
RECIPES = {
    "bf16": BF16,
    "fp8": Recipe(name="fp8", layers="fp8", head="fp8"),
    "fp8-kv8": Recipe(name="fp8-kv8", layers="fp8", head="fp8", kv_cache="fp8"),
    "int8": Recipe(name="int8", layers="w8a16", head="w8a16"),
    "int4": Recipe(name="int4", layers="w4a16-g128", head="fp8"),
}


@pytest.mark.parametrize("theme", ["gpuall", "gpufinal", "gpufinalagain"])
def test_measured_rows_lie_within_the_intervals(theme: str) -> None:
    path = ROOT / "benchmarks" / "results" / f"{theme}_nvidia-h100-80gb-hbm3-1c_2026-11-23.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["result"]["rows"]
    compared = 0
    for row in rows:
        if row["shape"] != "8B" or not row["kind"].startswith(("decode", "prefill")):
            continue
        workload = Workload(batch=row["sequences"], prompt=row["prompt"], output=128)
        times = capped(SPEC, RECIPES[row["recipe"]], H100, workload, 700)
        step = times.prefill if row["kind"] == "prefill" else times.decode
        for found, measured in (
            (step.seconds, row["seconds"]["median"]),
            (step.joules_per_token, row["joules_per_token"]),
        ):
            assert found.low <= measured <= found.high, row["kind"]
            assert found.tier == "calibrated"
        compared += 1
    assert compared == 12


def test_a_lower_limit_costs_time_and_saves_joules() -> None:
    steps = [
        capped(SPEC, BF16, H100, Workload(batch=1, prompt=4096, output=128), limit)
        for limit in (700, 600, 500, 400, 300)
    ]
    for before, after in pairwise(steps):
        for phase in ("prefill", "decode"):
            more: CappedStep = getattr(before, phase)
            less: CappedStep = getattr(after, phase)
            assert less.seconds.mid >= more.seconds.mid
            assert less.joules_per_token.mid <= more.joules_per_token.mid * 1.0001
            assert less.watts <= after.limit_w * 1.0001
    # Arithmetic pays with time, memory hardly.
    assert steps[-1].prefill.seconds.mid > 1.5 * steps[0].prefill.seconds.mid
    assert steps[-1].decode.seconds.mid < 1.3 * steps[0].decode.seconds.mid


def test_decode_waits_for_memory_alone() -> None:
    """By hand: at the highest clock a byte costs what memory and core take, an operation is free in time."""
    times = capped(SPEC, BF16, H100, Workload(batch=1, prompt=1024, output=2), 700).decode
    linears = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
    cache = 32 * 2 * 1024 * 2 * (1025 + 1)
    size = 2 * (linears + 128256 * 4096) + cache
    seconds = size / H100.read_bytes_per_s / H100.share
    assert times.clock_hz == H100.highest_hz
    assert times.seconds.mid == pytest.approx(seconds, rel=1e-2)
    joules = seconds * (H100.idle_w + H100.awake_w) + size * (MEMORY_J + H100.core_j)
    joules += 2 * (linears + 128256 * 4096) * H100.op_j["bf16"] * 1980 / 1450
    assert times.joules_per_token.mid == pytest.approx(joules, rel=1e-2)


@pytest.mark.parametrize("limit", [199.0, 701.0, float("nan")])
def test_limits_that_the_card_does_not_take(limit: float) -> None:
    with pytest.raises(ConfigError, match="200 to 700 W"):
        capped(SPEC, BF16, H100, Workload(), limit)


def test_the_command_predicts_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    model = str(ROOT / "tests" / "data" / "offgrid")
    assert main(["profile", model, "--power-cap", "700,300", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [times["limit_w"] for times in found["predicted"]] == [700, 300]
    assert found["predicted"][0]["decode"]["seconds"]["tier"] == "calibrated"
    assert main(["profile", model, "--power-cap", "300"]) == 0
    assert capsys.readouterr().out.startswith("predicted, not measured: ")
    assert main(["profile", model, "--power-cap", "cold"]) == 2
    assert "watts with commas between; found: 'cold'" in capsys.readouterr().err
