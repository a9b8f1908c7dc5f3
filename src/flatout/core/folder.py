"""A Hugging Face folder: config.json and one or several safetensors files, with float or quantised weights.

Quantised folders are read in compressed-tensors form (core/compressed_tensors.py). Every tensor's name and shape is
checked against config.json when the folder is opened; nothing of the model may go unused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flatout.core.compressed_tensors import from_tensors, read_values
from flatout.core.config import spec_from_config
from flatout.core.files import corrupt, read_json_object, shown
from flatout.core.quantization_config import Scheme, read_schemes
from flatout.core.quantized import QuantizedTensor
from flatout.core.safetensors import SafetensorsFile, open_safetensors
from flatout.core.spec import ModelSpec, weight_names
from flatout.errors import FlatoutError, ModelFileError, UnsupportedModelError

_QUANTISED_PARTS = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Folder:
    """An opened folder. owner: the file of each tensor; schemes: how each quantised module is stored."""

    path: Path
    spec: ModelSpec
    files: tuple[Path, ...]
    owner: Mapping[str, SafetensorsFile]
    schemes: Mapping[str, Scheme]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.owner)

    def dtype(self, name: str) -> str:
        return self._file(name).dtype(name)

    def raw(self, name: str) -> np.ndarray:
        return self._file(name).array(name)

    def array(self, name: str) -> np.ndarray:
        """Weight `name` of the spec as float32."""
        module = name.removesuffix(".weight")
        if module in self.schemes:
            return read_values(_Tensors(self), module, self.schemes[module], weight_names(self.spec)[name])
        return self._file(name).float32(name)

    def native(self, name: str) -> QuantizedTensor | None:
        """Weight `name` as the codes it is stored in; None for float weights."""
        module = name.removesuffix(".weight")
        if module not in self.schemes:
            return None
        return from_tensors(_Tensors(self), module, self.schemes[module], weight_names(self.spec)[name])

    def _file(self, name: str) -> SafetensorsFile:
        file = self.owner.get(name)
        if file is None:
            raise corrupt(self.path, "every weight must be in the folder", f"no tensor {shown(name)}")
        return file


@dataclass(frozen=True, slots=True)
class _Tensors:
    """The folder's tensors as stored, whichever file they are in."""

    folder: Folder

    @property
    def names(self) -> tuple[str, ...]:
        return self.folder.names

    def dtype(self, name: str) -> str:
        return self.folder.dtype(name)

    def array(self, name: str) -> np.ndarray:
        return self.folder.raw(name)

    def float32(self, name: str) -> np.ndarray:
        return self.folder._file(name).float32(name)
