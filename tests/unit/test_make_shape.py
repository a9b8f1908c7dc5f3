"""benchmarks/make_shape.py: files of random weights that engines read, run and stay finite on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.make_shape import SHAPES, Shape, matrices, q4_1, q8_0, write_shape

from flatout.core.checkpoint import open_checkpoint
from flatout.core.gguf import open_gguf
from flatout.core.gguf_blocks import dequantize
from flatout.engine.load import load
from flatout.engine.score import score_documents

TINY = SHAPES["tiny"]
LETTERS = [chr(code) for code in range(33, 127)]
TOKENIZER: dict[str, Any] = {
    "general.name": "not taken",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|end|>", *LETTERS, "ab"],
    "tokenizer.ggml.token_type": np.array([3] + [1] * (1 + len(LETTERS)), dtype=np.int32),
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.add_bos_token": False,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("shape") / "tiny.gguf"
    write_shape(file, TINY, TOKENIZER, "a name", seed=0)
    return file


@pytest.mark.parametrize(("blocks", "kind"), [(q4_1, "Q4_1"), (q8_0, "Q8_0")])
def test_weights_are_spread_about_zero(blocks: Any, kind: str) -> None:
    values = dequantize(kind, blocks(64, 256, np.random.default_rng(0)).reshape(-1))
    assert values.std() == pytest.approx(0.02, rel=0.05)
    assert abs(values.mean()) < 4 * 0.02 / values.size**0.5
    assert len(np.unique(values)) > 1000  # blocks differ in their scales


def test_the_file_holds_the_shape_and_the_tokenizer(path: Path) -> None:
    file, checkpoint = open_gguf(path), open_checkpoint(path)
    spec = checkpoint.spec
    assert (spec.num_layers, spec.hidden_size, spec.intermediate_size) == (2, 128, 256)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.max_positions) == (4, 2, 32, 2048)
    assert spec.vocab_size == 2 + len(LETTERS)
    assert not spec.tie_embeddings
    assert file.metadata["general.name"] == "a name"
    for key, value in TOKENIZER.items():
        if key.startswith("tokenizer."):
            np.testing.assert_array_equal(file.metadata[key], value)
    kinds = {name: tensor.type for name, tensor in file.tensors.items()}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert {kinds[f"blk.1.{part}.weight"] for part in ("attn_q", "attn_v", "ffn_down")} == {"Q4_1"}


def test_the_same_seed_gives_the_same_file(path: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_shape(tmp_path / f"{seed}.gguf", TINY, TOKENIZER, "a name", seed)
    assert (tmp_path / "0.gguf").read_bytes() == path.read_bytes()
    assert (tmp_path / "1.gguf").read_bytes() != path.read_bytes()


def test_activations_stay_finite(path: Path) -> None:
    runner = load(path, threads=1, max_tokens=256).runner
    scores = score_documents(runner, [list(range(1, 60))])[0]
    assert np.isfinite(scores).all()
    assert scores.std() > 0


def test_tinyllama_has_as_many_weights_as_its_name_says() -> None:
    shape: Shape = SHAPES["tinyllama-1.1b"]
    count = sum(rows * columns for _, rows, columns, _ in matrices(shape, 32000))
    assert count == pytest.approx(1.1e9, rel=0.001)
