"""Registers of a netlist that move into multipliers, and those that must not."""

from __future__ import annotations

from typing import Any

import pytest

from flatout.fpga.multipliers import absorb_registers

CLOCK, ENABLE = 2, 3


def flip_flop(source: int | str, result: int, **changes: Any) -> dict[str, Any]:
    return {
        "type": "TRELLIS_FF",
        "parameters": {"CEMUX": "CE", "CLKMUX": "CLK", "LSRMUX": "LSR", "REGSET": "RESET"}
        | changes.get("parameters", {}),
        "port_directions": {"CLK": "input", "CE": "input", "LSR": "input", "DI": "input", "Q": "output"},
        "connections": {"CLK": [CLOCK], "CE": [ENABLE], "LSR": ["0"], "DI": [source], "Q": [result]}
        | changes.get("connections", {}),
    }


def netlist() -> dict[str, Any]:
    """a * b of two bits each, a sign bit repeated, with registers around: nets 10.. into registers, 20..
    after them, 30.. the product, 40.. after its registers."""
    connections: dict[str, list[int | str]] = {f"A{i}": [20 + min(i, 1)] for i in range(18)}
    connections |= {f"B{i}": [22 + i if i < 2 else "0"] for i in range(18)}
    connections |= {f"P{i}": [30 + i] for i in range(4)}
    directions = {port: "output" if port[0] == "P" else "input" for port in connections}
    cells = {
        "product": {
            "type": "MULT18X18D", "parameters": {}, "port_directions": directions, "connections": connections,
        }
    }  # fmt: skip
    cells |= {f"in{i}": flip_flop(10 + i, 20 + i) for i in range(4)}
    cells |= {f"out{i}": flip_flop(30 + i, 40 + i) for i in range(3)}  # P3 is not read
    ports = {
        "x": {"direction": "input", "bits": [10, 11, 12, 13]},
        "y": {"direction": "output", "bits": [40, 41, 42]},
    }
    return {"cells": cells, "ports": ports}


def test_registers_before_and_after_a_product_move_in() -> None:
    module = netlist()
    assert absorb_registers(module) == (1, 1)
    assert set(module["cells"]) == {"product"}
    product = module["cells"]["product"]
    nets = product["connections"]
    assert [nets[f"A{i}"] for i in (0, 1, 17)] == [[10], [11], [11]]
    assert [nets[f"B{i}"] for i in (0, 1, 2)] == [[12], [13], ["0"]]
    assert [nets[f"P{i}"] for i in range(3)] == [[40], [41], [42]]
    assert (nets["CLK0"], nets["CE0"], nets["CE2"], nets["RST0"]) == ([CLOCK], [ENABLE], [ENABLE], ["0"])
    assert product["parameters"]["REG_OUTPUT_CLK"] == "CLK0"
    assert product["port_directions"]["CE1"] == "input"


@pytest.mark.parametrize(
    "changes",
    [{"connections": {"LSR": [9]}}, {"parameters": {"REGSET": "SET"}}, {"connections": {"CE": [8]}},
     {"parameters": {"CLKMUX": "INV"}}],
)  # fmt: skip
def test_a_register_with_a_will_of_its_own_stays(changes: dict[str, Any]) -> None:
    """Reset, set, another enable than its neighbour's, the falling edge: on either side."""
    module = netlist()
    module["cells"]["in0"] = flip_flop(10, 20, **changes)
    assert absorb_registers(module) == (0, 1)
    assert {"in0", "in1", "in2", "in3"} <= set(module["cells"])
    module = netlist()
    module["cells"]["out1"] = flip_flop(31, 41, **changes)
    assert absorb_registers(module) == (1, 0)
    assert {"out0", "out1", "out2"} <= set(module["cells"])


def test_what_others_read_stays() -> None:
    """A registered input that something else needs keeps its flip-flop; a product that is read before its
    register cannot move it."""
    module = netlist()
    module["ports"]["z"] = {"direction": "output", "bits": [20, 32]}
    assert absorb_registers(module) == (1, 0)
    assert set(module["cells"]) == {"product", "in0", "out0", "out1", "out2"}
    assert module["cells"]["product"]["connections"]["A0"] == [10]


def test_a_product_of_a_product_keeps_one_register_between() -> None:
    """The first product's register becomes the second one's input register: exactly once."""
    module = netlist()
    second = {f"{port}{i}": [40 + min(i, 2)] for port in "AB" for i in range(18)} | {"P0": [50]}
    module["cells"]["next"] = {
        "type": "MULT18X18D", "parameters": {}, "connections": second,
        "port_directions": {port: "output" if port[0] == "P" else "input" for port in second},
    }  # fmt: skip
    module["ports"]["y"]["bits"] = [50]
    assert absorb_registers(module) == (2, 0)
    first, last = module["cells"]["product"], module["cells"]["next"]
    assert last["connections"]["A0"] == first["connections"]["P0"] == [30]
    assert "REG_OUTPUT_CLK" not in first["parameters"]
