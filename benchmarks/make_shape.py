"""Make a GGUF file of random weights in the shape of a known model, for timings only.

    python benchmarks/make_shape.py OUT.gguf --shape tinyllama-1.1b --seed 0 --recipe w8a8 --folder OUT
    flatout bench OUT.gguf OUT --against llama.cpp --passages 0

Speed depends on a model's shape and formats, hardly on its values, so this shows how engines compare on a
model that nobody has to download. Its perplexity means nothing: do not score it. Layers are Q4_1, embedding
and head Q8_0, with uniform codes and scales that give the weights a standard deviation of about 0.02, so that
activations stay finite; norms are 1. Tokenizer and vocabulary are those of the built-in model's file. With
--recipe the same weights are also written as an artifact in another format, without search or certificate.

Needs the package gguf, which `pip install 'flatout[dev]'` brings.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from flatout.compress.apply import compress
from flatout.core.artifact import save_artifact
from flatout.core.checkpoint import open_checkpoint
from flatout.core.gguf import open_gguf
from flatout.errors import ConfigError, FlatoutError
from flatout.search.recipes import recipe_from_name

_DEVIATION = 0.02
_JITTER = 0.3  # scales of blocks differ by up to this share
_BLOCK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder of the llama architecture; its vocabulary is that of the tokenizer."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    positions: int = 2048
    rope_theta: float = 10000.0
    epsilon: float = 1e-5


SHAPES = {
    "tinyllama-1.1b": Shape(layers=22, hidden=2048, heads=32, kv_heads=4, intermediate=5632),
    "tiny": Shape(layers=2, hidden=128, heads=4, kv_heads=2, intermediate=256),
}


def q4_1(rows: int, columns: int, draw: np.random.Generator) -> np.ndarray:
    """uint8 (rows, bytes) of blocks d, m, 32 codes of 4 bits: weights d * q + m about zero."""
    count = rows * columns // _BLOCK
    blocks = np.empty((count, 20), dtype=np.uint8)
    scales = _scales(count, (16**2 - 1) / 12, draw)
    blocks[:, 0:2] = scales.view(np.uint8).reshape(-1, 2)
    blocks[:, 2:4] = (-7.5 * scales.astype(np.float32)).astype(np.float16).view(np.uint8).reshape(-1, 2)
    blocks[:, 4:] = draw.integers(0, 256, (count, 16), dtype=np.uint8)
    return blocks.reshape(rows, -1)


def q8_0(rows: int, columns: int, draw: np.random.Generator) -> np.ndarray:
    """uint8 (rows, bytes) of blocks d, 32 codes of 8 bits: weights d * q."""
    count = rows * columns // _BLOCK
    blocks = np.empty((count, 34), dtype=np.uint8)
    blocks[:, 0:2] = _scales(count, (255**2 - 1) / 12, draw).view(np.uint8).reshape(-1, 2)
    codes = draw.integers(-127, 128, (count, _BLOCK), dtype=np.int8)
    blocks[:, 2:] = codes.view(np.uint8)
    return blocks.reshape(rows, -1)


def _scales(count: int, variance: float, draw: np.random.Generator) -> np.ndarray:
    """float16 scales for codes of this variance."""
    spread = draw.uniform(1 - _JITTER, 1 + _JITTER, count)
    return np.asarray(_DEVIATION / variance**0.5 * spread, dtype=np.float16)


def matrices(shape: Shape, vocabulary: int) -> Iterator[tuple[str, int, int, Type]]:
    """(name, rows, columns, type) of every matrix."""
    kv = shape.hidden // shape.heads * shape.kv_heads
    yield "token_embd.weight", vocabulary, shape.hidden, Type.Q8_0
    yield "output.weight", vocabulary, shape.hidden, Type.Q8_0
    for layer in range(shape.layers):
        for name, rows, columns in (
            ("attn_q", shape.hidden, shape.hidden),
            ("attn_k", kv, shape.hidden),
            ("attn_v", kv, shape.hidden),
            ("attn_output", shape.hidden, shape.hidden),
            ("ffn_gate", shape.intermediate, shape.hidden),
            ("ffn_up", shape.intermediate, shape.hidden),
            ("ffn_down", shape.hidden, shape.intermediate),
        ):
            yield f"blk.{layer}.{name}.weight", rows, columns, Type.Q4_1


def write_shape(path: Path, shape: Shape, tokenizer: Mapping[str, Any], name: str, seed: int) -> None:
    """Write the model. tokenizer: metadata of a GGUF file, of which the tokenizer's keys are taken."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.positions)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    vocabulary = len(tokenizer["tokenizer.ggml.tokens"])
    writer.add_vocab_size(vocabulary)
    _copy_tokenizer(writer, tokenizer)
    norms = [f"blk.{i}.{part}.weight" for i in range(shape.layers) for part in ("attn_norm", "ffn_norm")]
    for norm in (*norms, "output_norm.weight"):
        writer.add_tensor(norm, np.ones(shape.hidden, dtype=np.float32))
    for matrix, rows, columns, kind in matrices(shape, vocabulary):
        draw = np.random.default_rng([seed, zlib.crc32(matrix.encode())])
        blocks = (q4_1 if kind == Type.Q4_1 else q8_0)(rows, columns, draw)
        writer.add_tensor(matrix, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_tokenizer(writer: gguf.GGUFWriter, metadata: Mapping[str, Any]) -> None:
    for key, value in metadata.items():
        if not key.startswith("tokenizer."):
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else list(value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tinyllama-1.1b")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recipe", help="formats of an artifact of the same weights, e.g. w8a8")
    parser.add_argument("--folder", type=Path, help="where the artifact goes")
    options = parser.parse_args()
    if (options.recipe is None) != (options.folder is None):
        raise ConfigError("--recipe and --folder come together", "one of them", "--recipe w8a8 --folder OUT")
    out: Path = options.out
    if out.suffix != ".gguf" or out.exists() or not out.absolute().parent.is_dir():
        raise ConfigError("the output is a new .gguf file in a folder that exists", str(out), "model.gguf")
    tokenizer = open_gguf(open_checkpoint("smollm2-135m").path).metadata
    name = f"random weights in the shape {options.shape}, seed {options.seed}"
    write_shape(out, SHAPES[options.shape], tokenizer, name, options.seed)
    print(f"{out}: {name}, {out.stat().st_size / 1e6:.0f} MB")
    if options.recipe is not None:
        checkpoint = open_checkpoint(out)
        recipe = recipe_from_name(options.recipe, checkpoint)
        save_artifact(compress(checkpoint, recipe), checkpoint.tokenizer, options.folder, {"source": name})
        print(f"{options.folder}: {recipe.name}")


if __name__ == "__main__":
    try:
        main()
    except FlatoutError as error:
        sys.exit(f"make_shape: {error}")
