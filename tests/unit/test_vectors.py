"""Vectors of two encoders on the same pieces: distances, placing, verdicts, and a search on a tiny one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.encoders import tiny_encoder_folder, tiny_encoder_spec

import flatout
from flatout.core.encoder_folder import open_encoder
from flatout.data.passages import Passage, load_passages
from flatout.engine.encoder import Encoder
from flatout.errors import ConfigError, EvidenceError, ModelFileError
from flatout.report.optimize import optimize
from flatout.search import encoder as module
from flatout.search.encoder_joint import Mixtures
from flatout.search.encoder_recipes import encoder_from_name, parse_encoder_recipe
from flatout.verify.speed import ab_test
from flatout.verify.vectors import compare, examine_vectors, pieces_of, placed


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def passages(count: int, words: int = 90) -> list[Passage]:
    return [
        Passage(id=f"p{i}", book="b", text=" ".join(f"w{i}.{j}" for j in range(words))) for i in range(count)
    ]


def test_pieces_cover_every_word_once() -> None:
    for words in (1, 27, 28, 29, 90):
        texts = [text for _, text in pieces_of(passages(1, words))]
        assert " ".join(texts) == passages(1, words)[0].text
        assert len(texts) == max(words // 28, 1)


def test_placing_by_hand() -> None:
    vectors = unit(np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.05]]))
    assert placed(vectors, np.array([0, 0, 1, 1])).tolist() == [False, False, False, False]
    assert placed(vectors, np.array([0, 0, 1, 0])).tolist() == [True, True, False, True]


def model(count: int, noise: float, seed: int = 0) -> tuple[list[Passage], np.ndarray, np.ndarray]:
    texts = passages(count)
    draw = np.random.default_rng(seed)
    pieces = pieces_of(texts)
    centres = {name: draw.standard_normal(32) for name, _ in pieces}
    original = unit(np.stack([centres[name] + 0.5 * draw.standard_normal(32) for name, _ in pieces]))
    return texts, original, unit(original + noise * draw.standard_normal(original.shape) / np.sqrt(32))


def test_the_same_vectors_pass_and_others_do_not() -> None:
    texts, original, close = model(60, 0.05)
    same = examine_vectors(texts, original, original, 0.02, 0.05)
    assert same.passed
    assert same.distance == pytest.approx(0, abs=1e-12)
    assert same.lost_upper == pytest.approx(-math.log(0.05) / same.pieces)  # none of them in 180
    assert same.accuracy_original == same.accuracy_optimised > 0.9
    near = examine_vectors(texts, original, close, 0.02, 0.05)
    expected = 1 - (original * close).sum(axis=1).mean()
    assert near.passed
    assert near.distance == pytest.approx(expected)
    assert near.distance < near.distance_upper < 0.01
    assert examine_vectors(texts, original, close, expected * 0.9, 0.05).verdict == "failed"
    _, _, far = model(60, 1.0)
    assert examine_vectors(texts, original, far, 0.01, 0.05).verdict == "failed"


def test_close_vectors_that_misplace_pieces_fail() -> None:
    """Distances are within the margin, the order of neighbours is not."""
    texts, original, _ = model(60, 0.0)
    crowded = unit(np.ones(32) * 30 + original)
    other = unit(crowded + 0.02 * np.random.default_rng(1).standard_normal(crowded.shape))
    found = examine_vectors(texts, crowded, other, 0.01, 0.05)
    assert found.distance_upper < 0.01
    assert found.lost_share > 0.01
    assert found.verdict == "failed"


def test_lost_and_gained_are_counted_by_passage() -> None:
    texts, original, changed = model(40, 0.8)
    rows, before, after = compare(pieces_of(texts), original, changed)
    assert sum(row.lost for row in rows) == int((before & ~after).sum()) > 0
    assert sum(row.gained for row in rows) == int((~before & after).sum())
    assert [row.pieces for row in rows] == [3] * 40


def test_vectors_that_are_none_are_refused() -> None:
    texts, original, _ = model(40, 0.0)
    broken = original.copy()
    broken[3, 4] = np.nan
    for wrong in (broken, original[:-1], 2 * original):
        with pytest.raises(EvidenceError):
            examine_vectors(texts, original, wrong, 0.01, 0.05)
    with pytest.raises(EvidenceError, match="at least 32 passages"):
        examine_vectors(texts[:30], original[:90], original[:90], 0.01, 0.05)


@pytest.fixture
def searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Any]]:
    """A whole search of a tiny encoder with short races, by a few passages."""
    monkeypatch.setenv("FLATOUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "load_passages", lambda split: load_passages(split)[:40])
    monkeypatch.setattr(module, "ab_test", lambda a, b, max_seconds: faster(b, b))
    # What careful formats cost must not depend on this machine's noise: a hundredth for each of the kinds.
    monkeypatch.setattr(Mixtures, "timed", lambda _, formats: lambda: 1 + 0.01 * len(formats.overrides))
    folder = tiny_encoder_folder(
        tmp_path / "model", tiny_encoder_spec(intermediate_size=128), max_seq_length=64
    )
    out = tmp_path / "out"
    return out, optimize(folder, out, max_loss="5%", workload="16x2", threads=1)


def faster(a: Any, b: Any) -> Any:
    """B takes a tenth of the time, whatever is timed."""
    return ab_test(lambda: 10 * b(), b, max_seconds=0.01, settle_s=0.0, max_foreign=1e9)


def test_an_encoder_is_optimised(searched: tuple[Path, dict[str, Any]]) -> None:
    out, result = searched
    assert result["passed"]
    assert not result["fallback"]
    assert result["optimized"]["recipe"].startswith("w8a")
    assert result["quality"]["k"] == 1 + sum(row["status"] == "failed" for row in result["candidates"])
    assert result["quality"]["distance_upper"] < 0.05
    assert result["speedup"]["texts"] > 5
    manifest = json.loads((out / "flatout.json").read_text())
    recipe, source = result["optimized"]["recipe"], open_encoder(out.parent / "model")
    assert manifest["encoder"]["format"] == parse_encoder_recipe(recipe, source.spec).format
    again = flatout.load(out, threads=1)
    assert isinstance(again, Encoder)
    made = Encoder.of(encoder_from_name(source, recipe), source.tokenizer(), threads=1)
    np.testing.assert_array_equal(again.encode(["the sea was grey"]), made.encode(["the sea was grey"]))
    assert (out / "model.safetensors").read_bytes() == (out.parent / "model/model.safetensors").read_bytes()


def test_found_mixtures_are_candidates_with_what_was_expected(searched: tuple[Path, dict[str, Any]]) -> None:
    _, result = searched
    found = [row for row in result["candidates"] if row["expected"] is not None]
    assert [row["name"] for row in found] == [f"joint-{i + 1}" for i in range(len(found))]
    assert found
    for row in found:
        assert "layers." in row["recipe"]
        assert row["expected"]["seconds"] > 0
        # The pieces are the same; errors of eight linears do not all add up.
        assert row["validation"]["distance"] == pytest.approx(row["expected"]["distance"], rel=0.5)


def test_what_is_unlikely_to_be_certified_is_opened_last() -> None:
    """Speed decides between those that are likely to pass, and loss between those of one speed."""

    def row(name: str, seconds: float, distance: float, upper: float) -> module.Candidate:
        known = SimpleNamespace(distance=distance, lost_share=0.0, lost_upper=upper, margin=0.01, alpha=0.05)
        return module.Candidate(name=name, recipe=name, weight_bytes=0, seconds=seconds, validation=known)  # type: ignore[arg-type]

    rows = [
        row("luck", 1.0, 3e-3, 0.012),  # as likely to lose one piece in a hundred as not
        row("slow", 1.5, 1e-4, 0.004),
        row("alike", 1.21, 1e-3, 0.005),
        row("quick", 1.2, 2e-3, 0.005),
    ]
    assert [one.name for one in module._by_promise(rows)] == ["alike", "quick", "slow", "luck"]


def test_an_encoder_with_weights_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The delivered folder is smaller, holds the zeros and encodes as what was certified."""
    monkeypatch.setenv("FLATOUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "load_passages", lambda split: load_passages(split)[:40])
    monkeypatch.setattr(module, "ab_test", lambda a, b, max_seconds: faster(b, b))
    folder = tiny_encoder_folder(tmp_path / "model", tiny_encoder_spec(), max_seq_length=64)
    name, out = "w8a8/gptq,ffn=128,sparsity=sparsegpt-2:4", tmp_path / "out"
    result = optimize(folder, out, recipe=name, max_loss="90%", workload="16x2", threads=1)
    assert result["passed"]
    assert result["optimized"]["name"] == name
    child = open_encoder(out)
    assert (child.spec.intermediate_size, child.spec.num_layers) == (128, 2)
    assert (child.tensors.float32("encoder.layer.1.output.dense.weight") == 0).mean() == 0.5
    again = flatout.load(out, threads=1)
    assert isinstance(again, Encoder)
    made = Encoder.of(encoder_from_name(open_encoder(folder), name), child.tokenizer(), threads=1)
    np.testing.assert_array_equal(again.encode(["the sea was grey"]), made.encode(["the sea was grey"]))


def test_a_changed_file_is_noticed(searched: tuple[Path, dict[str, Any]]) -> None:
    out, _ = searched
    config = out / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(ModelFileError, match="files must be as they were written"):
        flatout.load(out)


def test_what_an_encoder_has_no_use_for_is_refused(tmp_path: Path) -> None:
    folder = tiny_encoder_folder(tmp_path / "model", tiny_encoder_spec())
    with pytest.raises(ConfigError, match=r"optimising an encoder takes .*found: portable"):
        optimize(folder, tmp_path / "out", portable="vllm")
    with pytest.raises(ConfigError, match="an encoder's objective is latency or throughput"):
        optimize(folder, tmp_path / "out", objective="energy")
    for workload in ("512+64", "x", "12x", "-1"):
        with pytest.raises(ConfigError, match="an encoder's workload is TOKENS or TOKENSxBATCH"):
            optimize(folder, tmp_path / "out", workload=workload)
    with pytest.raises(ConfigError, match="must not replace its own input"):
        optimize(folder, folder)
    assert not (tmp_path / "out").exists()
