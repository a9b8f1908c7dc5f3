"""optimize(): the five steps. Profile, choose candidates, screen them, certify the fastest, prove it is never
slower.

Everything measured goes through a Bench and everything finished into the trial store, so an interrupted
search goes on where it stopped. The artifact is written once, at the end, and replaces the folder as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flatout.core.files import write_atomic
from flatout.core.scratch import remove_leftovers
from flatout.core.sources import cache_dir
from flatout.core.spec import ModelSpec
from flatout.core.types import Workload, to_json
from flatout.engine.cpu import check_formats
from flatout.hardware.detect import detect
from flatout.search.context import Bench, Context
from flatout.search.portable import check_portable, restrict
from flatout.search.preflight import check_output, preflight
from flatout.search.prove import Proof, prove
from flatout.search.recipes import ORIGINAL, Candidate, candidates, recipe_from_name
from flatout.search.request import Request, parse_bytes, parse_max_loss, parse_workload
from flatout.search.result import assemble
from flatout.search.saved import saved_recipe
from flatout.search.screen import VALIDATION, Screen
from flatout.search.stages import Listener, Stages
from flatout.search.texts import read_texts, tokens_of
from flatout.search.traffic import read_trace
from flatout.search.trials import Run, TrialStore
from flatout.verify.certificate import certificate_to_json
from flatout.verify.examination import FEWEST_SCORED
from flatout.verify.quality import Cluster, ClusterLoss, pair_scores

Json = dict[str, Any]

_STAGES = {
    "read the model": 3.0,
    "measure the machine": 17.0,
    "score the original": 20.0,
    "screen candidates": 60.0,
    "time every format": 17.0,
    "find what is sensitive": 40.0,
    "race the fastest": 13.0,
    "certify on sealed text": 45.0,
    "compare with transformers": 40.0,
    "profile operators": 8.0,
    "write the artifact": 3.0,
}
"""Every stage in order, with the seconds it takes for a model of 100 million parameters on a small
machine."""

_REPORTED = 8
"""Passages that the columns of the report are scored on: bf16 differs by a hundredth of a per cent, and the
certificate needs many times as many."""

_FLOAT_OPS = 2.0e11
_ENGINE_OPS = 1.2e12
"""Operations a second that the plan of the stages assumes; the time left corrects itself as stages end."""


def optimize(
    model: str | Path,
    out: str | Path,
    *,
    max_loss: str | float = "1%",
    recipe: str | None = None,
    objective: str = "latency",
    workload: Workload | str | None = None,
    text: str | Path | None = None,
    trace: str | Path | None = None,
    threads: int | None = None,
    portable: str | None = None,
    max_memory: str | int | None = None,
    dollars_per_hour: float | None = None,
    fresh: bool = False,
    render: Callable[[Json], str] | None = None,
    listen: Listener | None = None,
    note: Callable[[str], None] | None = None,
    open_bench: Callable[[Request], Bench] | None = None,
) -> Json:
    """Make `model` as fast as this machine allows inside a quality budget, and write it to the folder `out`.

    max_loss: largest perplexity increase, "1%" or 0.01. recipe: fixes one instead of searching, by its name
    (search/recipes.py has the grammar) or as an earlier search saved it (search/saved.py). objective: one of
    core.types.OBJECTIVES. workload: what has to be fast, "512+64x8" or a Workload; its default depends on the
    objective. text: a file to choose and judge by instead of the shipped passages. trace: a CSV file of
    requests, whose median is the workload unless one is given; the result says which few candidates would
    serve them best (`traffic`). portable: a program that must load the result too (core/portable.py).
    max_memory: of weights and cache, "800MB" or bytes. dollars_per_hour: what the machine costs, which the
    objective money needs. fresh: ignore results of earlier runs. render turns the result into the page that
    is written beside the model. Returns the JSON object of the command contract.

    Raises ConfigError for nonsense, ResourceError when memory or disk will not do, BackendError for energy
    without a counter, EvidenceError for a text
    that decides nothing, and what reading the model raises.
    """
    requests = None if trace is None else read_trace(Path(trace))
    request = Request(
        model=str(model),
        out=Path(out),
        max_loss=parse_max_loss(max_loss),
        workload=workload
        if isinstance(workload, Workload)
        else parse_workload(workload, objective, requests),
        recipe=recipe,
        text=None if text is None else Path(text),
        threads=threads,
        trace=None if trace is None else Path(trace),
        portable=portable,
        max_memory=None if max_memory is None else parse_bytes(max_memory),
        dollars_per_hour=dollars_per_hour,
    )
    check_output(request.out, Path(request.model))
    stages = Stages(_STAGES, listen)
    with stages.stage("read the model"):
        bench = (open_bench or _cpu_bench)(request)
        needs = preflight(bench.source.spec, request.workload, request.out)
        chosen = _candidates(bench, request)
        texts = read_texts(bench.tokenizer, bench.tokenizer_sha256, bench.source.spec, request.text)
    store = TrialStore(cache_dir() / "trials" / bench.sha256[:32], fresh)
    for folder in (cache_dir(), cache_dir() / "openings", store.folder):
        remove_leftovers(folder)
    run = Run(store, to_json(request) | {"out": str(request.out.absolute())})
    tell = note or (lambda message: None)
    if run.resumed:
        tell(f"resuming; finished trials come from {store.folder}")
    context = Context(
        bench=bench,
        request=request,
        texts=texts,
        store=store,
        run=run,
        stages=stages,
        hardware=detect(),
        note=tell,
        requests=requests,
    )
    stages.planned.update(_plan(context, len(chosen)))
    with stages.stage("read the model"):
        if request.workload.objective == "energy":
            bench.open_meter()
        for candidate in dict.fromkeys((chosen[0].recipe, ORIGINAL)):
            bench.rehearse(candidate, request.out.absolute().parent)
    needs = replace(needs, seconds=sum(stages.planned.values()))
    tell(str(needs))
    result = _search(context, chosen, render)
    run.finish()
    return result | {"preflight": to_json(needs)}


def _cpu_bench(request: Request) -> Bench:
    from flatout.search.bench import CpuBench

    return CpuBench(request.model, request.threads, request.workload)


def _candidates(bench: Bench, request: Request) -> list[Candidate]:
    """What is tried: the one that is asked for, or all that fit the model; the original is the last."""
    original, source = Candidate(recipe=ORIGINAL, why="original precision"), bench.source
    if request.recipe is None:
        listed = candidates(source)
        return listed if request.portable is None else restrict(listed, request.portable, source)
    asked = saved_recipe(request.recipe, request.out)
    if asked is None:
        asked = recipe_from_name(request.recipe, source)
    else:
        asked.check(source.spec)
        check_formats(asked)
    if request.portable is not None:
        check_portable(asked, request.portable, source)
    return [original] if asked == ORIGINAL else [Candidate(recipe=asked, why="asked for"), original]


def _plan(context: Context, count: int) -> dict[str, float]:
    """Seconds that the stages are expected to take with this model, for the time left."""
    spec = context.bench.source.spec
    size = spec.num_parameters() / 1e8
    validation = tokens_of(context.texts.validation[:VALIDATION])
    sealed = tokens_of(context.texts.holdout.clusters[:FEWEST_SCORED])
    reported = tokens_of(context.texts.holdout.clusters[:_REPORTED])
    return {
        "score the original": validation * _token_seconds(spec, _FLOAT_OPS),
        "screen candidates": count * (2 * size + 2 + validation * _token_seconds(spec, _ENGINE_OPS)),
        "race the fastest": 13.0,
        "certify on sealed text": 2 * size
        + sealed * (_token_seconds(spec, _FLOAT_OPS) + _token_seconds(spec, _ENGINE_OPS)),
        "compare with transformers": 25 + 6 * size + reported * _token_seconds(spec, 2.5 * _FLOAT_OPS),
        "profile operators": 2 + reported * _token_seconds(spec, _ENGINE_OPS),
        "write the artifact": 3 * size,
    }


def _token_seconds(spec: ModelSpec, operations_per_s: float) -> float:
    return 2 * spec.num_parameters() / operations_per_s


def _search(context: Context, chosen: list[Candidate], render: Callable[[Json], str] | None) -> Json:
    stages = context.stages
    with stages.stage("measure the machine"):
        context.hardware = context.bench.hardware(stages.step)
    with stages.stage("score the original"):
        context.original_scores(context.texts.validation[:VALIDATION])
    screen = Screen(context, chosen)
    with stages.stage("screen candidates"):
        finalists = screen.run()
    proof = prove(screen, finalists)
    with stages.stage("compare with transformers"):
        baseline = _losses(context, proof, context.baseline_scores)
    with stages.stage("profile operators"):
        original = _losses(context, proof, lambda clusters: context.scores(ORIGINAL, clusters))
        screen.note_loss(ORIGINAL.name, original)
        profiles = {name: screen.profile(name) for name in {ORIGINAL.name, proof.row.name}}
    with stages.stage("write the artifact"):
        result = assemble(screen, proof, profiles, baseline, original)
        return _write(context, proof, result, render)


def _losses(
    context: Context, proof: Proof, score: Callable[[Sequence[Cluster]], list[np.ndarray]]
) -> list[ClusterLoss]:
    """Losses on the beginning of the certificate's text of a column that is only reported: nothing is judged,
    or chosen by it."""
    clusters = context.texts.holdout.clusters[: min(len(proof.certificate.clusters), _REPORTED)]
    return pair_scores(clusters, context.original_scores(clusters), score(clusters))


def _write(context: Context, proof: Proof, result: Json, render: Callable[[Json], str] | None) -> Json:
    """The artifact folder, then its page; both replace what was there in one step."""
    out = context.request.out
    page = out / "report.html"
    result = result | {"artifact": str(out), "report": str(page) if render is not None else None}
    measurements = {
        key: value for key, value in result.items() if key not in ("artifact", "report", "recipe")
    }
    manifest = {"measurements": measurements, "certificate": certificate_to_json(proof.certificate)}
    context.build(proof.row.recipe)
    context.bench.save(proof.row.recipe, out, manifest, context.texts.validation[0])
    if render is not None:
        html = render(result).encode()

        def write(file: Any) -> None:
            file.write(html)

        write_atomic(page, write)
    return result
