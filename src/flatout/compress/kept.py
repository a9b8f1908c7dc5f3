"""Kept work: a model is rounded layer by layer, and what is done survives the end of the process.

Finished layers are files of their weights; a last file holds the calibration text's activations behind
them. All replace their predecessors as a whole, so that a process killed at any moment leaves a state from
which the next goes on. Work belongs to a recipe, a text and a method by the key of all three, and to a model
by the hash of each layer's own weights.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from flatout.compress.method import Data
from flatout.core.files import write_bytes
from flatout.core.formats import Recipe
from flatout.core.fuse import Source, float_weight
from flatout.core.quantized import QuantizedTensor, flat_arrays, from_flat_arrays
from flatout.core.types import to_json

EVERY_S = 15.0  # seconds of work that may be lost; the state is tens of megabytes
_VERSION = 1
Arrays = Mapping[str, np.ndarray]


class Kept:
    """The kept work of one run. Without a folder (`data.keep`) nothing is kept and nothing found."""

    def __init__(self, source: Source, data: Data, recipe: Recipe, method: str) -> None:
        self._source = source
        digest = hashlib.sha256(
            json.dumps([_VERSION, method, to_json(recipe.renamed("")), to_json(source.spec)]).encode()
        )
        for document in data.documents:
            digest.update(len(document).to_bytes(8, "little") + document.astype("<i8").tobytes())
        self._key = digest.hexdigest()
        self._folder = None if data.keep is None else data.keep / self._key[:32]
        self._unsaved: dict[int, dict[str, QuantizedTensor]] = {}
        self._saved_at = time.monotonic()

    def load(self) -> tuple[list[dict[str, QuantizedTensor]], Arrays]:
        """Weights of the layers that are done and the state behind them; ([], {}) if nothing fits."""
        if self._folder is None:
            return [], {}
        try:
            state = _read(self._folder / "state.npz")
            layers = []
            for layer in range(int(state["layers"])):
                arrays = _read(self._folder / f"layer-{layer}.npz")
                if str(arrays["source"]) != self._digest(layer):
                    return [], {}
                layers.append(from_flat_arrays(arrays))
        except (OSError, ValueError, KeyError, BadZipFile):  # absent, or not whole
            return [], {}
        return layers, state

    def save(self, layer: int, weights: Mapping[str, QuantizedTensor], state: Arrays) -> None:
        """Keep `layer`, counted from 0, and the state behind it, if some time has passed since the last layer
        that was. Raises ResourceError for a full disk."""
        if self._folder is None:
            return
        self._unsaved[layer] = dict(weights)
        if time.monotonic() - self._saved_at < EVERY_S:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        for index, kept in self._unsaved.items():
            arrays = {**flat_arrays(kept), "source": np.array(self._digest(index))}
            _write(self._folder / f"layer-{index}.npz", arrays)
        _write(self._folder / "state.npz", {**state, "layers": np.array(layer + 1)})
        self._unsaved, self._saved_at = {}, time.monotonic()

    def done(self) -> None:
        """Forget the work, once the model is whole."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            with suppress(OSError):  # other work is kept beside it
                self._folder.parent.rmdir()

    def _digest(self, layer: int) -> str:
        """Of the layer's own float weights."""
        digest = hashlib.sha256()
        for linear in self._source.spec.linears():
            digest.update(np.ascontiguousarray(float_weight(self._source, f"layers.{layer}.{linear}")).data)
        return digest.hexdigest()


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _write(path: Path, arrays: Arrays) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes(path, buffer.getvalue())
