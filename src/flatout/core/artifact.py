"""The artifact: an ordinary Hugging Face folder that also says how it was made and what was measured.

    config.json         the architecture, with quantization_config (core/compressed_tensors.py)
    model.safetensors   weights by Hugging Face name; bf16 linears as BF16, norms and biases as F32
    tokenizer files     as transformers reads them
    flatout.json        recipe, who loads it, sha256 of the files above, and whatever the caller adds:
                        measurements, certificate, provenance

A quantised embedding and head of a tied model are two modules to other tools, so config.json then says they
are not tied and both are stored; `flatout.json` remembers. Loading checks every hash and shape and needs
neither PyTorch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flatout.core.coded import open_weights
from flatout.core.compressed_tensors import from_tensors, to_tensors
from flatout.core.config import spec_from_config, spec_to_config
from flatout.core.files import map_file, read_json_object, sha256_of, write_atomic
from flatout.core.formats import Format, Recipe, parse_format
from flatout.core.fuse import source_names
from flatout.core.later import Later
from flatout.core.model import Model, OnDemand, Weight, equal, expected_weights
from flatout.core.portable import loads_in
from flatout.core.quantization_config import EMBEDDING, HEAD, cannot_express, to_config
from flatout.core.quantized import QuantizedTensor, concatenate_rows
from flatout.core.safetensors import SafetensorsFile, to_bfloat16, write_safetensors
from flatout.core.scratch import replace_folder, scratch_folder
from flatout.core.spec import ModelSpec, weight_names
from flatout.core.tokenizer import Tokenizer
from flatout.core.types import to_json
from flatout.errors import ConfigError, FlatoutError, ModelFileError, ResourceError

MANIFEST = "flatout.json"
_WEIGHTS = "model.safetensors"
_VERSION = 1
_OWN_KEYS = ("artifact", "recipe", "tied", "head_is_embedding", "loads_in", "files")

Stored = np.ndarray | tuple[np.ndarray, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where the two ends of the model are stored. tied: they share weights in the original; shared: and in
    the file."""

    tied: bool
    shared: bool


def is_artifact(path: str | Path) -> bool:
    """Whether `path` is a folder that flatout wrote."""
    return (Path(path) / MANIFEST).is_file()


def save_artifact(model: Model, tokenizer: Tokenizer, out: str | Path, manifest: Mapping[str, Any]) -> Path:
    """Write `model` and `tokenizer` as the folder `out`, all or nothing, and return its path.

    `manifest` (JSON values and dataclasses) joins flatout.json beside our own keys. An existing artifact is
    replaced; any other non-empty folder is refused. Raises ConfigError for that and ResourceError when the
    disk is too small or not writable.
    """
    import shutil

    out = Path(out).absolute()
    _refuse_own_keys(manifest)
    check_output(out)
    layout = _layout(model)
    tensors = _tensors(model, layout)
    size = sum((t[0] if isinstance(t, tuple) else t).nbytes for t in tensors.values())
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < size + (32 << 20):
            raise ResourceError(
                f"the folder needs {size / 1e6:.0f} MB and 32 MB for the rest",
                f"{free / 1e6:.0f} MB free",
                "another disk",
            )
        with scratch_folder(out.parent, f".{out.name}.flatout-") as temporary:
            folder = temporary / "artifact"
            folder.mkdir()
            _write_folder(folder, model, tokenizer, layout, tensors, manifest)
            replace_folder(folder, out)
    except OSError as error:
        raise ResourceError(
            "the output folder must be writable", f"{out}: {error}", "another folder"
        ) from error
    return out


def _refuse_own_keys(manifest: Mapping[str, Any]) -> None:
    clash = sorted(set(manifest) & set(_OWN_KEYS))
    if clash:
        raise ConfigError(
            f"flatout.json keeps {', '.join(_OWN_KEYS)} for itself", ", ".join(clash), "other names"
        )


def check_output(out: str | Path) -> None:
    """Raise ConfigError unless `out` is free: absent, an empty folder or an artifact of ours."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ConfigError("the output is a folder", f"{out} is a file", "another name")
    if out.is_dir() and not is_artifact(out) and any(out.iterdir()):
        raise ConfigError("only an artifact is overwritten", f"{out} holds other files", "an empty folder")


def update_manifest(path: str | Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Set keys of an artifact's flatout.json (measurements, certificate) and return the whole."""
    _refuse_own_keys(changes)
    file = Path(path) / MANIFEST
    manifest = read_json_object(file) | {key: to_json(value) for key, value in changes.items()}
    _write_json(file, manifest)
    return manifest


def _write_folder(
    folder: Path,
    model: Model,
    tokenizer: Tokenizer,
    layout: _Layout,
    tensors: Mapping[str, Stored],
    manifest: Mapping[str, Any],
) -> None:
    spec, recipe = model.spec, model.recipe
    formats = [fmt for name, _, fmt in expected_weights(spec, recipe) if not name.endswith(("norm", "bias"))]
    config = spec_to_config(
        replace(spec, tie_embeddings=layout.shared),
        "float32" if any(f.name == "fp32" for f in formats) else "bfloat16",
    )
    quantization = to_config(spec, recipe)
    if quantization is not None:
        config["quantization_config"] = quantization
    _write_json(folder / "config.json", config)
    write_safetensors(folder / _WEIGHTS, tensors, {"format": "pt"})
    tokenizer.save(folder)
    files = sorted(p for p in folder.iterdir() if p.is_file())
    own = {
        "artifact": _VERSION,
        "recipe": to_json(recipe),
        "tied": layout.tied,
        "head_is_embedding": layout.shared,
        "loads_in": loads_in(spec, recipe),
        "files": {p.name: sha256_of([p]) for p in files},
    }
    _write_json(folder / MANIFEST, own | {key: to_json(value) for key, value in manifest.items()})


def _layout(model: Model) -> _Layout:
    """A tied pair is stored once where nobody else would misread it: as floats, or in a folder that is ours
    alone."""
    spec, recipe = model.spec, model.recipe
    same = spec.tie_embeddings and equal(model.weights["embedding"], model.weights["head"])
    quantised = parse_format(recipe.embedding).is_integer
    return _Layout(
        tied=spec.tie_embeddings, shared=same and (not quantised or bool(cannot_express(spec, recipe)))
    )


def _parts(spec: ModelSpec, fused: str) -> list[tuple[str, int]]:
    """(tensor name, rows) of each part of a fused weight as stored, in row order."""
    if fused == "head":
        return [(f"{HEAD}.weight", spec.vocab_size)]
    shapes = weight_names(spec)
    return [(name, shapes[name][0]) for name in source_names(spec, fused)]


def _tensors(model: Model, layout: _Layout) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for fused, _, fmt in expected_weights(model.spec, model.recipe):
        if fused == "head" and layout.shared:
            continue
        weight, start = model.weights[fused], 0
        for name, rows in _parts(model.spec, fused):
            stop = start + rows
            if isinstance(weight, QuantizedTensor):
                module = name.removesuffix(".weight")
                tensors |= to_tensors(module, weight.rows(start, stop), is_table=module == EMBEDDING)
            elif fmt.name == "bf16":
                tensors[name] = (to_bfloat16(weight[start:stop]), "BF16")
            else:
                tensors[name] = np.asarray(weight[start:stop], dtype=np.float32)
            start = stop
    return tensors


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    write_atomic(path, write)


def load_artifact(path: str | Path) -> tuple[Model, Tokenizer, dict[str, Any]]:
    """(model, tokenizer, flatout.json) of an artifact folder, after checking every hash.

    The weights are read, and their shapes checked, when they are asked for. Raises ModelFileError for a
    folder that is not an artifact, or that was changed since it was written.
    """
    path = Path(path)
    if not is_artifact(path):
        raise ModelFileError(
            "an artifact is a folder with flatout.json", str(path), "a folder that `flatout optimize` wrote"
        )
    manifest = read_json_object(path / MANIFEST)
    files = _files(path, manifest)
    weights = files.pop(_WEIGHTS)
    for name, expected in files.items():
        _check_file(path / name, sha256_of([path / name]), expected)
    mapped = map_file(path / _WEIGHTS)
    digest = Later(lambda: hashlib.sha256(mapped).hexdigest())
    tokenizer = Tokenizer.from_folder(path)
    _check_file(path / _WEIGHTS, digest.get(), weights)
    mapped.close()
    config = read_json_object(path / "config.json")
    spec = replace(spec_from_config(config, where=str(path / "config.json")), tie_embeddings=manifest["tied"])
    recipe = recipe_from_json(manifest.get("recipe"))
    layout = _Layout(tied=manifest["tied"], shared=manifest["head_is_embedding"])
    file = open_weights(path / _WEIGHTS)

    def read(fused: str, shape: tuple[int, ...], fmt: Format) -> Weight:
        return _read(file, spec, "embedding" if fused == "head" and layout.shared else fused, shape, fmt)

    model = Model(spec=spec, recipe=recipe, weights=OnDemand(spec, recipe, read, file.forget))
    return model, tokenizer, manifest


def _files(path: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """The artifact's files by name, with the SHA-256 of each."""
    where = str(path / MANIFEST)
    files = manifest.get("files")
    sound = (
        isinstance(files, dict)
        and all(isinstance(manifest.get(key), bool) for key in ("tied", "head_is_embedding"))
        and {"config.json", _WEIGHTS} <= set(files)
    )
    if manifest.get("artifact") != _VERSION or not sound or not isinstance(files, dict):
        raise ModelFileError(
            f"flatout.json must be of version {_VERSION} and whole", where, "re-create the artifact"
        )
    for name in files:
        if Path(name).name != name:
            raise ModelFileError(
                "files of an artifact lie in its folder", f"{name!r} in {where}", "re-create it"
            )
    return dict(files)


def _check_file(file: Path, found: str, expected: str) -> None:
    if found != expected:
        raise ModelFileError(
            "files must be as they were written", f"{file} has changed", "re-create the artifact"
        )


def recipe_from_json(value: Any) -> Recipe:
    """The Recipe that `to_json` wrote. Raises ModelFileError for anything else."""
    texts = ("name", "layers", "embedding", "head", "kv_cache", "method")
    later = {"sparsity": "", "structure": []}  # artifacts written before these existed lack them
    value = later | value if isinstance(value, dict) else {}
    sound = (
        set(value) == {*texts, "overrides", *later}
        and all(isinstance(value[key], str) for key in (*texts, "sparsity"))
        and _pairs(value["overrides"], str)
        and _pairs(value["structure"], int)
    )
    if not sound:
        raise ModelFileError(
            f"a recipe has {', '.join(texts)}, overrides", str(value)[:120], "re-create the artifact"
        )
    pairs = {key: tuple((name, what) for name, what in value[key]) for key in ("overrides", "structure")}
    try:
        return Recipe(**{**value, **pairs})
    except FlatoutError as error:
        raise ModelFileError("a recipe must be valid", str(error), "re-create the artifact") from error


def _pairs(value: Any, kind: type) -> bool:
    """Whether `value` is a list of [text, `kind`]."""
    return isinstance(value, list) and all(
        isinstance(pair, list) and [type(item) for item in pair] == [str, kind] for pair in value
    )


def _read(file: SafetensorsFile, spec: ModelSpec, fused: str, shape: tuple[int, ...], fmt: Format) -> Weight:
    if fmt.is_integer:
        parts = [
            from_tensors(file, name.removesuffix(".weight"), fmt, (rows, shape[1]))
            for name, rows in _parts(spec, fused)
        ]
        return parts[0] if len(parts) == 1 else concatenate_rows(parts)
    floats = [file.float32(name) for name, _ in _parts(spec, fused)]
    return floats[0] if len(floats) == 1 else np.concatenate(floats)
