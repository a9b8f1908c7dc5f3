"""Every Triton kernel compiles ahead of time for cards that are not here; of AMD nothing more is known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "hip:gfx942", "hip:gfx950"])
def test_kernels_compile(target: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    command = [sys.executable, str(ROOT / "tests" / "aot.py"), target]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) > 20
    room = {"cuda:80": 163 << 10, "cuda:90": 227 << 10, "hip:gfx942": 64 << 10, "hip:gfx950": 160 << 10}
    assert all(row["bytes"] > 0 and row["shared"] <= room[target] for row in rows)
    matrix = [row for row in rows if row["kernel"].startswith(("attention", "gemm"))]
    assert len(matrix) > 4
    assert all(row["matrix"] for row in matrix)  # the tensor cores are used
    waits = [row["waits"] for row in rows if row["kernel"].startswith("gemv")]
    assert all(waits) if target == "cuda:90" else not any(waits)
