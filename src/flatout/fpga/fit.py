"""What a design needs beside what a board has.

DSP blocks and block RAM are counted from the structure of the RTL: every multiplier as tiles of 27 x 18,
every memory as blocks of 512 x 72. Nothing here is synthesised: logic cells are not counted, and timing is
not known.
"""

from __future__ import annotations

from dataclasses import dataclass

from flatout.fpga.boards import Board
from flatout.fpga.compile import Compiled, Shape

CLOSURE = 0.8
"""Share of DSP blocks and block RAM up to which timing usually closes (FINN's limit, platforms.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """One kind of resource: needed by the design, on the board, usable of it."""

    name: str
    needed: int
    available: int
    usable: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """why_not: a sentence for each resource that does not suffice."""

    board: str
    resources: tuple[Resource, ...]
    fits: bool
    why_not: tuple[str, ...]
    tier: str = "counted from the structure, not synthesised"


def tiles(a: int, b: int) -> int:
    """DSP48E2 of a product of signed a and b bits, with operands of 27 and 18."""
    one = -(-a // 27) * -(-b // 18)
    other = -(-b // 27) * -(-a // 18)
    return min(one, other)


def dsp_blocks(shape: Shape) -> int:
    """Multipliers of a design, in DSP48E2."""
    lanes, columns = shape.lanes, shape.columns
    dots = lanes  # two rows share each
    scaling = 2 * (tiles(22, 13) + tiles(48, 17))
    silu = tiles(32, 18) + tiles(32, 32) + tiles(17, 9)
    weighing = lanes * tiles(27, 8) + tiles(17, 13) + tiles(17, 9)
    vector = shape.words * (tiles(32, 16) + tiles(28, 28)) + tiles(13, 17)
    read_out = lanes // 16 * tiles(48, 17)
    addresses = tiles(32, 9) + tiles(24, 9)
    return columns * (dots + scaling + silu + weighing) + vector + read_out + addresses


def block_rams(shape: Shape) -> int:
    """Memories that are read with a register, in RAMB36 of 512 x 72. Small ones are in logic cells."""

    def blocks(depth_log2: int, width: int) -> int:
        return -(-(1 << depth_log2) // 512) * -(-width // 72)

    a_column = blocks(shape.rows_log2, shape.words * 32) + blocks(shape.context_log2, 32)
    return (
        shape.columns * a_column
        + blocks(shape.fifo_log2, shape.lanes * 8)
        + 2 * blocks(shape.program_log2, 64)
    )


def fit(compiled: Compiled, board: Board) -> Fit:
    """Compare the design and its memory image with `board`."""
    found = (
        Resource(name="DSP blocks", needed=dsp_blocks(compiled.shape), available=board.dsps,
                 usable=int(board.dsps * CLOSURE)),
        Resource(name="block RAM (36 kbit)", needed=block_rams(compiled.shape), available=board.bram36,
                 usable=int(board.bram36 * CLOSURE)),
        Resource(name="memory (bytes)", needed=compiled.image.nbytes, available=board.memory_bytes,
                 usable=board.memory_bytes // 2),
    )  # fmt: skip
    why_not = tuple(
        f"{r.name}: {r.needed:,} needed, {r.usable:,} of {r.available:,} usable"
        for r in found
        if r.needed > r.usable
    )
    return Fit(board=board.name, resources=found, fits=not why_not, why_not=why_not)
