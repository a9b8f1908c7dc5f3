"""A runner that takes exactly the seconds a test wants, on a clock of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pytest

from flatout.core.spec import ModelSpec
from flatout.core.types import Ceiling, Hardware
from flatout.engine.runner import StepInput, check_step

SPEC = ModelSpec(
    family="llama",
    vocab_size=500,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=2048,
)


def machine(read: float = 1e9, ops: float = 1e10) -> Hardware:
    """Four cores that read and multiply at one rate each, whatever the working set and the format."""
    ceilings = [Ceiling(name="read_dram", value=read, unit="byte/s", threads=1, working_set_bytes=1 << 28)]
    ceilings += [Ceiling(name=n, value=ops, unit="op/s", threads=1) for n in ("int8", "bf16", "fp32")]
    return Hardware(
        name="made up",
        kind="cpu",
        cores=4,
        features=("avx9",),
        l1d_bytes=0,
        l2_bytes=0,
        l3_bytes=0,
        memory_bytes=1 << 30,
        ceilings=tuple(ceilings),
        fingerprint="0123",
    )


@dataclass
class TimedRunner:
    """Takes seconds(step) in each op and `overhead` beyond them; timers slow everything by a tenth."""

    clock: list[float]
    seconds: Callable[[StepInput], dict[str, float]]
    overhead: float = 0.0
    spec: ModelSpec = SPEC
    page_size: int = 64
    num_pages: int = 64
    max_step_tokens: int = 512
    name: str = "timed (1 thread)"
    timing: bool = False
    counted: dict[str, float] = field(default_factory=dict)
    steps: list[tuple[list[int], list[int], bool]] = field(default_factory=list)

    def profile(self, enable: bool) -> None:
        self.timing = enable

    def timings(self) -> dict[str, float]:
        counted, self.counted = self.counted, {}
        return counted

    def sample(
        self,
        batch: StepInput,
        temperature: np.ndarray,
        top_k: np.ndarray,
        top_p: np.ndarray,
        seeds: np.ndarray,
    ) -> np.ndarray:
        check_step(batch, self.spec, self.page_size, self.num_pages)
        integers = (batch.tokens, batch.starts, batch.lengths, batch.pages, top_k)
        typed = [(a, np.int32) for a in integers] + [(temperature, np.float32), (top_p, np.float32)]
        for array, dtype in [*typed, (seeds, np.uint64)]:
            assert array.dtype == dtype
            assert array.flags.c_contiguous
        self.steps.append((batch.starts.tolist(), batch.lengths.tolist(), self.timing))
        ops = self.seconds(batch)
        slower = 1.1 if self.timing else 1.0
        self.clock[0] += slower * (sum(ops.values()) + self.overhead)
        if self.timing:
            for op, seconds in ops.items():
                self.counted[op] = self.counted.get(op, 0.0) + slower * seconds
        return np.zeros(len(batch.lengths), np.int32)

    def forward(self, batch: StepInput, rows: Literal["last", "all"]) -> np.ndarray:
        raise NotImplementedError

    def score(self, batch: StepInput, targets: np.ndarray) -> np.ndarray:
        raise NotImplementedError


def own_clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace time.perf_counter by a clock that only the runner moves."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    return clock


def linear_in_tokens(step: StepInput) -> dict[str, float]:
    """1 ms a token in gate_up, half of that in the head, a little elsewhere."""
    tokens = len(step.tokens)
    return {"embedding": 0.0, "gate_up": 1e-3 * tokens, "head": 5e-4 * tokens, "other": 1e-4}
