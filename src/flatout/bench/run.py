"""bench(): our engine and its peers on one machine, in one run, taking turns.

First everyone starts in fresh processes (`starts`). Then correctness: every contender scores the validation
passages, so that no speed stands without its perplexity. Then rounds (`turns`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

import flatout
from flatout.bench.install import install
from flatout.bench.models import model_file
from flatout.bench.own import check_models, find_original, floor_s, load_own
from flatout.bench.peers import LLAMA, OURS, TRANSFORMERS, Listener, Variant, launch, variants
from flatout.bench.phases import LOAD, PHASES, TIMED, Contender, Row, make_row, make_start_rows
from flatout.bench.record import BenchResult, Text, record
from flatout.bench.starts import Starter, take_starts
from flatout.bench.turns import Ours, Side, take_turns
from flatout.bench.worker import Worker
from flatout.core.checkpoint import Checkpoint
from flatout.data.passages import load_passages, split_sha256
from flatout.engine.load import PAGE_TOKENS
from flatout.errors import BackendError, ConfigError, ResourceError
from flatout.hardware.ceilings import measure_ceilings
from flatout.hardware.detect import available_cores, free_memory
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

_SPLIT = "validation"


@dataclass(frozen=True, slots=True)
class _Entry:
    """A contender before it is judged: who it is, and what does its work."""

    engine: str
    format: str
    source: str
    version: str
    details: str
    side: Side


def bench(
    models: Sequence[str],
    against: Sequence[str],
    *,
    original: str | None = None,
    threads: int | None = None,
    rounds: int = 5,
    passages: int | None = None,
    command: str = "",
    listen: Listener | None = None,
) -> BenchResult:
    """Measure `models` (artifacts or checkpoints) beside the peers in `against` (names of peers.PEERS).

    original: the checkpoint that peers run; by default the first model, or the one that it was made from.
    passages: of the validation split, all by default; 0 scores nobody, for models whose perplexity means
    nothing. command: what to record as the way to repeat this. Raises FlatoutErrors; a peer that fails ends
    the run, because a comparison without it would flatter us.
    """
    listen = listen or _silent
    check_models(models)
    if rounds < 1 or (passages is not None and passages < 2 and passages != 0):
        raise ConfigError(
            "a benchmark needs at least 1 round and 2 passages, or 0 passages to score nobody",
            f"{rounds} and {passages}",
            "--rounds 5 --passages 0",
        )
    source = find_original(models[0], original)
    threads, cores = threads or available_cores(), available_cores()
    wanted = [variant for peer in against for variant in variants(peer, source)]
    _check_memory(source, len(models), wanted)
    pythons = {peer: install(peer, listen) for peer in against}
    files = [model_file(variant, pythons[variant.engine], source, threads, listen) for variant in wanted]
    hardware = measure_ceilings(listen)
    phases = [phase for phase in PHASES if phase.positions <= source.spec.max_positions]
    timed = [phase for phase in phases if phase in TIMED]
    clusters = [] if passages == 0 else _passages(source)[:passages]
    base = _score_original(source, clusters, listen) if clusters else []
    with ExitStack() as stack:
        own = load_own(models, source, threads, phases)
        version = f"flatout {flatout.__version__}"
        entries = [
            _Entry(OURS, one.format, one.model, version, one.runner.name, Ours(one.runner)) for one in own
        ]
        for variant, file in zip(wanted, files, strict=True):
            listen(f"loading {variant.name}", 0, 1)
            worker = stack.enter_context(launch(variant, pythons[variant.engine]))
            entries.append(_open(worker, variant, file, source, threads))
        contenders = [_judge(entry, clusters, base, listen) for entry in entries]
        work = [(phase, workload_prompts(source.tokenizer, phase.workload)) for phase in timed]
        samples = take_turns([entry.side for entry in entries], work, rounds, cores, listen)
    rows: list[Row] = []
    for phase in timed:
        for i, contender in enumerate(contenders):
            floor = floor_s(own[i].runner, hardware, phase, threads) if i < len(own) else None
            rows.append(make_row(contender, phase, samples[i, phase.name], rounds, floor))
    del own, entries  # a start finds the memory that users would have
    if LOAD in phases:
        ours = [
            (Variant(engine=OURS, format=c.format), Path(sys.executable)) for c in contenders[: len(models)]
        ]
        launches = [*ours, *((variant, pythons[variant.engine]) for variant in wanted)]
        starters = [
            Starter(contender.name, partial(launch, *of), contender.source)
            for contender, of in zip(contenders, launches, strict=True)
        ]
        (prompt,) = workload_prompts(source.tokenizer, LOAD.workload)
        starts = take_starts(starters, prompt, threads, rounds, cores, listen)
        for i, contender in enumerate(contenders):
            rows += make_start_rows(contender, starts[i], rounds)
    return record(
        command=command,
        models=models,
        original=source.path,
        original_sha256=source.sha256,
        threads=threads,
        rounds=rounds,
        machine=hardware,
        text=_text(clusters, base) if clusters else None,
        contenders=contenders,
        rows=rows,
        ours=OURS,
    )


def _silent(stage: str, done: int, total: int) -> None:
    """No listener."""


def _check_memory(source: Checkpoint, own: int, wanted: Sequence[Variant]) -> None:
    """Raise ResourceError unless all contenders fit into memory together: they take turns, loaded. own: how
    many are ours."""
    stored = sum(file.stat().st_size for file in source.files)
    weights = source.spec.num_parameters()
    needed = 2 * weights * own + sum(_held(variant, stored, weights) for variant in wanted)
    free = free_memory()
    if 0 < free < needed:
        raise ResourceError(
            f"{own + len(wanted)} contenders side by side need about {needed / 1e9:.1f} GB",
            f"{free / 1e9:.1f} GB free",
            "fewer models, or fewer peers in --against",
        )


def _held(variant: Variant, stored: int, weights: int) -> int:
    """Bytes that a loaded variant holds, estimated. OpenVINO and ONNX Runtime keep repacked copies."""
    if variant.engine == LLAMA:
        return stored
    return 2 * weights if variant.engine == TRANSFORMERS else 4 * weights


def _passages(source: Checkpoint) -> list[Cluster]:
    return token_clusters(source.tokenizer, load_passages(_SPLIT), fits(source.spec))


def _score_original(source: Checkpoint, clusters: Sequence[Cluster], listen: Listener) -> list[np.ndarray]:
    from flatout.engine.reference import ReferenceRunner

    runner = ReferenceRunner(source, fits(source.spec) // PAGE_TOKENS + 1, PAGE_TOKENS, as_served=False)
    return score_model(runner, clusters, lambda done, total: listen("scoring the original", done, total))


def _open(worker: Worker, variant: Variant, file: Path, source: Checkpoint, threads: int) -> _Entry:
    facts = worker.load(str(file), threads)
    if facts.get("vocab_size") != source.spec.vocab_size:
        raise BackendError(
            f"{variant.name} must read the model's {source.spec.vocab_size} tokens",
            str(facts.get("vocab_size")),
            "leave this peer out of --against",
        )
    about = str(facts.get("version", "")), str(facts.get("details", ""))
    return _Entry(variant.engine, variant.format, str(file), *about, worker)


def _judge(
    entry: _Entry, clusters: Sequence[Cluster], base: Sequence[np.ndarray], listen: Listener
) -> Contender:
    """Score the passages, one at a time as contexts of their own, and compare with the original; without
    passages nobody is scored."""
    contender = Contender(
        engine=entry.engine,
        format=entry.format,
        source=entry.source,
        version=entry.version,
        details=entry.details,
        perplexity=None,
        loss=None,
        loss_upper=None,
    )
    if not clusters:
        return contender
    scores = []
    for done, cluster in enumerate(clusters):
        listen(f"scoring {contender.name}", done, len(clusters))
        scores.append(np.asarray(entry.side.score(cluster.tokens), dtype=np.float32))
    losses = pair_scores(clusters, base, scores)
    _, perplexity = perplexities(losses)
    sums, counts = arrays(losses)
    # Of a few passages a bootstrapped bound can be any number at all.
    bound = ratio_bound(sums, counts, 0.05) if len(losses) >= FEWEST_FOR_SPREAD else None
    return replace(
        contender,
        perplexity=perplexity,
        loss=math.expm1(moments(sums, counts).delta),
        loss_upper=None if bound is None else math.expm1(bound.upper),
    )


def _text(clusters: Sequence[Cluster], base: Sequence[np.ndarray]) -> Text:
    perplexity, _ = perplexities(pair_scores(clusters, base, base))
    return Text(
        split=_SPLIT,
        sha256=split_sha256(_SPLIT),
        passages=len(clusters),
        tokens=sum(len(cluster.tokens) - 1 for cluster in clusters),
        original_perplexity=perplexity,
    )
