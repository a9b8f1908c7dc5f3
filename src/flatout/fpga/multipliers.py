"""Registers around the multipliers of a netlist for ECP5 moved into them.

Yosys makes MULT18X18D of products but leaves the registers before and after them outside, so that a path
runs from a flip-flop through the multiplier to another. The multiplier has registers of its own: a product
whose inputs, or whose result, are plain flip-flops takes them in. Nothing else changes, cycles neither.
Cell and parameters: Lattice FPGA-TN-02205 (sysDSP of ECP5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Bit = int | str
"""Number of a net, or a constant "0", "1", "x"."""
Module = dict[str, Any]
"""A module of Yosys' JSON netlist."""
WIDTH, RESULT = 18, 36


@dataclass(frozen=True, slots=True)
class _Group:
    """Flip-flops with one clock and enable: nets before (after) them by net after (before) them."""

    clock: Bit
    enable: Bit
    other: Mapping[Bit, Bit]
    names: tuple[str, ...]


def absorb_registers(module: Module) -> tuple[int, int]:
    """Change `module` in place; returns how many multipliers have taken in their inputs' and their result's
    registers. Flip-flops whose results nobody needs any more are removed."""
    cells: dict[str, Any] = module["cells"]
    multipliers = [cell for cell in cells.values() if cell["type"] == "MULT18X18D"]
    by_result = {cell["connections"]["Q"][0]: name for name, cell in cells.items() if _plain(cell)}
    inputs = outputs = 0
    for cell in multipliers:
        nets = cell["connections"]
        a = _registered(cells, by_result, [nets[f"A{i}"][0] for i in range(WIDTH)])
        b = _registered(cells, by_result, [nets[f"B{i}"][0] for i in range(WIDTH)])
        if a is None or b is None or a.clock != b.clock:
            continue
        for port, group, enable in (("A", a, "CE0"), ("B", b, "CE1")):
            for i in range(WIDTH):
                bit = nets[f"{port}{i}"][0]
                nets[f"{port}{i}"] = [group.other.get(bit, bit)]
            _clock(cell, f"REG_INPUT{port}", group, enable)
        inputs += 1
    _sweep(module)
    readers = _readers(module)
    for cell in multipliers:
        nets = cell["connections"]
        result = {f"P{i}": nets[f"P{i}"][0] for i in range(RESULT) if nets.get(f"P{i}")}
        p = _captured(cells, readers, list(result.values()))
        if p is None or nets.get("CLK0", [p.clock]) != [p.clock]:
            continue
        nets |= {port: [p.other.get(bit, bit)] for port, bit in result.items()}
        for name in p.names:
            del cells[name]
        _clock(cell, "REG_OUTPUT", p, "CE2")
        outputs += 1
    return inputs, outputs


def _plain(cell: Mapping[str, Any]) -> bool:
    """A flip-flop at the rising edge without set or reset."""
    if cell["type"] != "TRELLIS_FF":
        return False
    parameters = {name: str(value).strip() for name, value in cell["parameters"].items()}
    return (
        cell["connections"].get("LSR", ["0"])[0] in ("0", "x")
        and parameters.get("CLKMUX", "CLK") == "CLK"
        and parameters.get("LSRMUX", "LSR") == "LSR"
        and parameters.get("REGSET", "RESET") == "RESET"
        and parameters.get("CEMUX", "1") in ("1", "CE")
    )


def _enable(cell: Mapping[str, Any]) -> Bit:
    if str(cell["parameters"].get("CEMUX", "1")).strip() == "1":
        return "1"
    bit: Bit = cell["connections"]["CE"][0]
    return bit


def _group(cells: Mapping[str, Any], names: Sequence[str], source: str, target: str) -> _Group | None:
    """The flip-flops called `names` if they share clock and enable."""
    found = [cells[name] for name in names]
    clocks = {(cell["connections"]["CLK"][0], _enable(cell)) for cell in found}
    if len(clocks) != 1:
        return None
    ((clock, enable),) = clocks
    other = {cell["connections"][source][0]: cell["connections"][target][0] for cell in found}
    return _Group(clock, enable, other, tuple(names))


def _registered(cells: Mapping[str, Any], by_result: Mapping[Bit, str], bits: Sequence[Bit]) -> _Group | None:
    """The flip-flops that make every bit that is not constant."""
    nets = {bit for bit in bits if not isinstance(bit, str)}
    if not nets or not nets <= by_result.keys():
        return None
    return _group(cells, sorted(by_result[bit] for bit in nets), "Q", "DI")


def _captured(
    cells: Mapping[str, Any], readers: Mapping[Bit, list[tuple[str, str]]], bits: Sequence[Bit]
) -> _Group | None:
    """The flip-flops that take every bit that anybody reads, if nobody else does."""
    names = []
    for bit in bits:
        reading = readers.get(bit, []) if not isinstance(bit, str) else []
        if not reading:
            continue
        if len(reading) != 1 or reading[0][1] != "DI" or not _plain(cells[reading[0][0]]):
            return None
        names.append(reading[0][0])
    return _group(cells, names, "DI", "Q") if names else None


def _clock(cell: dict[str, Any], register: str, group: _Group, enable: str) -> None:
    cell["parameters"] |= {f"{register}_CLK": "CLK0", f"{register}_CE": enable, f"{register}_RST": "RST0"}
    cell["connections"] |= {"CLK0": [group.clock], enable: [group.enable], "RST0": ["0"]}
    cell.setdefault("port_directions", {}).update({"CLK0": "input", enable: "input", "RST0": "input"})


def _readers(module: Module) -> dict[Bit, list[tuple[str, str]]]:
    """(cell, port) of everything that reads a net; the module's own outputs have no cell."""
    found: dict[Bit, list[tuple[str, str]]] = {}
    for name, cell in module["cells"].items():
        for port, bits in cell["connections"].items():
            if cell["port_directions"].get(port) == "output":
                continue
            for bit in bits:
                found.setdefault(bit, []).append((name, port))
    for name, port in module["ports"].items():
        if port["direction"] != "input":
            for bit in port["bits"]:
                found.setdefault(bit, []).append(("", name))
    return found


def _sweep(module: Module) -> None:
    """Remove flip-flops, again and again, whose result nobody reads."""
    while True:
        readers = _readers(module)
        dead = [
            name
            for name, cell in module["cells"].items()
            if cell["type"] == "TRELLIS_FF" and cell["connections"]["Q"][0] not in readers
        ]
        if not dead:
            return
        for name in dead:
            del module["cells"][name]
