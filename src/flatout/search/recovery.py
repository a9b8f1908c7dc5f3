"""The recovery ladder: one recipe, filled by ever dearer methods until the certificate passes.

    rtn       rounded to nearest, no text
    gptq      errors spread over the columns to come
    tune      rounding and scales of whole layers tuned
    lora-kd   thin matrices beside the linears distilled through the rounding, with the scales
    full-kd   all weights distilled through the rounding, with the scales

A rung of distillation starts from the best model so far and follows the original's predictions on the
calibration text. Each rung is judged on the validation text by the runner that serves, and told with its
minutes and what a minute brought. The sealed text is opened only for a rung that is likely to pass, since
every opening makes the next one stricter (verify/examination.py), and the first certificate that passes ends
the climb. A climb that is killed goes on in the middle of the rung (search/rungs.py).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flatout._version import __version__
from flatout.compress.apply import compress
from flatout.core.artifact import save_artifact
from flatout.core.checkpoint import Checkpoint, open_checkpoint
from flatout.core.encoder_folder import is_encoder
from flatout.core.files import sha256_of
from flatout.core.formats import Recipe
from flatout.core.fuse import float_weight
from flatout.core.model import Model, Weight, dense
from flatout.core.quantized import QuantizedTensor
from flatout.core.sources import cache_dir
from flatout.core.spec import ModelSpec
from flatout.core.types import to_json
from flatout.engine.reference import ReferenceRunner
from flatout.engine.runner import Runner
from flatout.errors import ConfigError
from flatout.hardware.detect import available_cores
from flatout.kernels.linear import as_tensor
from flatout.search.deliver import deliver
from flatout.search.preflight import check_output
from flatout.search.recipes import recipe_from_name
from flatout.search.request import parse_max_loss
from flatout.search.rows import loss_of
from flatout.search.rungs import Climb, Clock, Rung
from flatout.search.texts import Texts, read_texts
from flatout.search.trials import key_of
from flatout.train.config import TrainConfig
from flatout.train.constraints import Constraint, Mask, has_levels, inside, levels_of
from flatout.train.data import pack
from flatout.train.distill import Distillation, distillation
from flatout.train.trainable import make_trainable, source_weights, to_model
from flatout.train.trainer import Progress, open_device, train
from flatout.verify.certificate import Certificate, Side, certificate_to_json
from flatout.verify.examination import Plan, examine, plan_opening
from flatout.verify.quality import pair_scores, score_model, tokens_sha256

RUNGS = ("rtn", "gptq", "tune", "lora-kd", "full-kd")
_RANK = 16
_PAGES = 33  # two texts of 1,024 tokens and one page
_LIKELY = 0.5  # chance to pass that an opening takes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recovery:
    """The rungs climbed and the best model. certificate: the one that passed, or None."""

    rungs: tuple[Rung, ...]
    model: Model
    certificate: Certificate | None


def climb(
    source: Checkpoint,
    recipe: Recipe,
    texts: Texts,
    out: Path,
    config: TrainConfig,
    *,
    original: Runner,
    serve: Callable[[Model], Runner],
    margin: float = 0.01,
    rungs: Sequence[str] = RUNGS,
    ledger: Path | None = None,
    keep: Path | None = None,
    tell: Callable[[Rung], None] = lambda rung: None,
    progress: Progress | None = None,
) -> Recovery:
    """Climb `rungs` until one is certified, and write the best model to the folder `out`.

    config: of both distillations. original: scores the checkpoint; serve: the runner of a model. keep: a
    folder of this climb alone, from which it goes on where it was interrupted; finished rungs are told again.
    Raises ConfigError for a rung that is none, a recipe that names a method or rounds nothing, and what
    reading, rounding and scoring raise.
    """
    unknown = [name for name in rungs if name not in RUNGS]
    if unknown or not rungs:
        raise ConfigError(f"rungs are of {', '.join(RUNGS)}", ", ".join(unknown) or "none", "all of them")
    _check(recipe, source.spec)
    calibration = [cluster.tokens for cluster in texts.calibration]
    before = score_model(original, texts.validation)
    side = Side(source=source.name, sha256=source.sha256, recipe="original", runner=original.name)
    certificate: Certificate | None = None
    with tempfile.TemporaryDirectory(prefix="flatout-") as temporary:
        kept = Climb(keep or Path(temporary))
        climbed, best = kept.load()
        for rung in climbed:
            tell(rung)
        for name in rungs[len(climbed) :]:
            work = kept.work(name)
            clock = Clock(work, progress)
            if name.endswith("-kd"):
                start = best or compress(source, recipe)
                model = distilled(source, start, config, calibration, name, work / "training", clock)
            else:
                model = compress(source, replace(recipe, method=name), calibration, clock, work / "layers")
            minutes = clock.seconds / 60
            runner = serve(model)
            losses = pair_scores(texts.validation, before, score_model(runner, texts.validation))
            loss, least = loss_of(losses), min((rung.loss.value for rung in climbed), default=None)
            plan = plan_opening(losses, texts.holdout, side, margin=margin, ledger=ledger)
            certificate = None
            if plan.chance >= _LIKELY:
                certificate = _certify(
                    source, model, runner, original, side, texts, plan, margin, ledger, out
                )
            rung = Rung(
                name=name,
                minutes=minutes,
                loss=loss,
                gain_per_minute=None if least is None else (least - loss.value) / minutes,
                plan=plan,
                verdict="" if certificate is None else certificate.verdict,
            )
            climbed.append(rung)
            tell(rung)
            if certificate is not None and certificate.passed:
                best = model
                break
            better = model if least is None or loss.value < least else None
            best = kept.save(climbed, better, source.tokenizer)
        assert best is not None
        passed = certificate if certificate is not None and certificate.passed else None
        manifest: dict[str, Any] = {"derived_from": source.sha256, "recovery": climbed}
        if passed is not None:
            manifest["certificate"] = certificate_to_json(passed)
        deliver(best, source.tokenizer, out, manifest, serve(best), serve, texts.validation[0])
        kept.done()
    return Recovery(rungs=tuple(climbed), model=best, certificate=passed)


def recover(
    model: str | Path,
    out: str | Path,
    recipe: str,
    *,
    max_loss: str | float = "1%",
    text: Path | None = None,
    threads: int | None = None,
    steps: int = 200,
    learning_rate: float = 1e-4,
    rungs: Sequence[str] = RUNGS,
    ledger: Path | None = None,
    fresh: bool = False,
    tell: Callable[[Rung], None] = lambda rung: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`climb` with a model, a recipe and a text by name, on the CPU engine; returns a JSON object. An
    interrupted climb goes on from the cache folder with the same arguments, unless `fresh` is set.

    steps, learning_rate: of each distillation. Raises ConfigError for what does not fit, before any work.
    """
    from flatout.engine.cpu import CpuRunner

    margin, cores = parse_max_loss(max_loss), threads or available_cores()
    if is_encoder(model):
        raise ConfigError("the recovery ladder is for decoders", f"{model}, an encoder", "without --recover")
    check_output(Path(out), Path(model))
    source = open_checkpoint(model)
    config = TrainConfig(
        steps=steps, rows=4, length=256, learning_rate=learning_rate, warmup=steps // 10,
        weight_decay=0.0, precision="fp32", device="auto", log_every=10, save_every=20,
    )  # fmt: skip
    filled = recipe_from_name(recipe, source)
    texts = read_texts(source.tokenizer, source.tokenizer.sha256, source.spec, text)
    key = {"flatout": __version__, "model": source.sha256, "recipe": filled, "config": config}
    key |= {"margin": margin, "rungs": rungs}
    key |= {f"text {i}": tokens_sha256(used) for i, used in enumerate((texts.calibration, texts.validation))}
    keep = cache_dir() / "recovery" / key_of(key)[:32]
    if fresh:
        shutil.rmtree(keep, ignore_errors=True)
    found = climb(
        source,
        filled,
        texts,
        Path(out),
        config,
        original=ReferenceRunner(source, _PAGES),
        serve=lambda made: CpuRunner(made, threads=cores, num_pages=_PAGES),
        margin=margin,
        rungs=rungs,
        ledger=ledger,
        keep=keep,
        tell=tell,
        progress=progress,
    )
    certificate = found.certificate
    rung = min(found.rungs, key=lambda rung: rung.loss.value) if certificate is None else found.rungs[-1]
    return {
        "command": "optimize",
        "kind": "recovery",
        "model": str(model),
        "recipe": found.model.recipe.name,
        "margin": margin,
        "config": to_json(config),
        "rungs": [to_json(one) for one in found.rungs],
        "delivered": rung.name,
        "certified": None if certificate is None else {"k": certificate.k, "upper": certificate.loss_upper},
        "passed": certificate is not None,
        "verdict": f"{rung.name} is certified" if certificate is not None else "no rung is certified",
        "artifact": str(out),
    }


def _check(recipe: Recipe, spec: ModelSpec) -> None:
    """Raise ConfigError for a recipe that leaves the rungs nothing to choose."""
    recipe.check(spec)
    if recipe.method != "rtn":
        named = f"a recipe made by {recipe.method}"
        raise ConfigError("every rung has a method of its own", named, "the recipe without its method")
    formats = [recipe.format_of(i, linear) for i in range(spec.num_layers) for linear in spec.linears()]
    if not recipe.reduces and not any(fmt.is_integer and not fmt.is_native for fmt in formats):
        raise ConfigError("a recovery needs a loss", f"{recipe.name} rounds no layer", "w4a8-g64")


def _certify(
    source: Checkpoint,
    model: Model,
    runner: Runner,
    original: Runner,
    side: Side,
    texts: Texts,
    plan: Plan,
    margin: float,
    ledger: Path | None,
    out: Path,
) -> Certificate:
    """Open the sealed text for `model`."""
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=".flatout-") as folder:
        stored = save_artifact(model, source.tokenizer, Path(folder) / "candidate", {})
        sha256 = sha256_of([stored / "model.safetensors"])
    return examine(
        texts.holdout,
        plan,
        original=side,
        optimised=Side(
            source=str(out),
            sha256=sha256,
            recipe=model.recipe.name,
            runner=runner.name,
            derived_from=side.sha256,
        ),
        score_original=lambda clusters: score_model(original, clusters, sound=True),
        score_optimised=lambda clusters: score_model(runner, clusters, sound=True),
        margin=margin,
        ledger=ledger,
    )


def distilled(
    source: Checkpoint,
    start: Model,
    config: TrainConfig,
    documents: Sequence[Sequence[int]],
    rung: str,
    folder: Path,
    progress: Progress | None = None,
) -> Model:
    """`start` after following the predictions of `source` on `documents`; blocks taken from a file stay, and
    so does what is pruned.

    rung: "lora-kd", or "full-kd" for all weights. folder: keeps state and log of the training. Weights start
    inside the cells of their codes, so the first step has the loss of `start`.
    """
    device = open_device(config.device)
    weights, constraints, kept = {}, dict[str, Constraint](), dict[str, Weight]()
    for name, weight in start.weights.items():
        values = as_tensor(dense(weight).astype(np.float32))
        pruned = bool(start.recipe.sparsity) and values.ndim == 2 and name.startswith("layers.")
        weights[name] = values
        if isinstance(weight, QuantizedTensor) and not has_levels(weight):
            kept[name] = weight
        elif isinstance(weight, QuantizedTensor):
            constraints[name] = levels_of(weight, pruned)
            if not start.recipe.reduces:  # else the original is another weight
                weights[name] = inside(as_tensor(float_weight(source, name)), weight)
        elif pruned:
            constraints[name] = Mask((values != 0).float())
    student = make_trainable(
        start.spec,
        weights,
        device=device,
        constraints=constraints,
        rank=_RANK if rung == "lora-kd" else 0,
        fixed=list(kept),
        seed=config.seed,
    )
    teacher = make_trainable(source.spec, source_weights(source), device=device, frozen=True)
    outcome = train(
        student,
        distillation(teacher, Distillation()),
        pack(documents, config.length),
        replace(config, weight_decay=0.0),
        folder,
        purpose=rung,
        progress=progress,
    )
    if not outcome.finished:
        raise KeyboardInterrupt  # the step that it came in is kept
    return to_model(student, start.recipe, kept)
