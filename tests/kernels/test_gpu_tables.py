"""How kernels are launched: the table that comes with the package, and what a machine adds to it."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from flatout.cli.main import main
from flatout.errors import BackendError, ModelFileError
from flatout.kernels import gpu
from flatout.perf.gpu_routes import apart, table_text, tune_model

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FLATOUT_CACHE", str(tmp_path))
    gpu._tables.cache_clear()
    yield tmp_path
    gpu._tables.cache_clear()


def _behave(way: str) -> None:
    if way == "dies":
        os._exit(9)
    if way == "fails":
        raise RuntimeError("a test asked for it")
    if way == "hangs":
        time.sleep(600)
    Path(way).write_text("done")


def test_compilers_that_die_or_hang_hold_nobody_up(folder: Path) -> None:
    parts = ["dies", "hangs", str(folder / "a"), "fails", str(folder / "b")]
    assert apart(_behave, parts, 20.0) == 3
    assert [Path(part).read_text() for part in (parts[2], parts[4])] == ["done", "done"]
    assert multiprocessing.active_children() == []
    assert apart(_behave, [], 0.0) == 0


def test_the_shipped_table_is_there_without_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATOUT_CACHE", "/dev/null/nowhere")
    assert gpu.measured_routes(H100)["bf16 6144x4096 1"] == [256, 4, 8, 0]
    assert gpu.measured_routes("a card nobody has measured") == {}


def test_what_was_measured_here_wins(folder: Path) -> None:
    shipped = dict(gpu.measured_routes(H100))
    gpu._tables.cache_clear()
    own: gpu.Table = {H100: {"bf16 6144x4096 1": [1, 2, 3, 4]}, "Mine": {"fp8 8x16 tile 64": [5] * 6}}
    (folder / gpu.ROUTES).write_text(table_text(own))
    assert gpu.own_routes() == own
    assert gpu.measured_routes(H100) == shipped | own[H100]
    assert gpu.measured_routes("Mine") == own["Mine"]


@pytest.mark.parametrize(
    "table", [[1], {"card": [1]}, {"card": {"kernel": 3}}, {"card": {"kernel": [True, 2.5]}}]
)
def test_a_table_that_is_none_is_refused(folder: Path, table: object) -> None:
    (folder / gpu.ROUTES).write_text(json.dumps(table))
    with pytest.raises(ModelFileError, match=r"gpu_routes\.json"):
        gpu.measured_routes(H100)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BackendError, match="needs a GPU, its driver"):
        tune_model("no-such-model", 1, 512)
    assert main(["profile", "no-such-model", "--tune"]) == 2
    assert "needs a GPU, its driver" in capsys.readouterr().err
