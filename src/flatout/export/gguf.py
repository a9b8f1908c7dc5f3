"""A Model as a GGUF file for llama.cpp and everything built on it.

Names and layouts are those of core/gguf_config.py turned around: q and k rows of the llama architecture
interleaved, Gemma's norms plus one. Weights keep their numbers wherever GGUF has blocks for them
(core/gguf_write.py); float weights are written as BF16 or F32, or, where the model's own file has them in
blocks that no format here is (Q4_K, Q5_K, Q6_K, Q5_0, Q5_1), as those bytes. The file is read back before it
counts: spec, every weight, and how a text is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from flatout.core.checkpoint import Checkpoint, open_checkpoint
from flatout.core.files import corrupt
from flatout.core.formats import Format
from flatout.core.fuse import source_names
from flatout.core.gguf_config import frequency_divisors, gguf_name, unpermuted_rows
from flatout.core.gguf_write import (
    OutTensor,
    Value,
    block_kind,
    float_blocks,
    is_exact,
    weight_blocks,
    write_gguf,
)
from flatout.core.model import Model, Weight, equal, expected_weights
from flatout.core.quantized import QuantizedTensor
from flatout.core.safetensors import from_bfloat16, to_bfloat16
from flatout.core.spec import ModelSpec, weight_names
from flatout.core.tokenizer import Tokenizer
from flatout.errors import UnsupportedModelError
from flatout.export.gguf_tokenizer import tokenizer_metadata

_PROBE = (
    "The 3 quick-brown foxes' den, isn't it?\n\n\tdef f(x): return x**2  # caf\u00e9 \u4f60\u597d "
    "\U0001f98a 12345"
)
"""Text whose tokens are compared: contractions, digits, indents, accents, and characters without a token."""


Stored = Callable[[str], tuple[str, np.ndarray] | None]
"""(type, uint8 bytes) of the blocks that a float weight was read from, by Hugging Face name, in the order of
rows of the file; None for one that was stored as floats (Checkpoint.blocks)."""


def nothing_stored(name: str) -> None:
    """The Stored of a model that did not come from a GGUF file."""


def write_model(
    model: Model, tokenizer: Tokenizer, path: Path, name: str, stored: Stored = nothing_stored
) -> int:
    """Write `model` as a GGUF file called `name` in its metadata; returns how many weights are not exactly
    their numbers (minima rounded to float16).

    stored: blocks that are written in place of a matrix in a float format, whose numbers they must be.

    Raises UnsupportedModelError for a model, a format or a tokenizer that GGUF cannot say, before anything is
    written, and ModelFileError, leaving no file, when what is read back is another model.
    """
    spec = model.spec
    architecture = _architecture(spec)
    metadata = _metadata(spec, architecture, name) | tokenizer_metadata(tokenizer, spec.vocab_size)
    tied = spec.tie_embeddings and equal(model.weights["embedding"], model.weights["head"])
    tensors: list[OutTensor] = []
    inexact = 0
    for fused, _, fmt in expected_weights(spec, model.recipe):
        if fused == "head" and tied:
            continue
        start = 0
        for part, rows in parts_of(spec, fused):
            piece = _Piece(model, architecture, fused, part, start, start + rows)
            blocks = None if fmt.is_integer else stored(part)
            tensors.append(piece.tensor(fmt) if blocks is None else piece.as_stored(*blocks))
            inexact += piece.is_rounded
            start += rows
    if spec.rope_scaling is not None:
        divisors = frequency_divisors(spec.rope_scaling, spec.head_dim, spec.rope_theta).astype(np.float32)
        tensors.append(_floats("rope_freqs.weight", divisors.shape, "F32", lambda: divisors))
    write_gguf(path, metadata, tensors)
    try:
        _read_back(path, model, tokenizer, tied, stored)
    except Exception:
        path.unlink()
        raise
    return inexact


def _architecture(spec: ModelSpec) -> str:
    if (
        spec.family == "mistral"
        and spec.sliding_window is not None
        and spec.sliding_window < spec.max_positions
    ):
        raise UnsupportedModelError(
            "llama.cpp runs the llama architecture without a sliding window",
            f"a window of {spec.sliding_window} in {spec.max_positions} positions",
            "--to folder",
        )
    return "llama" if spec.family == "mistral" else spec.family


def _metadata(spec: ModelSpec, architecture: str, name: str) -> dict[str, Value]:
    sizes: dict[str, Value] = {
        "vocab_size": spec.vocab_size,
        "context_length": spec.max_positions,
        "embedding_length": spec.hidden_size,
        "block_count": spec.num_layers,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.num_heads,
        "attention.head_count_kv": spec.num_kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "rope.dimension_count": spec.head_dim,
        "rope.freq_base": float(spec.rope_theta),
        "attention.layer_norm_rms_epsilon": float(spec.rms_norm_eps),
    }
    general: dict[str, Value] = {"general.architecture": architecture, "general.name": name}
    return general | {f"{architecture}.{key}": value for key, value in sizes.items()}


def parts_of(spec: ModelSpec, fused: str) -> list[tuple[str, int]]:
    """(Hugging Face name, rows) of each part; a head that is written apart has its own name."""
    if fused == "head":
        return [("lm_head.weight", spec.vocab_size)]
    shapes = weight_names(spec)
    return [(name, shapes[name][0]) for name in source_names(spec, fused)]


class _Piece:
    """Rows start..stop of a fused weight: one tensor of the file."""

    def __init__(self, model: Model, architecture: str, fused: str, part: str, start: int, stop: int) -> None:
        self._model, self._fused, self._part = model, fused, part
        self._rows = slice(start, stop)
        rows = unpermuted_rows(model.spec, architecture, part)
        # Row i of the model is row rows[i] of the file.
        self._order = None if rows is None else np.argsort(rows)
        self.is_rounded = False

    def _read(self) -> Weight:
        weight = self._model.weights[self._fused]
        if isinstance(weight, QuantizedTensor):
            weight = weight.rows(self._rows.start, self._rows.stop)
            return weight if self._order is None else _reordered(weight, self._order)
        part = weight[self._rows]
        return part if self._order is None else part[self._order]

    def tensor(self, fmt: Format) -> OutTensor:
        name, weight = gguf_name(self._part), self._read()
        if isinstance(weight, QuantizedTensor):
            self.is_rounded = not is_exact(weight)
            kind = block_kind(weight)
            return OutTensor(name=name, shape=weight.shape, kind=kind, make=lambda: _blocks(self._read()))
        kind = "BF16" if fmt.name == "bf16" and weight.ndim == 2 else "F32"
        return _floats(name, weight.shape, kind, self._values)

    def as_stored(self, kind: str, raw: np.ndarray) -> OutTensor:
        shape = (self._rows.stop - self._rows.start, self._model.weights[self._fused].shape[1])
        return OutTensor(name=gguf_name(self._part), shape=shape, kind=kind, make=lambda: raw)

    def _values(self) -> np.ndarray:
        weight = self._read()
        assert isinstance(weight, np.ndarray)
        offset = self._model.spec.norm_offset if self._part.endswith("norm.weight") else 0.0
        return weight + np.float32(offset)


def _floats(name: str, shape: tuple[int, ...], kind: str, values: Callable[[], np.ndarray]) -> OutTensor:
    return OutTensor(name=name, shape=shape, kind=kind, make=lambda: float_blocks(values(), kind))


def _blocks(weight: Weight) -> np.ndarray:
    assert isinstance(weight, QuantizedTensor)
    return weight_blocks(weight)


def _reordered(weight: QuantizedTensor, order: np.ndarray) -> QuantizedTensor:
    return QuantizedTensor(
        format=weight.format,
        codes=weight.codes[order],
        scales=weight.scales[order],
        zeros=None if weight.zeros is None else weight.zeros[order],
        minima=None if weight.minima is None else weight.minima[order],
    )


def _read_back(path: Path, model: Model, tokenizer: Tokenizer, tied: bool, stored: Stored) -> None:
    """Raise ModelFileError unless the file is the model it was written from."""
    spec, again = model.spec, open_checkpoint(path)
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
        if getattr(again.spec, key) != getattr(spec, key):
            raise corrupt(path, f"{key} must read back as it was written", getattr(again.spec, key))
    for fused, _, fmt in expected_weights(spec, model.recipe):
        if fused == "head" and tied:
            continue
        weight, start = model.weights[fused], 0
        for part, rows in parts_of(again.spec, fused):
            stop = start + rows
            piece = weight.rows(start, stop) if isinstance(weight, QuantizedTensor) else weight[start:stop]
            _compare(path, again, piece, part, fmt.name == "bf16" and stored(part) is None)
            start = stop
    if again.tokenizer.encode(_PROBE) != tokenizer.encode(_PROBE):
        raise UnsupportedModelError(
            "the tokenizer must read back as it was written", "another cut of the probe text", "--to folder"
        )


def _compare(path: Path, again: Checkpoint, weight: Weight, part: str, rounds: bool) -> None:
    """rounds: whether floats are written as bf16."""
    found = again.array(part)
    if isinstance(weight, QuantizedTensor):
        # A minimum rounded to float16 moves weights by at most 2^-11 of the 31 steps that it can be.
        steps = weight.scales.astype(np.float32).max() * 31 * 2.0**-11 if not is_exact(weight) else 0.0
        same = np.abs(found - weight.dequantize()).max() <= steps
    elif weight.ndim == 2:
        same = np.array_equal(found, from_bfloat16(to_bfloat16(weight)) if rounds else weight)
    else:  # Gemma's norms are stored plus one
        same = np.allclose(found, weight, rtol=0, atol=1e-6 if again.spec.norm_offset else 0)
    if not same:
        raise corrupt(path, "every weight must read back as it was written", part)
