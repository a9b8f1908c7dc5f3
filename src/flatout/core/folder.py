"""A Hugging Face folder: config.json and one or several safetensors files, with float or quantised weights.

Quantised folders are read in compressed-tensors form (core/compressed_tensors.py), and in those of GPTQ and
AWQ (core/gptq_awq.py). Every tensor's name and
shape is checked against config.json when the folder is opened; nothing of the model may go unused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flatout.core.coded import open_weights
from flatout.core.compressed_tensors import from_tensors
from flatout.core.config import spec_from_config, spec_to_config
from flatout.core.files import corrupt, read_json_object, shown, write_bytes
from flatout.core.gptq_awq import (
    METHODS,
    PARTS,
    PackedModule,
    packed_module,
    packed_tensor,
    packed_values,
    read_packing,
)
from flatout.core.quantization_config import Scheme, read_schemes
from flatout.core.quantized import QuantizedTensor
from flatout.core.safetensors import SafetensorsFile, to_bfloat16, write_safetensors
from flatout.core.spec import ModelSpec, weight_names
from flatout.core.tokenizer import Tokenizer
from flatout.errors import FlatoutError, ModelFileError, UnsupportedModelError

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_QUANTISED_PARTS = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


@dataclass(frozen=True, slots=True)
class Shards:
    """The tensors of several safetensors files as if they were one; owner: tensor name -> its file."""

    folder: Path
    files: tuple[Path, ...]
    owner: Mapping[str, SafetensorsFile]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.owner)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(name).shape(name)

    def dtype(self, name: str) -> str:
        return self._file(name).dtype(name)

    def array(self, name: str) -> np.ndarray:
        return self._file(name).array(name)

    def float32(self, name: str) -> np.ndarray:
        return self._file(name).float32(name)

    def _file(self, name: str) -> SafetensorsFile:
        file = self.owner.get(name)
        if file is None:
            raise corrupt(self.folder, "every weight must be in the folder", f"no tensor {shown(name)}")
        return file


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Folder:
    """An opened folder. files: its weight files; schemes, packed: how each quantised module (no ".weight") is
    stored, in compressed-tensors form or as GPTQ or AWQ."""

    spec: ModelSpec
    files: tuple[Path, ...]
    tensors: Shards
    schemes: Mapping[str, Scheme]
    packed: Mapping[str, PackedModule]

    @property
    def notes(self) -> tuple[str, ...]:
        """What cannot run as it is stored, a line for each reason."""
        counts = Counter(module.reason for module in self.packed.values() if module.reason)
        return tuple(
            f"{count} of {len(self.packed)} quantised weights are dequantised and run in bf16, because no "
            f"integer format here holds {reason}"
            for reason, count in counts.items()
        )

    def array(self, name: str) -> np.ndarray:
        """Weight `name` of the spec as float32."""
        module = self.packed.get(name.removesuffix(".weight"))
        if module is not None:
            try:
                return packed_values(self.tensors, module)
            except FlatoutError as error:
                raise _located(error, self.tensors.folder) from error
        quantised = self.native(name)
        return self.tensors.float32(name) if quantised is None else quantised.dequantize()

    def native(self, name: str) -> QuantizedTensor | None:
        """Weight `name` as the integer codes it is stored in; None for float weights."""
        module = name.removesuffix(".weight")
        scheme, packed = self.schemes.get(module), self.packed.get(module)
        try:
            if packed is not None:
                return packed_tensor(self.tensors, packed)
            if scheme is None:
                return None
            return from_tensors(self.tensors, module, scheme, weight_names(self.spec)[name])
        except FlatoutError as error:
            raise _located(error, self.tensors.folder) from error

    def forget(self) -> None:
        """Give the files' pages back to the system; they are read anew when needed."""
        for file in {id(file): file for file in self.tensors.owner.values()}.values():
            file.forget()


def open_folder(path: Path) -> Folder:
    """Open and check a folder. Raises ModelFileError or UnsupportedModelError naming it or the file at
    fault."""
    config_path = path / "config.json"
    if not config_path.exists():
        raise ModelFileError(
            "a model folder must hold config.json",
            f"none in {shown(str(path), 300)}",
            "a full copy, or a GGUF file",
        )
    config = read_json_object(config_path)
    generation = path / "generation_config.json"
    spec = spec_from_config(
        config,
        read_json_object(generation) if generation.exists() else None,
        shown(str(config_path), 300),
    )
    tensors = open_shards(path)
    quantization = _quantization(config, config_path)
    packed = _packed(quantization, spec, tensors, path)
    schemes = {} if packed else _schemes(quantization, spec, config_path)
    _check_tensors(path, spec, tensors, schemes, packed)
    return Folder(spec=spec, files=tensors.files, tensors=tensors, schemes=schemes, packed=packed)


def open_shards(path: Path) -> Shards:
    """The tensors of a folder's safetensors files. Raises ModelFileError or UnsupportedModelError."""
    files = _weight_files(path)
    owner: dict[str, SafetensorsFile] = {}
    for file in files:
        for name in file.names:
            if name in owner:
                raise corrupt(file.path, "a tensor must be in one file only", name)
            owner[name] = file
    return Shards(path, tuple(f.path for f in files), owner)


def _weight_files(path: Path) -> list[SafetensorsFile]:
    """The folder's safetensors files: those of the index if there is one, otherwise model.safetensors."""
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if index.exists():
        places = read_json_object(index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
            raise corrupt(index, "weight_map must map tensors to files", places)
        names = sorted(set(places.values()))
        outside = [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]
        if outside:
            raise corrupt(index, "weight_map must name safetensors files beside it", outside[0])
        files = [open_weights(path / n) for n in names]
        held = {(tensor, file.path.name) for file in files for tensor in file.entries}
        for tensor, place in places.items():
            if (tensor, place) not in held:
                raise corrupt(index, f"{place} must hold the tensors that the index lists", tensor)
        return files
    if single.exists():
        return [open_weights(single)]
    pickled = sorted(p.name for p in path.glob("*.bin"))
    if pickled:
        raise UnsupportedModelError(
            "weights must be safetensors, because pickled files can run code",
            f"{shown(pickled[0])} in {shown(str(path), 300)}",
            "save the model with safe_serialization=True",
        )
    raise ModelFileError(
        "a model folder must hold model.safetensors or its index",
        f"neither in {shown(str(path), 300)}",
        "a full copy, or a GGUF file",
    )


def _quantization(config: dict[str, Any], config_path: Path) -> dict[str, Any] | None:
    """What quantised the weights: by config.json, or by the file that older GPTQ folders have beside it."""
    quantization = config.get("quantization_config")
    older = config_path.parent / "quantize_config.json"
    if quantization is None and older.exists():
        quantization = {"quant_method": "gptq"} | read_json_object(older)
    if quantization is not None and not isinstance(quantization, dict):
        raise corrupt(config_path, "quantization_config must be an object", quantization)
    return quantization


def _packed(
    quantization: dict[str, Any] | None, spec: ModelSpec, tensors: Shards, path: Path
) -> dict[str, PackedModule]:
    """The modules of a GPTQ or AWQ folder that are quantised: those that have packed codes."""
    if quantization is None or quantization.get("quant_method") not in METHODS:
        return {}
    found = {}
    try:
        packing = read_packing(quantization)
        for name, shape in weight_names(spec).items():
            module = name.removesuffix(".weight")
            if len(shape) == 2 and f"{module}.qweight" in tensors.owner:
                found[module] = packed_module(tensors, module, packing, shape)
    except FlatoutError as error:
        raise _located(error, path) from error
    if not found:
        raise corrupt(path, "a quantised folder must hold quantised weights", "no qweight")
    return found


def _schemes(quantization: dict[str, Any] | None, spec: ModelSpec, config_path: Path) -> dict[str, Scheme]:
    """The scheme of every quantised module; none for a float model."""
    if quantization is None:
        return {}
    matrices = [name for name, shape in weight_names(spec).items() if len(shape) == 2]
    try:
        schemes = read_schemes(quantization, [name.removesuffix(".weight") for name in matrices])
        for scheme in set(schemes.values()):
            _ = scheme.format
    except FlatoutError as error:
        raise _located(error, config_path) from error
    return schemes


def _located(error: FlatoutError, path: Path) -> FlatoutError:
    """The same error, naming the file or folder it is about."""
    where = shown(str(path), 300)
    value = error.value if where in error.value else f"{error.value} in {where}"
    return type(error)(error.rule, value, error.remedy)


def _check_tensors(
    path: Path,
    spec: ModelSpec,
    tensors: Shards,
    schemes: Mapping[str, Scheme],
    packed: Mapping[str, PackedModule],
) -> None:
    """Float weights by name and shape, quantised modules by name; shapes in compressed-tensors form are
    checked when read."""
    expected = weight_names(spec)
    stored = {*schemes, *packed}
    floats = {n: shape for n, shape in expected.items() if n.removesuffix(".weight") not in stored}
    names = tensors.owner
    for module in schemes:
        has_codes = f"{module}.weight" in names or f"{module}.weight_packed" in names
        if not has_codes or f"{module}.weight_scale" not in names:
            raise ModelFileError(
                "a quantised module needs codes and scales",
                f"not both of {module} in {shown(str(path), 300)}",
                "a full copy",
            )
    quantised = {f"{module}.{part}" for module in schemes for part in _QUANTISED_PARTS}
    quantised |= {f"{module}.{part}" for module in packed for part in PARTS}
    # AutoGPTQ wrote a bias beside every weight, of zeros where the model has none.
    biases = [f"{module}.bias" for module in packed if f"{module}.bias" not in expected]
    quantised |= {name for name in biases if name in names and not tensors.float32(name).any()}
    found = {n: tensors.shape(n) for n in tensors.names if n not in quantised}
    if spec.tie_embeddings and _HEAD in found and _EMBEDDING in floats:
        _check_tied(path, tensors)
        del found[_HEAD]
    # Old files keep the rotary frequencies, which the spec holds.
    check_shapes(path, floats, {n: s for n, s in found.items() if not n.endswith("rotary_emb.inv_freq")})


def _check_tied(path: Path, tensors: Shards) -> None:
    """A tied head that is in the file all the same must be the embedding: which one is meant cannot be
    guessed."""
    embedding, head = tensors.array(_EMBEDDING), tensors.array(_HEAD)
    if embedding.dtype != head.dtype or not np.array_equal(embedding, head):
        raise corrupt(
            path,
            "a tied lm_head.weight must equal the embedding",
            "another head",
            "set tie_word_embeddings to false in config.json if the head is meant",
        )


def check_shapes(
    path: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise unless `found` has every expected tensor with its shape, and no other."""
    wrong = [f"no {n}" for n in expected if n not in found]
    wrong += [
        f"{n} has shape {found[n]} instead of {shape}"
        for n, shape in expected.items()
        if found.get(n, shape) != shape
    ]
    if wrong:
        raise ModelFileError(
            "tensors must match the model's configuration",
            f"{_some(wrong)} in {shown(str(path), 300)}",
            "weights and configuration of the same model",
        )
    extra = [shown(n) for n in found if n not in expected]
    if extra:
        raise UnsupportedModelError(
            "every tensor must be one that the architecture uses",
            f"{_some(extra)} in {shown(str(path), 300)}",
            "a model without them",
        )


def _some(items: list[str]) -> str:
    return ", ".join(items[:2]) + (f" and {len(items) - 2} more" if len(items) > 2 else "")


def write_folder(
    folder: Path,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    weights: Mapping[str, np.ndarray],
    dtype: str = "float32",
) -> None:
    """Write float32 `weights` (`spec.weight_names`) as a folder that exists, which transformers loads.

    dtype: "float32", or "bfloat16" to round them to that.
    """
    config = json.dumps(spec_to_config(spec, dtype), indent=2) + "\n"
    write_bytes(folder / "config.json", config.encode())
    tokenizer.save(folder)
    stored: Mapping[str, np.ndarray | tuple[np.ndarray, str]] = weights
    if dtype == "bfloat16":
        stored = {name: (to_bfloat16(array), "BF16") for name, array in weights.items()}
    write_safetensors(folder / "model.safetensors", stored, {"format": "pt"})
