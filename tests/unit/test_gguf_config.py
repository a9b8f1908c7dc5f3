"""GGUF metadata -> ModelSpec."""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.files import as_in_file, only_flatout_errors

from flatout.core.gguf import GgufFile, GgufTensor
from flatout.core.gguf_config import spec_from_gguf
from flatout.errors import FlatoutError, ModelFileError, UnsupportedModelError

NOTHING = mmap.mmap(-1, 1)
SOUND: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.embedding_length": 64,
    "llama.block_count": 2,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.context_length": 512,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def opened(metadata: dict[str, Any], *, head: bool = False, vocabulary: int = 100) -> GgufFile:
    shapes = {"token_embd.weight": (vocabulary, 64)} | ({"output.weight": (vocabulary, 64)} if head else {})
    tensors = {n: GgufTensor(name=n, type="F32", shape=s, offset=0, nbytes=0) for n, s in shapes.items()}
    kept = {key: value for key, value in metadata.items() if value is not None}
    return GgufFile(
        path=Path("m.gguf"), metadata=kept, tensors=tensors, mapped=NOTHING, data=np.zeros(0, np.uint8)
    )


def as_architecture(name: str, **more: Any) -> dict[str, Any]:
    renamed = {key.replace("llama.", f"{name}."): value for key, value in SOUND.items()}
    return renamed | {"general.architecture": name} | {f"{name}.{k}": v for k, v in more.items()}


def test_defaults_and_derived_values() -> None:
    spec = spec_from_gguf(opened(SOUND))
    assert (spec.family, spec.vocab_size, spec.head_dim, spec.num_kv_heads) == ("llama", 100, 16, 2)
    assert spec.rope_theta == 10000.0
    assert spec.rms_norm_eps == 1e-5  # the shortest decimal that is that float32
    assert spec.tie_embeddings
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2,))
    assert not spec_from_gguf(opened(SOUND, head=True)).tie_embeddings
    full_heads = spec_from_gguf(opened(SOUND | {"llama.attention.head_count_kv": None}))
    assert full_heads.num_kv_heads == 4
    windowed = spec_from_gguf(opened(SOUND | {"llama.attention.sliding_window": 8}))
    assert (windowed.family, windowed.sliding_window) == ("mistral", 8)


def test_families() -> None:
    assert spec_from_gguf(opened(as_architecture("qwen2"))).qkv_bias
    qwen3 = spec_from_gguf(opened(as_architecture("qwen3", **{"attention.key_length": 32})))
    assert qwen3.qk_norm
    assert qwen3.head_dim == 32
    gemma = spec_from_gguf(opened(as_architecture("gemma")))
    assert (gemma.activation, gemma.norm_offset, gemma.embedding_scale) == ("gelu_tanh", 1.0, math.sqrt(64))


def test_the_end_of_a_turn_ends_too() -> None:
    tokens = ["<unk>", "<s>", "</s>", "<|im_end|>", "<|eot_id|>"]
    words = {
        "tokenizer.ggml.tokens": as_in_file(tokens),
        "tokenizer.ggml.token_type": np.array([2, 3, 3, 3, 1], np.int32),
    }
    assert spec_from_gguf(opened(SOUND | words)).eos_token_ids == (
        2,
        3,
    )  # <|eot_id|> is no control token here
    assert spec_from_gguf(opened(SOUND | {"tokenizer.ggml.eot_token_id": 4})).eos_token_ids == (2, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"general.architecture": "falcon"},
            UnsupportedModelError,
            "general.architecture must be one of llama",
        ),
        ({"general.architecture": None}, UnsupportedModelError, "general.architecture must be one of llama"),
        (
            {"general.architecture": np.arange(2)},
            UnsupportedModelError,
            "general.architecture must be one of",
        ),
        ({"llama.block_count": None}, ModelFileError, "must hold the integer block_count"),
        ({"llama.block_count": "2"}, ModelFileError, "must hold the integer block_count"),
        ({"llama.block_count": np.array([2])}, ModelFileError, "must hold the integer block_count"),
        ({"llama.block_count": 1 << 40}, UnsupportedModelError, "num_layers must be between 1 and 1024"),
        ({"llama.attention.head_count": 0}, ModelFileError, "the model must have heads"),
        ({"llama.attention.head_count": [4, 4]}, ModelFileError, "the integer attention.head_count"),
        ({"llama.attention.value_length": 8}, UnsupportedModelError, "must be the head size 16"),
        ({"llama.rope.dimension_count": 8}, UnsupportedModelError, "must be the head size 16"),
        ({"llama.rope.scaling.type": "yarn"}, UnsupportedModelError, "RoPE scaling"),
        ({"llama.rope.freq_base": 0.0}, ModelFileError, "positive number rope.freq_base"),
        ({"llama.rope.freq_base": float("nan")}, ModelFileError, "positive number rope.freq_base"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, ModelFileError, "positive number attention.layer"),
        ({"split.count": 3}, UnsupportedModelError, "must be in one file; found: 3 parts"),
        ({"llama.attention.sliding_window": 0}, ModelFileError, "sliding_window must be at least 1"),
    ],
)
def test_what_is_not_understood_is_refused(
    change: dict[str, Any], error: type[FlatoutError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        spec_from_gguf(opened(SOUND | change))
    assert caught.value.remedy


def test_a_file_without_an_embedding_is_refused() -> None:
    file = opened(SOUND)
    del file.tensors["token_embd.weight"]
    with pytest.raises(ModelFileError, match=r"token_embd\.weight must be a matrix"):
        spec_from_gguf(file)


KEYS = [
    *SOUND, "llama.attention.key_length", "llama.rope.freq_base", "llama.rope.scaling.type",
    "llama.attention.sliding_window", "tokenizer.ggml.tokens", "tokenizer.ggml.token_type",
]  # fmt: skip
VALUES = (
    st.integers(-(1 << 63), (1 << 64) - 1) | st.integers(0, 70) | st.floats() | st.booleans()
    | st.text(max_size=4) | st.lists(st.integers(0, 9), max_size=3).map(np.array)
    | st.lists(st.text(max_size=3), max_size=3) | st.lists(st.booleans(), max_size=3)
)  # fmt: skip


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_fuzz_only_flatout_errors_escape(changes: dict[str, Any]) -> None:
    with only_flatout_errors():
        spec_from_gguf(opened(SOUND | changes))
