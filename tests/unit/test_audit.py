"""`flatout verify` on tiny models from files to verdict: artifact against checkpoint, both ways round."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tiny import tiny_checkpoint_folder, tiny_spec

import flatout
from flatout.cli.main import main
from flatout.compress.apply import compress
from flatout.core.artifact import load_artifact, save_artifact, update_manifest
from flatout.core.checkpoint import open_checkpoint
from flatout.core.formats import uniform
from flatout.core.types import Workload
from flatout.errors import ConfigError, EvidenceError
from flatout.verify.audit import again, audit
from flatout.verify.certificate import certificate_from_json

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, an 8-bit artifact of it, another checkpoint, and a text of 320
    documents."""
    folder = tmp_path_factory.mktemp("audit")
    spec = tiny_spec(max_positions=128)
    for name, seed in (("original", 0), ("stranger", 1)):
        tiny_checkpoint_folder(folder / name, spec, seed)
    checkpoint = open_checkpoint(folder / "original")
    save_artifact(compress(checkpoint, uniform("w8a8-g32")), checkpoint.tokenizer, folder / "artifact", {})
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(WORDS, 12)), "domain": f"d{i % 40}"} for i in range(320)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(autouse=True)
def own_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATOUT_CACHE", str(tmp_path / "cache"))


def run(place: Path, optimised: str, original: str, **options: Any) -> Any:
    settings = {"text": place / "text.jsonl", "speed_seconds": 0, **options}
    return audit(place / optimised, place / original, **settings)


def test_an_eight_bit_artifact_passes(place: Path) -> None:
    seen: list[str] = []
    found = run(
        place, "artifact", "original", margin=0.2, listen=lambda stage, done, total: seen.append(stage)
    )
    certificate = found.quality
    assert certificate.passed
    assert abs(certificate.delta) < 0.1
    assert certificate.divergence.mean_kl > 0
    assert certificate.original.runner == "reference (float32)"
    assert certificate.original.recipe == "original"
    assert certificate.optimised.recipe == load_artifact(place / "artifact")[0].recipe.name
    assert certificate.original.sha256 == open_checkpoint(place / "original").sha256
    assert found.speed is None
    assert [block.name for block in found.blocks][-2:] == ["layers.1 mlp", "head"]
    assert all(0 < block.output_error < 0.05 for block in found.blocks)
    plan = next(i for i, stage in enumerate(seen) if stage.startswith("plan: needs"))
    assert "scoring the original model" in seen[:plan], "the plan comes from validation text"
    assert "scoring the original model" in seen[plan:]


def test_a_model_against_itself_passes_at_any_margin(place: Path) -> None:
    """A checkpoint served in bf16 against its float32 original: the loss is that of rounding."""
    certificate = run(place, "original", "original", margin=0.1).quality
    assert certificate.passed
    assert certificate.upper < 0.05


def test_another_model_fails(place: Path) -> None:
    certificate = run(place, "stranger", "original", margin=0.0001).quality
    assert not certificate.passed


def test_swapped_arguments_are_refused(place: Path) -> None:
    certificate = run(place, "artifact", "original", margin=0.2).quality
    update_manifest(place / "artifact", {"certificate": certificate})
    try:
        with pytest.raises(EvidenceError, match="swap the two"):
            run(place, "original", "artifact")
        stored, new = again(place / "artifact", original=place / "original")
        assert stored == certificate
        assert new.clusters == stored.clusters, "the artifact judges itself again, to the last bit"
        with pytest.raises(EvidenceError, match="the original model must be the certified one"):
            again(place / "artifact", original=place / "stranger")
    finally:
        update_manifest(place / "artifact", {"certificate": None})


def test_an_artifact_may_be_the_original(place: Path) -> None:
    certificate = run(place, "artifact", "artifact", margin=0.2).quality
    assert certificate.passed
    assert certificate.original.sha256 == certificate.optimised.sha256


def test_other_tokens_are_refused(place: Path, tmp_path: Path) -> None:
    other = tiny_checkpoint_folder(tmp_path / "other", tiny_spec(max_positions=128, vocab_size=300))
    with pytest.raises(EvidenceError, match=r"the same tokens; found: (320 and 300|different)"):
        run(place, str(other), "original")
    changed = tiny_checkpoint_folder(tmp_path / "changed", tiny_spec(max_positions=128))
    tokenizer = json.loads((changed / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][1:]
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(EvidenceError, match="different tokenizers"):
        run(place, str(changed), "original")


def test_a_text_that_repeats_itself_across_splits_is_refused(place: Path, tmp_path: Path) -> None:
    text = tmp_path / "copies.txt"
    passage = " ".join(np.random.default_rng(1).choice([f"word{i}" for i in range(999)], 300))
    text.write_text("\n\n".join([passage] * 40))
    with pytest.raises(EvidenceError, match="no hold-out passage may stand in calibration"):
        run(place, "artifact", "original", text=text)


def test_command_prints_quality_and_speed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["--against", str(place / "original"), "--text", str(place / "text.jsonl")]
    code = main(
        ["verify", str(place / "artifact"), *names, "--margin", "20%", "--json", "--speed-seconds", "0"]
    )
    shown = json.loads(capsys.readouterr().out)
    assert code == 0
    assert shown["quality"]["verdict"] == "passed"
    assert shown["speed"] is None
    assert certificate_from_json(shown["quality"]).passed
    assert certificate_from_json(shown).passed, "the command's own output is a certificate file"


def test_tasks_are_judged_beside_the_text(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(3)
    rows = [
        {
            "query": " ".join(rng.choice(WORDS, 4)),
            "choices": list(rng.choice(WORDS, 2, replace=False)),
            "gold": 0,
        }
        for _ in range(120)
    ]
    pairs = [
        {"sentence_good": w + " " + v, "sentence_bad": v + " " + w} for w in WORDS for v in WORDS if w != v
    ]
    for name, items in (("choices.jsonl", rows), ("pairs.jsonl", pairs)):
        (place / name).write_text("\n".join(map(json.dumps, items)))
    seen: list[str] = []
    files = [place / "choices.jsonl", place / "pairs.jsonl"]
    listen = {"listen": lambda stage, done, total: seen.append(stage)}
    found = run(place, "artifact", "original", margin=0.2, tasks=files, task_margin=0.2, limit=100, **listen)
    assert [(task.task, task.form, task.n) for task in found.tasks] == [
        ("choices", "choice", 100),
        ("pairs", "pair", 100),
    ]
    assert found.passed, [task.reason for task in found.tasks]
    assert seen[-1] == "pairs: optimised"
    names = ["--against", str(place / "original"), "--text", str(place / "text.jsonl")]
    command = ["verify", str(place / "artifact"), *names, "--margin", "20%", "--speed-seconds", "0"]
    code = main([*command, "--task", str(files[0]), "--task-margin", "0.001%"])
    assert code == 3, "the text passes, the task does not"
    table = capsys.readouterr().out
    assert re.search("verdict +passed", table)
    assert "choices: cannot decide, accuracy falls by at most" in table
    assert "(by plain log-probability" in table
    assert re.search(r"layers\.\d mlp +\d.* %.* w8a8-g32, w8a8-g32", table)


def test_broken_tasks_are_refused_before_the_models_are_opened(place: Path) -> None:
    (place / "broken.jsonl").write_text('{"text": "no form"}')
    with pytest.raises(ConfigError, match="an item has the keys"):
        audit(place / "nowhere", place / "original", tasks=[place / "broken.jsonl"])


def test_speed_is_measured_on_both(place: Path) -> None:
    found = flatout.verify(
        place / "artifact",
        place / "original",
        margin=0.2,
        text=place / "text.jsonl",
        workload=Workload(prompt=20, output=3),
        speed_seconds=0.2,
        threads=1,
    )
    for result in (found.speed.prefill, found.speed.decode):
        assert result.pairs >= 9
        assert result.low <= result.ratio <= result.high
    assert found.speed.workload.prompt == 20
