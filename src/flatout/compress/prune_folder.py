"""A pruned model written layer by layer: memory for one layer, and a kill at any point loses at most that
one.

Layer i becomes model-0000i-of-....safetensors, embedding, norm and head the last file, and index and
config.json come last of all, so an unfinished folder does not pose as a model. A layer's file is written in
one step under a key of everything it depends on; the next run takes it as it is where the key still holds.

bfloat16 zeros stay exactly zero, so the folder loads anywhere. packed: two of four are stored as values and
bit mask (core/sparse.py), 9 bits a weight for 16; flatout reads that, current transformers does not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from flatout.compress.method import Progress
from flatout.compress.prune import Layer, LinearReport, expected_names, pruned_layers
from flatout.core.checkpoint import Checkpoint, open_checkpoint
from flatout.core.coded import open_weights
from flatout.core.config import spec_to_config
from flatout.core.files import corrupt, write_bytes
from flatout.core.safetensors import from_bfloat16, open_safetensors, to_bfloat16, write_safetensors
from flatout.core.sparse import packed_tensors, sparsity_config
from flatout.core.sparsity import Sparsity
from flatout.core.spec import ModelSpec, weight_names
from flatout.errors import ConfigError, FlatoutError

_KEY = "flatout_pruned"


def prune_folder(
    source: Checkpoint,
    name: str,
    sparsity: Sparsity,
    documents: Sequence[np.ndarray],
    out: Path,
    *,
    packed: bool = False,
    progress: Progress | None = None,
) -> tuple[LinearReport, ...]:
    """Write `source`, pruned by `sparsity` (called `name`), as the folder `out` in bfloat16, and read it
    back.

    An unfinished folder of the same source, text and sparsity is gone on with. Raises ConfigError for a
    folder that holds anything else and for packed without two of four, ModelFileError when what is read
    back differs, and what pruning raises.
    """
    spec = source.spec
    if packed and (sparsity.kept, sparsity.of) != (2, 4):
        raise ConfigError("packed files hold two of four", name, "a -2:4 sparsity, or packed=False")
    key = _key(source, name, packed, documents)
    files = [f"model-{i + 1:05}-of-{spec.num_layers + 1:05}.safetensors" for i in range(spec.num_layers + 1)]
    _check_folder(out, files, key)
    out.mkdir(parents=True, exist_ok=True)
    reports: list[LinearReport] = []
    index: dict[str, str] = {}
    kept = [n for n in weight_names(spec) if n not in _linear_names(spec)]
    for layer in pruned_layers(
        source,
        sparsity,
        documents,
        progress,
        finished=lambda i: _finished(out / files[i], spec, i, key),
        stored=lambda weight: from_bfloat16(to_bfloat16(weight)),
    ):
        file = files[layer.index]
        if _finished(out / file, spec, layer.index, key) is None:
            _write_layer(out / file, layer, key, packed)
        _compare(out / file, layer)
        reports += layer.reports
        index |= dict.fromkeys(open_weights(out / file).names, file)
        source.forget()
    rest = {n: (to_bfloat16(source.array(n)), "BF16") for n in kept}
    write_safetensors(out / files[-1], rest, {"format": "pt", _KEY: json.dumps({"key": key})})
    index |= dict.fromkeys(rest, files[-1])
    config = spec_to_config(spec, "bfloat16")
    if packed:
        config["quantization_config"] = sparsity_config([] if spec.tie_embeddings else ["lm_head"])
    source.tokenizer.save(out)
    total = sum((out / f).stat().st_size for f in files)
    listing = {"metadata": {"total_size": total}, "weight_map": _stored_names(out, index)}
    write_bytes(out / "model.safetensors.index.json", (json.dumps(listing, indent=2) + "\n").encode())
    write_bytes(out / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    open_checkpoint(out)
    return tuple(reports)


def _linear_names(spec: ModelSpec) -> set[str]:
    return {name for i in range(spec.num_layers) for name in expected_names(spec, i)}


def _key(source: Checkpoint, name: str, packed: bool, documents: Sequence[np.ndarray]) -> str:
    """SHA-256 of everything that the files depend on."""
    digest = hashlib.sha256(f"{source.sha256} {name} {packed} {len(documents)}".encode())
    for document in documents:
        digest.update(np.asarray(document, dtype="<i8").tobytes() + b"|")
    return digest.hexdigest()


def _check_folder(out: Path, files: Sequence[str], key: str) -> None:
    if not out.exists():
        return
    found = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    first = out / files[0]
    ours = found <= {*files, "tokenizer.json", "tokenizer_config.json"} or not found
    if not ours or (found and first.exists() and _metadata(first).get("key") != key):
        raise ConfigError(
            "the output is a new folder, or an unfinished one of the same pruning", str(out), "another folder"
        )


def _metadata(path: Path) -> Mapping[str, object]:
    try:
        value = json.loads(open_weights(path).metadata.get(_KEY, "{}"))
    except (FlatoutError, ValueError):
        return {}  # a damaged file counts as not there: its layer is pruned again
    return value if isinstance(value, dict) else {}


def _finished(path: Path, spec: ModelSpec, index: int, key: str) -> Layer | None:
    """The layer in `path`, if it is whole and of the same pruning."""
    if not path.exists():
        return None
    about = _metadata(path)
    reports = about.get("reports")
    if about.get("key") != key or not isinstance(reports, list):
        return None
    file = open_weights(path)
    if {n: file.shape(n) for n in file.names} != expected_names(spec, index):
        return None
    weights = {n: file.float32(n) for n in file.names}
    return Layer(index=index, weights=weights, reports=tuple(LinearReport(**report) for report in reports))


def _write_layer(path: Path, layer: Layer, key: str, packed: bool) -> None:
    tensors: dict[str, np.ndarray | tuple[np.ndarray, str]] = {}
    for name, weight in layer.weights.items():
        bits = to_bfloat16(weight)
        if packed:
            module = name.removesuffix(".weight")
            for part, array in packed_tensors(module, bits).items():
                tensors[part] = (array, "BF16") if array.dtype == np.uint16 else array
        else:
            tensors[name] = (bits, "BF16")
    reports = [{"name": r.name, "zeros": r.zeros, "output_error": r.output_error} for r in layer.reports]
    about = json.dumps({"key": key, "reports": reports})
    write_safetensors(path, tensors, {"format": "pt", _KEY: about})


def _compare(path: Path, layer: Layer) -> None:
    file = open_weights(path)
    for name, weight in layer.weights.items():
        if not np.array_equal(file.array(name), to_bfloat16(weight)):
            raise corrupt(path, "a layer must read back as it was written", name)


def _stored_names(out: Path, index: Mapping[str, str]) -> dict[str, str]:
    """Every tensor as it is in the files, which for packed modules is not the weight's name."""
    return {name: file for file in sorted(set(index.values())) for name in open_safetensors(out / file).names}
