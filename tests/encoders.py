"""Tiny random encoders for tests: a spec, its tensors, an EncoderModel, and a folder of the usual files."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flatout.compress.encoder import compress_encoder
from flatout.core.encoder import EncoderModel, EncoderSpec, encoder_weight_names
from flatout.core.encoder_folder import open_encoder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "sea", "was", "grey", "and", "##s", "cold", "a", "ship"]


def tiny_encoder_spec(**changes: Any) -> EncoderSpec:
    """Two layers of two heads of 32; position table of 512."""
    spec = EncoderSpec(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=144,
        num_layers=2,
        num_heads=2,
        max_positions=512,
    )
    return replace(spec, **changes)


def tiny_encoder_tensors(spec: EncoderSpec, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 weights by Hugging Face name: linears of variance 1/K, norms near one, biases small."""
    tensors = {}
    for name, shape in encoder_weight_names(spec).items():
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        values = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 2 and "embeddings" not in name:
            values *= np.float32(1.5 / np.sqrt(shape[1]))
        elif name.endswith("LayerNorm.weight"):
            values = np.float32(1) + np.float32(0.1) * values
        elif len(shape) == 1:
            values *= np.float32(0.1)
        tensors[name] = values
    return tensors


def tiny_encoder_folder(
    folder: Path,
    spec: EncoderSpec,
    seed: int = 0,
    *,
    prefix: str = "",
    config: dict[str, Any] | None = None,
    pooling: str | None = "mean_tokens",
    max_seq_length: int | None = 12,
) -> Path:
    """A folder as sentence-transformers writes it; pooling None leaves its files out. `config` changes
    config.json."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "max_position_embeddings": spec.max_positions,
        "type_vocab_size": spec.type_vocab_size,
        "layer_norm_eps": spec.layer_norm_eps,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(values | (config or {})))
    tensors = {prefix + name: values for name, values in tiny_encoder_tensors(spec, seed).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=128)  # as sentence-transformers' own files have it: must not matter
    tokenizer.save(str(folder / "tokenizer.json"))
    if pooling is not None:
        kinds = ("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")
        modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir(exist_ok=True)
        modes = {f"pooling_mode_{m}": m == pooling for m in ("cls_token", "mean_tokens", "max_tokens")}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    if max_seq_length is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_seq_length}))
    return folder


def tiny_encoder(folder: Path, spec: EncoderSpec, name: str, seed: int = 0) -> EncoderModel:
    """The folder's weights in format `name`; written first if it is not there."""
    if not folder.exists():
        tiny_encoder_folder(folder, spec, seed)
    return compress_encoder(open_encoder(folder), name)


def packed(spec: EncoderSpec, lengths: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens of sequences of these lengths, one after the other, and where each starts."""
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int32)
    return rng.integers(0, spec.vocab_size, sum(lengths)).astype(np.int32), starts
