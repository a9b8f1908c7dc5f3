"""export(): a model in another form, written, read back and compared before it counts.

gguf      one file for llama.cpp; weights keep their numbers where GGUF has blocks for them, and without a
          recipe the blocks of a GGUF file stay as they are, K-quants too
folder    an ordinary Hugging Face folder of a recipe, not certified: what optimize writes without its proof
coded     the same folder with entropy-coded weights, for transfer (export/coded.py)
decoded   an ordinary folder again
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flatout.compress.apply import compress
from flatout.compress.method import Progress
from flatout.core.artifact import (
    check_output,
    is_artifact,
    load_artifact,
    save_artifact,
)
from flatout.core.checkpoint import open_checkpoint
from flatout.core.fuse import Source, native_recipe
from flatout.core.model import Model, expected_weights
from flatout.core.safetensors import from_bfloat16, to_bfloat16
from flatout.core.sources import resolve
from flatout.core.tokenizer import Tokenizer
from flatout.errors import ConfigError, EvidenceError
from flatout.export.gguf import Stored, nothing_stored, parts_of, write_model
from flatout.search.recipes import recipe_from_name
from flatout.search.texts import read_texts

FORMS = ("gguf", "folder", "coded", "decoded")
_CALIBRATION = 24  # passages, as in a search
_PROBED = 64  # tokens whose logits are compared
_LARGEST_ERROR = {"folder": 1e-4, "gguf": 0.02}
"""Of the largest logit. Weights are compared one by one elsewhere; this catches what they do not say: names,
layouts, norms, rotations. Minima rounded to float16 are why GGUF is given more."""


def export(
    model: str | Path,
    to: str,
    out: str | Path,
    *,
    recipe: str | None = None,
    vocabulary: str | Path | None = None,
    text: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `model` to `out` in the form `to`, one of FORMS.

    recipe: in the grammar of search/recipes.py; without one an artifact keeps its own, a checkpoint its
    blocks, and floats become bf16. vocabulary: a text file whose tokens are kept, and no others but what
    any text needs (compress/vocabulary.py). text: calibrates in place of the shipped passages. Returns
    "path", "bytes", "to", "recipe", and "max_logit_error": the largest difference of logits between what
    was made and what was read back, over the largest logit (coded folders are compared bit for bit instead
    and have 0).

    Raises ConfigError for options that do not go together, EvidenceError when what is read back computes
    something else, and what reading, compressing and writing raise.
    """
    out = Path(out)
    if to not in FORMS:
        raise ConfigError(f"a model is exported to {', '.join(FORMS)}", repr(to), "--to gguf")
    if to in ("coded", "decoded"):
        return _convert(model, to, out, recipe is not None or vocabulary is not None)
    if to == "gguf" and (out.suffix != ".gguf" or out.is_dir()):
        raise ConfigError("a GGUF file is called .gguf", str(out), f"{out}.gguf")
    if to == "folder":
        check_output(out)
    made, tokenizer, stored = _made(model, to, recipe, vocabulary, text, progress)
    result: dict[str, Any] = {"to": to, "path": str(out), "recipe": made.recipe.name}
    if to == "gguf":
        out.parent.mkdir(parents=True, exist_ok=True)
        result["rounded_minima"] = write_model(made, tokenizer, out, made.recipe.name, stored)
        again: Source | Model = open_checkpoint(out)
        result["bytes"] = out.stat().st_size
    else:
        save_artifact(made, tokenizer, out, {"exported_from": str(model)})
        again = load_artifact(out)[0]
        result["bytes"] = sum(path.stat().st_size for path in out.iterdir())
    result["max_logit_error"] = error = _logit_error(made, again, tokenizer)
    if not error <= _LARGEST_ERROR[to]:
        raise EvidenceError(
            f"what was written must compute the same within {_LARGEST_ERROR[to]:g}",
            f"{error:.2g} in {out}",
            "report this: the file is not to be used",
        )
    return result


def _convert(model: str | Path, to: str, out: Path, changed: bool) -> dict[str, Any]:
    from flatout.export.coded import code_folder, decode_folder

    if changed:
        raise ConfigError("a folder is coded as it is", "a recipe or a vocabulary", "--to folder first")
    folder = resolve(str(model))
    if not folder.is_dir():
        raise ConfigError("coding needs a folder with safetensors", str(model), "--to folder first")
    before, after = (code_folder if to == "coded" else decode_folder)(folder, out)
    return {"to": to, "path": str(out), "bytes_before": before, "bytes": after, "max_logit_error": 0.0}


def _made(
    model: str | Path,
    to: str,
    recipe: str | None,
    vocabulary: str | Path | None,
    text: str | Path | None,
    progress: Progress | None,
) -> tuple[Model, Tokenizer, Stored]:
    """The model to write, the tokenizer that goes with it, and blocks of its file that stay."""
    if is_artifact(model):
        if recipe is not None or vocabulary is not None:
            raise ConfigError(
                "an artifact is exported as it is",
                recipe or "a vocabulary",
                "the original that it was made from",
            )
        loaded, tokenizer, _ = load_artifact(model)
        return loaded, tokenizer, nothing_stored
    checkpoint = open_checkpoint(model)
    tokenizer = checkpoint.tokenizer
    chosen = native_recipe(checkpoint) if recipe is None else recipe_from_name(recipe, checkpoint)
    documents: list[list[int]] = []
    if chosen.needs_calibration:
        texts = read_texts(tokenizer, tokenizer.sha256, checkpoint.spec, None if text is None else Path(text))
        documents = [list(cluster.tokens) for cluster in texts.calibration[:_CALIBRATION]]
    source: Source = checkpoint
    if vocabulary is not None:
        source, tokenizer, documents = _smaller(checkpoint, tokenizer, Path(vocabulary), documents)
        if recipe is None:
            chosen = native_recipe(source)
    stays = to == "gguf" and recipe is None and vocabulary is None
    stored = checkpoint.blocks if stays else nothing_stored
    return _as_stored(compress(source, chosen, documents, progress), stored), tokenizer, stored


def _as_stored(model: Model, stored: Stored) -> Model:
    """The model with its bf16 weights rounded to bf16, which runners otherwise do, but for those whose blocks
    stay."""
    weights = dict(model.weights)
    for name, _, fmt in expected_weights(model.spec, model.recipe):
        weight = weights[name]
        if fmt.name != "bf16" or not isinstance(weight, np.ndarray):
            continue
        rounded, start = from_bfloat16(to_bfloat16(weight)), 0
        for part, rows in parts_of(model.spec, name) if weight.ndim == 2 else ():
            if stored(part) is not None:
                rounded[start : start + rows] = weight[start : start + rows]
            start += rows
        weights[name] = rounded
    return replace(model, weights=weights)


def _smaller(
    source: Source, tokenizer: Tokenizer, path: Path, documents: list[list[int]]
) -> tuple[Source, Tokenizer, list[list[int]]]:
    """`source` with the tokens that the file uses, its tokenizer, and the documents in the new ids."""
    from flatout.compress.structure import with_tokens
    from flatout.compress.vocabulary import kept_tokens, trimmed
    from flatout.core.files import read_text

    kept = kept_tokens(tokenizer, [read_text(path)])
    small = trimmed(tokenizer, kept)
    again = [small.encode(tokenizer.decode(document)) for document in documents]
    return with_tokens(source, kept), small, again


def _logit_error(made: Model, again: Source | Model, tokenizer: Tokenizer) -> float:
    from flatout.models.llama import Llama

    words = "The old man and the sea were both there. In 1999, however, nothing of that kind happened; "
    ids = (tokenizer.encode(words) * _PROBED)[: min(_PROBED, made.spec.max_positions)]
    ours, theirs = Llama(made).forward(ids).numpy(), Llama(again).forward(ids).numpy()
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())
