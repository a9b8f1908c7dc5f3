"""Boards that a design can be fitted to, from their makers' tables.

KV260: AMD's Kria documentation (K26 SOM) and data sheet DS987; power and bandwidth as in
"Pushing up to the Limit of Memory Bandwidth and Capacity Utilization for Efficient LLM Decoding on Embedded
FPGA" (arXiv 2502.10659). Alveo: what FINN counts as usable (platforms.py) and AMD UG1393. The memory's
refresh: JEDEC JESD79-4 for DDR4-2400, 8 Gbit (tRFC 350 ns, tREFI 7.8 us); its latency and the cost of a
closed row or of turning the bus are our assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass

from flatout.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """Counts of what a design may use. power_w: least and most in use, where known. source: of the counts."""

    name: str
    device: str
    luts: int
    ffs: int
    dsps: int
    bram36: int
    memory_bytes: int
    bandwidth_bytes_s: float
    source: str
    power_w: tuple[float, float] | None = None
    latency_ns: float = 200.0
    refresh_interval_ns: float = 7800.0
    refresh_ns: float = 350.0
    row_ns: float = 30.0
    turn_ns: float = 30.0


BOARDS = {
    "kv260": Board(
        name="kv260",
        device="K26, Zynq UltraScale+",
        luts=117_120,
        ffs=234_240,
        dsps=1_248,
        bram36=144,
        memory_bytes=4 << 30,
        bandwidth_bytes_s=19.2e9,
        source="AMD DS987; arXiv 2502.10659",
        power_w=(5.0, 8.0),
    ),
}

OTHER_BOARDS = (
    Board(
        name="u50", device="XCU50, HBM2", luts=743_000, ffs=1_485_000, dsps=5_352, bram36=1_128,
        memory_bytes=8 << 30, bandwidth_bytes_s=316e9, source="FINN platforms.py",
    ),
    Board(
        name="u55c", device="XCU55C, HBM2", luts=1_164_000, ffs=2_327_000, dsps=8_496, bram36=1_752,
        memory_bytes=16 << 30, bandwidth_bytes_s=460e9, source="FINN platforms.py; AMD UG1393",
    ),
    Board(
        name="u280", device="XCU280, HBM2", luts=1_164_000, ffs=2_327_000, dsps=8_496, bram36=1_752,
        memory_bytes=8 << 30, bandwidth_bytes_s=460e9, source="FINN platforms.py; AMD UG1393",
    ),
)  # fmt: skip
"""Boards whose resources are compared, but whose memories are not modelled: one bus of 64 bytes would leave
most of an HBM unused."""


def board(name: str) -> Board:
    """The board called `name`. Raises ConfigError."""
    if name not in BOARDS:
        near = nearest(name, BOARDS, "kv260")
        raise ConfigError(f"the board is one of {', '.join(BOARDS)}", repr(name), near)
    return BOARDS[name]
