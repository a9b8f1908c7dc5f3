"""Checkpoint: a model as its author stored it, whatever the file; the *original* that everything is compared
with.

Weights go by their Hugging Face names, shapes and row order (`spec.weight_names`) and are read when asked
for: `array` gives float32, `native` the file's own integer codes where a kernel takes them as they are.
Opening reads headers only; every name and shape the spec needs is checked then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flatout.core.config import spec_from_config
from flatout.core.files import corrupt, read_json_object, sha256_of, shown
from flatout.core.gguf import GgufFile, open_gguf
from flatout.core.gguf_config import IGNORED, gguf_name, spec_from_gguf, unpermuted_rows
from flatout.core.quantized import QuantizedTensor
from flatout.core.safetensors import SafetensorsFile, open_safetensors
from flatout.core.sources import resolve
from flatout.core.spec import ModelSpec, weight_names
from flatout.core.tokenizer import Tokenizer
from flatout.errors import ModelFileError, UnsupportedModelError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class WeightReader(Protocol):
    """What a kind of file implements; names are Hugging Face's, and only names of the spec are asked for."""

    def array(self, name: str) -> np.ndarray: ...

    def native(self, name: str) -> QuantizedTensor | None: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """An opened model. files: the weight files that `sha256` covers; load_tokenizer: called on first use."""

    spec: ModelSpec
    name: str
    path: Path
    files: tuple[Path, ...]
    reader: WeightReader
    load_tokenizer: Callable[[], Tokenizer]

    @property
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
        if array.size and not (np.isfinite(array.min()) and np.isfinite(array.max())):
            raise corrupt(self.path, "weights must be finite", f"inf or nan in {name}")
        return array

    def native(self, name: str) -> QuantizedTensor | None:
        """Weight `name` as the codes in the file (q4_0, q4_1, q8_0...), or None when it has no such codes."""
        return self.reader.native(self._stored(name))

    def _stored(self, name: str) -> str:
        if name == HEAD and self.spec.tie_embeddings:
            return EMBEDDING
        if name not in weight_names(self.spec):
            raise ModelFileError("the weight must be one of the model's", shown(name), EMBEDDING)
        return name


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a GGUF file, a safetensors folder, a built-in model or a Hugging Face id.

    Raises ModelFileError or UnsupportedModelError naming the file; BackendError or ResourceError for
    downloads.
    """
    path = resolve(str(model))
    if path.is_dir():
        return _open_folder(path, str(model))
    if path.suffix == ".safetensors":
        return _open_folder(path.parent, str(model))
    return _open_gguf(path, str(model))


@dataclass(frozen=True, slots=True)
class _GgufReader:
    file: GgufFile
    spec: ModelSpec
    architecture: str

    def array(self, name: str) -> np.ndarray:
        array = self.file.float32(gguf_name(name))
        if self.architecture == "gemma" and array.ndim == 1:
            return array - np.float32(1.0)
        rows = unpermuted_rows(self.spec, self.architecture, name)
        return array if rows is None else array[rows]

    def native(self, name: str) -> QuantizedTensor | None:
        tensor = self.file.native(gguf_name(name))
        rows = unpermuted_rows(self.spec, self.architecture, name)
        if tensor is None or rows is None:
            return tensor
        return replace(
            tensor,
            codes=tensor.codes[rows],
            scales=tensor.scales[rows],
            minima=None if tensor.minima is None else tensor.minima[rows],
        )


def _open_gguf(path: Path, name: str) -> Checkpoint:
    file = open_gguf(path)
    spec = spec_from_gguf(file)
    shapes = {name: tensor.shape for name, tensor in file.tensors.items() if name not in IGNORED}
    _check_shapes(path, {gguf_name(n): shape for n, shape in weight_names(spec).items()}, shapes)
    return Checkpoint(
        spec=spec,
        name=name,
        path=path,
        files=(path,),
        reader=_GgufReader(file, spec, file.metadata["general.architecture"]),
        load_tokenizer=lambda: Tokenizer.from_gguf(file),
    )


@dataclass(frozen=True, slots=True)
class _FolderReader:
    owner: dict[str, SafetensorsFile]

    def array(self, name: str) -> np.ndarray:
        return self.owner[name].float32(name)

    def native(self, name: str) -> QuantizedTensor | None:
        return None


def _open_folder(folder: Path, name: str) -> Checkpoint:
    config_path = folder / "config.json"
    if not config_path.exists():
        raise ModelFileError(
            "a model folder must hold config.json",
            f"none in {shown(str(folder), 300)}",
            "a GGUF file or a full folder",
        )
    config = read_json_object(config_path)
    generation = folder / "generation_config.json"
    spec = spec_from_config(
        config, read_json_object(generation) if generation.exists() else None, shown(str(config_path), 300)
    )
    files = _weight_files(folder)
    owner: dict[str, SafetensorsFile] = {}
    for file in files:
        for tensor in file.names:
            if tensor in owner:
                raise corrupt(file.path, "a tensor must be in one file only", tensor)
            owner[tensor] = file
    shapes = {n: f.shape(n) for n, f in owner.items() if not n.endswith("rotary_emb.inv_freq")}
    _check_shapes(folder, weight_names(spec), shapes)
    return Checkpoint(
        spec=spec,
        name=name,
        path=folder,
        files=tuple(file.path for file in files),
        reader=_FolderReader(owner),
        load_tokenizer=lambda: Tokenizer.from_folder(folder),
    )


def _weight_files(folder: Path) -> list[SafetensorsFile]:
    """The folder's safetensors files: those of the index if there is one, otherwise model.safetensors."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        places = read_json_object(index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
            raise corrupt(index, "weight_map must map tensors to files", places)
        names = sorted(set(places.values()))
        outside = [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]
        if outside:
            raise corrupt(index, "weight_map must name safetensors files beside it", outside[0])
        files = [open_safetensors(folder / n) for n in names]
        held = {(tensor, file.path.name) for file in files for tensor in file.names}
        for tensor, place in places.items():
            if (tensor, place) not in held:
                raise corrupt(index, f"{place} must hold the tensors the index lists", tensor)
        return files
    if single.exists():
        return [open_safetensors(single)]
    pickled = sorted(p.name for p in folder.glob("*.bin"))
    if pickled:
        raise UnsupportedModelError(
            "weights must be safetensors, because pickled files can run code",
            f"{shown(pickled[0])} in {shown(str(folder), 300)}",
            "save the model with safe_serialization=True",
        )
    raise ModelFileError(
        "a model folder must hold model.safetensors or its index",
        f"neither in {shown(str(folder), 300)}",
        "a full copy",
    )


def _check_shapes(
    path: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]
) -> None:
    """Every expected tensor with its shape and no other, so that nothing of the model goes unused."""
    wrong = [f"no {n}" for n in expected if n not in found]
    wrong += [
        f"{n} has shape {found[n]} instead of {shape}"
        for n, shape in expected.items()
        if found.get(n, shape) != shape
    ]
    if wrong:
        raise corrupt(
            path, "tensors must match the model's configuration", _some(wrong), "a file and config that match"
        )
    extra = [n for n in found if n not in expected]
    if extra:
        raise UnsupportedModelError(
            "every tensor must be one that the architecture uses",
            f"{_some([shown(n) for n in extra])} in {shown(str(path), 300)}",
            "a model without them",
        )


def _some(items: list[Any]) -> str:
    return ", ".join(items[:2]) + (f" and {len(items) - 2} more" if len(items) > 2 else "")
