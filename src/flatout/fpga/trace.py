"""Every tensor of a pass in the RTL beside the specification's, instruction by instruction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flatout.fpga.compile import Compiled, cache_region, store_cache, vector_rows
from flatout.fpga.model import KeyValues, forward
from flatout.fpga.simulate import Accelerator, MemoryModel, Pass
from flatout.fpga.spec import Integers

TENSORS = (
    ("qkv", "qkv", "wide"), ("read", "attention", "read"), ("attended", "o", "residual"),
    ("hidden", "gate_up", "wide"), ("out", "down", "residual"),
)  # fmt: skip
"""(what the specification calls it, the instruction that makes it, where it lies in the vector memory)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """numbers: how many were compared, keys and values included. different: tensors that differ, with how
    often."""

    tokens: int
    cycles: int
    tensors: int
    numbers: int
    different: dict[str, int]


def trace(
    design: Compiled,
    text: np.ndarray,
    memory: MemoryModel,
    progress: Callable[[str, int, int], None] | None = None,
) -> Trace:
    """Run `text` (T,), as many tokens together as there are columns, and compare all that every pass
    leaves."""
    kept = KeyValues(design.model.spec, design.context)
    cycles = tensors = numbers = 0
    different: dict[str, int] = {}
    with Accelerator(design, memory) as accelerator:
        for at in range(0, len(text), design.shape.columns):
            piece = text[at : at + design.shape.columns]
            expected: dict[str, Integers] = {}
            found = accelerator.run(piece.tolist(), trace=True)
            forward(design.model, piece, kept, expected.__setitem__)
            cycles += found.cycles
            for name, wrong, size in compare(design, found, expected):
                tensors, numbers = tensors + 1, numbers + size
                if wrong:
                    different[name] = different.get(name, 0) + wrong
            if progress is not None:
                progress("comparing", accelerator.length, len(text))
        wrong = cache_differences(design, accelerator.image, kept)
    if wrong:
        different["keys and values"] = wrong
    return Trace(
        tokens=len(text), cycles=cycles, tensors=tensors + 2 * design.model.spec.num_layers,
        numbers=numbers + kept.codes[:, :, : len(text)].size, different=different,
    )  # fmt: skip


def compare(design: Compiled, found: Pass, expected: dict[str, Integers]) -> list[tuple[str, int, int]]:
    """(name, numbers that differ, numbers) of each tensor of one traced pass."""
    assert found.vector_memory is not None, "the pass was not traced"
    rows, words = vector_rows(design.model, design.shape), design.shape.words
    places = {name: pc for pc, name in design.names.items()}
    out = [("logits", int((found.logits != expected["logits"]).sum()), found.logits.size)]
    for layer in range(design.model.spec.num_layers):
        for tensor, instruction, region in TENSORS:
            reference = expected[f"layers.{layer}.{tensor}"]
            start = rows[region] * words
            left = found.vector_memory[places[f"layers.{layer}.{instruction}"]]
            wrong = left[:, start : start + reference.shape[1]] != reference
            out.append((f"layers.{layer}.{tensor}", int(wrong.sum()), reference.size))
    return out


def cache_differences(design: Compiled, image: np.ndarray, kept: KeyValues) -> int:
    """Bytes of keys, values and their scales in `image` that are not those of `kept`."""
    expected = design.image.copy()
    store_cache(design, expected, kept)
    return int((cache_region(design, image) != cache_region(design, expected)).sum())
