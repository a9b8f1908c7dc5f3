"""`flatout bench`: rows, ratios, turns, peers, and the whole of it with a tiny model and a made-up peer."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.timed import machine
from tests.tiny import tiny_checkpoint_folder, tiny_spec, write_tokenizer

from flatout.bench import install as installing
from flatout.bench import own, peers, record, run, turns
from flatout.bench.install import LLAMA_BUILD, install, run_build
from flatout.bench.peers import Variant, environment, parse_peers
from flatout.bench.phases import (
    PHASES,
    TIMED,
    Contender,
    Row,
    Start,
    make_row,
    make_start_rows,
    ratios,
)
from flatout.cli import bench as command
from flatout.cli.main import main
from flatout.errors import BackendError, ConfigError
from flatout.verify.foreign_load import Ticks
from flatout.verify.speed import Sample

KNOWN = "this version measures llama.cpp, openvino, onnxruntime, ctranslate2 and transformers"
PREFILL, DECODE = PHASES[0], PHASES[1]
CONTENDER = Contender(
    engine="e",
    format="f",
    source="f.gguf",
    version="1",
    details="",
    perplexity=9.0,
    loss=0.002,
    loss_upper=0.004,
)


def samples(*seconds: float, noisy: Sequence[int] = ()) -> list[Sample]:
    return [Sample(s, 0.5 if i in noisy else 0.0, i in noisy) for i, s in enumerate(seconds)]


def row(engine: str, phase: str, median: float, loss: float | None = 0.0) -> Row:
    made = make_row(
        replace(CONTENDER, engine=engine, loss=loss), DECODE, samples(DECODE.workload.output / median), 1
    )
    return replace(made, phase=phase)


def test_the_contract_names_these_phases() -> None:
    assert [phase.name for phase in TIMED] == ["prefill", "decode", "decode_ctx1024", "batch_8", "batch_32"]
    assert [p.workload.prompt for p in TIMED[:3]] == [512, 32, 1024]
    assert [p.workload.batch for p in TIMED] == [1, 1, 1, 8, 32]
    assert [phase.name for phase in PHASES[5:]] == ["load", "peak_memory"]
    assert [phase.lower_is_better for phase in PHASES] == [False] * 5 + [True] * 2
    assert [p.positions for p in PHASES] == [512, 96, 1056, 64, 64, 33, 33]


def test_rows_are_rates_of_all_sequences() -> None:
    batch = PHASES[3]
    made = make_row(CONTENDER, batch, samples(1.0, 2.0, 4.0), 3, floor_s=0.5)
    assert (made.median, made.p20, made.p80, made.n) == (128.0, 64.0, 256.0, 3)
    assert made.floor_fraction == pytest.approx(0.25)
    assert make_row(CONTENDER, PREFILL, samples(2.0), 1).median == 256.0
    assert make_row(CONTENDER, PREFILL, samples(2.0), 1).floor_fraction is None


def test_a_start_is_a_time_and_a_peak() -> None:
    starts = [Start(*of) for of in zip(samples(3.0, 1.0, 9.0, noisy=[2]), (5, 7, 6), strict=True)]
    load, peak = make_start_rows(CONTENDER, starts, 2)
    assert (load.phase, load.unit, load.median, load.n, load.thrown_away) == ("load", "s", 2.0, 2, 1)
    assert (peak.phase, peak.unit, peak.median, peak.n) == ("peak_memory", "byte", 6.0, 3)
    without = make_start_rows(CONTENDER, [Start(s, None) for s in samples(1.0)], 1)
    assert [row.phase for row in without] == ["load"]


def test_noisy_samples_are_thrown_away_while_enough_are_left() -> None:
    made = make_row(CONTENDER, PREFILL, samples(1.0, 50.0, 2.0, 4.0, noisy=[1]), 4)
    assert (made.median, made.n, made.thrown_away, made.kept_noisy) == (256.0, 3, 1, 0)
    kept = make_row(CONTENDER, PREFILL, samples(1.0, 50.0, 2.0, noisy=[0, 1]), 3)
    assert (kept.n, kept.thrown_away, kept.kept_noisy, kept.foreign_load) == (3, 0, 2, 0.5)


def test_ratios_take_the_fastest_peer_and_the_fastest_of_equal_quality() -> None:
    rows = [
        row("flatout", "decode", 300.0, loss=0.004),
        row("a", "decode", 100.0, loss=0.0),
        row("b", "decode", 150.0, loss=0.01),
        row("c", "decode", 600.0, loss=0.25),
        row("c", "batch_8", 600.0, loss=0.25),
        row("flatout", "batch_8", 900.0, loss=0.004),
        row("flatout", "prefill", 900.0),
        row("a", "batch_32", 1.0),
    ]
    found, equal = ratios(rows, "flatout"), ratios(rows, "flatout", 0.01)
    assert found["decode"] is not None
    assert found["decode"].value == pytest.approx(0.5)
    assert found["decode"].peer == "c f"
    assert equal["decode"] is not None
    assert equal["decode"].value == pytest.approx(2.0)
    assert equal["decode"].peer == "b f"
    assert equal["batch_8"] is None  # no peer within 1 % was measured
    assert found["prefill"] is found["batch_32"] is found["decode_ctx1024"] is None
    assert set(found) == set(equal) == {phase.name for phase in PHASES}


def test_a_model_of_ours_that_lost_quality_claims_nothing_at_equal_quality() -> None:
    rows = [row("flatout", "decode", 300.0, loss=0.02), row("a", "decode", 100.0)]
    assert ratios(rows, "flatout", 0.01)["decode"] is None
    assert ratios(rows, "flatout")["decode"] is not None


def test_the_best_of_ours_stands_against_the_best_peer() -> None:
    rows = [
        row("flatout", "decode", 100.0),
        row("flatout", "decode", 300.0, loss=0.02),
        row("a", "decode", 200.0),
        row("flatout", "load", 2.0),
        row("flatout", "load", 0.5, loss=0.02),
        row("a", "load", 1.0),
        row("b", "load", 4.0),
    ]
    found, equal = ratios(rows, "flatout"), ratios(rows, "flatout", 0.01)
    values = [ratio and ratio.value for name in ("decode", "load") for ratio in (found[name], equal[name])]
    assert values == pytest.approx([1.5, 0.5, 2.0, 0.5])
    assert found["load"] is not None
    assert found["load"].peer == "a f"


def test_what_was_not_scored_is_of_no_known_quality() -> None:
    rows = [row("flatout", "decode", 300.0, loss=None), row("a", "decode", 100.0, loss=None)]
    assert ratios(rows, "flatout")["decode"] is not None
    assert ratios(rows, "flatout", 0.01)["decode"] is None


def test_models_of_one_recipe_are_told_apart() -> None:
    assert own.tell_apart(["m", "demo/artifact"], ["native", "w8a8"]) == ["native", "w8a8"]
    assert own.tell_apart(["m", "a", "b"], ["w8a8", "native", "w8a8"]) == ["w8a8 of m", "native", "w8a8 of b"]


class Scripted:
    """A side that counts its runs; `loads` are cores that others keep busy in its samples, one after the
    other."""

    def __init__(self, log: list[str], name: str, loads: Sequence[float] = ()) -> None:
        self._log, self._name, self._loads = log, name, iter(loads)
        self._now, self._busy, self._meter = 0.0, 0.0, False

    def prefill(self, prompts: Sequence[Sequence[int]]) -> float:
        self._log.append(f"{self._name} prefill")
        return 1.0

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        self._log.append(f"{self._name} decode {tokens}")
        return 1.0

    def score(self, document: Sequence[int]) -> list[float]:
        return [-1.0] * (len(document) - 1)

    def ticks(self) -> Ticks:
        if self._meter:  # the reading after a sample
            self._now += 1.0
            self._busy += next(self._loads, 0.0)
        self._meter = not self._meter
        return Ticks(self._busy, 2 * self._now, 0.0, self._now)


def silent(stage: str, done: int, total: int) -> None:
    """No listener."""


def test_everyone_is_warmed_and_then_timed_once_a_round() -> None:
    log: list[str] = []
    sides = [Scripted(log, name) for name in "ab"]
    work = [(PREFILL, [[1]]), (DECODE, [[1]])]
    found = turns.take_turns(sides, work, 3, 2, silent, settle_s=0.0)
    assert {key: len(value) for key, value in found.items()} == {
        (i, phase.name): 3 for i in (0, 1) for phase in (PREFILL, DECODE)
    }
    assert log[:4] == ["a prefill", "b prefill", "a decode 64", "b decode 64"]
    timed = log[4:]
    for start in range(0, len(timed), 2):  # neighbours in time are the same phase of different sides
        first, second = sorted(timed[start : start + 2])
        assert (first[0], second[0]) == ("a", "b")
        assert first[2:] == second[2:]


def test_noisy_phases_run_again_for_all_but_not_for_ever() -> None:
    log: list[str] = []
    sides = [Scripted(log, "a", loads=[0.0, 1.0]), Scripted(log, "b")]
    found = turns.take_turns(sides, [(PREFILL, [[1]]), (DECODE, [[1]])], 2, 2, silent, settle_s=0.0)
    counts = {key: len(value) for key, value in found.items()}
    assert counts == {(0, "prefill"): 2, (1, "prefill"): 2, (0, "decode"): 3, (1, "decode"): 3}
    assert sum(sample.noisy for sample in found[0, "decode"]) == 1
    busy = [Scripted(log, "a", loads=[2.0] * 99)]
    assert len(turns.take_turns(busy, [(PREFILL, [[1]])], 2, 2, silent, settle_s=0.0)[0, "prefill"]) == 4


def test_peers_are_named_in_any_case_and_once() -> None:
    assert parse_peers(" llama.cpp, Transformers,llama.cpp,") == ("llama.cpp", "transformers")


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("vllm,llama.cpp", "--against llama.cpp"),
        ("vllm", "--against llama.cpp,openvino,onnxruntime,ctranslate2,transformers"),
        (" , ", "--against llama.cpp,openvino,onnxruntime,ctranslate2,transformers"),
    ],
)
def test_other_peers_are_one_clear_error(text: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_peers(text)
    assert (
        caught.value.rule
        == "this version measures llama.cpp, openvino, onnxruntime, ctranslate2 and transformers"
    )
    assert caught.value.remedy == remedy


def test_workers_do_not_inherit_what_would_change_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
        monkeypatch.setenv(name, "active")
    assert not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "PYTHONPATH", "PYTHONHOME"} & set(
        environment("llama.cpp")
    )
    assert environment("llama.cpp")["PATH"]
    assert environment("transformers")["PYTHONPATH"].endswith("active")


@pytest.fixture
def building(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Installations that take no time; the list of those that were made."""
    built: list[Path] = []

    def fill(peer: str, python: Path, log: Path, listen: Any) -> None:
        built.append(python)
        python.parent.mkdir(parents=True)
        python.touch()

    monkeypatch.setenv("FLATOUT_CACHE", str(tmp_path))
    monkeypatch.setattr(installing, "_make_environment", lambda peer, folder: None)
    monkeypatch.setattr(installing, "_fill", fill)
    return built


def test_llama_is_built_once_and_again_when_the_build_would_differ(
    building: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = install("llama.cpp", silent)
    assert python == tmp_path.resolve() / "peers" / "llama.cpp" / "bin" / "python"
    install("llama.cpp", silent)
    assert len(building) == 1
    monkeypatch.setattr(installing, "LLAMA_BUILD", (*LLAMA_BUILD, "-DGGML_OPENMP=OFF"))
    install("llama.cpp", silent)
    assert len(building) == 2
    (tmp_path / "peers" / "llama.cpp" / "installed.json").write_text("cut o")
    install("llama.cpp", silent)
    assert len(building) == 3


def test_a_build_that_fails_is_made_again(building: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(peer: str, python: Path, log: Path, listen: Any) -> None:
        building.append(python)
        raise BackendError("the peer must install", "no network")

    with monkeypatch.context() as patch:
        patch.setattr(installing, "_fill", fail)
        with pytest.raises(BackendError, match="no network"):
            install("llama.cpp", silent)
    install("llama.cpp", silent)
    assert len(building) == 2


def test_a_compiler_is_asked_for_before_the_build(
    building: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installing.shutil, "which", lambda name: None)
    with pytest.raises(BackendError, match="needs a C\\+\\+ compiler"):
        install("llama.cpp", silent)
    assert building == []


def test_builds_report_progress_and_quote_the_error(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    code = "print('  [3/140] cc x'); print('ERROR: no wheel'); print('bye'); raise SystemExit({})"
    log = tmp_path / "log"
    run_build([sys.executable, "-c", code.format(0)], {}, log, lambda *step: steps.append(step))
    assert steps == [(3, 140)]
    assert "bye" in log.read_text()
    with pytest.raises(BackendError, match=r"the peer must install; found: ERROR: no wheel; try: read .*log"):
        run_build([sys.executable, "-c", code.format(1)], {}, log, lambda *step: None)


def test_the_commit_is_that_of_our_sources_only(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path), *words],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    (tmp_path / "__init__.py").touch()
    assert record.source_commit(tmp_path) is None
    git("init", "-q")
    assert record.source_commit(tmp_path) is None  # somebody else's repository
    git("add", ".")
    git("commit", "-q", "-m", "m")
    assert record.source_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "__init__.py").write_text("x = 1\n")
    assert record.source_commit(tmp_path) == git("rev-parse", "HEAD") + "-dirty"


PEER = """
import math, time
class Peer:
    def load(self, path, threads):
        return {"vocab_size": VOCABULARY, "version": "fake 2", "details": f"{threads} threads"}
    def first(self, prompt):
        time.sleep(10 if len(prompt) != 32 else 0)
        return True
    def prefill(self, prompts):
        time.sleep(0.001)
        return 100.0
    def decode(self, prompts, tokens):
        return 100.0
    def score(self, document):
        return [-math.log(VOCABULARY)] * (len(document) - 1)
"""


@pytest.fixture
def tiny_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny model's folder; the only peer is one that knows nothing and takes its time."""
    spec = tiny_spec()
    folder = tiny_checkpoint_folder(tmp_path / "model", spec)
    write_tokenizer(folder, spec.vocab_size)
    (tmp_path / "fake_peer.py").write_text(PEER.replace("VOCABULARY", str(spec.vocab_size)))

    real = peers.launch

    def launch(variant: Variant, python: Path) -> Any:
        if variant.engine == peers.OURS:
            return real(variant, python)
        script = str(Path(peers.__file__).parent / "workers" / "serve.py")
        env = {"PYTHONPATH": str(tmp_path)}
        return run.Worker(variant.name, [sys.executable, script, "fake_peer"], env)

    monkeypatch.setattr(run, "launch", launch)
    monkeypatch.setattr(run, "measure_ceilings", lambda listen: machine())
    return str(folder)


def test_a_whole_benchmark(tiny_bench: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    again = str(shutil.copytree(tiny_bench, tmp_path / "again"))
    args = ["bench", tiny_bench, again, "--against", "transformers", "--rounds", "1", "--passages", "3"]
    assert main([*args, "--threads", "1", "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == result
    assert out.with_suffix(".svg").read_text().startswith("<svg xmlns=")
    assert Counter(r["engine"] for r in result["rows"]) == {"flatout": 12, "transformers": 6}
    assert {r["phase"] for r in result["rows"]} == {p.name for p in PHASES} - {"decode_ctx1024"}
    assert "decode_ctx1024: longer than the model's positions" in result["not_measured"]
    first, second, theirs = result["contenders"]
    assert theirs["details"] == "1 threads"
    assert theirs["source"] == result["original"] == tiny_bench
    assert theirs["perplexity"] == pytest.approx(result["rows"][-1]["perplexity"])
    assert [c["source"] for c in (first, second)] == result["models"] == [tiny_bench, again]
    assert [c["format"] for c in (first, second)] == [f"native of {m}" for m in (tiny_bench, again)]
    assert abs(first["loss"]) < 0.01
    assert first["loss"] == second["loss"]
    assert set(result["ratio_to_best_peer"]) == {phase.name for phase in PHASES}
    assert result["ratio_to_best_peer"]["decode"] > 1
    assert result["ratio_to_best_peer"]["decode_ctx1024"] is None
    assert result["ratio_to_best_peer"]["load"] > 0
    assert result["best_peer"]["prefill"] == "transformers bf16"
    assert result["text"]["passages"] == 3
    command_line = f"flatout bench {tiny_bench} {again} --against transformers --threads 1"
    assert result["command"].startswith(command_line)
    for r in result["rows"]:
        floorless = r["engine"] != "flatout" or r["phase"] in ("load", "peak_memory")
        assert (r["floor_fraction"] is None) == floorless
        assert r["p20"] <= r["median"] <= r["p80"]
        assert np.isfinite(r["perplexity"])


def test_people_read_aligned_tables(tiny_bench: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", tiny_bench, "--against", "transformers", "--rounds", "1", "--passages", "2"]) == 0
    out = capsys.readouterr().out
    assert "prefill of 512 tokens, 1 sequence\n" in out
    assert "decode of 32 tokens after 32, 8 sequences\n" in out
    assert "load: a fresh process to the token after 32, s\n" in out
    assert "  transformers bf16 " in out
    assert "best within 1 % loss" in out
    assert re.search(r"^decode_ctx1024 +- +-$", out, re.MULTILINE)


def test_a_model_that_means_nothing_is_not_scored(
    tiny_bench: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["bench", tiny_bench, "--against", "transformers", "--rounds", "1", "--passages", "0"]
    assert main([*args, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["text"] is None
    assert "--passages 0" in result["command"]
    assert "quality: not scored" in result["not_measured"]
    judged = [*result["contenders"], *result["rows"]]
    assert {(item["loss"], item["perplexity"]) for item in judged} == {(None, None)}
    assert set(result["ratio_at_equal_quality"].values()) == {None}
    assert result["ratio_to_best_peer"]["decode"] > 1
    assert main(args) == 0
    assert "not scored" in capsys.readouterr().out


def test_a_peer_with_another_vocabulary_is_refused(
    tiny_bench: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fake_peer.py").write_text(PEER.replace("VOCABULARY", "7"))
    assert main(["bench", tiny_bench, "--against", "transformers", "--rounds", "1", "--passages", "2"]) == 2
    assert "transformers bf16 must read the model's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--against", "vllm"],
            "this version measures llama.cpp, openvino, onnxruntime, ctranslate2 and transformers",
        ),
        (["--against", "llama.cpp"], "llama.cpp reads GGUF files"),
        (["--against", "transformers", "--out", "/nonexistent/x.json"], "--out is a JSON file in a folder"),
        (["--against", "transformers", "--passages", "1"], "2 passages, or 0 passages to score nobody"),
    ],
)
def test_mistakes_cost_one_line_and_no_time(
    tiny_bench: str, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", tiny_bench, *more]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_a_model_is_named_once(tiny_bench: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", tiny_bench, tiny_bench, "--against", "transformers"]) == 2
    assert "each named once; found:" in capsys.readouterr().err


def test_warnings_name_phases_that_others_disturbed() -> None:
    noisy = replace(row("flatout", "decode", 9.0), kept_noisy=2, floor_fraction=1.2)
    fields: dict[str, Any] = dict.fromkeys(record.BenchResult.__slots__)
    notes = command._warnings(record.BenchResult(**{**fields, "rows": (noisy,)}))
    assert [note.split(":")[0] for note in notes] == [
        "other processes used the machine during decode",
        "decode above the floor",
    ]
