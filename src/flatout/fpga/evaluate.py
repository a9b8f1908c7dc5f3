"""The whole path on one model: compile, simulate real text, compare every result, measure cycles.

Simulated: every cycle of the RTL, against a model of the board's memory. Predicted: tokens a second and
energy, from those cycles, an assumed clock and the board's power. Never run here: any FPGA.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flatout.core.fuse import Source
from flatout.core.model import Model
from flatout.errors import ConfigError
from flatout.fpga.boards import OTHER_BOARDS, Board
from flatout.fpga.compile import Compiled, Shape, compile_model
from flatout.fpga.cycles import predict_cycles
from flatout.fpga.decode import Decoding, decode
from flatout.fpga.emit import emit
from flatout.fpga.fit import Fit, fit
from flatout.fpga.model import KeyValues, forward, integer_model
from flatout.fpga.simulate import Accelerator, MemoryModel, Pass
from flatout.fpga.spec import FRACTIONS
from flatout.fpga.synthesis import Synthesis
from flatout.fpga.trace import cache_differences

CLOCKS_MHZ = (250, 300)
PROMPT = 64
"""Tokens of text before an answer."""
PIECE, HEAD_ROWS = 16, 64
"""Passes, and tokens of the original, whose logits are held at a time."""
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
    joules_per_token: tuple[float, float] | None
    tier: str = "predicted from simulated cycles; clock and power are assumptions"


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """What the integers cost on the simulated tokens: perplexity of the original in float32, nats a token
    more than it, and their standard error over tokens. So few tokens do not judge a recipe."""

    perplexity_original: float
    nats: float
    standard_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """bit_exact: all logits of `tokens` tokens, all their keys and values, and the long-context pass are the
    specification's. simulation_core_seconds: of these tokens, specification included, builds not.
    cycles_per_token: of decoding one by one at `decode.context`. accuracy: None without the original."""

    board: str
    recipe: str
    fit: Fit
    boards: tuple[Fit, ...]
    synthesis: Synthesis | None
    bit_exact: bool
    differences: int
    tokens: int
    logits_sha256: str
    perplexity: float
    specification_perplexity: float
    accuracy: Accuracy | None
    simulation_core_seconds: float
    cycles_per_token: int
    mbu: float
    decode: Step
    together: Step
    speed: tuple[Speed, ...]
    speculative: Decoding | None = None
    tier: str = "simulated RTL against a modelled memory; no FPGA was run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What simulating a text gave. nats: losses (T,) of its tokens, by the RTL and by the specification;
    first: its first pass; seconds: of this process's cores, all included."""

    differences: int
    logits_sha256: str
    nats: tuple[np.ndarray, np.ndarray]
    first: Pass
    seconds: float


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
    original: Source | None = None,
    answer: int = 0,
    synthesise: Callable[[], Synthesis] | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Simulate the first `tokens` of `text` and one token after `context`; compare with the specification.
    original: what `model` was rounded from, to be compared on the same tokens. answer: tokens to decode after
    the first PROMPT with guesses that are judged together. synthesise: called
    at the end, for the cells of `shape` to be fitted instead of counts. out: where files for AMD's tools go.

    Raises ConfigError when the text is too short; UnsupportedModelError and ResourceError for a model that
    the accelerator cannot hold; BackendError without a simulator.
    """
    say = progress or (lambda what, done, total: None)
    integers = integer_model(model, shape.lanes)
    room = PROMPT + answer + 2 * shape.columns if answer else 0
    design = compile_model(integers, shape, max(tokens, context + 1, room))
    if not 1 < tokens < len(text) or not 0 <= context < len(text):
        raise ConfigError(
            f"tokens and context lie within a text of {len(text)}", f"{tokens} and {context}",
            f"at most {len(text) - 1}",
        )  # fmt: skip
    if out is not None:
        emit(design, out, CLOCKS_MHZ[-1])
    memory = memory_model(board, CLOCKS_MHZ[-1])

    checked = check_text(design, text[: tokens + 1], memory, say)
    differences = checked.differences
    accuracy = accuracy_of(original, text[: tokens + 1], checked.nats[0]) if original else None

    past = KeyValues(integers.spec, design.context)
    if context:
        forward(integers, text[:context], past)
    with Accelerator(design, memory) as accelerator:
        accelerator.resume(past)
        last = accelerator.run(text[context : context + 1].tolist())
    differences += int((last.logits != forward(integers, text[context : context + 1], past)).sum())

    speculative = decode(design, text[:PROMPT], answer, memory, say) if answer else None

    synthesis = synthesise() if synthesise is not None else None
    boards = tuple(fit(design, b, CLOCKS_MHZ[-1], synthesis) for b in (board, *OTHER_BOARDS))

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

    alone = step(context, 1, last)
    speed = []
    for clock in CLOCKS_MHZ:
        rate = clock * 1e6 / alone.cycles
        joules = (board.power_w[0] / rate, board.power_w[1] / rate) if board.power_w else None
        speed.append(Speed(clock_mhz=clock, tokens_per_s=rate, joules_per_token=joules))
    return Evaluation(
        board=board.name,
        recipe=model.recipe.name,
        fit=boards[0],
        boards=boards,
        synthesis=synthesis,
        bit_exact=differences == 0,
        differences=differences,
        tokens=tokens,
        logits_sha256=checked.logits_sha256,
        perplexity=float(np.exp(checked.nats[0].mean())),
        specification_perplexity=float(np.exp(checked.nats[1].mean())),
        accuracy=accuracy,
        simulation_core_seconds=checked.seconds,
        cycles_per_token=alone.cycles,
        mbu=alone.mbu,
        decode=alone,
        together=step(0, min(shape.columns, tokens), checked.first),
        speculative=speculative,
        speed=tuple(speed),
    )


def check_text(design: Compiled, text: np.ndarray, memory: MemoryModel, say: Progress) -> Checked:
    """Simulate all but the last of `text` (T + 1,), as many tokens together as there are columns, and compare
    logits, keys and values with the specification."""
    tokens, columns = len(text) - 1, design.shape.columns
    kept = KeyValues(design.model.spec, design.context)
    digest, differences, begin = hashlib.sha256(), 0, time.process_time()
    nats = [np.zeros(0), np.zeros(0)]
    first: Pass | None = None
    with Accelerator(design, memory) as accelerator:
        for at in range(0, tokens, PIECE * columns):
            piece = text[at : min(at + PIECE * columns, tokens)]
            passes = [accelerator.run(piece[i : i + columns].tolist()) for i in range(0, len(piece), columns)]
            first = first or passes[0]
            found = np.concatenate([run.logits for run in passes])
            expected = forward(design.model, piece, kept)
            differences += int((found != expected).sum())
            digest.update(found.tobytes())
            targets = text[at + 1 : at + 1 + len(piece)]
            nats = [
                np.concatenate([before, losses(logits, targets)])
                for before, logits in zip(nats, (found, expected), strict=True)
            ]
            say("simulating", accelerator.length, tokens)
        differences += cache_differences(design, accelerator.image, kept)
    assert first is not None, "a text has tokens"
    return Checked(
        differences=differences, logits_sha256=digest.hexdigest(), first=first,
        seconds=time.process_time() - begin, nats=(nats[0], nats[1]),
    )  # fmt: skip


def accuracy_of(original: Source, text: np.ndarray, nats: np.ndarray) -> Accuracy:
    """Losses `nats` (T,) of the integers on `text` (T + 1,) beside those of `original` in float32."""
    from flatout.models.llama import Llama

    llama = Llama(original, as_served=False)
    hidden = llama.hidden(text[:-1])
    before = np.concatenate(
        [
            logit_losses(llama.head(hidden[at : at + HEAD_ROWS]).numpy(), text[at + 1 : at + 1 + HEAD_ROWS])
            for at in range(0, len(nats), HEAD_ROWS)
        ]
    )
    more = nats - before
    return Accuracy(
        perplexity_original=float(np.exp(before.mean())),
        nats=float(more.mean()),
        standard_error=float(more.std(ddof=1) / len(more) ** 0.5),
    )


def losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Negative log-probabilities (T,) of `targets` (T,) under integer `logits` (T, V)."""
    return logit_losses(logits / 2.0**FRACTIONS.linear, targets)


def logit_losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Negative log-probabilities (T,) of `targets` (T,) under real `logits` (T, V)."""
    real = logits.astype(np.float64)
    real -= real.max(axis=1, keepdims=True)
    chosen = real[np.arange(len(targets)), targets] - np.log(np.exp(real).sum(axis=1))
    return np.asarray(-chosen)
