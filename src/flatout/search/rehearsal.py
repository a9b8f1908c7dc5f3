"""The whole way of a model in little, before the work starts: the first and the last block, with the first
rows of embedding and head, are rounded, saved, loaded again and asked for a token.

What cannot be saved, read back or run on this machine is found out in a second instead of at the end.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from flatout.compress.apply import compress
from flatout.core.artifact import load_artifact, save_artifact
from flatout.core.formats import Recipe
from flatout.core.fuse import Source
from flatout.core.quantized import QuantizedTensor
from flatout.core.spec import ModelSpec
from flatout.core.tokenizer import Tokenizer
from flatout.engine.cpu import CpuRunner
from flatout.errors import EvidenceError
from flatout.verify.quality import logits_of

_ROWS = 4096  # of embedding and head
_TOKENS = 8


class Ends:
    """The first and the last block of `source` as a model of its own."""

    def __init__(self, source: Source) -> None:
        self._source, whole = source, source.spec
        self.spec: ModelSpec = replace(
            whole, num_layers=min(whole.num_layers, 2), vocab_size=min(whole.vocab_size, _ROWS)
        )

    def array(self, name: str) -> np.ndarray:
        array = self._source.array(self._whole_name(name))
        return array[: self.spec.vocab_size] if _is_table(name) else array

    def native(self, name: str) -> QuantizedTensor | None:
        tensor = self._source.native(self._whole_name(name))
        return tensor.rows(0, self.spec.vocab_size) if tensor is not None and _is_table(name) else tensor

    def recipe(self, recipe: Recipe) -> Recipe:
        """The formats of `recipe` for these blocks, rounded to nearest: other methods need the whole."""
        layers = (0, self._source.spec.num_layers - 1)[: self.spec.num_layers]
        overrides = tuple(
            (f"layers.{i}.{linear}", recipe.format_of(layer, linear).name)
            for i, layer in enumerate(layers)
            for linear in self.spec.linears()
        )
        method = "rtn" if recipe.needs_calibration else recipe.method
        return replace(recipe, overrides=overrides, method=method, sparsity="", structure=())

    def _whole_name(self, name: str) -> str:
        last = self._source.spec.num_layers - 1
        return name.replace("model.layers.1.", f"model.layers.{last}.")


def _is_table(name: str) -> bool:
    return name in ("model.embed_tokens.weight", "lm_head.weight")


def rehearse(source: Source, recipe: Recipe, tokenizer: Tokenizer, threads: int, folder: Path) -> None:
    """Take the ends of `source` under `recipe` through everything, in the scratch `folder`.

    Raises what goes wrong on the way, EvidenceError when the logits are no numbers or change by saving.
    """
    ends = Ends(source)
    model = compress(ends, ends.recipe(recipe))
    again, _, _ = load_artifact(save_artifact(model, tokenizer, folder / "rehearsal", {}))
    tokens = [(7 * i * i + 3) % ends.spec.vocab_size for i in range(min(_TOKENS, ends.spec.max_positions))]
    before, after = (logits_of(CpuRunner(m, threads=threads, num_pages=2), tokens) for m in (model, again))
    if not (np.isfinite(before).all() and np.array_equal(before, after)):
        raise EvidenceError(
            "a saved block must compute what it did before",
            f"{recipe.name} of the first and last block does not",
            "another recipe, and report this",
        )
