"""An encoder's folder: config.json, safetensors, tokenizer.json, and what sentence-transformers adds.

modules.json and 1_Pooling/config.json say how token states become one vector; sentence_bert_config.json how
many tokens a text keeps. A folder without them is pooled by the mean, not normalised, and keeps max_positions
tokens, as sentence-transformers itself reads such a folder.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import tokenizers

from flatout.core.artifact import MANIFEST, check_output
from flatout.core.config import ConfigReader
from flatout.core.encoder import (
    MODEL_TYPES,
    EncoderSpec,
    encoder_spec_from_config,
    encoder_weight_names,
    fused_tensors,
)
from flatout.core.files import (
    corrupt,
    parse_json_object,
    read_json_object,
    read_text,
    sha256_of,
    shown,
    write_bytes,
)
from flatout.core.folder import Shards, check_shapes, open_shards
from flatout.core.quantized import QuantizedTensor, flat_arrays, from_flat_arrays
from flatout.core.scratch import replace_folder, scratch_folder
from flatout.core.sources import resolve
from flatout.core.types import to_json
from flatout.errors import ConfigError, ModelFileError, UnsupportedModelError

_ROUNDED, _FACTORS = "flatout.npz", ".factors"
_UNUSED = ("pooler.", "cls.", "embeddings.position_ids")  # heads of the pre-training, and a constant


class TextTokenizer:
    """Texts -> token ids with the model's special tokens around them, cut to `max_tokens`."""

    def __init__(self, inner: tokenizers.Tokenizer, max_tokens: int) -> None:
        self._inner, self.max_tokens = inner, max_tokens
        inner.no_padding()
        inner.enable_truncation(max_tokens)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, at least one a text. Raises ConfigError for what is not valid Unicode text."""
        for text in texts:
            if not isinstance(text, str):
                raise ConfigError("texts must be strings", type(text).__name__, 'encode(["a text"])')
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ConfigError("a text must be valid Unicode", shown(str(error)), "UTF-8 text") from error
        return [encoding.ids for encoding in self._inner.encode_batch_fast(list(texts))]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncoderCheckpoint:
    """An opened encoder. pooling: "mean" or "cls" (the first token's state); normalize: whether the pooled
    vector is divided by its length; max_tokens: what a text is cut to, special tokens included."""

    spec: EncoderSpec
    name: str
    path: Path
    pooling: str
    normalize: bool
    max_tokens: int
    tensors: Shards
    prefix: str

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files."""
        return self.tensors.files

    def array(self, name: str) -> np.ndarray:
        """Fused weight `name` of `expected_encoder_weights` as float32. Raises ModelFileError when a value is
        not finite."""
        parts = [self.tensors.float32(self.prefix + part) for part in fused_tensors(name)]
        joined = parts[0] + parts[1][0] if name == "positions" else np.concatenate(parts)
        if not np.isfinite(joined).all():
            raise corrupt(self.path, "weights must be finite", f"inf or nan in {name}")
        return np.ascontiguousarray(joined, dtype=np.float32)

    def tokenizer(self) -> TextTokenizer:
        """Raises ModelFileError when the folder has none that loads."""
        path = self.path / "tokenizer.json"
        if not path.is_file():
            raise ModelFileError(
                "the model folder must hold its tokenizer",
                f"no tokenizer.json in {shown(str(self.path), 300)}",
                "copy it from the original model",
            )
        try:
            inner = tokenizers.Tokenizer.from_str(read_text(path))
        except Exception as error:  # the library raises nothing narrower
            raise corrupt(path, "tokenizer.json must be a tokenizer", str(error)) from error
        if inner.get_vocab_size(with_added_tokens=True) > self.spec.vocab_size:
            raise corrupt(
                path,
                f"the tokenizer has at most the model's {self.spec.vocab_size} tokens",
                inner.get_vocab_size(with_added_tokens=True),
            )
        return TextTokenizer(inner, self.max_tokens)


def is_encoder(model: str | Path) -> bool:
    """Whether `model` names a folder whose config.json is an encoder's; resolves built-in names and ids."""
    path = resolve(str(model)) / "config.json"
    return path.is_file() and read_json_object(path).get("model_type") in MODEL_TYPES


def open_encoder(model: str | Path) -> EncoderCheckpoint:
    """Open and check an encoder's folder, a built-in name (minilm) or a Hugging Face id.

    Raises ModelFileError or UnsupportedModelError naming the folder and what is wrong in it.
    """
    path = resolve(str(model))
    config = path / "config.json"
    if not config.is_file():
        raise ModelFileError(
            "an encoder is a folder with config.json", shown(str(path), 300), "minilm, or such a folder"
        )
    spec = encoder_spec_from_config(read_json_object(config), shown(str(config), 300))
    tensors = open_shards(path)
    prefix = "bert." if "bert.embeddings.word_embeddings.weight" in tensors.owner else ""
    found = {name.removeprefix(prefix): tensors.shape(name) for name in tensors.names}
    used = {name: shape for name, shape in found.items() if not name.startswith(_UNUSED)}
    check_shapes(path, encoder_weight_names(spec), used)
    pooling, normalize = _pooling(path)
    return EncoderCheckpoint(
        spec=spec,
        name=str(model),
        path=path,
        pooling=pooling,
        normalize=normalize,
        max_tokens=_max_tokens(path, spec),
        tensors=tensors,
        prefix=prefix,
    )


def _pooling(path: Path) -> tuple[str, bool]:
    """(pooling, normalize) of modules.json and of the pooling module's config.json."""
    listing = path / "modules.json"
    if not listing.is_file():
        return "mean", False
    # The file is a list, which as a member of an object gets the checks of every other JSON file here.
    modules = parse_json_object(f'{{"modules": {read_text(listing)}}}', listing)["modules"]
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise corrupt(listing, "modules.json must list modules", modules)
    kinds = [str(m.get("type")).rpartition(".")[2] for m in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise UnsupportedModelError(
            "modules of an encoder are Transformer, Pooling and perhaps Normalize",
            f"{shown(kinds)} in {shown(str(listing), 300)}",
            "a model without others",
        )
    folder = modules[1].get("path")
    if not isinstance(folder, str) or not folder or os.path.basename(folder) != folder:
        raise corrupt(listing, "a module's path must name a folder beside it", folder)
    config = path / folder / "config.json"
    chosen = [
        key.removeprefix("pooling_mode_")
        for key, value in read_json_object(config).items()
        if key.startswith("pooling_mode_") and value is True
    ]
    names = {"mean_tokens": "mean", "cls_token": "cls"}
    if len(chosen) != 1 or chosen[0] not in names:
        raise UnsupportedModelError(
            f"pooling is one of {', '.join(names)}",
            f"{shown(chosen)} in {shown(str(config), 300)}",
            "such a model",
        )
    return names[chosen[0]], "Normalize" in kinds


def _max_tokens(path: Path, spec: EncoderSpec) -> int:
    config = path / "sentence_bert_config.json"
    values: dict[str, Any] = read_json_object(config) if config.is_file() else {}
    reader = ConfigReader(values, shown(str(config), 300))
    tokens = min(reader.integer("max_seq_length", spec.max_positions), spec.max_positions)
    if tokens < 3:
        raise reader.error(
            "max_seq_length must leave room for a token between the special ones", "max_seq_length"
        )
    return tokens


def save_encoder(
    source: EncoderCheckpoint,
    out: Path,
    format_name: str,
    manifest: Mapping[str, Any],
    rounded: Mapping[str, QuantizedTensor] | None = None,
    factors: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write the folder of `source` to `out` as it is, which everything loads as before, with flatout.json:
    the number format to run it in, the SHA-256 of every file, and `manifest`. All or nothing.

    rounded: linears by fused name, kept in a file beside it where rounding to nearest does not give them, and
    with them the factors of an EncoderModel.
    """
    import shutil

    out = out.absolute()
    check_output(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(out.parent, f".{out.name}.flatout-") as temporary:
        folder = temporary / "encoder"
        names = [
            path.relative_to(source.path)
            for pattern in ("*.json", "*.txt", "*.safetensors", "*/config.json")
            for path in sorted(source.path.glob(pattern))
            if path.is_file() and path.name != MANIFEST
        ]
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path / name, folder / name)
        if rounded:
            buffer = io.BytesIO()
            beside = {f"{name}{_FACTORS}": values for name, values in (factors or {}).items()}
            np.savez(buffer, **flat_arrays(rounded), **beside)  # type: ignore[arg-type]
            write_bytes(folder / _ROUNDED, buffer.getvalue())
            names.append(Path(_ROUNDED))
        hashes = {str(name): sha256_of([folder / name]) for name in names}
        own = {"encoder": {"format": format_name}, "files": hashes}
        content = json.dumps(own | to_json(dict(manifest)), indent=2, allow_nan=False) + "\n"
        write_bytes(folder / MANIFEST, content.encode())
        replace_folder(folder, out)


def saved_format(path: Path) -> str | None:
    """The number format that `save_encoder` wrote into the folder, None for one that is not ours. Raises
    ModelFileError for a folder that was changed since."""
    file = path / MANIFEST
    if not file.is_file():
        return None
    manifest = read_json_object(file)
    encoder, hashes = manifest.get("encoder"), manifest.get("files")
    name = encoder.get("format") if isinstance(encoder, dict) else None
    if not isinstance(name, str) or not isinstance(hashes, dict):
        raise corrupt(
            file, "flatout.json of an encoder holds its format and files", name, "optimize it again"
        )
    for member, expected in hashes.items():
        if ".." in Path(member).parts or Path(member).is_absolute():
            raise corrupt(file, "files of an artifact lie in its folder", member, "optimize it again")
        if sha256_of([path / member]) != expected:
            raise corrupt(
                path / member, "files must be as they were written", "another hash", "optimize it again"
            )
    return name


def saved_weights(path: Path) -> tuple[dict[str, QuantizedTensor], dict[str, np.ndarray]]:
    """(linears, factors) by fused name that `save_encoder` kept beside the folder's own weights; none where
    rounding to nearest gives them. `saved_format` has checked the folder. Raises ModelFileError for a file
    that does not hold such."""
    file = path / _ROUNDED
    if _ROUNDED not in read_json_object(path / MANIFEST)["files"]:
        return {}, {}
    try:
        with np.load(file, allow_pickle=False) as opened:
            arrays = {name: opened[name] for name in opened.files}
        found = from_flat_arrays(arrays)
    except (ValueError, TypeError, BadZipFile, ConfigError) as error:
        raise corrupt(
            file, "rounded weights are codes, scales and zeros", str(error), "optimize again"
        ) from error
    for name, weight in found.items():
        low, high = weight.code_range
        if weight.codes.min() < low or weight.codes.max() > high or not np.isfinite(weight.scales).all():
            raise corrupt(
                file, f"codes lie between {low} and {high}, and scales are finite", name, "optimize it again"
            )
    factors = {
        name.removesuffix(_FACTORS): np.asarray(values, dtype=np.float32)
        for name, values in arrays.items()
        if name.endswith(_FACTORS)
    }
    return found, factors
