"""The result of a search as plain JSON: what `flatout optimize --json` prints and the report draws.

Times are seconds, rates tokens a second of the whole batch, losses fractions of the perplexity. A ratio
compares seconds of the first side with seconds of the second: above 1 the second is faster.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from flatout._version import __version__
from flatout.core.costs import kv_bytes_per_token
from flatout.core.files import shown
from flatout.core.formats import Recipe
from flatout.core.types import Workload, to_json
from flatout.perf.profile import Profile, phase_parts
from flatout.perf.roofline import op_ceiling, read_ceiling, step_floor
from flatout.search.context import Context
from flatout.search.prove import Proof, Race
from flatout.search.recipes import ORIGINAL, layer_map
from flatout.search.rows import Row, memory_bytes
from flatout.search.screen import Screen
from flatout.search.traffic import Speed, serve
from flatout.search.units import percent, times
from flatout.verify.certificate import Certificate
from flatout.verify.quality import ClusterLoss, perplexities

PHASES = ("prefill", "decode")
Json = dict[str, Any]


def assemble(
    screen: Screen,
    proof: Proof,
    profiles: Mapping[str, Profile],
    baseline: Sequence[ClusterLoss],
    original: Sequence[ClusterLoss],
) -> Json:
    """The whole result but `artifact` and `report`. baseline, original: losses of transformers and of the
    engine at original precision on the certificate's text."""
    context = screen.context
    request, bench = context.request, context.bench
    columns = _columns(context, proof, baseline, original)
    speedup = proof.against_baseline
    compression = proof.against_original or _no_change()
    quality = _quality(proof)
    return {
        "command": "optimize",
        "flatout": __version__,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "model": {
            "name": shown(bench.name),
            "path": bench.path,
            "sha256": bench.sha256,
            "family": bench.source.spec.family,
            "parameters": bench.source.spec.num_parameters(),
            "layers": bench.source.spec.num_layers,
        },
        "verdict": verdict(context, proof, columns),
        "passed": met(screen, proof),
        "fallback": proof.fallback,
        "threads": bench.threads,
        "request": {
            "model": request.model,
            "max_loss": request.max_loss,
            "recipe": request.recipe,
            "workload": to_json(request.workload),
            "portable": request.portable,
            "max_memory": request.max_memory,
            "dollars_per_hour": request.dollars_per_hour,
            "text": None if request.text is None else str(request.text),
            "trace": None if request.trace is None else str(request.trace),
        },
        "traffic": _traffic(context, screen.rows),
        "hardware": to_json(context.hardware),
        "roofs": _roofs(context, proof.row.recipe),
        **columns,
        "speedup": _ratios(speedup, "ratio"),
        "speedup_interval": _intervals(speedup),
        "speedup_by_compression": _ratios(compression, "ratio"),
        "speedup_by_compression_interval": _intervals(compression),
        "energy": _energy(context, proof),
        "money": _money(context, columns),
        "quality": quality,
        "floor_fraction": columns["optimized"]["floor_fraction"],
        "ops": _ops(profiles, proof.row.name),
        "recipe": to_json(proof.row.recipe),
        "recipe_map": layer_map(proof.row.recipe.child(bench.source.spec), proof.row.recipe),
        "candidates": [_candidate(row) for row in screen.rows],
        "frontier": [
            {"workload_s": point.seconds, "loss": math.expm1(point.loss)} for point in screen.frontier()
        ],
        "races": {
            "baseline": proof.against_baseline,
            "original": proof.against_original,
            "other": proof.against_other,
        },
        "first_usable_s": screen.first_usable_s,
        "timings": [{"stage": name, "seconds": s} for name, s in context.stages.timings.items()],
        "trials": {"folder": str(context.store.folder), "reused": context.store.hits},
        "versions": dict(bench.versions),
    }


def met(screen: Screen, proof: Proof) -> bool:
    """Whether what was asked for was delivered: a certified model, small enough and, where one recipe was
    asked for, that one."""
    request = screen.context.request
    asked = request.recipe is None or proof.row.name == screen.rows[0].name
    fits = request.max_memory is None or proof.row.memory_bytes <= request.max_memory
    return proof.certificate.passed and asked and fits


def _columns(
    context: Context, proof: Proof, baseline: Sequence[ClusterLoss], original: Sequence[ClusterLoss]
) -> dict[str, Json]:
    """The three columns: what the user has today, our engine with the same numbers, and what is delivered."""
    certificate = proof.certificate
    final = proof.against_baseline
    own, side = (final, "b") if proof.against_original is None else (proof.against_original, "a")
    return {
        "baseline": _column(context, "transformers bf16", ORIGINAL, final, "a")
        | {"memory_bytes": _transformers_bytes(context)}
        | _quality_of(baseline, certificate),
        "engine_original": _column(context, "engine, original precision", ORIGINAL, own, side)
        | _quality_of(original, certificate),
        "optimized": _column(context, "engine, optimised", proof.row.recipe, final, "b")
        | {
            "perplexity": certificate.perplexity_optimised,
            "loss": certificate.loss,
            "loss_upper_bound": _finite(certificate.loss_upper),
        },
    }


def _quality_of(losses: Sequence[ClusterLoss], certificate: Certificate) -> Json:
    """Of a column that is only reported: its loss on the first `tokens` of the certificate's text, and the
    perplexity that the original's becomes by it."""
    before, after = perplexities(losses)
    return {
        "perplexity": certificate.perplexity_original * after / before,
        "loss": after / before - 1,
        "loss_upper_bound": None,
        "tokens": sum(one.tokens for one in losses),
    }


def _column(context: Context, name: str, recipe: Recipe, race: Race, side: str) -> Json:
    workload = context.request.workload
    seconds = {phase: race[phase][f"seconds_{side}"] for phase in PHASES}
    tokens = {"prefill": workload.batch * workload.prompt, "decode": workload.batch * workload.output}
    floor = floors(context, recipe)
    spread = ("median", "p20", "p80", "samples")
    return {
        "name": name,
        "runner": race[side],
        "recipe": recipe.name,
        **{f"{phase}_tokens_per_s": tokens[phase] / seconds[phase]["median"] for phase in PHASES},
        **{f"{phase}_s": {key: seconds[phase][key] for key in spread} for phase in PHASES},
        "memory_bytes": memory_bytes(context, recipe),
        "floor_fraction": {phase: floor[phase] / seconds[phase]["median"] for phase in PHASES},
    }


def _transformers_bytes(context: Context) -> int:
    """bf16 weights, a tied head stored once, and a bf16 cache of the workload."""
    spec, workload = context.bench.source.spec, context.request.workload
    tokens = workload.batch * (workload.prompt + workload.output)
    return 2 * spec.num_parameters() + round(tokens * spec.num_layers * kv_bytes_per_token(spec, "bf16"))


def floors(context: Context, recipe: Recipe) -> dict[str, float]:
    """Least seconds of the whole prefill and of all decode steps of the workload."""
    workload = context.request.workload
    spec = recipe.child(context.bench.source.spec)
    parts = phase_parts(spec, recipe, context.hardware, workload, context.bench.threads)
    return {
        "prefill": step_floor(parts["prefill"]).floor_s,
        "decode": workload.output * step_floor(parts["decode"]).floor_s,
    }


def _roofs(context: Context, recipe: Recipe) -> dict[str, float]:
    """The lines of the roofline: byte/s at a decode step's working set, op/s of the formats' arithmetic."""
    spec = recipe.child(context.bench.source.spec)
    parts = phase_parts(spec, recipe, context.hardware, context.request.workload, context.bench.threads)
    working_set = sum(part.floor.bytes for part in parts["decode"])
    kinds = {part.arithmetic for part in parts["decode"]} | {"bf16"}
    return {
        "read": read_ceiling(context.hardware, working_set, context.bench.threads),
        **{kind: op_ceiling(context.hardware, kind, context.bench.threads) for kind in sorted(kinds)},
    }


def _quality(proof: Proof) -> Json:
    certificate = proof.certificate
    divergence = certificate.divergence
    return {
        "baseline": certificate.perplexity_original,
        "optimized": certificate.perplexity_optimised,
        "loss": certificate.loss,
        "upper_bound": _finite(certificate.loss_upper),
        "margin": certificate.margin,
        "passed": certificate.passed,
        "verdict": certificate.verdict,
        "reason": certificate.reason,
        "clusters": len(certificate.clusters),
        "tokens": certificate.tokens,
        "delta": certificate.delta,
        "k": certificate.k,
        "alpha_k": certificate.alpha_k,
        "method": certificate.method,
        "text": certificate.text.source,
        "text_sha256": certificate.text.sha256,
        "worst_domain": certificate.worst_domain,
        "worst_domain_loss": certificate.worst_domain_loss,
        "divergence": to_json(divergence),
        "notes": list(certificate.notes),
    }


def _energy(context: Context, proof: Proof) -> Json | None:
    """Joules above idle of an output token, prompt included, and the ratio of the baseline's to the delivered
    model's; None unless energy was the objective."""
    joules = proof.against_baseline.get("energy")
    if joules is None:
        return None
    workload = context.request.workload
    tokens = workload.batch * workload.output
    return {
        "joules_per_token": {
            "baseline": joules["seconds_a"]["median"] / tokens,
            "optimized": joules["seconds_b"]["median"] / tokens,
        },
        "ratio": joules["ratio"],
        "interval": [joules["low"], joules["high"]],
    }


def _money(context: Context, columns: Mapping[str, Json]) -> Json | None:
    """Dollars of a million output tokens, prompts included, at the machine's price; None without one."""
    price, workload = context.request.dollars_per_hour, context.request.workload
    if price is None:
        return None
    per_second = price / 3600 * 1e6 / (workload.batch * workload.output)
    return {
        "dollars_per_hour": price,
        "dollars_per_million_tokens": {
            name: per_second * sum(column[f"{phase}_s"]["median"] for phase in PHASES)
            for name, column in columns.items()
        },
    }


def _ratios(race: Race, edge: str) -> dict[str, float]:
    return {phase: race[phase][edge] for phase in ("decode", "prefill", "workload")}


def _intervals(race: Race) -> dict[str, list[float]]:
    return {phase: [race[phase]["low"], race[phase]["high"]] for phase in ("decode", "prefill", "workload")}


def _no_change() -> Race:
    """The delivered model is the original: compression changed nothing, exactly."""
    return {phase: {"ratio": 1.0, "low": 1.0, "high": 1.0} for phase in ("decode", "prefill", "workload")}


def _ops(profiles: Mapping[str, Profile], chosen: str) -> dict[str, Json]:
    """Per phase, each op before (original precision) and after."""
    return {
        phase: {
            side: [
                {
                    "op": op.op,
                    "seconds": op.seconds,
                    "share": op.share,
                    "floor_s": None if op.floor is None else op.floor.floor_s,
                    "fraction": op.fraction,
                    "bound": "" if op.floor is None else op.floor.bound,
                    "bytes": 0.0 if op.floor is None else op.floor.bytes,
                    "flops": 0.0 if op.floor is None else op.floor.flops,
                }
                for op in profiles[name].ops
                if op.phase == phase
            ]
            for side, name in (("before", ORIGINAL.name), ("after", chosen))
        }
        for phase in PHASES
    }


def _traffic(context: Context, rows: Sequence[Row]) -> Json | None:
    """Which of the candidates that keep the quality serve the trace best, by their measured times. Only the
    chosen one has a certificate."""
    if context.requests is None:
        return None
    work = context.request.workload
    speeds = [
        Speed(
            name=row.name,
            prompt_s=row.times["prefill_s"] / (work.batch * work.prompt),
            output_s=row.times["decode_s"] / work.batch,
        )
        for row in rows
        if row.times is not None and row.status in ("passed", "chosen", "original")
    ]
    service = serve(context.requests, speeds)
    variants = [to_json(variant) | {"high": _finite(variant.high)} for variant in service.variants]
    return {
        "requests": len(context.requests.prompt),
        "seconds": service.seconds,
        "saving": service.saving,
        "variants": variants,
    }


def _candidate(row: Row) -> Json:
    predicted = row.predicted
    return {
        "name": row.name,
        "recipe": to_json(row.recipe),
        "why": row.candidate.why,
        "status": row.status,
        "reason": row.reason,
        "weight_bytes": row.memory_bytes,
        "predicted": None
        if predicted is None
        else to_json(
            {"workload_s": row.workload, "prefill_s": predicted.prefill, "decode_s": predicted.decode}
        ),
        "measured": row.times,
        "loss": to_json(row.loss),
        "predicted_loss": None
        if row.expected_loss is None
        else dict(zip(("low", "mid", "high"), row.expected_loss, strict=True)),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def verdict(context: Context, proof: Proof, columns: Mapping[str, Json]) -> str:
    """The result in a sentence or two."""
    race = proof.against_baseline
    speed = (
        f"decodes {times(race['decode']['ratio'])} and prefills {times(race['prefill']['ratio'])} "
        "as fast as transformers bf16"
    )
    certificate = proof.certificate
    bound = _finite(certificate.loss_upper)
    quality = f"{percent(certificate.loss, signed=True)} perplexity" + (
        ""
        if bound is None
        else f" (at most {percent(bound, signed=True)}, budget {percent(certificate.margin)})"
    )
    if not proof.fallback:
        but = _slower_phase(race, context.request.workload)
        return f"{shown(context.bench.name)} {speed} at {quality}.{but}"
    if race["workload"]["low"] > 1:
        kept = f"The folder holds the original in bf16; our engine {speed} at {quality}."
    else:
        kept = (
            "The folder holds the original in bf16, and transformers runs it at least as fast as our engine "
            f"here, which {speed}."
        )
    doubt = (
        "" if certificate.passed else f" Even the original in bf16 is not certified: {certificate.reason}."
    )
    return f"Nothing beat the original inside the budget: {proof.reason}. {kept}{doubt}"


def _slower_phase(race: Race, workload: Workload) -> str:
    """The promise is about the whole workload; a phase that got slower is said."""
    slower = [phase for phase in PHASES if race[phase]["high"] < 1]
    if not slower:
        return ""
    return (
        f" Its {' and '.join(slower)} alone is slower; the workload of {workload.prompt} + {workload.output} "
        f"tokens is {times(race['workload']['ratio'])} as fast."
    )
