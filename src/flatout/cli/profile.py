"""`flatout profile MODEL`: ceilings of the machine, floor of the model, time and fraction of floor by op."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from flatout.cli.output import aligned, log, print_json
from flatout.core.types import Workload
from flatout.engine.load import shape_and_recipe
from flatout.errors import BackendError, ConfigError
from flatout.perf.power import H100, capped
from flatout.perf.profile import Profile
from flatout.perf.profile import profile as run_profile
from flatout.perf.timing import Progress as Callback


def profile(
    model: Annotated[str, typer.Argument(help="Artifact, checkpoint folder, GGUF file, or built-in name.")],
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 512,
    output: Annotated[int, typer.Option(help="Tokens generated for each prompt.")] = 32,
    threads: Annotated[int | None, typer.Option(help="Threads; all cores by default.")] = None,
    tune: Annotated[
        bool,
        typer.Option(help="Measure how this GPU's kernels are best launched for such steps, and keep it."),
    ] = False,
    power_cap: Annotated[
        str | None,
        typer.Option(
            help="Predict, without a GPU, what power limits of an H100 would do, e.g. 700,500,300 watts."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object: ceilings, floor, ops.")] = False,
) -> None:
    """Measure where the time of a model goes, and how far each op is from the least time it could take."""
    workload = Workload(batch=batch, prompt=prompt, output=output)
    if power_cap is not None:
        _power(model, workload, _limits(power_cap), as_json)
        return
    if tune:
        _tune(model, workload, as_json)
        return
    with _progress() as progress:
        result = run_profile(model, workload, threads=threads, progress=progress)
    if as_json:
        print_json(_record(model, result))
    else:
        print(_table(model, result))
    for warning in result.warnings:
        log(f"warning: {warning}")


def _tune(model: str, workload: Workload, as_json: bool) -> None:
    try:
        from flatout.perf.gpu_routes import tune_model
    except ImportError as error:
        raise BackendError(
            "--tune needs a GPU and Triton 3.6 or newer", str(error), "pip install 'triton>=3.6'"
        ) from error
    context = workload.prompt + workload.output // 2
    path, found = tune_model(model, workload.batch, context, log)
    if as_json:
        print_json({"model": model, "workload": workload, "path": str(path), "settings": found})
    else:
        print(
            aligned([[kernel, " ".join(map(str, setting))] for kernel, setting in found.items()], right=False)
        )
        log(f"kept in {path}")


def _limits(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            "power limits are watts with commas between", repr(text), "--power-cap 700,500,300"
        ) from error


def _power(model: str, workload: Workload, limits: list[float], as_json: bool) -> None:
    """Predictions alone: no limit is set, and nothing runs."""
    spec, recipe = shape_and_recipe(model)
    found = [capped(spec, recipe, H100, workload, limit) for limit in limits]
    if as_json:
        print_json({"model": model, "recipe": recipe, "workload": workload, "card": H100, "predicted": found})
        return
    rows = [["limit W", "step", "MHz", "W", "ms (interval)", "tokens/s", "J/token (interval)"]]
    for times in found:
        for name, step in (("prefill", times.prefill), ("decode", times.decode)):
            ms, joules = step.seconds, step.joules_per_token
            rows.append([
                f"{times.limit_w:g}", name, f"{step.clock_hz / 1e6:,.0f}", f"{step.watts:.0f}",
                f"{1e3 * ms.mid:,.3f} ({1e3 * ms.low:,.3f} to {1e3 * ms.high:,.3f})",
                f"{step.tokens_per_s:,.0f}",
                f"{joules.mid:.3g} ({joules.low:.2g} to {joules.high:.2g})",
            ])  # fmt: skip
    print(
        f"predicted, not measured: {model} ({recipe.name}) on an {H100.name} under power limits\n"
        f"batch {workload.batch}, prompt {workload.prompt}, output {workload.output}\n\n{aligned(rows)}"
    )


@contextmanager
def _progress() -> Iterator[Callback]:
    """A bar with the time left on stderr, gone when the work is done."""
    columns = TextColumn("{task.description:<28}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda what, done, of: bar.update(task, description=what, completed=done, total=of)


def _record(model: str, result: Profile) -> dict[str, Any]:
    """The JSON of the command contract."""
    return {
        "model": model,
        "runner": result.runner,
        "recipe": result.recipe,
        "threads": result.threads,
        "workload": result.workload,
        "hardware": replace(result.hardware, ceilings=()),
        "ceilings": result.hardware.ceilings,
        "floor": {
            phase.phase: {
                "floor_s": phase.floor.floor_s,
                "bound": phase.floor.bound,
                "bytes": phase.floor.bytes,
                "flops": phase.floor.flops,
                "measured": phase.measured,
                "fraction": phase.fraction,
                "tokens_per_s": phase.tokens_per_s,
                "read_bytes_per_s": phase.read_bytes_per_s,
            }
            for phase in result.phases
        },
        "ops": [
            {
                "phase": op.phase,
                "op": op.op,
                "seconds": op.seconds,
                "share": op.share,
                "floor_s": op.floor.floor_s if op.floor else None,
                "bound": op.floor.bound if op.floor else None,
                "bytes": op.floor.bytes if op.floor else None,
                "flops": op.floor.flops if op.floor else None,
                "fraction": op.fraction,
            }
            for op in result.ops
        ],
        "memory": {
            "weight_bytes": result.weight_bytes,
            "kv_bytes_per_token": result.kv_bytes_per_token,
            "peak_resident_bytes": result.peak_resident_bytes,
        },
        "warnings": result.warnings,
    }


def _table(model: str, result: Profile) -> str:
    work = result.workload
    title = (
        f"{model} ({result.recipe.name}) on {result.runner}, {result.hardware.name}\n"
        f"batch {work.batch}, prompt {work.prompt}, output {work.output}; "
        f"weights {result.weight_bytes / 1e6:.1f} MB, "
        f"KV cache {result.kv_bytes_per_token / 1e3:.1f} kB a token, "
        f"peak memory {result.peak_resident_bytes / 1e6:.0f} MB"
    )
    sections = [title, "ceilings (best of several samples)\n" + _ceilings_table(result)]
    for phase in result.phases:
        what = "whole prefill" if phase.phase == "prefill" else "one decode step"
        heading = (
            f"{what}: {phase.measured.median * 1e3:.3f} ms (p20 {phase.measured.p20 * 1e3:.3f}, "
            f"p80 {phase.measured.p80 * 1e3:.3f}, n {phase.measured.samples}), "
            f"{phase.tokens_per_s:,.0f} tokens/s, "
            f"floor {phase.floor.floor_s * 1e3:.3f} ms ({phase.floor.bound}): {phase.fraction:.0%} of floor"
        )
        sections.append(f"{heading}\n{_ops_table(phase.phase, result)}")
    return "\n\n".join(sections)


def _ceilings_table(result: Profile) -> str:
    ceilings = result.hardware.ceilings
    counts = sorted({c.threads for c in ceilings})
    rows = [["", *(f"{n} thread{'s' if n > 1 else ''}" for n in counts), "unit", "working set"]]
    for name in dict.fromkeys(c.name for c in ceilings):
        same = {c.threads: c for c in ceilings if c.name == name}
        some = next(iter(same.values()))
        scale, unit = {"byte/s": (1e9, "GB/s"), "op/s": (1e9, "Gop/s"), "Hz": (1e9, "GHz")}[some.unit]
        size = (
            f"{max(c.working_set_bytes for c in same.values()) / 2**20:.0f} MiB"
            if some.working_set_bytes
            else ""
        )
        values = [f"{same[n].value / scale:,.1f}" if n in same else "-" for n in counts]
        rows.append([name, *values, unit, size])
    return aligned(rows)


def _ops_table(phase: str, result: Profile) -> str:
    rows = [["op", "ms", "share", "floor ms", "bound", "of floor", "MB", "GB/s", "Gop/s"]]
    for op in result.ops:
        if op.phase != phase:
            continue
        row = [op.op, f"{op.seconds * 1e3:.3f}", f"{op.share:.0%}"]
        if op.floor is not None and op.fraction is not None:
            floor = op.floor
            row += [
                f"{floor.floor_s * 1e3:.3f}",
                floor.bound,
                f"{op.fraction:.0%}",
                f"{floor.bytes / 1e6:.2f}",
            ]
            row += [f"{floor.bytes / op.seconds / 1e9:.1f}", f"{floor.flops / op.seconds / 1e9:.1f}"]
        rows.append(row)
    return aligned(rows)
