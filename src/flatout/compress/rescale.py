"""Rescaling: factors moved from the inputs of linears into what feeds them, for nothing at run time.

    x W^T = (x / s) (W s)^T          for any factors s > 0, one for each input channel

1 / s goes where it costs nothing: into the norm before qkv, gate_up and the head, into the rows of up_proj
before down, and into the rows of v_proj before o, where the query heads that read one key/value head share
their factors. The model computes what it did before. Smoothing (compress/smooth.py) and AWQ
(compress/awq.py) choose the factors; the places are those of both papers.

Trade-off: rounding sees other numbers at no cost, but the file's own blocks are given up wherever a factor
goes, and all linears that read one norm share its factors.

Legend: N rows and K columns of a weight, P free factors (K, or fewer where columns share one).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flatout.compress.method import format_in, is_made
from flatout.core.formats import Recipe
from flatout.core.fuse import Source, source_names
from flatout.core.quantized import QuantizedTensor
from flatout.core.spec import ModelSpec

_CARRIERS: dict[str, tuple[str, ...]] = {
    "qkv": ("input_layernorm.weight",),
    "o": ("self_attn.v_proj.weight",),
    "gate_up": ("post_attention_layernorm.weight",),
    "down": ("mlp.up_proj.weight",),
}
_FED_BY = {"o": "qkv", "down": "gate_up"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rescaled:
    """A Source that computes what `original` does, with other activations between its linears.

    columns: Hugging Face name -> float32 (K,) that multiplies the columns. rows: name -> float32 (N,) that
    divides the rows; of norms, the factors that are applied (the weight plus spec.norm_offset). A rescaled
    head is a tensor of its own, so `spec` then does not tie it to the embedding.
    """

    spec: ModelSpec
    original: Source
    columns: Mapping[str, np.ndarray]
    rows: Mapping[str, np.ndarray]

    def array(self, name: str) -> np.ndarray:
        array = self.original.array(name)
        if name in self.columns:
            array = array * self.columns[name]
        if name in self.rows:
            divisor = self.rows[name]
            if name.endswith("norm.weight"):
                offset = np.float32(self.spec.norm_offset)
                array = (array + offset) / divisor - offset
            else:
                array = array / (divisor[:, None] if array.ndim == 2 else divisor)
        return array

    def native(self, name: str) -> QuantizedTensor | None:
        changed = name in self.columns or name in self.rows
        return None if changed else self.original.native(name)


def rescaled(source: Source, factors: Mapping[str, np.ndarray]) -> Rescaled:
    """`source` with `factors` (P,) by fused name moved into its weights."""
    spec = source.spec
    columns: dict[str, np.ndarray] = {}
    rows: dict[str, np.ndarray] = {}
    for name, of_linear in factors.items():
        parts = ("lm_head.weight",) if name == "head" else source_names(spec, name)
        columns.update(dict.fromkeys(parts, of_linear[owner_of(spec, name).numpy()]))
        rows.update(dict.fromkeys(_carriers(spec, name), of_linear))
    tied = spec.tie_embeddings and "head" not in factors
    return Rescaled(spec=replace(spec, tie_embeddings=tied), original=source, columns=columns, rows=rows)


def rescalable(source: Source, recipe: Recipe, name: str) -> bool:
    """Whether linear `name` is rounded, and nothing that its factors would go into is taken from the file."""
    if not is_made(source, recipe, name):
        return False
    layer, _, linear = name.rpartition(".")
    if linear not in _FED_BY:
        return True
    before = f"{layer}.{_FED_BY[linear]}"
    return not format_in(recipe, before).is_integer or is_made(source, recipe, before)


def _carriers(spec: ModelSpec, name: str) -> tuple[str, ...]:
    """The tensors whose rows are divided by the factors of linear `name`."""
    if name == "head":
        return ("model.norm.weight",)
    _, layer, linear = name.split(".")
    suffixes = _CARRIERS[linear]
    if linear == "o" and spec.qkv_bias:
        suffixes = (*suffixes, "self_attn.v_proj.bias")
    return tuple(f"model.layers.{layer}.{suffix}" for suffix in suffixes)


def owner_of(spec: ModelSpec, name: str) -> Tensor:
    """The factor of each column (K,): its own, but o's columns share those of the value that heads read."""
    if name.endswith(".o"):
        values = torch.arange(spec.kv_size).reshape(spec.num_kv_heads, 1, spec.head_dim)
        return values.expand(-1, spec.num_heads // spec.num_kv_heads, -1).reshape(-1)
    return torch.arange(spec.linears()["down"][1] if name.endswith(".down") else spec.hidden_size)


def evenly(count: int, most: int) -> np.ndarray:
    """At most `most` of 0..count-1, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))
