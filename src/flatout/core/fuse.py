"""From a checkpoint's tensors to the fused weights of a Model, without rounding any code.

`Source` is the little of a Checkpoint that is needed: a spec, float tensors by Hugging Face name and, where
the file has them, GGUF blocks as stored. Fused names are those of `core.model.expected_weights`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

import numpy as np

from flatout.core.byte_scales import with_byte_scales
from flatout.core.formats import Format, Recipe, parse_format
from flatout.core.gguf_blocks import BlockTensor, concatenate_blocks
from flatout.core.model import Model, OnDemand, Weight
from flatout.core.quantized import QuantizedTensor, concatenate_rows
from flatout.core.spec import FUSED, ModelSpec
from flatout.errors import UnsupportedModelError

_LAYER_VECTORS = {
    "input_norm": ("input_layernorm.weight",),
    "post_norm": ("post_attention_layernorm.weight",),
    "q_norm": ("self_attn.q_norm.weight",),
    "k_norm": ("self_attn.k_norm.weight",),
    "qkv_bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
}
_TOP = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}


class Source(Protocol):
    """What weights are taken from."""

    @property
    def spec(self) -> ModelSpec: ...

    def array(self, name: str) -> np.ndarray:
        """float32 tensor by Hugging Face name, (N, K) for linears."""
        ...

    def native(self, name: str) -> QuantizedTensor | None:
        """The same tensor as the GGUF blocks it is stored in, None when it is stored otherwise."""
        ...


def source_names(spec: ModelSpec, fused: str) -> tuple[str, ...]:
    """Hugging Face names of the tensors that `fused` joins along its rows, in order."""
    if fused == "head" and spec.tie_embeddings:
        return (_TOP["embedding"],)
    if fused in _TOP:
        return (_TOP[fused],)
    _, layer, what = fused.split(".")
    parts = _LAYER_VECTORS.get(what) or tuple(f"{p}.weight" for p in FUSED[what])
    return tuple(f"model.layers.{layer}.{p}" for p in parts)


def float_weight(source: Source, fused: str) -> np.ndarray:
    """The fused weight as float32."""
    parts = [source.array(name) for name in source_names(source.spec, fused)]
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return np.asarray(joined, dtype=np.float32)


def native_weight(source: Source, fused: str, fmt: Format) -> QuantizedTensor:
    """The fused weight as the blocks of `fmt` stored in the file, scales rounded where `fmt` has 8 bits for
    them. Raises UnsupportedModelError when a part has none."""
    parts: list[QuantizedTensor] = []
    wrong: list[str] = []
    for name in source_names(source.spec, fused):
        part = source.native(name)
        if part is None or part.format.name not in (fmt.name, fmt.blocks):
            wrong.append(f"{name} is {'float' if part is None else part.format.name}")
        else:
            parts.append(part)
    if wrong:
        raise UnsupportedModelError(
            f"{fmt.name} takes blocks as the file stores them, and {fused} needs all its parts in {fmt.name}",
            ", ".join(wrong),
            "the format of the file, or a rounded format such as w8a8-g64",
        )
    blocks = [part for part in parts if isinstance(part, BlockTensor)]
    if len(parts) == 1:
        joined = parts[0]
    elif len(blocks) == len(parts):
        joined = concatenate_blocks(blocks)
    else:
        joined = concatenate_rows(parts)
    return joined if joined.format == fmt else with_byte_scales(joined, fmt)


def native_format(source: Source, fused: str) -> str | None:
    """Name of the one native format that all parts of `fused` share, None when they have none or differ."""
    found = [source.native(name) for name in source_names(source.spec, fused)]
    names = {part.format.name if part is not None else "" for part in found}
    name = names.pop() if len(names) == 1 else ""
    return name or None


def native_recipe(source: Source, kv_cache: str = "int8", fallback: str = "bf16") -> Recipe:
    """The recipe that takes every weight as the file stores it; weights not stored as native blocks use
    `fallback`."""
    spec = source.spec
    formats = {
        f"layers.{i}.{linear}": native_format(source, f"layers.{i}.{linear}") or fallback
        for i in range(spec.num_layers)
        for linear in spec.linears()
    }
    usual = Counter(formats.values()).most_common(1)[0][0]
    return Recipe(
        name="native",
        layers=usual,
        embedding=native_format(source, "embedding") or fallback,
        head=native_format(source, "head") or fallback,
        kv_cache=kv_cache,
        method="native",
        overrides=tuple((place, name) for place, name in formats.items() if name != usual),
    )


def float_recipe(name: str, kv_cache: str = "bf16") -> Recipe:
    """Every weight in the float format `name` (fp32 or bf16)."""
    parse_format(name)
    return Recipe(name=name, layers=name, embedding=name, head=name, kv_cache=kv_cache, method="native")


def assemble(
    source: Source, recipe: Recipe, on_demand: bool = False, forget: Callable[[], None] = lambda: None
) -> Model:
    """A Model of float and native formats only, so nothing is rounded here. Raises UnsupportedModelError
    otherwise: now, or on demand when a weight is asked for. forget: as in OnDemand."""
    recipe.check(source.spec)

    def read(name: str, _: tuple[int, ...], fmt: Format) -> Weight:
        return native_weight(source, name, fmt) if fmt.is_integer else float_weight(source, name)

    weights = OnDemand(source.spec, recipe, read, forget)
    return Model(spec=source.spec, recipe=recipe, weights=weights if on_demand else dict(weights))
