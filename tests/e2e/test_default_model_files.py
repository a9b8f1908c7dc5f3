"""The built-in model's file, read here and by independent libraries."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from tests.files import gguf_name, interleave

from flatout.core.checkpoint import Checkpoint, open_checkpoint
from flatout.core.config import spec_to_config
from flatout.core.spec import weight_names
from flatout.core.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "Count: 1, 2, 345 🙂"}]
TEXTS = [
    "Gravity is the force that pulls things together.",
    "  two  spaces\n\n\tTab 12345 naïve café 数字 🙂👩‍👩‍👧 e\u0301 \ufffd\x00",
    "I'll don't WE'RE <|im_start|>user\nhi<|im_end|>\n",
    "",
    " ",
]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint("smollm2-135m")


def test_spec_and_hash(checkpoint: Checkpoint) -> None:
    spec = checkpoint.spec
    assert (spec.family, spec.vocab_size, spec.hidden_size, spec.intermediate_size) == (
        "llama",
        49152,
        576,
        1536,
    )
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (30, 9, 3, 64)
    assert (spec.rope_theta, spec.rms_norm_eps, spec.max_positions) == (100000.0, 1e-5, 8192)
    assert spec.tie_embeddings
    assert spec.eos_token_ids == (2,)
    assert spec.num_parameters() == 134_515_008
    assert checkpoint.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def test_weights_equal_those_of_the_package_gguf_and_their_native_codes(checkpoint: Checkpoint) -> None:
    tensors = {t.name: t for t in gguf.GGUFReader(checkpoint.path).tensors}
    kinds: dict[str, int] = {}
    formats = set()
    for name, shape in weight_names(checkpoint.spec).items():
        tensor = tensors.pop(gguf_name(name))
        kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + 1
        if ".layers." in name and name.split(".")[2] not in ("0", "17", "29"):
            continue
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        got = checkpoint.array(name)
        assert got.shape == shape
        stored = got
        if "q_proj" in name or "k_proj" in name:
            stored = interleave(got, 9 if "q_proj" in name else 3)
        np.testing.assert_array_equal(stored, expected, err_msg=name)
        native = checkpoint.native(name)
        if native is not None:
            formats.add(native.format.name)
            np.testing.assert_array_equal(native.dequantize(), got, err_msg=name)
    assert not tensors
    assert kinds == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert formats == {"q4_1", "q8_0"}


def test_tokens_round_trip_and_special_tokens_are_one_id(checkpoint: Checkpoint) -> None:
    tokenizer = checkpoint.tokenizer
    assert tokenizer.vocab_size == checkpoint.spec.vocab_size
    assert (tokenizer.bos, tokenizer.eos, tokenizer.adds_bos) == (1, 2, False)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_start|>") == [1]
    assert [tokenizer.decode([i]) for i in tokenizer.encode("x12345")] == ["x", "1", "2", "3", "4", "5"]


def test_transformers_loads_the_saved_tokenizer_and_agrees(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = checkpoint.tokenizer
    ours.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(spec_to_config(checkpoint.spec)))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(CHAT) == expected
    assert expected.endswith("<|im_start|>assistant\n")
    assert Tokenizer.from_folder(tmp_path).sha256 == ours.sha256
