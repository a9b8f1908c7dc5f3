"""What is handed to tools that are not here: files, parameters, netlists' cells, and the page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.tiny import tiny_model, tiny_spec

from flatout.core.formats import uniform
from flatout.errors import BackendError, ConfigError, ResourceError
from flatout.fpga.chip import write_chip
from flatout.fpga.compile import Compiled, Shape, cache_region, compile_model
from flatout.fpga.emit import emit
from flatout.fpga.model import integer_model
from flatout.fpga.synthesis import count_cells, design_files, summary, with_parameters


def compiled(lanes: int, columns: int) -> Compiled:
    size = max(1, lanes // 16)
    spec = tiny_spec(hidden_size=64 * size, intermediate_size=128 * size, head_dim=16 * size, num_kv_heads=4)
    shape = Shape(lanes=lanes, columns=columns, program_log2=6, rows_log2=7, codes_log2=4, context_log2=6)
    model = tiny_model(spec, uniform("w4a8-g64" if lanes == 64 else "w4a8-g32"))
    return compile_model(integer_model(model, lanes), shape, 40)


def test_parameters_are_written_into_a_module() -> None:
    text = "module m #(\n    parameter int KW = 64,\n    parameter int BITS = KW * 8\n)"
    assert "parameter int KW = 16," in with_parameters(text, {"KW": 16})
    with pytest.raises(ValueError, match="no parameter DEPTH"):
        with_parameters(text, {"DEPTH": 1})
    files = design_files(Shape(lanes=16, columns=2), cascades=False)
    assert "parameter int KW = 16," in files["accelerator.sv"]
    assert "mac_chain.sv" not in files
    assert "harness.cpp" not in files


def test_cells_of_submodules_are_counted_as_often_as_they_occur() -> None:
    stat = {
        "modules": {
            "\\accelerator": {"num_cells_by_type": {"column": 3, "FDRE": 5}},
            "\\column": {"num_cells_by_type": {"half": 2, "LUT6": 5, "INV": 2}},
            "\\half": {"num_cells_by_type": {"DSP48E2": 1, "RAM32M16": 1, "RAMB18E2": 1, "FDSE": 2}},
        }
    }
    found = summary(count_cells(stat), "xcup", 1.0, "yosys")
    assert (found.dsps, found.ffs, found.luts) == (6, 5 + 12, 21 + 6 * 8)
    assert (found.memory_luts, found.bram36) == (48, 3)
    stat["modules"]["\\half"]["num_cells_by_type"] |= {"$add": 1}
    with pytest.raises(BackendError, match=r"found: \$add"):
        count_cells(stat)


def test_a_chip_holds_the_whole_image_and_program(tmp_path: Path) -> None:
    design = compiled(16, 1)
    names = write_chip(design, tmp_path).split()
    assert {"on_chip.sv", "accelerator.sv"} <= set(names)
    columns = [path.read_text().split() for path in sorted(tmp_path.glob("fixed_??.hex"))]
    fixed = np.packbits(np.array(columns, dtype=np.uint8).T, axis=1, bitorder="little")
    left = len(design.image) - np.prod(cache_region(design, design.image).shape[:-1])
    np.testing.assert_array_equal(fixed, design.image[:left])
    words = [int(word, 16) for word in (tmp_path / "program.hex").read_text().split()]
    assert words == design.program
    assert f"parameter int FIXED = {left}," in (tmp_path / "on_chip.sv").read_text()


def test_vendor_files_hold_the_design(tmp_path: Path) -> None:
    design = compiled(64, 4)
    names = emit(design, tmp_path, 250)
    assert {
        "build.tcl",
        "timing.xdc",
        "driver.py",
        "weights.bin",
        "rtl/axi_top.sv",
        "rtl/mac_chain.sv",
    } <= set(names)
    assert (tmp_path / "weights.bin").read_bytes() == design.image.tobytes()
    assert np.fromfile(tmp_path / "program.bin", dtype="<u8").tolist() == design.program
    assert "-period 4.000" in (tmp_path / "timing.xdc").read_text()
    assert "FREQMHZ 250" in (tmp_path / "build.tcl").read_text()
    assert json.loads((tmp_path / "design.json").read_text())["block_tokens"] == design.block_tokens
    compile((tmp_path / "driver.py").read_text(), "driver.py", "exec")
    with pytest.raises(ConfigError, match="beats of 64 bytes"):
        emit(compiled(16, 1), tmp_path)
    with pytest.raises(ResourceError, match=r"output folder must be writable.*weights\.bin"):
        emit(design, tmp_path / "weights.bin")
