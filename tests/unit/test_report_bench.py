"""The drawing of a benchmark: what it says, in which order, and that it is a file of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from benchmarks import record

from flatout.report.bench import bench_chart

SVG = "{http://www.w3.org/2000/svg}"


def row(engine: str, phase: str, median: float, loss: float | None = 0.0, form: str = "f") -> dict[str, Any]:
    unit = {"load": "s", "peak_memory": "byte"}.get(phase, "token/s")
    spread = {"median": median, "p20": 0.9 * median, "p80": 1.1 * median}
    shape = {"batch": 1, "prompt": 32, "output": 64}
    return {"engine": engine, "format": form, "phase": phase, "unit": unit, "loss": loss} | spread | shape


def result(*rows: dict[str, Any], equal: float | None = 3.0) -> dict[str, Any]:
    phases = {row["phase"] for row in rows}
    return {
        "models": ["smollm2-135m", "demo/artifact"],
        "machine": {"name": "a machine"},
        "threads": 2,
        "rounds": 5,
        "taken": "2026-01-02T03:04:05+00:00",
        "rows": list(rows),
        "ratio_to_best_peer": dict.fromkeys(phases, 0.5),
        "ratio_at_equal_quality": dict.fromkeys(phases, equal),
    }


def words(drawing: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(drawing).iter(f"{SVG}text")]


def test_the_best_comes_first_in_every_panel() -> None:
    rows = [row(engine, "decode", speed) for engine, speed in (("a", 1.0), ("flatout", 300.0), ("c", 20.0))]
    rows += [row(engine, "load", time) for engine, time in (("a", 2.0), ("flatout", 9.0), ("c", 0.5))]
    said = words(bench_chart(result(*rows)))
    names = [word for word in said if word in ("a f", "flatout f", "c f")]
    assert names == ["flatout f", "c f", "a f", "c f", "a f", "flatout f"]
    assert {"300", "9.00", "tokens/s, more is better", "seconds, less is better"} <= set(said)
    assert "a machine, 2 threads, 5 rounds, 2026-01-02; whiskers: 20th to 80th percentile" in said


def test_bars_grow_with_the_figure_and_are_pale_where_quality_is_lost() -> None:
    rows = [row("flatout", "decode", 100.0), row("fast", "decode", 200.0, loss=0.02)]
    drawing = bench_chart(result(*rows))
    bars = {
        kind: float(w)
        for w, kind in re.findall(r'width="([\d.]+)" height="13.0" rx="2" class="(bar.*?)"', drawing)
    }
    assert set(bars) == {"bar ours", "bar pale"}
    assert bars["bar pale"] == pytest.approx(2 * bars["bar ours"], abs=0.2)
    assert {"+2.0 %", "0.50× / 3.00×"} <= set(words(drawing))


def test_memory_is_in_megabytes() -> None:
    said = words(bench_chart(result(row("a", "peak_memory", 3.2e8), row("flatout", "peak_memory", 4e9))))
    assert {"320", "4,000", "MB, less is better"} <= set(said)


def test_nobody_scored_means_no_losses() -> None:
    drawing = bench_chart(
        result(row("a", "decode", 5.0, None), row("flatout", "decode", 6.0, None), equal=None)
    )
    assert "loss" not in words(drawing)
    assert 'class="bar pale"' not in drawing
    assert "0.50×" in words(drawing)


def test_without_peers_there_is_no_ratio() -> None:
    alone = result(row("flatout", "decode", 6.0), equal=None) | {"ratio_to_best_peer": {"decode": None}}
    assert "no peer was measured in the same phases" in words(bench_chart(alone))


def test_marks_stay_inside_and_hostile_names_stay_text() -> None:
    long = "<script>&" + "w" * 80
    drawing = bench_chart(result(*(row("a", "decode", 5.0, form=long) for _ in range(20))))
    width = float(re.findall(r'viewBox="0 0 ([\d.]+)', drawing)[0])
    assert "<script>" not in drawing
    ends = [
        float(a) + float(b) for a, b in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawing)
    ]
    assert max(ends) <= width
    assert all(len(word) < 90 for word in words(drawing))


def test_a_results_file_gets_its_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    whole = result(row("flatout", "decode", 6.0), row("a", "decode", 5.0))
    whole["machine"] |= {"cores": 2, "kind": "cpu"}
    path = record.write("bench", whole | {"models": ["/some/folder/m.gguf"]}, "make bench")
    drawing = path.with_suffix(".svg").read_text(encoding="utf-8")
    assert "m.gguf beside other engines" in words(drawing)
    assert "/some" not in drawing
