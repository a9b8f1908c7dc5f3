"""config.json <-> ModelSpec, against transformers' own configuration classes."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.files import only_flatout_errors
from tests.tiny import llama3_scaling, tiny_spec

from flatout.core.config import ARCHITECTURES, spec_from_config, spec_to_config
from flatout.core.spec import RopeScaling
from flatout.errors import FlatoutError, ModelFileError, UnsupportedModelError

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def config_class(family: str) -> Any:
    import transformers

    return {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "gemma": transformers.GemmaConfig,
    }[family]


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_transformers_reads_what_is_written(family: str) -> None:
    spec = tiny_spec(family, rope_theta=5e5, eos_token_ids=(2, 7))
    config = config_class(family).from_dict(json.loads(json.dumps(spec_to_config(spec, "float32"))))
    assert config.architectures == [ARCHITECTURES[family]]
    assert config.vocab_size == spec.vocab_size
    assert config.hidden_size == spec.hidden_size
    assert config.intermediate_size == spec.intermediate_size
    assert config.num_hidden_layers == spec.num_layers
    assert config.num_attention_heads == spec.num_heads
    assert config.num_key_value_heads == spec.num_kv_heads
    assert config.head_dim == spec.head_dim
    assert config.max_position_embeddings == spec.max_positions
    assert config.rms_norm_eps == spec.rms_norm_eps
    assert config.tie_word_embeddings == spec.tie_embeddings
    assert config.rope_parameters["rope_theta"] == 5e5
    assert config.rope_parameters["rope_type"] == "default"
    assert config.bos_token_id == 1
    assert config.eos_token_id == [2, 7]
    assert str(config.dtype).endswith("float32")
    if family == "mistral":
        assert config.sliding_window == spec.sliding_window == 8


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "llama3"])
def test_a_spec_survives_our_file_and_transformers(family: str, scaled: bool) -> None:
    spec = tiny_spec(family, rope_scaling=llama3_scaling() if scaled else None)
    ours = json.loads(json.dumps(spec_to_config(spec)))
    assert spec_from_config(ours) == spec
    theirs = json.loads(config_class(family).from_dict(ours).to_json_string())
    assert spec_from_config(theirs) == spec


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_what_a_file_leaves_out_has_the_default_of_transformers(family: str) -> None:
    sizes = {k: v for k, v in LLAMA.items() if k != "model_type"} | {"num_attention_heads": 32}
    full = json.loads(config_class(family)(**sizes).to_json_string(use_diff=False))
    sparse = sizes | {"model_type": family}
    assert spec_from_config(sparse) == spec_from_config(full)


def test_gemma_peculiarities() -> None:
    spec = spec_from_config(LLAMA | {"model_type": "gemma", "hidden_act": "gelu", "num_key_value_heads": 1})
    assert spec.activation == "gelu_tanh"
    assert spec.norm_offset == 1.0
    assert spec.embedding_scale == math.sqrt(64)
    assert spec.tie_embeddings


def test_nulls_of_mistral_and_heads() -> None:
    spec = spec_from_config(
        LLAMA
        | {"model_type": "mistral", "sliding_window": None, "num_key_value_heads": None, "head_dim": None}
    )
    assert spec.sliding_window is None
    assert spec.num_kv_heads == 4
    assert spec.head_dim == 16


def test_end_tokens_of_both_files_are_joined() -> None:
    spec = spec_from_config(LLAMA | {"eos_token_id": 5}, {"eos_token_id": [7, 5, 9]})
    assert spec.eos_token_ids == (5, 7, 9)
    assert spec_from_config(LLAMA | {"eos_token_id": None, "bos_token_id": None}).eos_token_ids == ()


def test_llama3_scaling_in_both_spellings() -> None:
    numbers = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    expected = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64)
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **numbers}}
    new = LLAMA | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **numbers}}
    for config in (old, new):
        spec = spec_from_config(config)
        assert spec.rope_scaling == expected
        assert spec.rope_theta == 5e5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "gpt2"}, UnsupportedModelError, "model_type must be one of llama, mistral"),
        ({"model_type": None}, UnsupportedModelError, "model_type must be one of"),
        ({"model_type": ["llama"]}, UnsupportedModelError, "model_type must be one of"),
        ({"hidden_act": "relu"}, UnsupportedModelError, "hidden_act = silu; found: hidden_act = relu"),
        ({"attention_bias": True}, UnsupportedModelError, "attention_bias = False"),
        ({"mlp_bias": True}, UnsupportedModelError, "mlp_bias = False"),
        ({"partial_rotary_factor": 0.5}, UnsupportedModelError, "partial_rotary_factor = 1.0"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, UnsupportedModelError, "default or llama3"),
        ({"rope_scaling": 4}, ModelFileError, "rope_scaling must be an object"),
        ({"rope_scaling": {"rope_type": "llama3"}}, ModelFileError, "factor must be a positive"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            ModelFileError,
            "low_freq_factor < high_freq_factor",
        ),
        (
            {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True},
            UnsupportedModelError,
            "use_sliding_window",
        ),
        (
            {"model_type": "qwen3", "num_key_value_heads": 2, "layer_types": ["sliding_attention"]},
            UnsupportedModelError,
            "same attention",
        ),
        ({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 0}, ModelFileError, "window"),
        ({"hidden_size": None}, ModelFileError, "hidden_size must be an integer"),
        ({"hidden_size": "64"}, ModelFileError, "hidden_size must be an integer"),
        ({"model_type": "gemma", "hidden_size": 10**400}, ModelFileError, "hidden_size must be an integer"),
        ({"hidden_size": True}, ModelFileError, "hidden_size must be an integer"),
        ({"hidden_size": 66}, ModelFileError, "num_attention_heads must divide hidden_size"),
        ({"num_attention_heads": 0}, ModelFileError, "num_attention_heads must divide hidden_size"),
        ({"num_hidden_layers": 10**9}, UnsupportedModelError, "num_layers must be between 1 and 1024"),
        ({"vocab_size": -1}, UnsupportedModelError, "vocab_size must be between"),
        ({"num_key_value_heads": 3}, UnsupportedModelError, "multiple of num_kv_heads"),
        ({"head_dim": 15}, UnsupportedModelError, "head_dim must be even"),
        ({"rms_norm_eps": float("nan")}, ModelFileError, "rms_norm_eps must be a positive number"),
        ({"rope_theta": 0}, ModelFileError, "rope_theta must be a positive number"),
        ({"tie_word_embeddings": "yes"}, ModelFileError, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": "2"}, ModelFileError, "eos_token_id must be a token id"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(
    change: dict[str, Any], error: type[FlatoutError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        spec_from_config(LLAMA | change)
    assert caught.value.remedy


KEYS = [
    *LLAMA, "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rope_parameters",
    "rms_norm_eps", "eos_token_id", "sliding_window", "layer_types", "hidden_act", "tie_word_embeddings",
]  # fmt: skip


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    st.dictionaries(
        st.sampled_from(KEYS),
        st.recursive(
            st.none()
            | st.booleans()
            | st.just(10**400)
            | st.integers()
            | st.integers(-1, 70)
            | st.floats()
            | st.text(max_size=4),
            lambda inner: (
                st.lists(inner, max_size=2)
                | st.dictionaries(
                    st.sampled_from(["rope_type", "type", "factor", "rope_theta"]), inner, max_size=3
                )
            ),
            max_leaves=4,
        ),
        max_size=5,
    ),
    st.sampled_from(list(ARCHITECTURES)),
)
def test_fuzz_only_flatout_errors_escape(changes: dict[str, Any], family: str) -> None:
    with only_flatout_errors():
        spec = spec_from_config(LLAMA | {"model_type": family} | changes, changes)
        assert spec_from_config(json.loads(json.dumps(spec_to_config(spec)))) == spec
