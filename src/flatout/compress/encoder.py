"""Encoders in the number format asked for, and load(): from a name or path to what runs it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from flatout.compress.rtn import round_to_nearest
from flatout.core.encoder import (
    EncoderModel,
    EncoderSpec,
    check_encoder_formats,
    expected_encoder_weights,
    parse_encoder_formats,
)
from flatout.core.encoder_folder import is_encoder, open_encoder, saved_format, saved_weights
from flatout.core.formats import Recipe
from flatout.core.model import Weight
from flatout.core.quantized import QuantizedTensor
from flatout.engine import load as decoders
from flatout.engine.encoder import Encoder
from flatout.engine.engine import Engine
from flatout.errors import ConfigError

DEFAULT_FORMAT = "bf16"


class EncoderSource(Protocol):
    """What an encoder's weights are taken from: an EncoderCheckpoint, or one cut out of it."""

    @property
    def spec(self) -> EncoderSpec: ...

    def array(self, name: str) -> np.ndarray:
        """Fused weight `name` of `expected_encoder_weights` as float32."""
        ...


def compress_encoder(
    source: EncoderSource,
    name: str,
    rounded: Mapping[str, QuantizedTensor] | None = None,
    factors: Mapping[str, np.ndarray] | None = None,
) -> EncoderModel:
    """The encoder with its linears in the formats `name` (core.encoder.parse_encoder_formats): fp32, bf16, or
    w{8,6,5,4}a{8,16} rounded to nearest.

    rounded: linears by fused name that another method has rounded already; factors: of EncoderModel. Raises
    ConfigError for another format, or one whose groups do not divide a width, before any work.
    """
    formats = parse_encoder_formats(name)
    check_encoder_formats(source.spec, formats)
    weights: dict[str, Weight] = dict(rounded or {})
    for fused, _, how in expected_encoder_weights(source.spec, formats):
        if fused in weights:
            continue
        array = source.array(fused)
        weights[fused] = round_to_nearest(array, how, search_clip=how.bits < 8) if how.is_integer else array
    return EncoderModel(spec=source.spec, formats=formats, weights=weights, factors=factors or {})


def load(
    model: str | Path,
    runner: str = "auto",
    threads: int | None = None,
    max_tokens: int | None = None,
    *,
    max_batch: int = 32,
    recipe: Recipe | None = None,
    speculate: str | None = None,
    draft: str | Path | None = None,
    format: str | None = None,
) -> Engine | Encoder:
    """What runs `model`: an Engine that generates text, or an Encoder for a BERT folder (`minilm` is one).

    Decoders are loaded by `flatout.engine.load.load`, whose arguments these are. An encoder takes runner,
    threads and `format`, the number format of its linears: by default what `flatout optimize` chose, or else
    "bf16"; "fp32", "w8a8", "w8a16" and the other integer formats, or "w8a8,layers.*.qkv=w8a8-g32", are
    rounded to nearest when it is loaded, but for weights that the folder keeps rounded by another method.
    Raises ConfigError for an argument that the model has no use for.
    """
    if not is_encoder(model):
        if format is not None:
            raise ConfigError("a decoder's formats are its recipe's", repr(format), "recipe=Recipe(...)")
        return decoders.load(
            model,
            runner,
            threads,
            max_tokens,
            max_batch=max_batch,
            recipe=recipe,
            speculate=speculate or "auto",
            draft=draft,
        )
    foreign = {"recipe": recipe, "max_tokens": max_tokens, "speculate": speculate, "draft": draft}
    for name, value in foreign.items():
        if value is not None:
            raise ConfigError(f"an encoder has no {name}", _shown(value), 'format="w8a8"')
    checkpoint = open_encoder(model)
    tokenizer = checkpoint.tokenizer()
    saved = None if format else saved_format(checkpoint.path)  # which checks all hashes first
    rounded, factors = saved_weights(checkpoint.path) if saved else (None, None)
    compressed = compress_encoder(checkpoint, format or saved or DEFAULT_FORMAT, rounded, factors)
    chosen = decoders.choose_runner(runner)
    return Encoder.of(
        compressed,
        tokenizer,
        runner=chosen,
        threads=threads,
        pooling=checkpoint.pooling,
        normalize=checkpoint.normalize,
    )


def _shown(value: object) -> str:
    return value.name if isinstance(value, Recipe) else str(value)
