"""config.json <-> ModelSpec, for the families that run here: Llama (SmolLM2 is one), Mistral, Qwen2, Qwen3,
Gemma.

A key that changes the arithmetic and is not understood is an error, never ignored: a model that loads
computes what its author meant. Where config.json leaves a key out, the default of that family's transformers
class holds. GGUF metadata are read in core/gguf_config.py.
"""

from __future__ import annotations

import math
from typing import Any

from flatout.core.files import shown
from flatout.core.spec import ModelSpec, RopeScaling
from flatout.errors import ModelFileError, UnsupportedModelError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
}
"""model_type of config.json (= ModelSpec.family) -> architecture."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 4096 * 32,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "gemma": {
        "max_position_embeddings": 8192,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
}


class ConfigReader:
    """Typed look-up in a JSON object with defaults; every error names the key and the file."""

    def __init__(self, values: dict[str, Any], where: str, defaults: dict[str, Any] | None = None) -> None:
        self.values, self.where, self.defaults = values, where, defaults or {}

    def get(self, key: str) -> Any:
        """The value of `key`; as in transformers, an explicit null does not bring the default back."""
        return self.values[key] if key in self.values else self.defaults.get(key)

    def _found(self, key: str) -> str:
        return f"{key} = {shown(self.values.get(key))} in {self.where}"

    def error(self, rule: str, key: str) -> ModelFileError:
        return ModelFileError(rule, self._found(key), f"check {self.where}")

    def only(self, key: str, *accepted: Any) -> None:
        """Refuse a model whose `key` is neither absent nor one of `accepted`."""
        value = self.get(key)
        if value is not None and not any(type(value) is type(a) and value == a for a in accepted):
            choices = " or ".join(shown(a) for a in accepted)
            raise UnsupportedModelError(
                f"flatout runs {key} = {choices}", self._found(key), "a model with it"
            )

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
            raise self.error(f"{key} must be an integer", key)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.error(f"{key} must be a positive number", key)
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self.get(key)
        if value is not None and type(value) is not bool:
            raise self.error(f"{key} must be true or false", key)
        return value is True

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id, a list of them or nothing; negative ids (old files' "none") are dropped."""
        value = self.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int for i in ids):
            raise self.error(f"{key} must be a token id or a list of them", key)
        return tuple(i for i in ids if 0 <= i < 1 << 31)


def spec_from_config(
    values: dict[str, Any], generation: dict[str, Any] | None = None, where: str = "config.json"
) -> ModelSpec:
    """The spec of a parsed config.json; `generation` is generation_config.json, which may name more end
    tokens.

    Raises UnsupportedModelError for a family or an option that does not run here, ModelFileError for bad
    values.
    """
    family = values.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"model_type must be one of {', '.join(ARCHITECTURES)}",
            f"{shown(family)} in {where}",
            "such a model",
        )
    config = ConfigReader(values, where, _DEFAULTS[family])
    _refuse_other_arithmetic(config, family)
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if heads < 1 or (config.get("head_dim") is None and hidden % heads):
        raise config.error("num_attention_heads must divide hidden_size", "num_attention_heads")
    window = config.get("sliding_window") if family == "mistral" else None
    if window is not None:
        window = checked_window(config.integer("sliding_window"), where)
    theta, scaling = _rope(config)
    bos = config.token_ids("bos_token_id")
    eos = config.token_ids("eos_token_id")
    eos += ConfigReader(generation or {}, "generation_config.json").token_ids("eos_token_id")
    gemma = family == "gemma"
    return ModelSpec(
        family=family,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=config.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=config.integer("num_key_value_heads", heads),
        head_dim=config.integer("head_dim", hidden // heads),
        max_positions=config.integer("max_position_embeddings"),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        tie_embeddings=config.boolean("tie_word_embeddings"),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        activation="gelu_tanh" if gemma else "silu",
        norm_offset=1.0 if gemma else 0.0,
        embedding_scale=math.sqrt(hidden) if gemma and hidden > 0 else 1.0,
        sliding_window=window,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=tuple(dict.fromkeys(eos)),
    )


def _refuse_other_arithmetic(config: ConfigReader, family: str) -> None:
    """Options of these families that change the result and that no runner here implements."""
    if family == "gemma":
        # "gelu" in the first Gemma files means the tanh form as well; transformers reads it so.
        config.only("hidden_act", "gelu_pytorch_tanh", "gelu")
        config.only("hidden_activation", "gelu_pytorch_tanh")
        config.only("use_bidirectional_attention", False)
    else:
        config.only("hidden_act", "silu")
    if family != "qwen2":
        config.only("attention_bias", False)
    config.only("mlp_bias", False)
    config.only("partial_rotary_factor", 1.0, 1)
    if family in ("qwen2", "qwen3"):
        config.only("use_sliding_window", False)
    kinds = config.get("layer_types")
    same = "sliding_attention" if family == "mistral" else "full_attention"
    if kinds is not None and (not isinstance(kinds, list) or any(kind != same for kind in kinds)):
        raise UnsupportedModelError(
            "flatout runs layers with the same attention",
            f"layer_types = {shown(kinds)}",
            "a model without them",
        )


def _rope(config: ConfigReader) -> tuple[float, RopeScaling | None]:
    """Theta and Llama-3 scaling, from rope_parameters (transformers 5) or rope_theta and rope_scaling."""
    merged: dict[str, Any] = {"rope_theta": config.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if value is not None and not isinstance(value, dict):
            raise config.error(f"{key} must be an object", key)
        merged |= value or {}
    rope = ConfigReader(merged, config.where)
    theta = rope.number("rope_theta", 10000.0)
    kind = merged.get("rope_type", merged.get("type"))
    if kind in (None, "default"):
        return theta, None
    if kind != "llama3":
        raise UnsupportedModelError(
            "flatout runs rope_type default or llama3",
            f"{shown(kind)} in {config.where}",
            "a model without it",
        )
    return theta, _scaling(
        rope.number("factor"),
        rope.number("low_freq_factor"),
        rope.number("high_freq_factor"),
        rope.integer("original_max_position_embeddings", config.integer("max_position_embeddings")),
        config.where,
    )


def _scaling(factor: float, low: float, high: float, original: int, where: str) -> RopeScaling:
    """Llama-3 scaling, refused when its numbers would divide by zero."""
    if not (factor >= 1 and 0 < low < high and 1 <= original <= 1 << 26):
        raise ModelFileError(
            "llama3 rope scaling needs factor >= 1 and 0 < low_freq_factor < high_freq_factor",
            f"factor {factor:g}, low {low:g}, high {high:g}, original length {original} in {where}",
            "check config.json",
        )
    return RopeScaling(
        factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_positions=original
    )


def checked_window(window: int, where: str) -> int:
    """A sliding window of a sensible length. Raises ModelFileError."""
    if not 1 <= window < 1 << 31:
        raise ModelFileError("sliding_window must be at least 1", f"{window} in {where}", "check config.json")
    return window


def spec_to_config(spec: ModelSpec, dtype: str = "bfloat16") -> dict[str, Any]:
    """An ordinary config.json for `spec`; `dtype` names the type of the float weights. Inverse of
    spec_from_config."""
    if spec.family not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"the family must be one of {', '.join(ARCHITECTURES)}", shown(spec.family), "such a model"
        )
    eos = spec.eos_token_ids
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[spec.family]],
        "model_type": spec.family,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_positions,
        "hidden_act": "silu" if spec.activation == "silu" else "gelu_pytorch_tanh",
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": spec.tie_embeddings,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "torch_dtype": dtype,
    }
    if spec.rope_scaling is not None:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": spec.rope_scaling.factor,
            "low_freq_factor": spec.rope_scaling.low_freq_factor,
            "high_freq_factor": spec.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": spec.rope_scaling.original_max_positions,
        }
    if spec.family == "mistral":
        config["sliding_window"] = spec.sliding_window
    return config
