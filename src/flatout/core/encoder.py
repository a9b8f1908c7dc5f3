"""Encoders of the BERT family: their shape, the fused names of their weights, and how config.json says so.

Post-norm layers of bidirectional attention and a two-layer network with the exact GELU, after a sum of word,
position and type embeddings (Devlin et al., 2018). Legend as in core/spec.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flatout.core.config import ConfigReader
from flatout.core.files import shown
from flatout.core.formats import Format, check_layer, check_pattern, overridden, parse_format
from flatout.core.model import Weight
from flatout.core.quantized import QuantizedTensor
from flatout.errors import ConfigError, ModelFileError, UnsupportedModelError

_LINEARS = ("qkv", "o", "up", "down")

MODEL_TYPES = ("bert",)
"""Values of config.json's model_type that are encoders here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """Shape and arithmetic of one encoder. Sizes are element counts."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        sizes = {
            "vocab_size": (self.vocab_size, 1 << 20),
            "hidden_size": (self.hidden_size, 1 << 14),
            "intermediate_size": (self.intermediate_size, 1 << 16),
            "num_hidden_layers": (self.num_layers, 1 << 10),
            "num_attention_heads": (self.num_heads, 1 << 10),
            "max_position_embeddings": (self.max_positions, 1 << 16),
            "type_vocab_size": (self.type_vocab_size, 1 << 10),
        }
        for name, (value, limit) in sizes.items():
            if not 1 <= value <= limit:
                raise UnsupportedModelError(
                    f"{name} must be between 1 and {limit}", str(value), "check config.json"
                )
        if self.hidden_size % self.num_heads or self.head_dim > 256:
            raise UnsupportedModelError(
                "num_attention_heads must divide hidden_size into heads of at most 256",
                f"{self.num_heads} and {self.hidden_size}",
                "check config.json",
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) of each fused linear of one layer, in execution order. Rows of qkv are q, k, v."""
        D, F = self.hidden_size, self.intermediate_size
        return dict(zip(_LINEARS, ((3 * D, D), (D, D), (F, D), (D, F)), strict=True))

    def num_parameters(self) -> int:
        """Parameters that are used: the pooler of the original BERT is not among them."""
        return sum(int(np.prod(shape)) for shape in encoder_weight_names(self).values())


def encoder_spec_from_config(values: Mapping[str, Any], where: str = "config.json") -> EncoderSpec:
    """The spec of a parsed config.json. Defaults are those of transformers' BertConfig.

    Raises UnsupportedModelError for an architecture or an option that does not run here, ModelFileError for
    bad values.
    """
    if values.get("model_type") not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"an encoder's model_type must be one of {', '.join(MODEL_TYPES)}",
            f"{shown(values.get('model_type'))} in {where}",
            "such a model",
        )
    config = ConfigReader(dict(values), where)
    config.only("hidden_act", "gelu")
    config.only("position_embedding_type", "absolute")
    config.only("is_decoder", False)
    config.only("add_cross_attention", False)
    if config.get("quantization_config") is not None:
        raise UnsupportedModelError(
            "encoders are read from float weights", f"quantization_config in {where}", "the unquantised model"
        )
    return EncoderSpec(
        vocab_size=config.integer("vocab_size", 30522),
        hidden_size=config.integer("hidden_size", 768),
        intermediate_size=config.integer("intermediate_size", 3072),
        num_layers=config.integer("num_hidden_layers", 12),
        num_heads=config.integer("num_attention_heads", 12),
        max_positions=config.integer("max_position_embeddings", 512),
        type_vocab_size=config.integer("type_vocab_size", 2),
        layer_norm_eps=config.number("layer_norm_eps", 1e-12),
    )


_EMBEDDINGS = {
    "embedding": "embeddings.word_embeddings.weight",
    "embedding_norm": "embeddings.LayerNorm.weight",
    "embedding_norm_bias": "embeddings.LayerNorm.bias",
}
_POSITIONS, _TYPES = "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"
_QKV = ("attention.self.query", "attention.self.key", "attention.self.value")
_LAYER: dict[str, tuple[str, ...]] = {
    "qkv": tuple(f"{part}.weight" for part in _QKV),
    "qkv_bias": tuple(f"{part}.bias" for part in _QKV),
    "o": ("attention.output.dense.weight",),
    "o_bias": ("attention.output.dense.bias",),
    "attention_norm": ("attention.output.LayerNorm.weight",),
    "attention_norm_bias": ("attention.output.LayerNorm.bias",),
    "up": ("intermediate.dense.weight",),
    "up_bias": ("intermediate.dense.bias",),
    "down": ("output.dense.weight",),
    "down_bias": ("output.dense.bias",),
    "output_norm": ("output.LayerNorm.weight",),
    "output_norm_bias": ("output.LayerNorm.bias",),
}


def _layer_shapes(spec: EncoderSpec) -> dict[str, tuple[int, ...]]:
    linears = spec.linears()
    return {name: linears.get(name) or (linears.get(name.removesuffix("_bias")) or (spec.hidden_size,))[:1]
            for name in _LAYER}  # fmt: skip


def encoder_weight_names(spec: EncoderSpec) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor name -> shape of every weight that is used (N, K for linears)."""
    D = spec.hidden_size
    names: dict[str, tuple[int, ...]] = {
        _EMBEDDINGS["embedding"]: (spec.vocab_size, D),
        _POSITIONS: (spec.max_positions, D),
        _TYPES: (spec.type_vocab_size, D),
        _EMBEDDINGS["embedding_norm"]: (D,),
        _EMBEDDINGS["embedding_norm_bias"]: (D,),
    }
    for i in range(spec.num_layers):
        for fused, (rows, *columns) in _layer_shapes(spec).items():
            for part in _LAYER[fused]:
                names[f"encoder.layer.{i}.{part}"] = (rows // len(_LAYER[fused]), *columns)
    return names


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderFormats:
    """A number format for every linear: `usual`, unless `overrides` has another for it, as in
    core.formats.Recipe. Where one is of integers all are."""

    usual: str
    overrides: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        names = [self.usual, *(name for _, name in self.overrides)]
        if self.overrides and not all(parse_format(name).is_integer for name in names):
            raise ConfigError("an encoder mixes integer formats", ", ".join(names), "w8a8-g32 and w8a8")
        for pattern, _ in self.overrides:
            check_pattern(pattern, _LINEARS)

    def of(self, layer: int, linear: str) -> Format:
        """Format of linear `linear` (qkv, o, up, down) of layer `layer`."""
        return parse_format(overridden(self.usual, self.overrides, layer, linear))

    def at(self, name: str) -> Format:
        """Format of the linear of fused name `name`, "layers.4.qkv"."""
        _, layer, linear = name.split(".")
        return self.of(int(layer), linear)

    @property
    def name(self) -> str:
        """What `parse_encoder_formats` reads."""
        return ",".join((self.usual, *(f"{pattern}={name}" for pattern, name in self.overrides)))


def parse_encoder_formats(name: str) -> EncoderFormats:
    """Of "w8a8", or "w8a8,layers.*.down=w8a16,layers.4.qkv=w8a8-g32". Raises ConfigError for another name."""
    usual, *changes = (part.strip() for part in name.split(","))
    overrides = []
    for change in changes:
        pattern, equals, value = change.partition("=")
        if not equals:
            raise ConfigError("an override is PLACE=FORMAT", repr(change), "layers.*.down=w8a16")
        overrides.append((pattern, value))
    return EncoderFormats(usual=parse_format(usual).name, overrides=tuple(overrides))


def expected_encoder_weights(
    spec: EncoderSpec, formats: EncoderFormats
) -> Iterator[tuple[str, tuple[int, ...], Format]]:
    """(name, shape, format) of every weight of an EncoderModel in `formats`.

    embedding (V, D) words; positions (P, D), to which the first type's embedding is added; embedding_norm,
    embedding_norm_bias (D); layers.I.{qkv, o, up, down} (N, K) and their _bias (N);
    layers.I.{attention_norm, output_norm} (D) and their _bias (D). Linears are in `formats`, words in fp32
    or bf16, all else in fp32.
    """
    D, fp32 = spec.hidden_size, parse_format("fp32")
    yield "embedding", (spec.vocab_size, D), fp32 if formats.usual == "fp32" else parse_format("bf16")
    yield "positions", (spec.max_positions, D), fp32
    yield "embedding_norm", (D,), fp32
    yield "embedding_norm_bias", (D,), fp32
    for i in range(spec.num_layers):
        for name, shape in _layer_shapes(spec).items():
            yield f"layers.{i}.{name}", shape, formats.of(i, name) if len(shape) == 2 else fp32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncoderModel:
    """An encoder's weights by fused name (`expected_encoder_weights`), linears in `formats`. factors: float32
    (K,) by fused name of a linear, by which what it receives is multiplied before it is rounded."""

    spec: EncoderSpec
    formats: EncoderFormats
    weights: Mapping[str, Weight]
    factors: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, factors in self.factors.items():
            weight = self.weights.get(name)
            width = weight.shape[1:] if isinstance(weight, QuantizedTensor) else None
            if factors.shape != width or not ((factors > 0) & np.isfinite(factors)).all():
                raise ModelFileError(
                    f"factors of {name} are one positive number for each column",
                    f"{factors.shape} for {width}",
                    "re-create the model",
                )
        for name, shape, fmt in expected_encoder_weights(self.spec, self.formats):
            weight = self.weights.get(name)
            found = weight.format if isinstance(weight, QuantizedTensor) else None
            if weight is None or weight.shape != shape or found != (fmt if fmt.is_integer else None):
                have = None if weight is None else (weight.shape, found.name if found else "floats")
                raise ModelFileError(
                    f"{name} must be there as {shape} in {fmt.name}", str(have), "re-create the model"
                )

    @property
    def kv_cache(self) -> str:
        """How keys and values are kept within a layer: "int8" beside int8 activations, otherwise "bf16"."""
        return "int8" if parse_format(self.formats.usual).activation == "int8" else "bf16"


def check_encoder_formats(spec: EncoderSpec, formats: EncoderFormats) -> None:
    """Raise ConfigError unless every linear of `spec` can be in its format, and is there."""
    for pattern, _ in formats.overrides:
        check_layer(pattern, spec.num_layers)
    wrong = set()
    for i in range(spec.num_layers):
        for name, (_, k) in spec.linears().items():
            fmt = formats.of(i, name)
            if fmt.is_native:
                raise ConfigError("encoders take fp32, bf16 or w{8,6,5,4}a{8,16} formats", fmt.name, "w8a8")
            if fmt.group and k % fmt.group:
                wrong.add(f"{name}: {fmt.name} on width {k}")
    if wrong:
        raise ConfigError("groups must divide the width", ", ".join(sorted(wrong)), "w8a8")


def fused_tensors(name: str) -> tuple[str, ...]:
    """Hugging Face names of the tensors that fused weight `name` joins along its rows; positions is the first
    plus row 0 of the second."""
    if name == "positions":
        return _POSITIONS, _TYPES
    if name in _EMBEDDINGS:
        return (_EMBEDDINGS[name],)
    _, layer, what = name.split(".")
    return tuple(f"encoder.layer.{layer}.{part}" for part in _LAYER[what])
