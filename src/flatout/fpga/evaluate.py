"""The whole path on one model: compile, simulate real text, compare every result, measure cycles.

Simulated: every cycle of the RTL, against a model of the board's memory. Predicted: tokens a second and
energy, from those cycles, an assumed clock and the board's power. Never run here: any FPGA.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flatout.core.model import Model
from flatout.errors import ConfigError
from flatout.fpga.boards import Board
from flatout.fpga.compile import Shape, cache_region, compile_model, store_cache
from flatout.fpga.cycles import predict_cycles
from flatout.fpga.fit import Fit, fit
from flatout.fpga.model import KeyValues, forward, integer_model
from flatout.fpga.simulate import Accelerator, MemoryModel, Pass
from flatout.fpga.spec import FRACTIONS

CLOCKS_MHZ = (250, 300)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One simulated pass. predicted_cycles: what the model of cycles says without simulating. mbu: bytes of
    weights, scales, keys and values read, over what the bus could have carried in these cycles (memory
    bandwidth utilisation)."""

    context: int
    tokens: int
    cycles: int
    predicted_cycles: int
    bytes_read: int
    mbu: float
    cycles_by_kind: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Predicted decoding at one clock; joules a token from the board's least and most power."""

    clock_mhz: int
    tokens_per_s: float
    joules_per_token: tuple[float, float]
    tier: str = "predicted from simulated cycles; clock and power are assumptions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """bit_exact: all logits of `tokens` tokens, all their keys and values, and the long-context pass are the
    specification's. cycles_per_token: of decoding one by one at `decode.context`."""

    board: str
    recipe: str
    fit: Fit
    bit_exact: bool
    differences: int
    tokens: int
    logits_sha256: str
    perplexity: float
    cycles_per_token: int
    mbu: float
    decode: Step
    together: Step
    speed: tuple[Speed, ...]
    tier: str = "simulated RTL against a modelled memory; no FPGA was run"


def memory_model(board: Board, clock_mhz: int) -> MemoryModel:
    """The board's memory in cycles of the accelerator's clock."""

    def cycles(ns: float) -> int:
        return round(ns * clock_mhz / 1000)

    return MemoryModel(
        latency=cycles(board.latency_ns),
        outstanding=8,
        refresh_interval=cycles(board.refresh_interval_ns),
        refresh_cycles=cycles(board.refresh_ns),
        row_cycles=cycles(board.row_ns),
        turn_cycles=cycles(board.turn_ns),
    )


def evaluate(
    model: Model,
    board: Board,
    text: np.ndarray,
    *,
    shape: Shape,
    tokens: int,
    context: int,
    progress: Progress | None = None,
) -> Evaluation:
    """Simulate the first `tokens` of `text` and one token after `context`; compare with the specification.

    Raises ConfigError when the text is too short; UnsupportedModelError and ResourceError for a model that
    the accelerator cannot hold; BackendError without a simulator.
    """
    if not 1 < tokens < len(text) or not 0 <= context < len(text):
        raise ConfigError(
            f"tokens and context lie within a text of {len(text)}", f"{tokens} and {context}", "fewer"
        )
    say = progress or (lambda what, done, total: None)
    integers = integer_model(model, shape.lanes)
    design = compile_model(integers, shape, max(tokens, context + 1))
    fitted = fit(design, board)
    memory = memory_model(board, CLOCKS_MHZ[-1])

    passes, logits = [], []
    with Accelerator(design, memory) as accelerator:
        for at in range(0, tokens, shape.columns):
            passes.append(accelerator.run(text[at : min(at + shape.columns, tokens)].tolist()))
            logits.append(passes[-1].logits)
            say("simulating", accelerator.length, tokens)
        written = cache_region(design, accelerator.image).copy()
    found = np.concatenate(logits)
    kept = KeyValues(integers.spec, design.context)
    expected = forward(integers, text[:tokens], kept)
    image = design.image.copy()
    store_cache(design, image, kept)
    differences = int((found != expected).sum()) + int((written != cache_region(design, image)).sum())

    past = KeyValues(integers.spec, design.context)
    if context:
        forward(integers, text[:context], past)
    with Accelerator(design, memory) as accelerator:
        accelerator.resume(past)
        last = accelerator.run(text[context : context + 1].tolist())
    differences += int((last.logits != forward(integers, text[context : context + 1], past)).sum())

    bus = board.bandwidth_bytes_s / (CLOCKS_MHZ[-1] * 1e6)

    def step(at: int, count: int, run: Pass) -> Step:
        read = run.beats_read * shape.lanes
        kinds: dict[str, int] = {}
        for name, cycles in run.cycles_by_name.items():
            kind = name.rpartition(".")[2]
            kinds[kind] = kinds.get(kind, 0) + cycles
        return Step(
            context=at,
            tokens=count,
            cycles=run.cycles,
            predicted_cycles=predict_cycles(design, at, count, memory),
            bytes_read=read,
            mbu=read / (run.cycles * bus),
            cycles_by_kind=kinds,
        )

    decode = step(context, 1, last)
    speed = []
    for clock in CLOCKS_MHZ:
        rate = clock * 1e6 / decode.cycles
        low, high = board.power_w
        speed.append(Speed(clock_mhz=clock, tokens_per_s=rate, joules_per_token=(low / rate, high / rate)))
    return Evaluation(
        board=board.name,
        recipe=model.recipe.name,
        fit=fitted,
        bit_exact=differences == 0,
        differences=differences,
        tokens=tokens,
        logits_sha256=hashlib.sha256(found.tobytes()).hexdigest(),
        perplexity=perplexity(found, text[1 : tokens + 1]),
        cycles_per_token=decode.cycles,
        mbu=decode.mbu,
        decode=decode,
        together=step(0, min(shape.columns, tokens), passes[0]),
        speed=tuple(speed),
    )


def perplexity(logits: np.ndarray, targets: np.ndarray) -> float:
    """exp of the mean negative log-probability of `targets` (T,) under integer `logits` (T, V)."""
    real = logits.astype(np.float64) / 2.0**FRACTIONS.linear
    real -= real.max(axis=1, keepdims=True)
    chosen = real[np.arange(len(targets)), targets] - np.log(np.exp(real).sum(axis=1))
    return float(np.exp(-chosen.mean()))
