"""GGUF metadata -> ModelSpec, and the mapping of GGUF tensor names and layouts to Hugging Face's.

Two layouts differ. The "llama" architecture stores rows of q and k interleaved for its RoPE: within a head,
row 2 e + h of the file is row h E/2 + e of Hugging Face (h = 0, 1). Gemma files store norm weights plus one.
Source: convert_hf_to_gguf.py in https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flatout.core.config import checked_window
from flatout.core.files import shown
from flatout.core.gguf import GgufFile, Strings
from flatout.core.spec import ModelSpec, RopeScaling
from flatout.errors import ModelFileError, UnsupportedModelError

FAMILIES = ("llama", "qwen2", "qwen3", "gemma")
"""general.architecture values that are read; Mistral models are stored as llama."""

_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}

IGNORED = ("rope_freqs.weight",)
"""Tensors that are not weights: the spec holds what they say."""

_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")


def gguf_name(name: str) -> str:
    """The GGUF name of Hugging Face tensor `name` (one of spec.weight_names)."""
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_LAYER_NAMES[rest]}"


def unpermuted_rows(spec: ModelSpec, architecture: str, name: str) -> np.ndarray | None:
    """For a q or k weight or bias of the llama architecture: row of the file for each Hugging Face row, else
    None."""
    if architecture != "llama":
        return None
    if ".q_proj." in name:
        heads = spec.num_heads
    elif ".k_proj." in name:
        heads = spec.num_kv_heads
    else:
        return None
    rows = np.arange(heads * spec.head_dim).reshape(heads, spec.head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


class _Metadata:
    """Typed look-up in GGUF metadata; `key` is relative to the architecture."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.values, self.architecture = file.metadata, architecture
        self.where = shown(str(file.path), 300)

    def get(self, key: str) -> Any:
        return self.values.get(f"{self.architecture}.{key}")

    def error(self, rule: str, key: str) -> ModelFileError:
        found = f"{self.architecture}.{key} = {shown(self.get(key))} in {self.where}"
        return ModelFileError(rule, found, "convert the model again")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not int:
            raise self.error(f"the metadata must hold the integer {key}", key)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.error(f"the metadata must hold the positive number {key}", key)
        return float(value)


def spec_from_gguf(file: GgufFile) -> ModelSpec:
    """The spec of an opened GGUF file.

    Raises UnsupportedModelError for an architecture or option that does not run here, ModelFileError for bad
    values.
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise UnsupportedModelError(
            f"general.architecture must be one of {', '.join(FAMILIES)}",
            f"{shown(architecture)} in {shown(str(file.path), 300)}",
            "such a model",
        )
    metadata = _Metadata(file, architecture)
    parts = file.metadata.get("split.count", 1)
    if type(parts) is not int or parts > 1:
        raise UnsupportedModelError(
            "a GGUF model must be in one file",
            f"{shown(parts)} parts, one of them {metadata.where}",
            "join them with llama-gguf-split --merge",
        )
    hidden, heads = metadata.integer("embedding_length"), metadata.integer("attention.head_count")
    if heads < 1 or hidden < 1:
        raise metadata.error("the model must have heads", "attention.head_count")
    head_dim = metadata.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.integer(key, head_dim) != head_dim:
            raise UnsupportedModelError(
                f"{key} must be the head size {head_dim}",
                f"{metadata.get(key)} in {metadata.where}",
                "another model",
            )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelFileError(
            "the embedding token_embd.weight must be a matrix",
            f"none in {metadata.where}",
            "convert the model again",
        )
    window = metadata.get("attention.sliding_window") if architecture == "llama" else None
    if window is not None:
        window = checked_window(metadata.integer("attention.sliding_window"), metadata.where)
    gemma = architecture == "gemma"
    theta = metadata.number("rope.freq_base", 10000.0)
    return ModelSpec(
        family=architecture if window is None else "mistral",
        vocab_size=embedding.shape[0],
        hidden_size=hidden,
        intermediate_size=metadata.integer("feed_forward_length"),
        num_layers=metadata.integer("block_count"),
        num_heads=heads,
        num_kv_heads=metadata.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_positions=metadata.integer("context_length"),
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, metadata, head_dim, theta),
        rms_norm_eps=_shortest(metadata.number("attention.layer_norm_rms_epsilon")),
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        activation="gelu_tanh" if gemma else "silu",
        norm_offset=1.0 if gemma else 0.0,
        embedding_scale=math.sqrt(hidden) if gemma else 1.0,
        sliding_window=window,
        bos_token_id=_token_id(file, "bos"),
        eos_token_ids=_end_tokens(file),
    )


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 9.999999747378752e-06 was written for 1e-5."""
    return float(str(np.float32(value)))


def _token_id(file: GgufFile, which: str) -> int | None:
    value = file.metadata.get(f"tokenizer.ggml.{which}_token_id")
    return value if type(value) is int and 0 <= value < 1 << 31 else None


def _end_tokens(file: GgufFile) -> tuple[int, ...]:
    """The end of text, and the end of a turn where the file names one or its vocabulary holds a well-known
    one."""
    ends = [_token_id(file, "eos"), _token_id(file, "eot")]
    tokens, kinds = file.metadata.get("tokenizer.ggml.tokens"), file.metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, Strings) and isinstance(kinds, np.ndarray) and kinds.size == len(tokens):
        ends += [i for i in np.flatnonzero(kinds == 3).tolist() if tokens[i] in _TURN_ENDS]
    return tuple(dict.fromkeys(i for i in ends if i is not None))


def _rope_scaling(file: GgufFile, metadata: _Metadata, head_dim: int, theta: float) -> RopeScaling | None:
    """Llama-3 scaling. The file holds only its result, a divisor for each frequency; the parameters every
    such model was published with (low 1, high 4, original length 8192) are taken when they reproduce that
    table."""
    kind = metadata.get("rope.scaling.type")
    if kind is not None and not (isinstance(kind, str) and kind == "none"):
        raise UnsupportedModelError(
            "flatout runs models without RoPE scaling or with Llama-3's",
            f"rope.scaling.type = {shown(kind)} in {metadata.where}",
            "a model without it",
        )
    if "rope_freqs.weight" not in file.tensors:
        return None
    table = file.float32("rope_freqs.weight").reshape(-1)
    factor = float(table.max())
    if table.size == head_dim // 2 and 1 <= factor < math.inf:
        scaling = RopeScaling(
            factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
        )
        if np.allclose(table, frequency_divisors(scaling, head_dim, theta), rtol=1e-3):
            return scaling
    raise UnsupportedModelError(
        "rope_freqs.weight must be the Llama-3 scaling of an 8192-token model",
        f"{table.size} divisors up to {factor:g} in {metadata.where}",
        "the safetensors folder of this model",
    )


def frequency_divisors(scaling: RopeScaling, head_dim: int, theta: float) -> np.ndarray:
    """What Llama-3 scaling divides each of the E/2 rotary frequencies by, float64 (E/2,)."""
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return 1.0 / ((1 - smooth) / scaling.factor + smooth)
