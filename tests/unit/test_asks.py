"""What a search can be asked for besides speed: other programs, memory, energy, money, earlier recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_bench import SPEC, FakeBench, FakeSource
from test_loop import LOSSES, NAMES, SPEEDS, cache, run  # noqa: F401 (a fixture)

from flatout.core.artifact import recipe_from_json
from flatout.core.formats import Recipe
from flatout.core.portable import ENGINES, loads_in, why_not
from flatout.core.types import OBJECTIVES, Workload, to_json
from flatout.errors import BackendError, ConfigError, ModelFileError
from flatout.search.joint import space_of, stand_ins
from flatout.search.portable import restrict, restrict_space
from flatout.search.recipes import ORIGINAL, candidates
from flatout.search.request import parse_bytes
from flatout.search.saved import saved_recipe


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("engine", ["transformers", "vllm", "llama.cpp"])
def test_only_what_the_program_loads_is_left(engine: str, native: bool) -> None:
    source = FakeSource(native)
    left = restrict(candidates(source), engine, source)
    assert left[-1].recipe == ORIGINAL
    assert len(left) > 2
    for candidate in left:
        assert why_not(engine, SPEC, candidate.recipe) == ""
        assert not loads_in(SPEC, candidate.recipe)[engine].startswith("no")
    names = {candidate.recipe.name for candidate in left}
    assert len(names) == len(left)
    # q4_1 has a form of its own in a folder, and is GGUF's.
    assert ("native" in names) == (native and engine == "llama.cpp")


@pytest.mark.parametrize("native", [True, False])
def test_the_joint_space_is_what_the_program_loads(native: bool) -> None:
    whole = space_of(FakeSource(native))
    for engine in ("transformers", "vllm", "llama.cpp"):
        space = restrict_space(whole, engine)
        assert space is not None
        for recipe in stand_ins(space):
            assert why_not(engine, SPEC, recipe) == "", recipe
    assert restrict_space(whole, "openvino") is None


def test_a_program_that_loads_nothing_is_refused_first(tmp_path: Path) -> None:
    bench = FakeBench(LOSSES, SPEEDS)
    with pytest.raises(ConfigError, match=r"openvino must load the result; found: it reads .*no --portable"):
        run(bench, tmp_path / "out", portable="openvino")
    assert bench.calls == []
    with pytest.raises(ConfigError, match="--portable is one of transformers, vllm"):
        run(bench, tmp_path / "out", portable="tensorrt")


def test_a_portable_search_delivers_what_loads(tmp_path: Path) -> None:
    speeds = {name + ends: 1.7 for name in NAMES for ends in ("", ",head=bf16,embedding=bf16")}
    speeds |= {"native": 9.0, "bf16": 1.0, "w8a8": 3.0}
    speeds |= {f"w4a16-g{g}/gptq,head=bf16,embedding=bf16": 1.5 for g in (32, 64)}
    result = run(FakeBench(LOSSES, speeds), tmp_path / "out", portable="transformers")
    assert result["optimized"]["recipe"] == "w8a8"
    assert result["request"]["portable"] == "transformers"
    with pytest.raises(ConfigError, match="transformers must load the result; found: native: compressed-ten"):
        run(FakeBench(LOSSES, speeds), tmp_path / "out", portable="transformers", recipe="native")


def test_a_recipe_is_run_again_from_where_it_was_saved(tmp_path: Path) -> None:
    first = run(FakeBench(LOSSES, SPEEDS), tmp_path / "first")
    saved = tmp_path / "recipe.json"
    saved.write_text(json.dumps(to_json(Recipe(name="joint-3", layers="w8a8-g64", head="q8_0"))))
    for text, name in (
        (str(tmp_path / "first"), "native-s8"),
        (str(tmp_path / "first" / "flatout.json"), "native-s8"),
        (f"{tmp_path / 'first'}:w8a8-g32", "w8a8-g32"),
        (str(saved), "joint-3"),
    ):
        bench = FakeBench(LOSSES | {"joint-3": 0.001}, SPEEDS | {"joint-3": 2.0})
        result = run(bench, tmp_path / "again", recipe=text)
        assert result["passed"], text
        assert result["optimized"]["recipe"] == name
    row = next(row for row in first["candidates"] if row["name"] == "native-s8")
    assert recipe_from_json(row["recipe"]) == recipe_from_json(first["recipe"])


def test_a_candidate_of_the_output_folder_is_known_by_its_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(FakeBench(LOSSES, SPEEDS), out)
    manifest = json.loads((out / "flatout.json").read_text())
    manifest["measurements"]["candidates"][0]["name"] = "joint-1"
    (out / "flatout.json").write_text(json.dumps(manifest))
    found = saved_recipe("joint-1", out)
    assert found is not None
    assert found.name == "native-s8"
    assert saved_recipe("w8a8-g64,head=q8_0", out) is None
    assert saved_recipe("joint-1", tmp_path / "nothing") is None
    with pytest.raises(ConfigError, match=r"a candidate of that search is one of joint-1, .*found: joint-9"):
        saved_recipe(f"{out}:joint-9", out)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ModelFileError, match="a recipe has name, layers"):
        saved_recipe(str(tmp_path / "other.json"), out)


def test_memory_is_a_limit(tmp_path: Path) -> None:
    whole = run(FakeBench(LOSSES, SPEEDS), tmp_path / "whole", workload="1000+24x64")
    sizes = {row["name"]: row["weight_bytes"] for row in whole["candidates"]}
    limit = sizes["native-s8"]
    assert sizes["w8a8-g64"] > limit > 1 << 20
    bench = FakeBench(LOSSES, SPEEDS | {"w8a8-g64": 9.0})
    result = run(bench, tmp_path / "out", max_memory=limit, workload="1000+24x64")
    assert result["optimized"]["recipe"] == "native-s8"
    assert result["passed"]
    reasons = {row["name"]: row["reason"] for row in result["candidates"]}
    for name in set(sizes) - {"bf16"}:
        assert ("are allowed" in reasons[name]) == (sizes[name] > limit)
    assert "build w8a8-g64" not in bench.calls
    least = min(sizes.values()) - 1
    result = run(FakeBench(LOSSES, SPEEDS), tmp_path / "less", max_memory=least, workload="1000+24x64")
    assert not result["passed"]
    assert "to keep the quality budget in 16 MB" in result["verdict"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("800MB", 800_000_000),
        ("1.5 GiB", 3 << 29),
        (1 << 20, 1 << 20),
        ("2M", 2_000_000),
        ("3000kB", 3_000_000),
    ],
)
def test_sizes(text: str | int, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "1KBB", "0", "3 XB", "1000"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--max-memory is a size of at least 1MiB"):
        parse_bytes(text)


JOULES = {**dict.fromkeys(NAMES, 5.0), "baseline": 9.0, "bf16": 4.0, "native-s8": 3.0}


def test_energy_is_won_by_joules_at_no_loss_of_time(tmp_path: Path) -> None:
    bench = FakeBench(LOSSES, SPEEDS, joules=JOULES | {"native-s8": 3.0})
    result = run(bench, tmp_path / "out", objective="energy", workload="512+64")
    assert result["optimized"]["recipe"] == "native-s8"
    assert result["energy"]["ratio"] == pytest.approx(3.0)
    assert result["energy"]["joules_per_token"] == {"baseline": 9.0 / 64, "optimized": 3.0 / 64}
    hungry = FakeBench(LOSSES, SPEEDS, joules=JOULES | {"native-s8": 4.5})
    result = run(hungry, tmp_path / "hungry", objective="energy", workload="512+64")
    assert result["fallback"]  # faster, yet no joule less
    assert "not less hungry at the same speed" in result["verdict"]
    assert run(FakeBench(LOSSES, SPEEDS), tmp_path / "time")["energy"] is None


def test_energy_without_a_counter_is_refused_first(tmp_path: Path) -> None:
    bench = FakeBench(LOSSES, SPEEDS)
    with pytest.raises(BackendError, match="energy needs a counter"):
        run(bench, tmp_path / "out", objective="energy")
    assert not [call for call in bench.calls if not call.startswith("rehearse")]


def test_money_is_time_at_a_price(tmp_path: Path) -> None:
    result = run(
        FakeBench(LOSSES, SPEEDS),
        tmp_path / "out",
        objective="money",
        dollars_per_hour=1.8,
        workload="512+64x8",
    )
    assert result["optimized"]["recipe"] == "native-s8"
    # 0.1 s of prefill and 64 steps of 3 ms at speed 1 for 8 x 64 tokens, at 1.8 / 3600 dollars a second
    dollars = result["money"]["dollars_per_million_tokens"]
    assert dollars["engine_original"] == pytest.approx(1.8 / 3600 * (0.1 + 64 * 0.003) * 1e6 / 512)
    assert dollars["optimized"] == pytest.approx(dollars["engine_original"] / 2.5)
    with pytest.raises(ConfigError, match="the objective money needs a price"):
        run(FakeBench(LOSSES, SPEEDS), tmp_path / "none", objective="money")
    with pytest.raises(ConfigError, match="a price is dollars an hour above 0"):
        run(FakeBench(LOSSES, SPEEDS), tmp_path / "none", dollars_per_hour=-1)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives(objective: str) -> None:
    assert Workload(objective=objective).objective == objective


def test_every_program_has_an_answer() -> None:
    found = loads_in(SPEC, ORIGINAL)
    assert set(found) == {"flatout", *ENGINES}
    assert found.pop("llama.cpp") == "after flatout export FOLDER --to gguf --out FILE.gguf"
    assert all(answer == "yes" or answer.startswith("no: ") for answer in found.values())


def test_needs_are_told_and_kept(tmp_path: Path) -> None:
    notes: list[str] = []
    result = run(FakeBench(LOSSES, SPEEDS), tmp_path / "out", note=notes.append)
    assert result["preflight"]["seconds"] > 0
    assert any(note.startswith("needs about ") and " of disk" in note for note in notes)


def test_the_rehearsal_comes_first(tmp_path: Path) -> None:
    bench = FakeBench(LOSSES, SPEEDS)
    run(bench, tmp_path / "out")
    assert bench.calls[:2] == ["rehearse native-s8", "rehearse bf16"]
