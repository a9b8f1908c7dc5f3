"""load(): from a path or a name to an Engine that generates text."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

from flatout.core.artifact import is_artifact, load_artifact
from flatout.core.checkpoint import open_checkpoint
from flatout.core.costs import kv_bytes_per_token, weight_bytes
from flatout.core.files import shown
from flatout.core.formats import Recipe
from flatout.core.fuse import assemble, native_recipe
from flatout.core.garbage import without_garbage_collection
from flatout.core.later import Later
from flatout.core.model import Model, expected_weights
from flatout.core.spec import ModelSpec
from flatout.core.tokenizer import Tokenizer
from flatout.engine.draft import DraftProposer
from flatout.engine.engine import Engine
from flatout.engine.runner import Runner
from flatout.engine.speculate import NgramProposer, Speculator, is_exact
from flatout.errors import BackendError, ConfigError, ResourceError
from flatout.hardware.detect import free_memory

RUNNERS = ("auto", "cpu", "cuda", "reference")
SPECULATION = ("auto", "ngram", "draft", "off")
PAGE_TOKENS = 64
_CACHE_BYTES = 256 << 20  # of KV cache unless told otherwise, but no less than one context of up to:
_CACHE_TOKENS = 4096


# A vocabulary is 10^5 objects that stay, and going through them again and again took a seventh of the time.
@without_garbage_collection()
def load(
    model: str | Path,
    runner: str = "auto",
    threads: int | None = None,
    max_tokens: int | None = None,
    *,
    max_batch: int = 32,
    recipe: Recipe | None = None,
    speculate: str = "auto",
    draft: str | Path | None = None,
    gpus: int = 1,
) -> Engine:
    """An Engine for an artifact of flatout, a GGUF file, a safetensors folder, a Hugging Face id or a
    built-in name.

    runner: "cpu", "cuda" (a GPU), "reference", or "auto" (cpu where the extension was built; a line on
    stderr says when it was not). threads: of the cpu runner, default all cores. max_tokens: what the KV
    cache holds, all sequences together; default 256 MiB, but at least one context of up to 4096 tokens; on a
    GPU what 32 sequences of 8192 tokens take, or as much as there is room for. recipe: how a checkpoint's
    weights run, by formats that round nothing further; default its own integer blocks where it has them and
    bf16 elsewhere; an artifact has its own. speculate: "ngram" guesses tokens from what was
    said before and has several judged in a step where that pays (`speculate`), "off" decodes one by one;
    "auto" is "ngram" where answers are bit for bit the same either way: integer formats on the cpu runner.
    Elsewhere a near tie between two tokens may fall the other way. draft: a second, cheaper model with the
    same vocabulary that guesses as well where that pays, in any precision and as loadable as the first, with
    a KV cache of as many tokens; "draft" asks for it where answers may differ. gpus: GPUs that share the
    model, of the cuda runner. Raises ConfigError for a draft
    of another vocabulary, ResourceError when memory would not suffice, before it is taken.
    """
    runner = choose_runner(runner)
    if speculate not in SPECULATION:
        raise ConfigError(f"speculation is one of {', '.join(SPECULATION)}", repr(speculate), "auto")
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError("the KV cache holds at least one token", str(max_tokens), "max_tokens=4096")
    if draft is None and speculate == "draft":
        raise ConfigError("a draft model that guesses must be given", "none", "draft=MODEL")
    if draft is not None and speculate in ("ngram", "off"):
        raise ConfigError("a draft model guesses under draft or auto", repr(speculate), "speculate='draft'")
    if gpus < 1 or (gpus > 1 and runner != "cuda"):
        raise ConfigError(
            "a model is shared by at least one GPU, under the cuda runner", f"{gpus}, {runner}", "gpus=1"
        )
    if runner == "cuda":
        return _load_cuda(model, recipe, max_tokens, max_batch, speculate, draft, gpus)
    loaded, tokenizer, tokens = _open(model, recipe, max_tokens)
    exact = runner == "cpu" and is_exact(loaded.spec, loaded.recipe)
    if draft is not None and speculate == "auto" and not exact:
        raise _inexact(f"recipe {loaded.recipe.name} on the {runner} runner")
    pages = -(-tokens // PAGE_TOKENS)
    guessing = None
    if draft is not None:
        taken = _resident(loaded.spec, loaded.recipe, tokens)
        guessing, words, _ = _open(draft, None, tokens, taken)
        check_vocabulary(loaded.spec, tokenizer(), guessing.spec, words())
    judge = _runner(loaded, runner, threads, pages)
    speculator = None
    if guessing is not None:
        speculator = Speculator(NgramProposer(), DraftProposer(_runner(guessing, runner, threads, pages)))
    elif speculate == "ngram" or (speculate == "auto" and exact):
        speculator = Speculator(NgramProposer())
    return Engine(judge, tokenizer(), max_batch=max_batch, speculator=speculator)


def _load_cuda(
    model: str | Path,
    recipe: Recipe | None,
    max_tokens: int | None,
    max_batch: int,
    speculate: str,
    draft: str | Path | None,
    gpus: int,
) -> Engine:
    """An Engine on the GPU, which guesses nothing unless asked to."""
    try:
        from flatout.engine.cuda import open_device, open_runner
        from flatout.engine.cuda_decode import UNSETTLED
        from flatout.engine.cuda_memory import claim
    except ImportError as error:
        raise BackendError(
            "the cuda runner needs a GPU and Triton 3.6 or newer", str(error), "pip install 'triton>=3.6'"
        ) from error
    if draft is not None and speculate == "auto":
        raise _inexact("the cuda runner")
    if draft is not None and gpus > 1:
        raise ConfigError(
            "a draft model guesses for a model on one GPU", f"{gpus} GPUs", "gpus=1, or speculate='ngram'"
        )
    open_device()  # the reason why not, before anything is read
    loaded, tokenizer, _ = _open(model, recipe, max_tokens, cached=False)
    arguments = weight_bytes(loaded.spec, loaded.recipe), max_tokens, PAGE_TOKENS, max_batch
    proposer = NgramProposer()
    if draft is not None:
        guessing, words, _ = _open(draft, None, max_tokens, cached=False)
        check_vocabulary(loaded.spec, tokenizer(), guessing.spec, words())
        size = weight_bytes(guessing.spec, guessing.recipe)
        beside = claim(guessing.spec, guessing.recipe, size, PAGE_TOKENS)
        judge = open_runner(loaded, *arguments, beside)
        drafting = open_runner(guessing, size, judge.num_pages * PAGE_TOKENS, PAGE_TOKENS, max_batch)
        speculator = Speculator(proposer, DraftProposer(drafting, UNSETTLED), UNSETTLED)
        return Engine(judge, tokenizer(), max_batch=max_batch, speculator=speculator)
    runner: Runner
    if gpus > 1:
        from flatout.engine.cuda_parallel import open_parallel

        runner = open_parallel(loaded, gpus, *arguments)
    else:
        runner = open_runner(loaded, *arguments)
    lookup = Speculator(proposer, unsettled=UNSETTLED) if speculate == "ngram" else None
    return Engine(runner, tokenizer(), max_batch=max_batch, speculator=lookup)


def _inexact(found: str) -> ConfigError:
    return ConfigError(
        "a draft model leaves every token as it is in integer formats on the cpu runner only",
        found,
        "speculate='draft', if near ties may fall the other way",
    )


def check_vocabulary(spec: ModelSpec, tokenizer: Tokenizer, draft: ModelSpec, words: Tokenizer) -> None:
    """Raise ConfigError unless `draft`, whose tokenizer is `words`, means the same by every token id."""
    rule, remedy = "a draft model has the model's vocabulary", "a smaller model of the same family"
    if draft.vocab_size != spec.vocab_size:
        raise ConfigError(rule, f"{draft.vocab_size} tokens, not {spec.vocab_size}", remedy)
    ours, theirs = tokenizer.vocabulary(), words.vocabulary()
    for i in sorted(ours.keys() & theirs.keys()):  # the ids that pad a vocabulary are not in every file
        if ours[i] != theirs[i]:
            raise ConfigError(rule, f"token {i} is {shown(theirs[i])}, not {shown(ours[i])}", remedy)


def cache_tokens(spec: ModelSpec, kv_cache: str) -> int:
    """Tokens the KV cache holds unless told otherwise."""
    affordable = int(_CACHE_BYTES / (spec.num_layers * kv_bytes_per_token(spec, kv_cache)))
    return max(affordable, min(spec.max_positions, _CACHE_TOKENS))


def check_memory(spec: ModelSpec, recipe: Recipe, tokens: int, read: bool, taken: float = 0) -> None:
    """Raise ResourceError when loading would need more memory than is free now, less `taken`.

    Cautious: counts a checkpoint's weights twice, packed for the runner and as they are read (float32, or a
    byte a code), of which the cpu runner holds one at a time. `read`: not the second, as for artifacts.
    """
    as_read = 0
    if not read:
        for _, shape, fmt in expected_weights(spec, recipe):
            as_read += math.prod(shape) * (1 if fmt.is_integer else 4)
    cache = _cache_bytes(spec, recipe, tokens)
    needed = as_read + _resident(spec, recipe, tokens)
    free = free_memory()
    if 0 < free < taken + needed:
        raise ResourceError(
            f"loading needs about {needed / 1e9:.1f} GB, of which the KV cache {cache / 1e9:.1f} GB",
            f"{(free - taken) / 1e9:.1f} GB free",
            "a smaller max_tokens or a smaller model",
        )


def _cache_bytes(spec: ModelSpec, recipe: Recipe, tokens: int) -> float:
    return tokens * spec.num_layers * kv_bytes_per_token(spec, recipe.kv_cache)


def _resident(spec: ModelSpec, recipe: Recipe, tokens: int) -> float:
    """Bytes that a loaded model keeps: packed weights and KV cache."""
    return weight_bytes(spec, recipe) + _cache_bytes(spec, recipe, tokens)


def _open(
    model: str | Path,
    recipe: Recipe | None,
    max_tokens: int | None,
    taken: float = 0,
    cached: bool = True,
) -> tuple[Model, Callable[[], Tokenizer], int]:
    """The model, its tokenizer, and how many tokens its KV cache holds: in this machine's memory, if
    `cached`. A checkpoint's tokenizer is built while the runner packs the weights."""
    if is_artifact(model):
        if recipe is not None:
            raise ConfigError("an artifact runs under its own recipe", recipe.name, "no recipe")
        loaded, tokenizer, _ = load_artifact(model)
        tokens = max_tokens or cache_tokens(loaded.spec, loaded.recipe.kv_cache)
        check_memory(loaded.spec, loaded.recipe, tokens if cached else 0, read=True, taken=taken)
        return loaded, lambda: tokenizer, tokens
    checkpoint = open_checkpoint(model)
    if recipe is None:
        recipe = native_recipe(checkpoint, kv_cache="bf16")
        for note in checkpoint.notes:
            print(f"flatout: {note}", file=sys.stderr)
    tokens = max_tokens or cache_tokens(checkpoint.spec, recipe.kv_cache)
    if cached:  # a GPU gets weights one after another
        check_memory(checkpoint.spec, recipe, tokens, read=False, taken=taken)
    words = Later(lambda: checkpoint.tokenizer)
    return assemble(checkpoint, recipe, True, checkpoint.forget), words.get, tokens


def shape_and_recipe(model: str | Path) -> tuple[ModelSpec, Recipe]:
    """Of an artifact, or of a checkpoint as it is stored; no weights are packed."""
    if is_artifact(model):
        loaded, _, _ = load_artifact(model)
        return loaded.spec, loaded.recipe
    checkpoint = open_checkpoint(model)
    return checkpoint.spec, native_recipe(checkpoint, kv_cache="bf16")


def choose_runner(runner: str) -> str:
    """`runner`, or for "auto" the one that this installation has. Raises ConfigError for another name."""
    if runner not in RUNNERS:
        raise ConfigError(f"the runner is one of {', '.join(RUNNERS)}", repr(runner), "auto")
    return _available() if runner == "auto" else runner


def _available() -> str:
    from flatout.engine.cpu import extension

    try:
        extension()
    except BackendError as error:
        print(f"flatout: the reference runner (slow) is used: {error}", file=sys.stderr)
        return "reference"
    return "cpu"


def _runner(model: Model, runner: str, threads: int | None, num_pages: int) -> Runner:
    if runner == "cpu":
        from flatout.engine.cpu import CpuRunner

        return CpuRunner(model, threads=threads, num_pages=num_pages)
    from flatout.engine.reference import ReferenceRunner

    return ReferenceRunner(model, num_pages, PAGE_TOKENS)
