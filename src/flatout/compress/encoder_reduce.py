"""Encoders with weights taken away: sparse linears, fewer layers and feed-forward channels, fewer words.

What compress/prune.py, structure.py and vocabulary.py do to decoders, for the BERT family; the formulas and
their sources are in compress/{magnitude,wanda,sparsegpt,importance}.py. Heads stay: their number times their
size is the width in every BERT configuration.

Trade-off: statistics are those of the original's activations, all texts in one pass, and not behind layers
that are pruned already: quicker, and post-norm layers are renormalised after each sum, so that errors of
early layers change later ones little. Nothing trains what is left.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flatout.compress.encoder import compress_encoder
from flatout.compress.encoder_gptq import checked_texts
from flatout.compress.inputs import check_activations
from flatout.compress.prune import Statistics, prune_weight
from flatout.compress.structure import most
from flatout.compress.vocabulary import kept_of, trimmed_contents
from flatout.core.encoder import EncoderSpec, encoder_weight_names, fused_tensors
from flatout.core.encoder_folder import EncoderCheckpoint, open_encoder
from flatout.core.files import corrupt, parse_json_object, read_json_object, read_text, write_bytes
from flatout.core.safetensors import write_safetensors
from flatout.core.sparsity import Sparsity
from flatout.errors import ConfigError
from flatout.models.bert import Bert

_WORDS = "embeddings.word_embeddings.weight"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReducedEncoder:
    """An encoder cut out of `original`: a source for `compress_encoder`.

    layers: the original's number of each layer. channels: what each keeps of its feed-forward network.
    tokens: the original's id of each word, None for all. changed: other values by the child's tensor names.
    """

    spec: EncoderSpec
    original: EncoderCheckpoint
    layers: tuple[int, ...]
    channels: tuple[np.ndarray, ...]
    tokens: np.ndarray | None = None
    changed: Mapping[str, np.ndarray] = field(default_factory=dict)

    def tensor(self, name: str) -> np.ndarray:
        """float32 tensor by Hugging Face name, without a prefix."""
        if name in self.changed:
            return self.changed[name]
        source, prefix = self.original.tensors, self.original.prefix
        if name == _WORDS and self.tokens is not None:
            words: np.ndarray = source.float32(prefix + name)[self.tokens]
            return words
        if not name.startswith("encoder.layer."):
            return source.float32(prefix + name)
        _, _, number, rest = name.split(".", 3)
        array = source.float32(f"{prefix}encoder.layer.{self.layers[int(number)]}.{rest}")
        kept = self.channels[int(number)]
        if rest.startswith("intermediate.dense"):
            array = array[kept]
        elif rest == "output.dense.weight":
            array = array[:, kept]
        return array

    def array(self, name: str) -> np.ndarray:
        """Fused weight as EncoderCheckpoint.array gives it. Raises ModelFileError for one that is not
        finite."""
        parts = [self.tensor(part) for part in fused_tensors(name)]
        joined = parts[0] + parts[1][0] if name == "positions" else np.concatenate(parts)
        if not np.isfinite(joined).all():
            raise corrupt(self.original.path, "weights must be finite", f"inf or nan in {name}")
        return np.ascontiguousarray(joined, dtype=np.float32)


def whole(source: EncoderCheckpoint) -> ReducedEncoder:
    """The encoder with nothing taken away."""
    every = np.arange(source.spec.intermediate_size)
    layers = range(source.spec.num_layers)
    return ReducedEncoder(
        spec=source.spec, original=source, layers=tuple(layers), channels=tuple(every for _ in layers)
    )


class _Watched(Bert):
    """The encoder, remembering second moments of every linear's inputs, and how much each layer changes."""

    def __init__(self, source: ReducedEncoder) -> None:
        super().__init__(compress_encoder(source, "fp32"))
        self.moments: dict[str, Tensor] = {}
        self.influence = np.zeros(source.spec.num_layers)
        self.tokens = 0
        self._entered: Tensor | None = None

    def _linear(self, name: str, x: Tensor) -> Tensor:
        check_activations(name, x)
        self.moments[name] = self.moments.get(name, torch.zeros(1)) + x.T @ x
        if name.endswith(".qkv"):
            self._left(int(name.split(".")[1]) - 1, x)
            self._entered = x
        return super()._linear(name, x)

    def _left(self, layer: int, x: Tensor) -> None:
        if self._entered is not None:
            cosine = torch.nn.functional.cosine_similarity(self._entered, x, dim=1)
            self.influence[layer] += float((1 - cosine).sum())

    def watch(self, ids: Tensor) -> None:
        self._entered = None
        self._left(self.spec.num_layers - 1, self.hidden(ids))
        self.tokens += len(ids)


@torch.no_grad()
def _watched(source: ReducedEncoder, texts: Iterable[Sequence[int]]) -> _Watched:
    """Raises ConfigError for too little text and ids that are not the model's."""
    found = _Watched(source)
    for ids in checked_texts(texts, source.spec):
        found.watch(ids)
    return found


def prune_encoder(
    source: ReducedEncoder, sparsity: Sparsity, texts: Iterable[Sequence[int]] = ()
) -> ReducedEncoder:
    """`source` with its linears pruned; query, key and value apart. texts: token ids of one text each, which
    magnitude does not need. Raises ConfigError for a pattern that does not divide a width."""
    for name, (_, k) in source.spec.linears().items():
        sparsity.check(name, k)
    seen = _watched(source, texts) if sparsity.needs_calibration else None
    changed = dict(source.changed)
    for layer in range(source.spec.num_layers):
        for linear, (_, k) in source.spec.linears().items():
            name = f"layers.{layer}.{linear}"
            statistics = Statistics(energy=np.ones(k, np.float32))
            if seen is not None:
                moments = (seen.moments[name] / seen.tokens).numpy()
                statistics = Statistics.of_moments(moments, sparsity, name)
            for part in fused_tensors(name):
                changed[part] = prune_weight(source.tensor(part), statistics, sparsity)
    return replace(source, changed=changed)


def cut_encoder(
    source: ReducedEncoder,
    texts: Iterable[Sequence[int]],
    depth: int | None = None,
    ffn: int | None = None,
) -> ReducedEncoder:
    """`source` with its most important layers and feed-forward channels (compress/importance.py). Raises
    ConfigError for sizes that it does not have."""
    spec = source.spec
    for what, size, limit in (("depth", depth, spec.num_layers), ("ffn", ffn, spec.intermediate_size)):
        if size is not None and not 1 <= size <= limit:
            raise ConfigError(f"{what} lies between 1 and the model's {limit}", str(size), f"{what}={limit}")
    if source.changed:
        raise ConfigError("a structure is cut before weights are pruned", "pruned weights", "cut first")
    seen = _watched(source, texts)
    layers = most(seen.influence, depth or spec.num_layers)
    channels = []
    for layer in layers:
        down = source.array(f"layers.{layer}.down")
        energy = np.diag(seen.moments[f"layers.{layer}.down"].numpy())
        kept = most(energy * (down.astype(np.float64) ** 2).sum(axis=0), ffn or spec.intermediate_size)
        channels.append(source.channels[layer][kept])
    return replace(
        source,
        spec=replace(spec, num_layers=len(layers), intermediate_size=len(channels[0])),
        layers=tuple(source.layers[i] for i in layers),
        channels=tuple(channels),
    )


def write_encoder(
    reduced: ReducedEncoder,
    out: Path,
    texts: Iterable[str] | None = None,
    *,
    multiple: int = 64,
    bfloat16: bool = False,
) -> EncoderCheckpoint:
    """Write `reduced` as the folder `out` and return it, opened: the original's other files, its
    config.json with the new sizes, float32 or bfloat16 weights. texts: keep only the words that these use,
    in folder and tokenizer.

    Raises ConfigError for an `out` that exists, ModelFileError when what is read back differs.
    """
    from flatout.core.safetensors import to_bfloat16

    if out.exists():
        raise ConfigError("an encoder is written to a new folder", str(out), "another name")
    contents = parse_json_object(read_text(reduced.original.path / "tokenizer.json"), out)
    if texts is not None:
        counts: Counter[int] = Counter()
        for ids in reduced.original.tokenizer().encode_batch(list(texts)):
            counts.update(ids)
        tokens = kept_of(contents, counts, multiple=multiple)
        contents = trimmed_contents(contents, tokens)
        reduced = replace(reduced, spec=replace(reduced.spec, vocab_size=len(tokens)), tokens=tokens)
    spec = reduced.spec
    config = read_json_object(reduced.original.path / "config.json") | {
        "vocab_size": spec.vocab_size,
        "num_hidden_layers": spec.num_layers,
        "intermediate_size": spec.intermediate_size,
        "torch_dtype": "bfloat16" if bfloat16 else "float32",
    }
    if config.get("pad_token_id") is not None and reduced.tokens is not None:
        places = np.flatnonzero(reduced.tokens == config["pad_token_id"])
        config["pad_token_id"] = int(places[0]) if len(places) else None
    names = encoder_weight_names(spec)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as temporary:
        made = Path(temporary) / "model"
        unwanted = shutil.ignore_patterns(
            "*.safetensors*", "*.bin", "*.onnx", "vocab.txt", "onnx", "openvino"
        )
        shutil.copytree(reduced.original.path, made, ignore=unwanted)
        write_bytes(made / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        write_bytes(made / "tokenizer.json", json.dumps(contents, ensure_ascii=False).encode())
        tensors = {name: reduced.tensor(name) for name in names}
        stored = {name: (to_bfloat16(array), "BF16") for name, array in tensors.items()}
        write_safetensors(made / "model.safetensors", stored if bfloat16 else tensors, {"format": "pt"})
        again = open_encoder(made)
        for name, array in tensors.items():
            expected = to_bfloat16(array) if bfloat16 else array
            if not np.array_equal(again.tensors.array(name), expected):
                raise corrupt(out, "every weight must read back as it was written", name)
        again.tokenizer()
        made.rename(out)
    return open_encoder(out)
