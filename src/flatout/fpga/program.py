"""The accelerator's instructions, 64 bits each, and the constants that RTL and Python share.

    SET     [59:56] which setting, [55:0] value
    MODE    of the next GEMV: [27:0] beats, [35:28] target row, [47:40] shift, [51:48] mode, [52] 4 bits
    EMBED   [31:0] address, [39:32] rows, [47:40] target row, [51:48] shift
    TURNS   [31:0] address of the table of cos and sin
    NORM    [31:0] address of the weights, [39:32] rows, [47:40] source row, [53:48] shift
    CODES   [39:32] rows, [47:40] source row
    HEADS   [31:0] address of the layer's keys, [47:40] source row
    ATTEND  [31:0] address of the layer's keys, [47:40] target row
    GEMV    [31:0] address, [51:32] units (rows, or pairs of 4-bit rows), [57:52] chunks of a row
    END

The program does not depend on tokens, their positions or their number: those are registers of the host.
"""

from __future__ import annotations

import numpy as np

from flatout.fpga.spec import EXP2, SIGMOID

OPS = {name: i for i, name in enumerate(
    ("END", "SET", "MODE", "EMBED", "TURNS", "NORM", "CODES", "HEADS", "ATTEND", "GEMV")
)}  # fmt: skip
SETTINGS = {name: i for i, name in enumerate(
    ("HEADS", "HEAD_STRIDE", "VALUE_OFFSET", "EPSILON", "FACTORS")
)}  # fmt: skip
MODES = {name: i for i, name in enumerate(("STORE", "ADD", "SILU", "LOGITS"))}


def pack(*fields: tuple[int, int, int]) -> int:
    """The sum of value << low over (low, width, value). Raises ValueError for a value that does not fit."""
    word = 0
    for low, width, value in fields:
        if not 0 <= value < 1 << width:
            raise ValueError(f"{value} does not fit {width} bits")
        word |= value << low
    return word


def op(name: str, *fields: tuple[int, int, int]) -> int:
    return pack((60, 4, OPS[name]), *fields)


def setting(name: str, *fields: tuple[int, int, int]) -> int:
    return op("SET", (56, 4, SETTINGS[name]), *fields)


def mode(name: str, *, beats: int, target: int, shift: int, four_bits: bool) -> int:
    return op(
        "MODE", (0, 28, beats), (28, 8, target), (40, 8, shift), (48, 4, MODES[name]), (52, 1, four_bits)
    )


def includes() -> dict[str, str]:
    """Files that the RTL includes."""
    constants = [f"localparam logic [3:0] OP_{name} = {i};" for name, i in OPS.items()]
    constants += [f"localparam logic [3:0] SET_{name} = {i};" for name, i in SETTINGS.items()]
    constants += [f"localparam logic [3:0] MODE_{name} = {i};" for name, i in MODES.items()]
    tables = [
        f"localparam logic [{len(table) * 16 - 1}:0] {name} = {len(table) * 16}'h{_hex(table)};"
        for name, table in (
            ("EXP2", EXP2),
            ("EXP2_FALLS", -np.diff(EXP2)),
            ("SIGMOID", SIGMOID),
            ("SIGMOID_RISES", np.diff(SIGMOID)),
        )
    ]
    return {"isa.svh": "\n".join(constants) + "\n", "tables.svh": "\n".join(tables) + "\n"}


def _hex(table: np.ndarray) -> str:
    return "".join(f"{int(value):04x}" for value in table[::-1])
