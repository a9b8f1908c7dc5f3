"""What a design needs beside what a board has.

DSP blocks and block RAM are counted from the structure of the RTL (every multiplier as tiles of 27 x 18,
every memory as blocks of 512 x 72), or all four kinds of cells are what Yosys made of it (`synthesis`).
Neither knows wires: timing is not known. Not counted: the memory controller and what surrounds it.
"""

from __future__ import annotations

from dataclasses import dataclass

from flatout.fpga.boards import Board
from flatout.fpga.compile import Compiled, Shape
from flatout.fpga.synthesis import Synthesis

CLOSURE = {"look-up tables": 0.7, "flip-flops": 0.5, "DSP blocks": 0.8, "block RAM (36 kbit)": 0.8}
"""Share up to which timing usually closes (FINN's limits, platforms.py)."""
COUNTED = "counted from the structure, not synthesised"


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """One kind of resource: needed by the design, on the board, usable of it."""

    name: str
    needed: int
    available: int
    usable: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """why_not: a sentence for each resource that does not suffice. bandwidth_share: of the board's memory,
    what the design's bus carries at the fastest assumed clock."""

    board: str
    device: str
    source: str
    resources: tuple[Resource, ...]
    fits: bool
    why_not: tuple[str, ...]
    bandwidth_share: float
    tier: str


def tiles(a: int, b: int) -> int:
    """DSP48E2 of a product of signed a and b bits, with operands of 27 and 18."""
    one = -(-a // 27) * -(-b // 18)
    other = -(-b // 27) * -(-a // 18)
    return min(one, other)


def dsp_blocks(shape: Shape) -> int:
    """Multipliers of a design, in DSP48E2."""
    lanes, columns = shape.lanes, shape.columns
    dots = lanes  # two rows share each
    rescale = 3 * tiles(18, 17)
    scaling = 2 * (tiles(15 + lanes.bit_length() - 1, 13) + rescale)
    silu = tiles(16, 18) + tiles(17, 18) + 4 * tiles(18, 18) + tiles(11, 9)
    weighing = lanes * tiles(27, 8) + tiles(17, 13) + tiles(17, 9)
    lane = 2 * tiles(18, 16) + 2 * tiles(15, 15) + tiles(14, 15)
    vector = shape.words * lane + tiles(13, 17)
    read_out = max(1, lanes // 16) * rescale
    addresses = 4 * tiles(17, 9) + 2 * tiles(12, 9)
    return columns * (dots + scaling + silu) + shape.weighing * weighing + vector + read_out + addresses


def block_rams(shape: Shape) -> int:
    """Memories that are read with a register, in RAMB36 of 512 x 72. Small ones are in logic cells."""

    def blocks(depth_log2: int, width: int) -> int:
        return -(-(1 << depth_log2) // 512) * -(-width // 72)

    a_column = blocks(shape.rows_log2, shape.words * 32) + blocks(shape.context_log2, 32)
    a_column += blocks(9, 26)  # the sigmoid
    return (
        shape.columns * a_column
        + blocks(shape.fifo_log2, shape.lanes * 8)
        + 2 * blocks(shape.program_log2, 64)
    )


def fit(compiled: Compiled, board: Board, clock_mhz: int, synthesis: Synthesis | None = None) -> Fit:
    """Compare the design and its memory image with `board`."""
    shape = compiled.shape
    needed = {"DSP blocks": dsp_blocks(shape), "block RAM (36 kbit)": block_rams(shape)}
    if synthesis is not None:
        needed = {
            "look-up tables": synthesis.luts, "flip-flops": synthesis.ffs, "DSP blocks": synthesis.dsps,
            "block RAM (36 kbit)": round(synthesis.bram36 + 0.25),
        }  # fmt: skip
    available = {
        "look-up tables": board.luts, "flip-flops": board.ffs, "DSP blocks": board.dsps,
        "block RAM (36 kbit)": board.bram36,
    }  # fmt: skip
    found = [
        Resource(name=name, needed=count, available=available[name],
                 usable=int(available[name] * CLOSURE[name]))
        for name, count in needed.items()
    ]  # fmt: skip
    found.append(
        Resource(name="memory (bytes)", needed=compiled.image.nbytes, available=board.memory_bytes,
                 usable=board.memory_bytes // 2)
    )  # fmt: skip
    why_not = tuple(
        f"{r.name}: {r.needed:,} needed, {r.usable:,} of {r.available:,} usable"
        for r in found
        if r.needed > r.usable
    )
    return Fit(
        board=board.name,
        device=board.device,
        source=board.source,
        resources=tuple(found),
        fits=not why_not,
        why_not=why_not,
        bandwidth_share=min(1.0, shape.lanes * clock_mhz * 1e6 / board.bandwidth_bytes_s),
        tier=COUNTED if synthesis is None else synthesis.tier,
    )
