"""Boards that a design can be fitted to, from their makers' tables.

KV260: AMD's Kria documentation (K26 SOM) and data sheet DS987; power and bandwidth as in
"Pushing up to the Limit of Memory Bandwidth and Capacity Utilization for Efficient LLM Decoding on Embedded
FPGA" (arXiv 2502.10659). The memory's refresh: JEDEC JESD79-4 for DDR4-2400, 8 Gbit (tRFC 350 ns, tREFI
7.8 us); its latency and the cost of a closed row or of turning the bus are our assumptions.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from flatout.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """Counts of what a design may use. power_w: least and most in use."""

    name: str
    dsps: int
    bram36: int
    memory_bytes: int
    bandwidth_bytes_s: float
    power_w: tuple[float, float]
    latency_ns: float = 200.0
    refresh_interval_ns: float = 7800.0
    refresh_ns: float = 350.0
    row_ns: float = 30.0
    turn_ns: float = 30.0


BOARDS = {
    "kv260": Board(
        name="kv260",
        dsps=1_248,
        bram36=144,
        memory_bytes=4 << 30,
        bandwidth_bytes_s=19.2e9,
        power_w=(5.0, 8.0),
    ),
}


def board(name: str) -> Board:
    """The board called `name`. Raises ConfigError."""
    if name not in BOARDS:
        near = difflib.get_close_matches(name, BOARDS, n=1)
        raise ConfigError(
            f"the board is one of {', '.join(BOARDS)}", repr(name), near[0] if near else "kv260"
        )
    return BOARDS[name]
