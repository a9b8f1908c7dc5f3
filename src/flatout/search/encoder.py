"""optimize() of an encoder: the fastest number formats that keep its vectors, proven like a decoder's recipe.

Validation passages say which recipes keep the budget, listed ones and mixtures that are found
(search/encoder_joint.py), an A/B test of the workload which is the fastest. It
opens the sealed passages (verify/vectors.py), and has to beat the engine at original precision and PyTorch,
which is how sentence-transformers runs the model; otherwise the next one is tried, and in the end the
original comes back. The artifact is the original's folder, which everything loads as before, with the formats
in flatout.json: our engine rounds to nearest when it loads it. Codes of a recipe FORMAT/gptq or FORMAT/smooth
are kept beside the folder's weights; a recipe that takes weights away (search/encoder_recipes.py) writes a
smaller or sparser folder of the same kind.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from flatout._version import __version__
from flatout.compress.encoder import EncoderSource, compress_encoder, load
from flatout.compress.encoder_reduce import ReducedEncoder, write_encoder
from flatout.compress.encoder_smooth import smooth_encoder, smoothing_factors
from flatout.compress.method import Progress
from flatout.core.encoder import EncoderModel
from flatout.core.encoder_folder import EncoderCheckpoint, TextTokenizer, open_encoder, save_encoder
from flatout.core.files import sha256_of, shown
from flatout.core.formats import parse_format
from flatout.core.quantized import QuantizedTensor
from flatout.core.scratch import scratch_folder
from flatout.core.types import Workload, to_json
from flatout.data.passages import Passage, load_passages, passages_sha256
from flatout.engine.encoder import Encoder
from flatout.errors import ConfigError, EvidenceError
from flatout.hardware.detect import available_cores, detect
from flatout.search.encoder_joint import (
    SPACE,
    Mixtures,
    Proposal,
    batch_timer,
    measure,
    propose,
    timed_in_turns,
)
from flatout.search.encoder_recipes import (
    calibration_texts,
    encoder_of,
    parse_encoder_recipe,
    reduced_encoder,
)
from flatout.search.preflight import check_output
from flatout.search.request import parse_max_loss
from flatout.search.units import percent, times
from flatout.verify.baseline import BertBaseline
from flatout.verify.ledger import record_opening
from flatout.verify.speed import SpeedResult, ab_test
from flatout.verify.statistics import alpha_k
from flatout.verify.vectors import VectorVerdict, examine_vectors, judged_sha256, pieces_of

Json = dict[str, Any]

ORIGINAL = "bf16"
FORMATS = ("w8a8", "w8a8/smooth", "w8a8-g128", "w8a8-g64", "w8a8-g32", "w8a16", "w4a16-g32")
_BATCHES = {"latency": 1, "throughput": 32}
_TOKENS = 128
_WORKLOAD = re.compile(r"(?P<tokens>\d{1,4})(x(?P<batch>\d{1,4}))?")
_ALPHA = 0.05
_LOOK_S, _RACE_S = 6.0, 12.0  # of an A/B test
_ROUNDS = 60  # of timing candidates
_ALIKE = 1.02  # times that are as good as equal


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A recipe with what is known of it. name: the recipe's, or joint-N of one that was found; expected: what
    that one was expected to lose and take. status: waiting, rejected, slower, failed, chosen or original."""

    name: str
    recipe: str
    weight_bytes: int
    validation: VectorVerdict | None = None
    seconds: float | None = None
    expected: Json | None = None
    status: str = "waiting"
    reason: str = ""


class _Search:
    """What every step shares: the checkpoint, its vectors, and encoders by format."""

    def __init__(
        self, checkpoint: EncoderCheckpoint, threads: int, workload: Workload, step: Progress
    ) -> None:
        self.checkpoint, self.threads, self.workload, self.step = checkpoint, threads, workload, step
        self.passages = {split: load_passages(split) for split in ("validation", "holdout")}
        self._encoders: dict[str, Encoder] = {}
        self.models: dict[str, EncoderModel] = {}
        self._sources: dict[str, EncoderSource] = {}
        self._original: dict[str, np.ndarray] = {}
        self.names: dict[str, str] = {}
        """Of recipes that were found, for people."""
        self._tokenizer = checkpoint.tokenizer()
        self.batch = workload_batch(self._tokenizer, self.passages["validation"], workload)

    def encoder(self, name: str) -> Encoder:
        if name not in self._encoders:
            found = self.checkpoint
            recipe = parse_encoder_recipe(name, found.spec)
            self._sources[name] = reduced_encoder(found, recipe)
            if recipe.method == "smooth" and not recipe.reduces:
                self.models[name] = smooth_encoder(found, recipe.format, self.factors)
            else:
                self.models[name] = encoder_of(self._sources[name], recipe, lambda: calibration_texts(found))
            self._encoders[name] = self.running(self.models[name])
        return self._encoders[name]

    def running(self, model: EncoderModel) -> Encoder:
        pooling = self.checkpoint.pooling
        return Encoder.of(model, self._tokenizer, threads=self.threads, pooling=pooling, normalize=True)

    @cached_property
    def factors(self) -> dict[str, np.ndarray]:
        """That smooth the whole encoder."""
        self.step("smoothing", 0, 1)
        return smoothing_factors(self.checkpoint, calibration_texts(self.checkpoint))

    def save(self, name: str, out: Path, manifest: Json) -> None:
        """Write the encoder of recipe `name`, which was made before, as the folder `out`."""
        recipe, source = parse_encoder_recipe(name, self.checkpoint.spec), self._sources[name]
        model = self.models[name]
        made = {} if recipe.method == "rtn" else model.weights
        rounded = {key: weight for key, weight in made.items() if isinstance(weight, QuantizedTensor)}
        if not isinstance(source, ReducedEncoder):
            save_encoder(self.checkpoint, out, recipe.format, manifest, rounded, model.factors)
            return
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(out.absolute().parent, f".{out.name}.flatout-") as temporary:
            folder = write_encoder(source, temporary / "reduced")
            save_encoder(folder, out, recipe.format, manifest, rounded, model.factors)

    def original_vectors(self, split: str) -> np.ndarray:
        """Of the float32 weights, by the plain PyTorch specification, once a split."""
        if split not in self._original:
            from flatout.models.bert import Bert

            found = self.checkpoint
            exact = Encoder(
                Bert(compress_encoder(found, "fp32")),
                self._tokenizer,
                pooling=found.pooling,
                normalize=True,
            )
            self._original[split] = self._vectors(exact, split, "original")
        return self._original[split]

    def judge(self, name: str, split: str, margin: float, alpha: float) -> VectorVerdict:
        vectors = self._vectors(self.encoder(name), split, self.names.get(name, name))
        return examine_vectors(self.passages[split], self.original_vectors(split), vectors, margin, alpha)

    def _vectors(self, encoder: Encoder, split: str, name: str) -> np.ndarray:
        texts = [text for _, text in pieces_of(self.passages[split])]
        found = []
        for start in range(0, len(texts), 128):
            self.step(f"vectors of {split}: {name}", start, len(texts))
            found.append(encoder.encode(texts[start : start + 128]))
        return np.concatenate(found)

    def seconds(self, name: str) -> Callable[[], float]:
        """Seconds of one batch of the workload by our engine."""
        return batch_timer(self.encoder(name), self.batch)

    def mixtures(self, space: Sequence[str]) -> Mixtures:
        """Of the formats `space`, smoothed where activations share a scale a token."""
        uniform = {}
        for name in space:
            recipe = f"{name}/smooth" if parse_format(name).scales_tokens else name
            self.encoder(recipe)
            uniform[name] = self.models[recipe]
        texts = [text for _, text in pieces_of(self.passages["validation"])]
        return Mixtures(uniform, self.running, texts, self.original_vectors("validation"), self.batch)


def optimize_encoder(
    model: str | Path,
    out: str | Path,
    *,
    max_loss: str | float = "1%",
    recipe: str | None = None,
    objective: str = "latency",
    workload: str | None = None,
    threads: int | None = None,
    step: Progress | None = None,
) -> Json:
    """The fastest formats of the encoder `model` whose vectors stay within `max_loss`, written to `out`.

    max_loss bounds both 1 - cosine and the share of pieces that are misplaced. recipe: one of
    search/encoder_recipes.py instead of trying all. objective: latency or throughput. workload: TOKENS or
    TOKENSxBATCH, "128x32". Raises ConfigError for nonsense and what reading the model raises.
    """
    margin = parse_max_loss(max_loss)
    work = encoder_workload(workload, objective)
    check_output(Path(out), Path(model))
    checkpoint = open_encoder(model)
    search = _Search(checkpoint, threads or available_cores(), work, step or (lambda what, done, of: None))
    if recipe is not None:
        parse_encoder_recipe(recipe, checkpoint.spec)
    sha256 = sha256_of(checkpoint.files)
    names = _fitting(checkpoint) if recipe is None else [recipe]
    found = _proposals(search, margin) if recipe is None else []
    rows = _screen(search, names, found, margin)
    chosen, verdict, races, k = _prove(search, rows, margin, sha256)
    baseline = races["baseline"]
    passed = verdict.passed and recipe in (None, chosen.recipe)
    fallback = chosen.recipe == ORIGINAL and recipe != ORIGINAL
    result: Json = {
        "command": "optimize",
        "kind": "encoder",
        "flatout": __version__,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "model": {
            "name": shown(checkpoint.name),
            "sha256": sha256,
            "parameters": checkpoint.spec.num_parameters(),
        },
        "verdict": _sentence(chosen, verdict, baseline, rows[0] if recipe and fallback else None, fallback),
        "passed": passed,
        "fallback": fallback,
        "threads": search.threads,
        "hardware": to_json(detect()),
        "request": {"model": str(model), "max_loss": margin, "recipe": recipe, "workload": to_json(work)},
        "baseline": _column("PyTorch float32", baseline, "a", work),
        "engine_original": _column(ORIGINAL, races["original"], "a", work) if "original" in races else None,
        "optimized": _column(chosen.name, baseline, "b", work)
        | {"recipe": chosen.recipe, "memory_bytes": chosen.weight_bytes},
        "speedup": {"texts": baseline.ratio},
        "speedup_interval": {"texts": [baseline.low, baseline.high]},
        "quality": to_json(verdict) | {"k": k, "text_sha256": passages_sha256(search.passages["holdout"])},
        "candidates": [to_json(replace(row, validation=None)) | _validation(row) for row in rows],
        "report": None,
    }
    search.save(chosen.recipe, Path(out), {"measurements": result})
    _check_saved(search, Path(out), chosen.recipe)
    return result | {"artifact": str(out)}


def encoder_workload(text: str | None, objective: str) -> Workload:
    """The batches of TOKENS or TOKENSxBATCH, by default one text or 32, as the objective says. Raises
    ConfigError for anything else."""
    if objective not in _BATCHES:
        raise ConfigError("an encoder's objective is latency or throughput", repr(objective), "latency")
    match = _WORKLOAD.fullmatch((text or str(_TOKENS)).strip())
    if match is None:
        raise ConfigError("an encoder's workload is TOKENS or TOKENSxBATCH", repr(text), "128x32")
    batch = int(match["batch"] or _BATCHES[objective])
    return Workload(prompt=int(match["tokens"]), output=1, batch=batch, objective=objective)


def workload_batch(tokenizer: TextTokenizer, passages: Sequence[Passage], workload: Workload) -> np.ndarray:
    """int32 (B, T): token ids of the workload's batch, the beginnings of passages that are long enough.
    Raises ConfigError when none is."""
    length = workload.prompt
    rows = [row[:length] for row in tokenizer.encode_batch([p.text for p in passages]) if len(row) >= length]
    if not rows:
        raise ConfigError(
            f"a text of this model has at most {tokenizer.max_tokens} tokens", str(length), "--workload 128"
        )
    return np.array([rows[i % len(rows)] for i in range(workload.batch)], dtype=np.int32)


def _fitting(checkpoint: EncoderCheckpoint) -> list[str]:
    found = []
    for name in FORMATS:
        try:
            parse_encoder_recipe(name, checkpoint.spec)
        except ConfigError:
            continue  # groups that do not divide a width
        found.append(name)
    return found


def _proposals(search: _Search, margin: float) -> list[Proposal]:
    """Mixtures of formats that are worth a look."""
    space = [name for name in SPACE if name in _fitting(search.checkpoint)]
    if len(space) < 2:
        return []
    bench = search.mixtures(space)
    return propose(measure(bench, space, search.step), bench.spec, margin)


def _screen(search: _Search, names: list[str], proposals: list[Proposal], margin: float) -> list[Candidate]:
    """Every recipe with its vectors on validation passages and its time; the original is the last."""
    found = {p.recipe: {"distance": p.distance, "seconds": p.seconds} for p in proposals}
    search.names.update((recipe, f"joint-{i + 1}") for i, recipe in enumerate(found))
    rows = []
    for recipe in dict.fromkeys((*names, *found, ORIGINAL)):
        encoder = search.encoder(recipe)
        row = Candidate(
            name=search.names.get(recipe, recipe),
            recipe=recipe,
            weight_bytes=encoder.runner.weight_bytes,  # type: ignore[attr-defined]
            expected=found.get(recipe),
        )
        try:
            verdict = search.judge(recipe, "validation", margin, _ALPHA)
        except EvidenceError as error:
            rows.append(replace(row, status="rejected", reason=str(error)))
            continue
        if recipe == ORIGINAL:
            row = replace(row, status="original")
        elif verdict.verdict == "failed":
            row = replace(row, status="rejected", reason=verdict.reason)
        rows.append(replace(row, validation=verdict))
    timed = [row.recipe for row in rows if row.validation is not None]
    samples = timed_in_turns({recipe: search.seconds(recipe) for recipe in timed}, _ROUNDS, search.step)
    return [
        replace(row, seconds=float(np.quantile(samples[row.recipe], 0.2))) if row.recipe in samples else row
        for row in rows
    ]


def _chance(verdict: VectorVerdict) -> float:
    """That the sealed passages, as many as these, certify a recipe: it misplaces as many more pieces as here,
    or none if it has been lucky, give or take the error of counting, which the bound adds once more."""
    normal = NormalDist()
    z = normal.inv_cdf(1 - verdict.alpha)
    error = max((verdict.lost_upper - verdict.lost_share) / z, 1e-9)
    return normal.cdf((verdict.margin - max(verdict.lost_share, 0.0)) / error - z)


def _by_promise(rows: list[Candidate]) -> list[Candidate]:
    """Those that are likely to be certified before others, since every opening makes the next one stricter;
    of them the fastest first, and of recipes as fast as it the one that loses least."""
    waiting = sorted((row for row in rows if row.status == "waiting"), key=lambda row: row.seconds or 0.0)
    found: list[Candidate] = []
    for likely in (True, False):
        left = [row for row in waiting if row.validation and (_chance(row.validation) >= 0.5) == likely]
        while left:
            alike = [row for row in left if (row.seconds or 0.0) <= _ALIKE * (left[0].seconds or 0.0)]
            best = min(alike, key=lambda row: row.validation.distance if row.validation else 0.0)
            found.append(best)
            left.remove(best)
    return found


def _prove(
    search: _Search, rows: list[Candidate], margin: float, sha256: str
) -> tuple[Candidate, VectorVerdict, dict[str, SpeedResult], int]:
    """(delivered, its verdict on sealed passages, races, opening). `rows` are marked as their fates are
    known."""

    def mark(row: Candidate, status: str, reason: str = "") -> Candidate:
        rows[rows.index(row)] = marked = replace(row, status=status, reason=reason)
        return marked

    baseline = BertBaseline(search.checkpoint.path, search.threads)

    def against_baseline(name: str) -> SpeedResult:
        search.step(f"{search.names.get(name, name)} against PyTorch", 0, 1)
        return ab_test(lambda: baseline.seconds(search.batch), search.seconds(name), max_seconds=_RACE_S)

    for row in _by_promise(rows):
        search.step(f"{row.name} against {ORIGINAL}", 0, 1)
        own = ab_test(search.seconds(ORIGINAL), search.seconds(row.recipe), max_seconds=_LOOK_S)
        if not own.faster:
            mark(row, "slower", "not faster than original precision in an A/B test")
            continue
        verdict, k = _certify(search, row.recipe, margin, sha256)
        if not verdict.passed:
            mark(row, "failed", verdict.reason)
            continue
        final = against_baseline(row.recipe)
        if final.faster:
            return mark(row, "chosen"), verdict, {"original": own, "baseline": final}, k
        mark(row, "slower", "not faster than PyTorch in an A/B test")
    original = next(row for row in rows if row.recipe == ORIGINAL)
    verdict, k = _certify(search, ORIGINAL, margin, sha256)
    return (
        mark(original, "chosen", "the original comes back"),
        verdict,
        {"baseline": against_baseline(ORIGINAL)},
        k,
    )


def _certify(search: _Search, name: str, margin: float, sha256: str) -> tuple[VectorVerdict, int]:
    """Open the sealed passages for one format."""
    text = passages_sha256(search.passages["holdout"])
    k = record_opening(text, sha256, judged_sha256(name, search.encoder(name).runner.name, margin))
    return search.judge(name, "holdout", margin, alpha_k(k, _ALPHA)), k


def _check_saved(search: _Search, out: Path, name: str) -> None:
    again = load(out, threads=search.threads)
    texts = [text for _, text in pieces_of(search.passages["validation"][:1])]
    if not isinstance(again, Encoder) or again.runner.spec != search.models[name].spec:
        raise EvidenceError("a saved encoder must load again", str(out), "report this")
    vectors = again.encode(texts)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.allclose(vectors, search.encoder(name).encode(texts), rtol=0, atol=1e-6):
        raise EvidenceError(
            "a saved encoder must give the certified vectors", f"{out} does not", "report this"
        )


def _column(name: str, race: SpeedResult, side: str, work: Workload) -> Json:
    seconds = race.seconds_a if side == "a" else race.seconds_b
    return {"name": name, "seconds": to_json(seconds), "texts_per_s": work.batch / seconds.median}


def _validation(row: Candidate) -> Json:
    found = row.validation
    if found is None:
        return {"validation": None}
    return {
        "validation": {
            "distance": found.distance,
            "lost_share": found.lost_share,
            "lost_upper": found.lost_upper,
            "pieces": found.pieces,
            "chance": _chance(found),
        }
    }


def _sentence(
    chosen: Candidate, verdict: VectorVerdict, race: SpeedResult, asked: Candidate | None, fallback: bool
) -> str:
    """asked: the format that was asked for and is not the chosen one."""
    quality = (
        f"1 - cosine {percent(verdict.distance)} (at most {percent(verdict.distance_upper)}), "
        f"{percent(verdict.lost_share, signed=True)} of the pieces misplaced (at most "
        f"{percent(verdict.lost_upper, signed=True)}), budget {percent(verdict.margin)}"
    )
    start = "Nothing beat the original inside the budget; in bf16 it" if fallback else chosen.name
    if asked is not None:
        start = f"{asked.name} is {asked.status}: {asked.reason}; in bf16 the original"
    return f"{start} encodes {times(race.ratio)} as fast as PyTorch in float32: {quality}."
