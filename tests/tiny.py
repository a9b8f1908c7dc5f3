"""Tiny random models for tests: a spec of each family, its weights, a Model under a recipe, a Hugging Face
folder."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from flatout.compress.apply import compress
from flatout.core.byte_scales import with_byte_scales
from flatout.core.formats import Recipe, parse_format
from flatout.core.model import Model
from flatout.core.quantized import QuantizedTensor
from flatout.core.spec import ModelSpec, RopeScaling, weight_names

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
}

QUICK_BUILD = ("OPT_FAST=-Og", "OPT_GLOBAL=-O0")
"""Of simulators (`fpga.simulate.OPTIMISATION`): one of a tiny model takes longer to compile than it runs."""


def tiny_spec(family: str = "llama", **changes: Any) -> ModelSpec:
    """A two-layer model of `family` with 4 query heads, 2 key/value heads and the family's own
    peculiarities."""
    spec = ModelSpec(
        family=family,
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_positions=512,
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    if family == "mistral":
        spec = replace(spec, sliding_window=8)
    if family == "qwen2":
        spec = replace(spec, qkv_bias=True, rms_norm_eps=1e-6, tie_embeddings=True)
    if family == "qwen3":
        spec = replace(spec, qk_norm=True, rms_norm_eps=1e-6, head_dim=32)
    if family == "gemma":
        spec = replace(
            spec,
            activation="gelu_tanh",
            norm_offset=1.0,
            embedding_scale=float(np.sqrt(np.float32(64))),
            tie_embeddings=True,
            rms_norm_eps=1e-6,
            num_kv_heads=1,
        )
    return replace(spec, **changes)


def llama3_scaling() -> RopeScaling:
    """Llama 3 RoPE scaling that touches all three frequency ranges of a tiny model."""
    return RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64)


@dataclass(frozen=True)
class TinySource:
    """A Checkpoint as far as compression is concerned. `blocks`: Hugging Face name -> native tensor."""

    spec: ModelSpec
    tensors: Mapping[str, np.ndarray]
    blocks: Mapping[str, QuantizedTensor] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def array(self, name: str) -> np.ndarray:
        if name == "lm_head.weight" and self.spec.tie_embeddings:
            name = "model.embed_tokens.weight"
        return self.blocks[name].dequantize() if name in self.blocks else self.tensors[name]

    def native(self, name: str) -> QuantizedTensor | None:
        return self.blocks.get(name)


def tiny_tensors(spec: ModelSpec, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 weights by Hugging Face name: linears of variance 1/K, norms near one (near zero for Gemma)."""
    tensors = {}
    for name, shape in weight_names(spec).items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = rng.standard_normal(shape).astype(np.float32)
        if name.endswith("norm.weight"):
            values = np.float32(1 - spec.norm_offset) + np.float32(0.1) * values
        elif len(shape) == 2:
            values /= np.float32(np.sqrt(shape[1]))
        else:
            values *= np.float32(0.1)
        tensors[name] = values
    return tensors


def native_blocks(name: str, n: int, k: int, seed: int) -> QuantizedTensor:
    """Random blocks of a native format with sensible scales."""
    fmt = parse_format(name)
    if fmt.scale_bits == 8:
        return with_byte_scales(native_blocks(fmt.blocks, n, k, seed), fmt)
    rng = np.random.default_rng([seed, n, k])
    scales = (rng.uniform(0.5, 1.5, (n, k // 32)) / (np.sqrt(k) * 2 ** (fmt.bits - 2))).astype(np.float16)
    if fmt.bits == 8:
        codes = rng.integers(-127, 128, (n, k)).astype(np.int8)
    else:
        codes = rng.integers(0, 16, (n, k)).astype(np.uint8)
    minima = (scales.astype(np.float32) * -7.5).astype(np.float16) if fmt.zero == "minimum" else None
    return QuantizedTensor(format=fmt, codes=codes, scales=scales, minima=minima)


def tiny_source(
    spec: ModelSpec, seed: int = 0, layers: str | None = None, head: str | None = None
) -> TinySource:
    """Random weights; `layers` and `head` name the native formats of the linears and of embedding and
    head."""
    tensors = tiny_tensors(spec, seed)
    blocks = {}
    for i, (name, array) in enumerate(tensors.items()):
        if array.ndim == 2:
            native = layers if ".layers." in name else head
            if native is not None:
                blocks[name] = native_blocks(native, *array.shape, seed=seed * 1000 + i)
    return TinySource(spec, tensors, blocks)


def loud_source(spec: ModelSpec) -> TinySource:
    """`tiny_source` with one channel of the residual stream 30 times as heavy in all that reads it, and that
    much lighter in the norms."""
    tensors = {name: array.copy() for name, array in tiny_tensors(spec).items()}
    for name, array in tensors.items():
        if name.endswith(tuple(f"{part}_proj.weight" for part in ("q", "k", "v", "gate", "up"))):
            array[:, 7] *= 30
        elif name.endswith("layernorm.weight"):
            array[7] /= 30
    return TinySource(spec, tensors)


def tiny_model(spec: ModelSpec, recipe: Recipe, seed: int = 0) -> Model:
    """A Model of random weights; native formats of the recipe come from random blocks."""
    layers = recipe.layers if parse_format(recipe.layers).is_native else None
    head = next((name for name in (recipe.head, recipe.embedding) if parse_format(name).is_native), None)
    return compress(tiny_source(spec, seed, layers, head), recipe)


def tiny_config(spec: ModelSpec) -> dict[str, Any]:
    """config.json of the spec."""
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
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": spec.tie_embeddings,
        "hidden_act": "gelu_pytorch_tanh" if spec.activation == "gelu_tanh" else "silu",
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": list(spec.eos_token_ids) or None,
        "torch_dtype": "float32",
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
    if spec.family == "gemma":
        config["hidden_activation"] = config["hidden_act"]
    return config


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level tokenizer of 3 special tokens, 256 bytes and 6 merges; `vocab_size` must hold these
    265."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    merges = [(pair[0], pair[1]) for pair in ("th", "er", "in", "an", "ou", "on")]
    for a, b in merges:
        vocabulary[a + b] = len(vocabulary)
    if len(vocabulary) > vocab_size:
        raise ValueError(f"a tiny vocabulary holds at least {len(vocabulary)} tokens, not {vocab_size}")
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def tiny_checkpoint_folder(folder: Path, spec: ModelSpec, seed: int = 0) -> Path:
    """A Hugging Face folder of the same weights as `tiny_source(spec, seed)`, made with the library
    itself."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tiny_config(spec), indent=2))
    save_file(tiny_tensors(spec, seed), folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, spec.vocab_size)
    return folder
