"""bench(): our engine and its peers on one machine, in one run, taking turns.

Correctness first: every contender scores the validation passages, so that no speed stands without its
perplexity. Then rounds (`turns`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import flatout
from flatout.bench.install import install
from flatout.bench.models import model_file
from flatout.bench.peers import LLAMA, TRANSFORMERS, Listener, Variant, launch, variants
from flatout.bench.phases import PHASES, Contender, Phase, Row, make_row
from flatout.bench.record import BenchResult, Text, record, tokens_needed
from flatout.bench.turns import Ours, Side, take_turns
from flatout.bench.worker import Worker
from flatout.core.artifact import is_artifact
from flatout.core.checkpoint import Checkpoint, open_checkpoint
from flatout.core.files import read_json_object
from flatout.core.formats import Recipe
from flatout.core.types import Hardware
from flatout.data.passages import load_passages, split_sha256
from flatout.engine.cpu import CpuRunner
from flatout.engine.load import load
from flatout.errors import BackendError, ConfigError, EvidenceError, ResourceError
from flatout.hardware.ceilings import measure_ceilings
from flatout.hardware.detect import available_cores, free_memory
from flatout.perf.profile import phase_parts
from flatout.perf.roofline import step_floor
from flatout.verify.drivers import workload_prompts
from flatout.verify.quality import (
    Cluster,
    arrays,
    fits,
    pair_scores,
    perplexities,
    score_model,
    token_clusters,
)
from flatout.verify.statistics import FEWEST_FOR_SPREAD, moments, ratio_bound

OURS = "flatout"
_PAGE = 64
_SPLIT = "validation"


@dataclass(frozen=True, slots=True)
class _Entry:
    """A contender before it is judged: who it is, and what does its work."""

    engine: str
    format: str
    version: str
    details: str
    side: Side


def bench(
    model: str,
    against: Sequence[str],
    *,
    original: str | None = None,
    threads: int | None = None,
    rounds: int = 5,
    passages: int | None = None,
    command: str = "",
    listen: Listener | None = None,
) -> BenchResult:
    """Measure `model` (artifact or checkpoint) beside the peers in `against` (names of peers.PEERS).

    original: the checkpoint that peers run; by default the one an artifact was made from, or `model` itself.
    passages: of the validation split, all by default. command: what to record as the way to repeat this.
    Raises FlatoutErrors; a peer that fails ends the run, because a comparison without it would flatter us.
    """
    listen = listen or _silent
    if rounds < 1 or (passages is not None and passages < 2):
        raise ConfigError(
            "a benchmark needs at least 1 round and 2 passages", f"{rounds} and {passages}", "--rounds 5"
        )
    source = _original(model, original)
    threads = threads or available_cores()
    wanted = [variant for peer in against for variant in variants(peer, source)]
    _check_memory(source, wanted)
    pythons = {peer: install(peer, listen) for peer in against}
    files = [model_file(variant, pythons[variant.engine], source, threads, listen) for variant in wanted]
    hardware = measure_ceilings(listen)
    phases = [phase for phase in PHASES if tokens_needed(phase) <= source.spec.max_positions]
    clusters = token_clusters(source.tokenizer, load_passages(_SPLIT), fits(source.spec))[:passages]
    base = _score_original(source, clusters, listen)
    with ExitStack() as stack:
        runner = _load(model, source, threads, phases)
        entries = [
            _Entry(OURS, runner.recipe.name, f"flatout {flatout.__version__}", runner.name, Ours(runner))
        ]
        for variant, file in zip(wanted, files, strict=True):
            listen(f"loading {variant.name}", 0, 1)
            worker = stack.enter_context(launch(variant, pythons[variant.engine]))
            entries.append(_open(worker, variant, file, source, threads))
        contenders = [_judge(entry, clusters, base, listen) for entry in entries]
        work = [(phase, workload_prompts(source.tokenizer, phase.workload)) for phase in phases]
        samples = take_turns([entry.side for entry in entries], work, rounds, available_cores(), listen)
    rows: list[Row] = []
    for phase in phases:
        floor_s = _floor_s(runner, runner.recipe, hardware, phase, threads)
        for i, contender in enumerate(contenders):
            own = floor_s if contender.engine == OURS else None
            rows.append(make_row(contender, phase, samples[i, phase.name], rounds, own))
    return record(
        command=command,
        model=model,
        original=source.path,
        original_sha256=source.sha256,
        threads=threads,
        rounds=rounds,
        machine=hardware,
        text=_text(clusters, base),
        contenders=contenders,
        rows=rows,
        ours=OURS,
    )


def _silent(stage: str, done: int, total: int) -> None:
    """No listener."""


def _original(model: str, named: str | None) -> Checkpoint:
    """The checkpoint that peers run: the one named, the one an artifact's certificate names, or the model."""
    if named is not None or not is_artifact(model):
        return open_checkpoint(named or model)
    certificate = read_json_object(Path(model) / "flatout.json").get("certificate")
    side = certificate.get("original") if isinstance(certificate, dict) else None
    if not isinstance(side, dict) or not isinstance(side.get("source"), str):
        raise ConfigError(
            "peers run the original of an artifact", "the artifact does not name it", "--original MODEL"
        )
    checkpoint = open_checkpoint(side["source"])
    if checkpoint.sha256 != side.get("sha256"):
        raise EvidenceError(
            "the original must be the one that the artifact was made from",
            f"other weights in {checkpoint.path}",
            "--original MODEL",
        )
    return checkpoint


def _check_memory(source: Checkpoint, wanted: Sequence[Variant]) -> None:
    """Raise ResourceError unless all contenders fit into memory together: they take turns, loaded."""
    stored = sum(file.stat().st_size for file in source.files)
    weights = source.spec.num_parameters()
    needed = 2 * weights + sum(_held(variant, stored, weights) for variant in wanted)
    free = free_memory()
    if 0 < free < needed:
        raise ResourceError(
            f"{len(wanted) + 1} contenders side by side need about {needed / 1e9:.1f} GB",
            f"{free / 1e9:.1f} GB free",
            "fewer peers in --against",
        )


def _held(variant: Variant, stored: int, weights: int) -> int:
    """Bytes that a loaded variant holds, estimated. OpenVINO and ONNX Runtime keep repacked copies."""
    if variant.engine == LLAMA:
        return stored
    return 2 * weights if variant.engine == TRANSFORMERS else 4 * weights


def _score_original(source: Checkpoint, clusters: Sequence[Cluster], listen: Listener) -> list[np.ndarray]:
    from flatout.engine.reference import ReferenceRunner

    runner = ReferenceRunner(source, fits(source.spec) // _PAGE + 1, _PAGE, as_served=False)
    return score_model(runner, clusters, lambda done, total: listen("scoring the original", done, total))


def _load(model: str, source: Checkpoint, threads: int, phases: Sequence[Phase]) -> CpuRunner:
    """Our runner, with room for the largest phase and for scoring."""
    pages = max(p.workload.batch * (tokens_needed(p) // _PAGE + 1) for p in phases)
    tokens = max(pages * _PAGE, fits(source.spec) + _PAGE)
    runner = load(model, runner="cpu", threads=threads, max_tokens=tokens).runner
    assert isinstance(runner, CpuRunner)
    if runner.spec.vocab_size != source.spec.vocab_size:
        raise EvidenceError(
            "all contenders must read the same tokens",
            f"vocabularies of {runner.spec.vocab_size} and {source.spec.vocab_size}",
            "the model's own original",
        )
    return runner


def _open(worker: Worker, variant: Variant, file: Path, source: Checkpoint, threads: int) -> _Entry:
    facts = worker.load(str(file), threads)
    if facts.get("vocab_size") != source.spec.vocab_size:
        raise BackendError(
            f"{variant.name} must read the model's {source.spec.vocab_size} tokens",
            str(facts.get("vocab_size")),
            "leave this peer out of --against",
        )
    about = str(facts.get("version", "")), str(facts.get("details", ""))
    return _Entry(variant.engine, variant.format, *about, worker)


def _judge(
    entry: _Entry, clusters: Sequence[Cluster], base: Sequence[np.ndarray], listen: Listener
) -> Contender:
    """Score the passages, one at a time as contexts of their own, and compare with the original."""
    scores = []
    for done, cluster in enumerate(clusters):
        listen(f"scoring {entry.engine} {entry.format}", done, len(clusters))
        scores.append(np.asarray(entry.side.score(cluster.tokens), dtype=np.float32))
    losses = pair_scores(clusters, base, scores)
    _, perplexity = perplexities(losses)
    sums, counts = arrays(losses)
    # Of a few passages a bootstrapped bound can be any number at all.
    bound = ratio_bound(sums, counts, 0.05) if len(losses) >= FEWEST_FOR_SPREAD else None
    return Contender(
        engine=entry.engine,
        format=entry.format,
        version=entry.version,
        details=entry.details,
        perplexity=perplexity,
        loss=math.expm1(moments(sums, counts).delta),
        loss_upper=None if bound is None else math.expm1(bound.upper),
    )


def _floor_s(runner: CpuRunner, recipe: Recipe, hardware: Hardware, phase: Phase, threads: int) -> float:
    """Least seconds of a whole phase on our runner: all prompts, or all decode steps."""
    floor = step_floor(phase_parts(runner.spec, recipe, hardware, phase.workload, threads)[phase.kind])
    return floor.floor_s * (phase.workload.output if phase.kind == "decode" else 1)


def _text(clusters: Sequence[Cluster], base: Sequence[np.ndarray]) -> Text:
    perplexity, _ = perplexities(pair_scores(clusters, base, base))
    return Text(
        split=_SPLIT,
        sha256=split_sha256(_SPLIT),
        passages=len(clusters),
        tokens=sum(len(cluster.tokens) - 1 for cluster in clusters),
        original_perplexity=perplexity,
    )
