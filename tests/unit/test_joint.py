"""Recipes that are found: the space, the names, the scale, and a whole search on a bench without weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_bench import SPEC, FakeBench, FakeSource, FakeTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from flatout.core.artifact import recipe_from_json
from flatout.core.formats import Recipe, parse_format
from flatout.core.spec import ModelSpec
from flatout.core.types import to_json
from flatout.perf.profile import phase_parts
from flatout.perf.roofline import step_floor
from flatout.search.joint import (
    METHOD,
    PRIOR,
    Joint,
    Observation,
    Space,
    conflicts,
    formats_of,
    loss_scale,
    recipe_of,
    space_of,
    stand_ins,
)
from flatout.search.loop import optimize
from flatout.search.recipes import ORIGINAL
from flatout.search.texts import Texts, read_texts

FLOAT, BLOCKS = space_of(FakeSource(native=False)), space_of(FakeSource())


def test_the_space_fits_the_model() -> None:
    assert set(FLOAT.linears) == set(SPEC.linears())
    assert all("w4a8-g32" in formats for formats in FLOAT.linears.values())
    assert "q4_1" not in FLOAT.linears["down"]
    assert "q4_1" in BLOCKS.linears["down"]
    assert BLOCKS.heads == ("q8_0",)
    narrow = ModelSpec(**{**to_json(SPEC), "hidden_size": 48, "rope_scaling": None, "eos_token_ids": ()})
    assert "w4a8-g32" not in space_of(FakeSource(native=False, spec=narrow)).linears["qkv"]


@pytest.mark.parametrize("space", [FLOAT, BLOCKS], ids=["float", "blocks"])
def test_stand_ins_time_every_format(space: Space) -> None:
    recipes = stand_ins(space)
    for linear, formats in space.linears.items():
        assert {recipe.format_of(0, linear).name for recipe in recipes} >= set(formats)
    assert {recipe.head for recipe in recipes} == set(space.heads)
    assert {recipe.kv_cache for recipe in recipes} == set(space.caches)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_recipe_says_what_was_chosen(data: st.DataObject) -> None:
    chosen = {place: data.draw(st.sampled_from(formats)) for place, formats in FLOAT.choices().items()}
    recipe = recipe_of(chosen, SPEC, "joint-1")
    assert formats_of(recipe, SPEC) == chosen
    assert recipe_from_json(to_json(recipe)) == recipe
    recipe.check(SPEC)


def test_what_cannot_be_smoothed_is_not_asked_for() -> None:
    pairs = conflicts(BLOCKS)
    assert (("layers.2.down", "w8a8"), ("layers.2.gate_up", "q4_1")) in pairs
    assert (("layers.0.o", "w8a8"), ("layers.0.qkv", "q4_1")) in pairs
    smoothed = [name for name in BLOCKS.linears["down"] if parse_format(name).scales_tokens]
    assert smoothed == ["w8a8", "w6a8", "w5a8"]
    assert len(pairs) == 2 * SPEC.num_layers * len(smoothed)
    assert conflicts(FLOAT) == []


def test_the_loss_scale_by_hand() -> None:
    assert loss_scale([]) == (1.0, pytest.approx(PRIOR))
    exact = [Observation(expected=0.01, measured=0.02, error=1e-9)]
    assert loss_scale(exact)[0] == pytest.approx(2.0)
    # as uncertain as the prior: half way
    even = [Observation(expected=0.01, measured=0.02, error=PRIOR * 0.01)]
    assert loss_scale(even) == (pytest.approx(1.5), pytest.approx(PRIOR / math.sqrt(2)))


def losses_of(space: Space) -> dict[tuple[str, str], float]:
    """The first layer is a thousand times as sensitive as the last, 4 bits lose 100 times what 8 do."""
    found = {}
    for place, formats in space.choices().items():
        layer = int(place.split(".")[1]) if place.startswith("layers") else 0
        for name in formats:
            coarse = not name.startswith(("w8", "q8", "int8", "bf16"))
            found[place, name] = 4e-3 * 10 ** (-1.5 * layer) * (1.0 if coarse else 0.01)
    return found


def test_the_budget_goes_where_it_buys_most() -> None:
    losses = losses_of(FLOAT)
    from fake_bench import HARDWARE

    from flatout.core.types import Workload
    from flatout.perf.predict import Calibration

    joint = Joint(FLOAT, losses, losses, HARDWARE, Workload(prompt=1, output=16), 2)
    known = Calibration(fractions={}, interactions={})
    recipe = joint.propose(0.003, known, ORIGINAL)
    assert recipe is not None
    bits = [recipe.format_of(layer, "gate_up").bits for layer in range(3)]
    assert bits == [8, 4, 4]
    assert joint.expected(recipe) == pytest.approx(
        sum(losses[choice] for choice in formats_of(recipe, SPEC).items())
    )
    assert joint.propose(1e-9, known, ORIGINAL) is None
    points = joint.trade_off(known, ORIGINAL)
    assert [p.seconds for p in points] == sorted((p.seconds for p in points), reverse=True)


class JointBench(FakeBench):
    """Losses add up by place, times `scale`; times follow the floors."""

    def __init__(self, scale: float) -> None:
        super().__init__({"bf16": 0.00005}, {}, native=False, baseline=0.1)
        self.scale, self.recipes = scale, {ORIGINAL.name: ORIGINAL}
        self.by_place = losses_of(FLOAT)

    def expected_losses(self, choices: Any, calibration: Any, step: Any) -> Any:
        self._call("sensitivity")
        return self.by_place, {choice: 3 * loss for choice, loss in self.by_place.items()}

    def build(self, recipe: Recipe, calibration: Any, step: Any) -> None:
        super().build(recipe, calibration, step)
        self.recipes[recipe.name] = recipe

    def _scores(self, name: str, clusters: Any) -> Any:
        recipe = self.recipes.get(name)
        if recipe is not None and recipe != ORIGINAL:
            three = 1 if recipe.method in (METHOD, "gptq") else 3
            total = sum(self.by_place.get(choice, 0.5) for choice in formats_of(recipe, SPEC).items())
            self.losses = {**self.losses, name: self.scale * three * total}
        return super()._scores(name, clusters)

    def _seconds(self, name: str) -> dict[str, float]:
        from fake_bench import HARDWARE

        from flatout.core.types import Workload

        parts = phase_parts(SPEC, self.recipes[name], HARDWARE, Workload(prompt=1, output=16), 2)
        return {phase: 2 * step_floor(its).floor_s for phase, its in parts.items()}

    def race(self, first: Recipe | None, second: Recipe, *rest: Any) -> Any:
        self.speeds = {name: 1 / self._seconds(name)["decode"] for name in self.recipes}
        self.baseline = 0.1 * min(self.speeds.values())
        return super().race(first, second, *rest)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATOUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("flatout.search.loop.read_texts", lambda *args: shipped_texts())


@functools.cache
def shipped_texts() -> Texts:
    return read_texts(FakeTokenizer(), FakeBench.tokenizer_sha256, SPEC)


def run(bench: FakeBench, out: Path, **options: Any) -> dict[str, Any]:
    return optimize("tiny", out, open_bench=lambda request: bench, workload="1+16", **options)


def rows(result: Mapping[str, Any]) -> dict[str, Any]:
    return {row["name"]: row for row in result["candidates"]}


def test_a_found_recipe_is_delivered(tmp_path: Path) -> None:
    """No listed recipe mixes layers; the one that was found does, and is faster inside the budget."""
    bench = JointBench(scale=1.0)
    result = run(bench, tmp_path / "out")
    name = result["optimized"]["recipe"]
    assert name.startswith("joint-")
    assert any(len(set(formats)) > 1 for formats in result["recipe_map"].values())
    assert result["passed"]
    assert result["quality"]["upper_bound"] < 0.01
    found = rows(result)
    others = [r for r in found.values() if r["status"] in ("passed", "slower") and r["measured"]]
    best = found[name]["measured"]["workload_s"]
    assert all(best < r["measured"]["workload_s"] for r in others if not r["name"].startswith("joint"))
    assert found[name]["predicted_loss"]["low"] <= found[name]["loss"]["value"]
    assert found[name]["loss"]["value"] <= found[name]["predicted_loss"]["high"]
    frontier = result["frontier"]
    assert len(frontier) > 3
    assert [p["loss"] for p in frontier] == sorted(p["loss"] for p in frontier)


@pytest.mark.parametrize("scale", [2.5, 3.0])
def test_measured_losses_correct_the_next_choice(tmp_path: Path, scale: float) -> None:
    """The model loses more than was expected of it: the first proposal misses the budget, a later one keeps
    it."""
    result = run(JointBench(scale=scale), tmp_path / "out")
    found = [row for name, row in rows(result).items() if name.startswith("joint-")]
    assert 2 <= len([row for row in found if row["measured"]]) <= 4
    assert result["optimized"]["recipe"] != found[0]["name"]
    assert found[0]["status"] in ("failed", "rejected")
    assert result["passed"]
    assert result["optimized"]["recipe"] == found[-1]["name"]


def test_a_fixed_recipe_is_not_searched_around(tmp_path: Path) -> None:
    bench = JointBench(scale=1.0)
    run(bench, tmp_path / "out", recipe="w8a8-g32")
    assert "sensitivity" not in bench.calls
    assert "table" not in bench.calls


def test_a_repeated_search_does_not_measure_sensitivities_again(tmp_path: Path) -> None:
    run(JointBench(scale=1.0), tmp_path / "out")
    again = JointBench(scale=1.0)
    result = run(again, tmp_path / "out")
    assert "sensitivity" not in again.calls
    assert result["optimized"]["recipe"].startswith("joint-")
    assert np.isfinite(result["optimized"]["loss"])


class Disturbed(JointBench):
    """A neighbour keeps the machine busy while the first found recipe is timed for the first time."""

    def profile(self, recipe: Recipe, *rest: Any) -> Any:
        first = (recipe.name, "profile") not in self.calls_of
        self.calls_of.append((recipe.name, "profile"))
        self.slowed = 3.0 if recipe.name == "joint-1" and first else 1.0
        try:
            return super().profile(recipe, *rest)
        finally:
            self.slowed = 1.0

    def __init__(self, scale: float) -> None:
        super().__init__(scale)
        self.calls_of: list[tuple[str, str]] = []
        self.slowed = 1.0

    def _seconds(self, name: str) -> dict[str, float]:
        return {phase: self.slowed * seconds for phase, seconds in super()._seconds(name).items()}


def test_a_time_that_nobody_expected_is_taken_again(tmp_path: Path) -> None:
    quiet, bench = JointBench(scale=1.0), Disturbed(scale=1.0)
    expected = run(quiet, tmp_path / "quiet", fresh=True)
    found = run(bench, tmp_path / "out", fresh=True)
    assert bench.calls_of.count(("joint-1", "profile")) == 2
    assert found["optimized"]["recipe"] == expected["optimized"]["recipe"]
    measured = [rows(result)["joint-1"]["measured"]["workload_s"] for result in (found, expected)]
    assert measured[0] == pytest.approx(measured[1])


@pytest.mark.parametrize(("max_loss", "built"), [("0.2%", False), ("5%", True)])
def test_a_uniform_recipe_of_the_same_calibration_joins_when_it_may_keep_the_budget(
    tmp_path: Path, max_loss: str, built: bool
) -> None:
    row = rows(run(JointBench(scale=1.0), tmp_path / "out", max_loss=max_loss))["w6a16/smooth-gptq"]
    assert (row["loss"] is not None) == built
    assert built or row["status"] == "rejected"


def test_a_proposal_keeps_away_from_the_edge_until_losses_are_known() -> None:
    losses = losses_of(FLOAT)
    from fake_bench import HARDWARE

    from flatout.core.types import Workload
    from flatout.perf.predict import Calibration

    joint = Joint(FLOAT, losses, losses, HARDWARE, Workload(prompt=1, output=16), 2)
    known = Calibration(fractions={}, interactions={})
    edge = joint.propose(0.0045, known, ORIGINAL)
    assert edge is not None
    joint.seen.append(Observation(expected=0.004, measured=0.004, error=1e-9))
    certain = joint.propose(0.0045, known, ORIGINAL)
    assert certain is not None
    before, after = joint.expected(edge), joint.expected(certain)
    assert before is not None
    assert after is not None
    assert before < after < 0.0045
