"""Checkpoint: a model as its author stored it, whatever the file; the *original* that all else is compared
with.

Weights go by their Hugging Face names, shapes and row order (`spec.weight_names`) and are read when asked
for: `array` gives float32, `native` the file's own integer codes. Opening reads headers only, and checks
there that every tensor the spec needs is in the file with its shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from flatout.core.files import corrupt, sha256_of, shown
from flatout.core.folder import check_shapes, open_folder
from flatout.core.gguf import GgufFile, open_gguf
from flatout.core.gguf_blocks import FLOATS, BlockTensor
from flatout.core.gguf_config import IGNORED, gguf_name, spec_from_gguf, unpermuted_rows
from flatout.core.quantized import QuantizedTensor
from flatout.core.sources import resolve
from flatout.core.spec import ModelSpec, weight_names
from flatout.core.tokenizer import Tokenizer
from flatout.errors import ModelFileError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class WeightReader(Protocol):
    """What each kind of file implements. Only names of `spec.weight_names` are asked for."""

    def array(self, name: str) -> np.ndarray: ...

    def native(self, name: str) -> QuantizedTensor | None: ...

    def forget(self) -> None: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """An opened model. files: the weight files that `sha256` covers; load_tokenizer: called on first use;
    notes: which weights cannot run as they are stored, and why."""

    spec: ModelSpec
    name: str
    path: Path
    files: tuple[Path, ...]
    reader: WeightReader
    load_tokenizer: Callable[[], Tokenizer]
    notes: tuple[str, ...] = ()
    _blocks: dict[str, BlockTensor] = field(default_factory=dict, init=False, repr=False)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Every weight, in the order of `spec.weight_names`; a tied head is not listed."""
        return tuple(weight_names(self.spec))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises ModelFileError when the model came without one."""
        return self.load_tokenizer()

    @functools.cached_property
    def sha256(self) -> str:
        """Hex SHA-256 of the weight file, or of the digests of several. Reads them whole the first time."""
        return sha256_of(self.files)

    def array(self, name: str) -> np.ndarray:
        """Weight `name` as float32: (N, K) for linears, (D,) for norms; the embedding for a tied head.

        Raises ModelFileError when the name is unknown or a value is not finite.
        """
        array = self.reader.array(self._stored(name))
        # Minimum and maximum carry NaN along and need no temporary array.
        if not (np.isfinite(array.min()) and np.isfinite(array.max())):
            raise corrupt(self.path, "weights must be finite", f"inf or nan in {name}")
        return array

    def native(self, name: str) -> QuantizedTensor | None:
        """Weight `name` as the codes in the file: q4_0, q4_1 or q8_0 blocks of a GGUF file, integer codes of
        a quantised folder; None when it is stored as floats or in a type without such a format."""
        name = self._stored(name)
        known = self._blocks.get(name)
        if known is not None:
            return known
        tensor = self.reader.native(name)
        if tensor is not None and not _is_finite(tensor):
            raise corrupt(self.path, "weights must be finite", f"inf or nan in the scales of {name}")
        if isinstance(tensor, BlockTensor):  # a view of the file, which takes no memory
            self._blocks[name] = tensor
        return tensor

    def blocks(self, name: str) -> tuple[str, np.ndarray] | None:
        """(type, uint8 bytes) of weight `name` as quantised in a GGUF file, whatever its type, in the file's
        own order of rows; None when it is stored as floats or in a folder."""
        reader = self.reader
        if not isinstance(reader, _GgufWeights):
            return None
        kind, raw = reader.file.stored(gguf_name(self._stored(name)))
        return None if kind in FLOATS else (kind, raw)

    def forget(self) -> None:
        """Give the files' pages back to the system; they are read anew when needed."""
        self.reader.forget()

    def _stored(self, name: str) -> str:
        if name == HEAD and self.spec.tie_embeddings:
            return EMBEDDING
        if name not in self.names:
            raise ModelFileError("the weight must be one of the model's", shown(name), EMBEDDING)
        return name


def _is_finite(tensor: QuantizedTensor) -> bool:
    if isinstance(tensor, BlockTensor):
        return tensor.is_finite
    arrays = (tensor.scales, tensor.minima)
    return all(array is None or bool(np.isfinite(array).all()) for array in arrays)


@dataclass(frozen=True, slots=True)
class _GgufWeights:
    """A GGUF file's tensors by Hugging Face name, in Hugging Face layout."""

    file: GgufFile
    spec: ModelSpec
    architecture: str

    def array(self, name: str) -> np.ndarray:
        array = self.file.float32(gguf_name(name))
        if self.architecture == "gemma" and array.ndim == 1:
            return array - np.float32(1.0)
        rows = unpermuted_rows(self.spec, self.architecture, name)
        return array if rows is None else array[rows]

    def native(self, name: str) -> BlockTensor | None:
        tensor = self.file.native(gguf_name(name))
        rows = unpermuted_rows(self.spec, self.architecture, name)
        if tensor is None or rows is None:
            return tensor
        return tensor.reordered(rows)

    def forget(self) -> None:
        self.file.forget()


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a GGUF file, a safetensors folder, a built-in model or a Hugging Face id.

    Raises ModelFileError or UnsupportedModelError naming the file; BackendError or ResourceError for
    downloads.
    """
    path = resolve(str(model))
    name = path.name if Path(model).exists() else str(model)
    if path.is_dir():
        folder = open_folder(path)
        return Checkpoint(
            spec=folder.spec,
            name=name,
            path=path,
            files=folder.files,
            reader=folder,
            load_tokenizer=lambda: Tokenizer.from_folder(path),
            notes=folder.notes,
        )
    if path.suffix == ".safetensors":
        raise ModelFileError(
            "a safetensors model is opened by its folder", shown(str(path), 300), shown(str(path.parent), 300)
        )
    file = open_gguf(path)
    spec = spec_from_gguf(file)
    check_shapes(
        path,
        {gguf_name(name): shape for name, shape in weight_names(spec).items()},
        {name: tensor.shape for name, tensor in file.tensors.items() if name not in IGNORED},
    )
    return Checkpoint(
        spec=spec,
        name=name,
        path=path,
        files=(path,),
        reader=_GgufWeights(file, spec, file.metadata["general.architecture"]),
        load_tokenizer=lambda: Tokenizer.from_gguf(file),
    )
