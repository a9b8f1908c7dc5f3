"""Audit anyone's checkpoint against its original: the certificate, and the speed of both on our engine.

The original is scored by the float32 reference, the candidate by the runner that would serve it. Quality
comes first: it opens the hold-out once and needs no quiet machine; tasks besides perplexity follow. `again`
scores an existing certificate's clusters once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flatout.core.artifact import is_artifact, load_artifact
from flatout.core.checkpoint import open_checkpoint
from flatout.core.files import read_json_object, sha256_of
from flatout.core.fuse import assemble, float_recipe, native_recipe
from flatout.core.model import Model
from flatout.core.spec import ModelSpec
from flatout.core.tokenizer import Tokenizer
from flatout.core.types import Workload
from flatout.data.passages import Passage, load_passages, load_text, split_text
from flatout.engine.load import load
from flatout.engine.runner import Runner
from flatout.errors import EvidenceError
from flatout.hardware.detect import detect
from flatout.verify.certificate import Certificate, Side, check_levels, recompute, refuse_swapped
from flatout.verify.drivers import RunnerDriver
from flatout.verify.examination import Plan, examine, plan_opening, rerun, seal
from flatout.verify.examine_tasks import TaskResult, encode_tasks, examine_tasks
from flatout.verify.layers import BlockLoss, block_losses
from flatout.verify.quality import (
    Cluster,
    divergence,
    fits,
    pair_scores,
    score_model,
    token_clusters,
    tokens_sha256,
)
from flatout.verify.race import race_workload
from flatout.verify.speed import SpeedResult
from flatout.verify.tasks import read_task

_VALIDATION_CLUSTERS = 32
_PAGE = 64
_BLOCK_TOKENS = 128
_TASK_PAGES = 32
"""Sequences of tasks that may share a step: short ones still take a page each."""
_SPLITS = ("calibration", "validation", "holdout")

Listener = Callable[[str, int, int], None]
"""listener(stage, done, total)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """The candidate against the original, both on our engine; ratios above 1 mean that the candidate is
    faster."""

    workload: Workload
    original: str
    optimised: str
    prefill: SpeedResult
    decode: SpeedResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What an audit found; blocks: what each loses by itself; `speed` is None when it was left out."""

    quality: Certificate
    plan: Plan
    blocks: tuple[BlockLoss, ...]
    tasks: tuple[TaskResult, ...]
    speed: Speed | None

    @property
    def passed(self) -> bool:
        """Whether the certificate and every task passed."""
        return self.quality.passed and all(task.passed for task in self.tasks)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """Both models opened: the original on the reference, the candidate on the runner that serves it."""

    original: Side
    optimised: Side
    reference: Runner
    served: Runner
    before: Any
    tokenizer: Tokenizer
    tokenizer_sha256: str


def texts(source: str) -> dict[str, list[Passage]]:
    """The three splits of "shipped" or of a user's file."""
    return (
        {split: load_passages(split) for split in _SPLITS}
        if source == "shipped"
        else split_text(load_text(source))
    )


def audit(
    optimised: str | Path,
    original: str | Path,
    *,
    margin: float = 0.01,
    text: str | Path | None = None,
    tasks: Sequence[str | Path] = (),
    task_margin: float = 0.01,
    limit: int | None = None,
    workload: Workload | None = None,
    speed_seconds: float = 60.0,
    threads: int | None = None,
    ledger: Path | None = None,
    listen: Listener | None = None,
) -> Audit:
    """Certificate and A/B speed of `optimised` against `original`: artifacts, checkpoints or built-in names.

    text: a user's file instead of the shipped passages; half of it is the hold-out. tasks: files of items
    (`verify.tasks`), `limit` of each; task_margin: the loss of accuracy allowed, in points. speed_seconds:
    for each of prefill and decode; 0 leaves speed out. Raises FlatoutErrors for models or text that cannot
    be judged.
    """
    listen = listen or _silent
    workload = workload or Workload()
    source = "shipped" if text is None else str(text)
    splits = texts(source)
    check_levels(margin, 0.05)
    check_levels(task_margin, 0.05)
    read = [read_task(path) for path in tasks]
    pair = _open(str(optimised), str(original), splits, threads, workload)
    items = encode_tasks(read, pair.tokenizer, pair.reference, pair.served, limit)
    model, notes = _model(str(optimised))
    block = fits(pair.served.spec)
    holdout = seal(
        splits["holdout"],
        [*splits["calibration"], *splits["validation"]],
        pair.tokenizer,
        tokenizer_sha256=pair.tokenizer_sha256,
        source=source,
        block=block,
    )
    validation = token_clusters(pair.tokenizer, splits["validation"], block)[:_VALIDATION_CLUSTERS]
    scorers = _scorer(pair.reference, "original", listen), _scorer(pair.served, "optimised", listen)
    losses = pair_scores(validation, *(score(validation) for score in scorers))
    plan = plan_opening(losses, holdout, pair.original, margin=margin, ledger=ledger)
    listen(f"plan: {plan}", 1, 1)
    certificate = examine(
        holdout,
        plan,
        original=pair.original,
        optimised=pair.optimised,
        score_original=scorers[0],
        score_optimised=scorers[1],
        margin=margin,
        ledger=ledger,
        hardware=detect().name,
        divergence=divergence(pair.reference, pair.served, validation),
        notes=_notes(pair, notes),
    )
    listen("comparing blocks", 0, 1)
    blocks = block_losses(pair.before, model, validation[0].tokens[:_BLOCK_TOKENS])
    listen("comparing blocks", 1, 1)
    results = examine_tasks(items, pair.reference, pair.served, margin=task_margin, listen=listen)
    speed = (
        _race(pair, str(original), workload, speed_seconds, threads, listen) if speed_seconds > 0 else None
    )
    return Audit(quality=certificate, plan=plan, blocks=blocks, tasks=results, speed=speed)


def again(
    path: str | Path,
    *,
    optimised: str | Path | None = None,
    original: str | Path | None = None,
    threads: int | None = None,
    listen: Listener | None = None,
) -> tuple[Certificate, Certificate]:
    """(stored, new): the certificate at `path`, checked, and the same clusters scored again.

    The models are the ones given, or those the certificate names; an artifact's own certificate judges the
    artifact. Raises EvidenceError when models or text are not the certified ones.
    """
    listen = listen or _silent
    stored = recompute(path)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if optimised is None:
        optimised = folder if is_artifact(folder) else stored.optimised.source
    splits = texts(stored.text.source)
    pair = _open(str(optimised), str(original or stored.original.source), splits, threads, Workload())
    new = rerun(
        stored,
        splits["holdout"],
        pair.tokenizer,
        original=pair.original,
        optimised=pair.optimised,
        score_original=_scorer(pair.reference, "original", listen),
        score_optimised=_scorer(pair.served, "optimised", listen),
        hardware=detect().name,
    )
    return stored, new


def _silent(stage: str, done: int, total: int) -> None:
    """No listener."""


def _scorer(runner: Runner, what: str, listen: Listener) -> Callable[[Sequence[Cluster]], list[np.ndarray]]:
    def score(clusters: Sequence[Cluster]) -> list[np.ndarray]:
        return score_model(
            runner, clusters, lambda done, total: listen(f"scoring the {what} model", done, total)
        )

    return score


def _open(
    optimised: str, original: str, splits: dict[str, list[Passage]], threads: int | None, workload: Workload
) -> _Pair:
    """Identify both models, refuse pairs that cannot be compared, then load them."""
    from flatout.engine.reference import ReferenceRunner

    base, candidate = _side(original, "original", "reference (float32)"), _side(optimised, "native", "")
    refuse_swapped(base, candidate)
    before: Any
    if is_artifact(original):
        before, tokenizer, _ = load_artifact(original)
    else:
        before = open_checkpoint(original)
        tokenizer = before.tokenizer
    engine = load(optimised, threads=threads, max_tokens=_cache_tokens(before.spec, workload))
    _refuse_other_tokens(tokenizer, engine.tokenizer, splits, before.spec, engine.runner.spec)
    return _Pair(
        original=base,
        optimised=replace(candidate, runner=engine.runner.name),
        reference=ReferenceRunner(before, fits(before.spec) // _PAGE + 1, _PAGE, as_served=False),
        served=engine.runner,
        before=before,
        tokenizer=tokenizer,
        tokenizer_sha256=tokenizer.sha256,
    )


def _model(optimised: str) -> tuple[Model, tuple[str, ...]]:
    """The candidate's weights as the engine loads them, read when asked for, and which of them run otherwise
    than they are stored."""
    if is_artifact(optimised):
        return load_artifact(optimised)[0], ()
    checkpoint = open_checkpoint(optimised)
    recipe = native_recipe(checkpoint, kv_cache="bf16")
    return assemble(checkpoint, recipe, True, checkpoint.forget), checkpoint.notes


def _cache_tokens(spec: ModelSpec, workload: Workload) -> int:
    """Tokens the KV cache must hold for scoring and for the workload, whole pages for every sequence."""
    pages = -(-(workload.prompt + workload.output) // _PAGE)
    return max(fits(spec), workload.batch * pages * _PAGE, _TASK_PAGES * _PAGE)


def _refuse_other_tokens(
    before: Any, after: Any, splits: dict[str, list[Passage]], spec: ModelSpec, other: ModelSpec
) -> None:
    """Raise EvidenceError unless both models read and predict the same tokens. Files may differ in form."""
    judged = [*splits["validation"], *splits["holdout"]]
    same = before.sha256 == after.sha256 or tokens_sha256(token_clusters(before, judged)) == tokens_sha256(
        token_clusters(after, judged)
    )
    if not same or spec.vocab_size != other.vocab_size:
        raise EvidenceError(
            "both models must read and predict the same tokens",
            f"{spec.vocab_size} and {other.vocab_size} of them" if same else "different tokenizers",
            "the model's own original",
        )


def _side(model: str, recipe: str, runner: str) -> Side:
    """Identity of a model by its files, without loading weights. An artifact names its original in its
    certificate."""
    if not is_artifact(model):
        return Side(source=model, sha256=open_checkpoint(model).sha256, recipe=recipe, runner=runner)
    manifest = read_json_object(Path(model) / "flatout.json")
    own, parent = manifest.get("recipe"), manifest.get("certificate")
    parent = parent.get("original") if isinstance(parent, dict) else None
    return Side(
        source=model,
        sha256=sha256_of([Path(model) / "model.safetensors"]),
        recipe=str(own.get("name", "")) if isinstance(own, dict) else "",
        runner=runner,
        derived_from=str(parent.get("sha256", "")) if isinstance(parent, dict) else "",
    )


def _notes(pair: _Pair, weights: tuple[str, ...]) -> list[str]:
    """What the certificate must say: weights that run otherwise than stored, another original."""
    parent = pair.optimised.derived_from
    if parent and parent != pair.original.sha256:
        return [*weights, "the optimised model says that it was made from another original"]
    return list(weights)


def _race(
    pair: _Pair, original: str, workload: Workload, seconds: float, threads: int | None, listen: Listener
) -> Speed:
    """The candidate against the original on the same engine: an artifact as it is, a checkpoint in
    bfloat16."""
    recipe = None if is_artifact(original) else float_recipe("bf16")
    tokens = _cache_tokens(pair.served.spec, workload)
    engine = load(original, threads=threads, max_tokens=tokens, recipe=recipe)
    a, b = RunnerDriver(engine.runner), RunnerDriver(pair.served)
    phases = race_workload(
        a,
        b,
        pair.tokenizer,
        workload,
        prefill_s=seconds,
        decode_s=seconds,
        progress=lambda phase, done, total: listen(f"timing {phase}", done, total),
    )
    return Speed(workload=workload, original=a.name, optimised=b.name, **phases)
