"""Cycles of a pass without simulating it: what each instruction takes, and when its beats can be there.

Two clocks run along the program. The sequencer's adds up the states of rtl/sequencer.sv and rtl/vector.sv,
one instruction after the other. The memory's delivers beats in order, ahead of the sequencer by as much as
the FIFO holds; at attention it waits for the keys that are being written. A stream ends when both are done.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from flatout.fpga.compile import Compiled
from flatout.fpga.program import OPS
from flatout.fpga.simulate import MemoryModel

STATES = 4  # load, read, decode, next
LAST_RESULT = 35  # cycles from the last beat of a linear to the next instruction
LAST_SCORE, LAST_VALUE = 23, 12  # of keys and of values to what follows
DIVISION = 17
FIT, ROOT = 36, 19  # scale and reciprocal of a row, and the root of a norm
REQUEST = 6  # states of the fetcher from an open fence to its first request


@dataclass(slots=True)
class _Clocks:
    """now: of the sequencer. delivered: when the last beat came. taken: (beats, cycle) of the sequencer."""

    memory: MemoryModel
    room: int
    now: float = 0.0
    delivered: float = 0.0
    beats: int = 0
    taken: list[tuple[int, float]] = field(default_factory=lambda: [(0, 0.0)])

    def taken_at(self, beat: int) -> float:
        """When the sequencer took that beat, as far as it has come."""
        counts, times = zip(*self.taken, strict=True)
        return float(np.interp(beat, counts, times)) if beat > 0 else 0.0

    def stream(self, beats: int, cycles: float, asked: float = 0.0) -> None:
        """A run of beats that the sequencer goes through in `cycles`, asked for at `asked` or later."""
        memory, first = self.memory, self.beats
        share = memory.refresh_cycles / memory.refresh_interval if memory.refresh_interval else 0.0
        free = self.taken_at(first - self.room)
        start = max(self.delivered, free, asked + memory.latency) + memory.row_cycles
        end = max(start + beats / (1 - share), self.taken_at(first + beats - self.room))
        begun = max(self.now, start)
        self.now = max(self.now + cycles, end)
        self.delivered = max(end, self.now - self.room / (1 - share)) if beats > self.room else end
        self.beats += beats
        self.taken += [(first, begun), (self.beats, self.now)]


def predict_cycles(compiled: Compiled, position: int, count: int, memory: MemoryModel) -> int:
    """Cycles of a pass of `count` tokens after `position`, without random stalls."""
    spec, shape, chunks = compiled.model.spec, compiled.shape, compiled.head_chunks
    group = spec.num_heads // spec.num_kv_heads
    depth = 9 + (shape.words - 1).bit_length()  # of the vector unit's pipeline
    clocks = _Clocks(memory, 1 << shape.fifo_log2)
    clocks.delivered = memory.latency
    beats, written = 0, 0.0
    for word in compiled.program:
        op, clocks.now = word >> 60, clocks.now + STATES
        rows = word >> 32 & 255
        if op == OPS["MODE"]:
            beats = word & (1 << 28) - 1
        elif op in (OPS["EMBED"], OPS["TURNS"]):
            run = count * (rows if op == OPS["EMBED"] else 2 * chunks)
            clocks.stream(run, run)
        elif op == OPS["NORM"]:
            clocks.stream(rows, rows * count)
            clocks.now += 2 + depth + count * (rows + FIT + ROOT)
        elif op == OPS["CODES"]:
            clocks.now += 2 + count * (2 * rows + depth + FIT)
        elif op == OPS["HEADS"]:
            query, key, value = (n * chunks + depth + FIT for n in (6, 7, 5))
            clocks.now += 2 + count * (spec.num_heads * query + spec.num_kv_heads * (key + value + 2))
            written = clocks.now + memory.latency
        elif op == OPS["ATTEND"]:
            clocks.now = max(clocks.now, written)
            asked = clocks.now + REQUEST
            for _ in range(spec.num_kv_heads):
                for token in range(count):
                    block, place = divmod(position + token, compiled.block_tokens)
                    period = compiled.block_tokens * chunks + 1
                    run = block * period + 1 + (place + 1) * chunks
                    clocks.now += 2
                    clocks.stream(run, run, asked)
                    clocks.now += LAST_SCORE
                    clocks.stream(run, run, asked)
                    clocks.now += LAST_VALUE + DIVISION + min(16, shape.lanes) * group * chunks + 11
        elif op == OPS["GEMV"]:
            clocks.stream(beats, beats)
            clocks.now += LAST_RESULT
    return round(clocks.now)
