"""Designs for a board beside each other, none of them built: bits x width of the FFN x columns x bus.

Every design is compiled for a model of the right sizes without weights, its cycles are those of the model of
cycles (`cycles`), its resources are counted from the structure (`fit`). Fewer FFN rows are what structured
pruning leaves (`compress/structure.py`); unstructured zeros save this accelerator nothing. What a design
costs in accuracy is not known here: measure the recipe that is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from flatout.core.spec import ModelSpec
from flatout.errors import ConfigError, ResourceError
from flatout.fpga.boards import Board
from flatout.fpga.compile import Compiled, check_shape, compile_model, shape_for
from flatout.fpga.cycles import predict_cycles
from flatout.fpga.evaluate import memory_model
from flatout.fpga.fit import fit
from flatout.fpga.model import IntegerLinear, IntegerModel, IntegerNorm

BITS, LANES, COLUMNS, KEPT = (4, 8), (32, 64, 128), tuple(range(1, 9)), (1.0, 0.75, 0.5)
GROUP = 64
ACCEPTANCE = 0.54
"""Chance that a guess comes true after those before it: with it a pass of four gives the 1.99 tokens
that were measured on three texts (docs/fpga.md), passes for which prompt lookup found nothing included."""
TIER = "predicted: cycles by the model of cycles, resources counted, no weights, accuracy not looked at"


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """kept: share of the FFN's rows. tokens_per_s: one by one. guessing_tokens_per_s: with columns - 1
    guesses a pass of which each comes true with the acceptance that was given. why_not: limits of the board
    or of the generator that it breaks; figures are 0 where nothing could be compiled."""

    bits: int
    kept: float
    columns: int
    lanes: int
    tokens_per_s: float
    guessing_tokens_per_s: float
    bytes_per_token: int
    dsp_blocks: int
    block_rams: int
    why_not: tuple[str, ...]


def explore(spec: ModelSpec, board: Board, clock_mhz: int, context: int, acceptance: float) -> list[Design]:
    """All designs, those that fit first, the fastest first; `acceptance` of guesses in [0, 1). Raises
    ConfigError for one outside."""
    if not 0 <= acceptance < 1:
        raise ConfigError("guesses come true with a chance in [0, 1)", str(acceptance), "0.5")
    found = [
        design
        for bits in BITS
        for lanes in LANES
        for kept in KEPT
        for design in _designs(spec, board, clock_mhz, context, acceptance, bits, lanes, kept)
    ]
    return sorted(found, key=lambda d: (bool(d.why_not), -d.guessing_tokens_per_s, d.columns))


def _designs(
    spec: ModelSpec, board: Board, clock_mhz: int, context: int, acceptance: float, bits: int, lanes: int,
    kept: float,
) -> Iterator[Design]:  # fmt: skip
    width = int(spec.intermediate_size * kept) // lanes * lanes
    model = blank_model(replace(spec, intermediate_size=width), bits, lanes)
    bus, memory = lanes * clock_mhz * 1e6, memory_model(board, clock_mhz)
    most = shape_for(spec, lanes, max(COLUMNS))
    compiled: Compiled | None = None
    for columns in COLUMNS:
        shape, reasons = replace(most, columns=columns), []
        try:
            check_shape(model, shape, context + columns)
        except ResourceError as error:
            reasons.append(error.value)
        if bus > board.bandwidth_bytes_s:
            reasons.append(f"bus: {bus / 1e9:.1f} GB/s of {board.bandwidth_bytes_s / 1e9:.1f}")
        if reasons:
            yield Design(
                bits=bits, kept=kept, columns=columns, lanes=lanes, tokens_per_s=0, guessing_tokens_per_s=0,
                bytes_per_token=0, dsp_blocks=0, block_rams=0, why_not=tuple(reasons),
            )  # fmt: skip
            continue
        compiled = compiled or compile_model(model, most, context + max(COLUMNS))
        design = replace(compiled, shape=shape)
        fitted = fit(design, board, clock_mhz)
        needed = {resource.name: resource.needed for resource in fitted.resources}
        one, all_ = (predict_cycles(design, context, count, memory) for count in (1, columns))
        expected = (1 - acceptance**columns) / (1 - acceptance)
        yield Design(
            bits=bits, kept=kept, columns=columns, lanes=lanes,
            tokens_per_s=clock_mhz * 1e6 / one,
            guessing_tokens_per_s=clock_mhz * 1e6 * expected / all_,
            bytes_per_token=sum(design.stream_beats.values()) * lanes,
            dsp_blocks=needed["DSP blocks"], block_rams=needed["block RAM (36 kbit)"],
            why_not=fitted.why_not,
        )  # fmt: skip


def blank_model(spec: ModelSpec, bits: int, chunk: int) -> IntegerModel:
    """A model of the sizes of `spec` whose weights are zero: its program and its beats are those of any."""
    group = max(GROUP, chunk)

    def linear(n: int, k: int, width: int) -> IntegerLinear:
        groups = max(1, k // group)
        scales = np.zeros((n, groups), dtype=np.int64)
        return IntegerLinear(
            bits=width, group=k // groups, zero=0, codes=np.zeros((n, k), dtype=np.int8), mantissas=scales,
            exponents=scales, minima=None, binary_point=20,
        )  # fmt: skip

    sizes = {
        "qkv": (spec.qkv_size, spec.hidden_size), "o": (spec.hidden_size, spec.q_size),
        "gate_up": (2 * spec.intermediate_size, spec.hidden_size),
        "down": (spec.hidden_size, spec.intermediate_size),
    }  # fmt: skip
    shared = {name: linear(*size, bits) for name, size in sizes.items()}
    norm = IntegerNorm(gamma=np.ones(spec.hidden_size, dtype=np.int64), fraction=15, epsilon=1)
    layers = [f"layers.{i}." for i in range(spec.num_layers)]
    return IntegerModel(
        spec=spec,
        chunk=chunk,
        linears={layer + name: shared[name] for layer in layers for name in sizes}
        | {"head": linear(spec.vocab_size, spec.hidden_size, 8)},
        norms={layer + name: norm for layer in layers for name in ("input_norm", "post_norm")}
        | {"norm": norm},
        embedding=np.zeros((spec.vocab_size, spec.hidden_size), dtype=np.int16),
        embedding_shift=0,
    )
