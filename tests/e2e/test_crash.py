"""A search that is killed (SIGKILL) at every file it writes delivers what an undisturbed one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import flatout

ROOT = Path(__file__).parents[2]
MOVING = {"created", "date", "first_usable_s", "timings", "trials", "versions", "source"}
"""Keys whose values are about the run, not about what was found."""


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("crash")
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(flatout.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.crash", str(folder)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    return folder, json.loads(run.stdout)


def still(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: still(item) for key, item in value.items() if key not in MOVING}
    return [still(item) for item in value] if isinstance(value, list) else value


def test_every_stage_was_killed(searched: tuple[Path, dict[str, Any]]) -> None:
    kills = searched[1]["kills"]
    stages = {kill.partition(":")[0] for kill in kills}
    assert stages >= {
        "score the original", "screen candidates", "find what is sensitive", "race the fastest",
        "certify on sealed text", "compare with transformers", "profile operators", "write the artifact",
    }  # fmt: skip
    assert "write the artifact: before out" in kills
    assert "write the artifact: after report.html" in kills


def test_the_output_folder_was_whole_at_every_moment(searched: tuple[Path, dict[str, Any]]) -> None:
    assert searched[1]["broken"] == []


def test_the_artifact_is_the_same_bit_for_bit(searched: tuple[Path, dict[str, Any]]) -> None:
    whole, killed = (searched[0] / name / "out" for name in ("whole", "killed"))
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in killed.iterdir()) == names
    for name in names:
        if name != "flatout.json":
            assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    manifests = [json.loads((out / "flatout.json").read_text()) for out in (whole, killed)]
    assert manifests[0]["certificate"]["verdict"] == "passed"
    assert manifests[0]["recipe"]["layers"] != "bf16"
    assert still(manifests[0]) == still(manifests[1])


def test_nothing_half_written_is_left(searched: tuple[Path, dict[str, Any]]) -> None:
    killed = searched[0] / "killed"
    assert sorted(path.name for path in killed.iterdir()) == ["cache", "out"]
    assert list(killed.rglob(".*")) == []
    assert list(killed.rglob("run-*.json")) == []  # finished, not to be resumed
