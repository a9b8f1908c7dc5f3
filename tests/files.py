"""Model files for tests: GGUF bytes made by hand, so that any number in them can be wrong, and whole GGUF
models made with the package `gguf`."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from flatout.core.gguf import Strings
from flatout.core.spec import ModelSpec
from flatout.errors import FlatoutError

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


@contextlib.contextmanager
def only_flatout_errors() -> Iterator[None]:
    """For fuzzing: a FlatoutError that says what to do is a good end, every other exception is not."""
    try:
        yield
    except FlatoutError as error:
        if not (error.rule and error.remedy):
            raise AssertionError("an error needs a rule and a remedy") from error


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, payload: bytes) -> bytes:
    """One metadata pair; kinds: 4 u32, 5 i32, 6 f32, 7 bool, 8 string, 9 array."""
    return string(key) + struct.pack("<I", kind) + payload


def info(name: str, sizes: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    """One tensor info; sizes are fastest first, kind 0 is F32."""
    head = string(name) + struct.pack("<I", len(sizes))
    return head + struct.pack(f"<{len(sizes)}QIQ", *sizes, kind, offset)


def gguf_bytes(
    pairs: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensors: int | None = None,
    metadata: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A GGUF file. `tensors` and `metadata` replace the true counts in the header."""
    counts = (len(infos) if tensors is None else tensors, len(pairs) if metadata is None else metadata)
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(infos)
    return header + b"\0" * (-len(header) % alignment if data else 0) + data


def gguf_name(name: str) -> str:
    """GGUF's name of Hugging Face tensor `name`."""
    stem, what = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        layer, rest = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{NAMES[rest]}.{what}"
    return f"{NAMES[stem]}.{what}"


def interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's q or k rows in the order of GGUF's llama architecture."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def write_gguf_model(
    path: Path,
    spec: ModelSpec,
    tensors: Mapping[str, np.ndarray],
    types: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    tokens: Sequence[str] | None = None,
) -> Path:
    """A GGUF model of `spec` from Hugging Face tensors. types: GGUF name -> type, F32 where it is silent."""
    architecture = "llama" if spec.family == "mistral" else spec.family
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_layer_norm_rms_eps(spec.rms_norm_eps)
    if spec.sliding_window is not None:
        writer.add_sliding_window(spec.sliding_window)
    writer.add_bos_token_id(spec.bos_token_id or 0)
    writer.add_eos_token_id(spec.eos_token_ids[0])
    if tokens is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(list(tokens))
        writer.add_token_types([1] * len(tokens))
        writer.add_token_merges(["a b"])
    for name, value in tensors.items():
        stored = value
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            stored = interleave(value, spec.num_heads if "q_proj" in name else spec.num_kv_heads)
        if spec.norm_offset and name.endswith("norm.weight"):
            stored = stored + np.float32(spec.norm_offset)
        kind = (types or {}).get(gguf_name(name), gguf.GGMLQuantizationType.F32)
        _add(writer, gguf_name(name), stored, kind)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, name: str, value: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
    if kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, np.ascontiguousarray(value))
    else:
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(value), kind), raw_dtype=kind)


def as_in_file(value: Any) -> Any:
    """A list of strings as an opened GGUF file has it, anything else as it is."""
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        return value
    words = [word.encode() for word in value]
    mapped = mmap.mmap(-1, 8 + sum(8 + len(word) for word in words))
    mapped.write(b"".join(struct.pack("<Q", len(word)) + word for word in words))
    starts = list(itertools.accumulate((8 + len(word) for word in words), initial=8))
    return Strings(path=Path("t.gguf"), what="words", mapped=mapped, starts=starts)
