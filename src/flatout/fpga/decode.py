"""Greedy decoding on the simulated accelerator, with guesses that one pass judges together.

One beat of weights serves every column, so a pass of four tokens costs little more than one of one. The last
token goes in together with guesses of what follows (prompt lookup: what followed the same tokens before,
engine/speculate.py); those that equal what the model says there are kept. Wrong guesses leave keys and values
behind that the next pass overwrites.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flatout.engine.scheduler import agreement
from flatout.engine.speculate import NgramIndex
from flatout.errors import ConfigError
from flatout.fpga.compile import Compiled
from flatout.fpga.cycles import predict_cycles
from flatout.fpga.model import IntegerModel, KeyValues, forward
from flatout.fpga.simulate import Accelerator, MemoryModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """One continuation. guesses: of all passes; accepted: those that came true. plain_cycles: of the same
    tokens one by one, by the model of cycles. tokens_per_pass: tokens for each time the weights are read.
    gain: tokens a cycle over those of decoding one by one. identical: every token is the specification's
    greedy one."""

    prompt: int
    tokens: tuple[int, ...]
    passes: int
    guesses: int
    accepted: int
    cycles: int
    plain_cycles: int
    tokens_per_pass: float
    gain: float
    identical: bool


def decode(
    design: Compiled,
    prompt: np.ndarray,
    count: int,
    memory: MemoryModel,
    progress: Callable[[str, int, int], None] | None = None,
) -> Decoding:
    """`count` tokens after `prompt` (T,). Raises ConfigError when they do not fit the context."""
    columns = design.shape.columns
    if len(prompt) == 0 or len(prompt) + count + columns > design.context:
        raise ConfigError(
            f"prompt, answer and {columns} guesses fit {design.context} positions",
            f"{len(prompt)} and {count}", "a shorter answer",
        )  # fmt: skip
    index, tokens = NgramIndex(), prompt.tolist()
    past = KeyValues(design.model.spec, design.context)
    if len(prompt) > 1:
        forward(design.model, prompt[:-1], past)
    passes = guesses = accepted = cycles = 0
    with Accelerator(design, memory) as accelerator:
        # The last token of the prompt is the first that is judged together with guesses; the others' keys and
        # values are the specification's.
        accelerator.resume(past)
        while len(tokens) < len(prompt) + count:
            draft = index.guess(tokens, columns - 1)
            start = accelerator.length
            found = accelerator.run([tokens[-1], *draft])
            right = agreement(draft, found.best.tolist())
            accelerator.rewind(start + 1 + right)
            tokens += found.best[: right + 1].tolist()
            passes, cycles = passes + 1, cycles + found.cycles
            guesses, accepted = guesses + len(draft), accepted + right
            if progress is not None:
                progress("decoding", min(len(tokens) - len(prompt), count), count)
    produced = tuple(tokens[len(prompt) :])
    starts = range(len(prompt) - 1, len(tokens) - 1)
    plain = sum(predict_cycles(design, at, 1, memory) for at in starts)
    return Decoding(
        prompt=len(prompt),
        tokens=produced,
        passes=passes,
        guesses=guesses,
        accepted=accepted,
        cycles=cycles,
        plain_cycles=plain,
        tokens_per_pass=len(produced) / passes,
        gain=plain / cycles,
        identical=is_greedy(design.model, np.array(tokens), len(prompt)),
    )


def is_greedy(model: IntegerModel, tokens: np.ndarray, first: int) -> bool:
    """Whether each of `tokens` (T,) from `first` on has the largest logit of the specification, given those
    before it: what decoding one by one would have drawn."""
    logits = forward(model, tokens[:-1], KeyValues(model.spec, len(tokens)))
    return bool((logits[first - 1 :].argmax(axis=1) == tokens[first:]).all())
