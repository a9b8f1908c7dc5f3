"""`flatout optimize MODEL --out DIR`: parse, run the loop, print three columns and what to type next."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from flatout.cli.output import Progress, aligned, log, print_json
from flatout.core.portable import TO_GGUF
from flatout.errors import ConfigError
from flatout.search.stages import Listener, Status
from flatout.search.units import megabytes, percent, rate, seconds, times


def optimize(
    model: Annotated[
        str,
        typer.Argument(help="A GGUF file, a safetensors folder, a Hugging Face id or a built-in name."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the artifact: new, empty or an artifact.")],
    max_loss: Annotated[str, typer.Option(help="Largest increase of the perplexity.")] = "1%",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Use this one instead of searching: a name such as native or w8a8-g64, a file or an "
            "artifact that holds one, or ARTIFACT:NAME of a candidate."
        ),
    ] = None,
    objective: Annotated[str, typer.Option(help="latency, throughput, energy, memory or money.")] = "latency",
    workload: Annotated[
        str | None, typer.Option(help="What must be fast: PROMPT+OUTPUTxBATCH tokens, e.g. 512+64x1.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text or .jsonl to judge by, instead of the shipped one.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="CSV of requests (ContextTokens, GeneratedTokens): the median is the workload."),
    ] = None,
    portable: Annotated[
        str | None,
        typer.Option(help="A program that must load the result too: transformers, vllm."),
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Most that weights and cache may take, e.g. 800MB.")
    ] = None,
    dollars_per_hour: Annotated[
        float | None, typer.Option(help="What this machine costs; the objective money needs it.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads; all cores by default.")] = None,
    recover: Annotated[
        bool,
        typer.Option(
            "--recover",
            help="Fill --recipe by ever dearer methods, rounding to distillation, until one is certified.",
        ),
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Ignore finished trials of earlier runs, or reuse them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, the whole result.")] = False,
) -> int:
    """Make MODEL as fast as this machine allows inside a quality budget, prove it, and write it to --out.

    Exit code 0: done. 3: what was asked for cannot be certified; the folder then holds the original, or
    with --recover the best model, without a certificate.
    """
    if recover:
        searching = (
            ("--objective", objective, "latency"), ("--workload", workload, None), ("--trace", trace, None),
            ("--portable", portable, None), ("--max-memory", max_memory, None),
            ("--dollars-per-hour", dollars_per_hour, None),
        )  # fmt: skip
        foreign = [option for option, given, default in searching if given != default]
        if foreign:
            raise ConfigError(
                "--recover takes --recipe, --max-loss, --text, --threads and --fresh",
                ", ".join(foreign),
                "without",
            )
        return _recover(model, out, recipe, max_loss, text, threads, fresh, as_json)
    from flatout.report.optimize import optimize as run

    with _progress() as (listen, note):
        result = run(
            model,
            out,
            max_loss=max_loss,
            recipe=recipe,
            objective=objective,
            workload=workload,
            text=text,
            trace=trace,
            threads=threads,
            portable=portable,
            max_memory=max_memory,
            dollars_per_hour=dollars_per_hour,
            fresh=fresh,
            listen=listen,
            note=note,
        )
    if as_json:
        print_json(result)
    else:
        print(summary(result))
    if not result["passed"]:
        log(f"flatout: the budget cannot be met: {result['verdict']}")
    return 0 if result["passed"] else 3


def _recover(
    model: str,
    out: Path,
    recipe: str | None,
    max_loss: str,
    text: Path | None,
    threads: int | None,
    fresh: bool,
    as_json: bool,
) -> int:
    """The recovery ladder, a line for each rung."""
    from flatout.search.recovery import recover

    if recipe is None:
        raise ConfigError("--recover fills a recipe that is named", "none", "--recipe w4a8-g64")
    result = recover(
        model,
        out,
        recipe,
        max_loss=max_loss,
        text=text,
        threads=threads,
        fresh=fresh,
        tell=lambda rung: log(str(rung)),
        progress=Progress(),
    )
    if as_json:
        print_json(result)
    else:
        print(f"{result['verdict']}\nnext: flatout run {result['artifact']}")
    return 0 if result["passed"] else 3


def summary(result: Mapping[str, Any]) -> str:
    """The three columns, the verdict and the next command."""
    if result.get("kind") == "encoder":
        return _encoder_summary(result)
    columns = [result["baseline"], result["engine_original"], result["optimized"]]
    work = result["request"]["workload"]
    rows = [["", *(column["name"] for column in columns)]]
    for phase in ("prefill", "decode"):
        cells = [
            f"{rate(c[f'{phase}_tokens_per_s'])} ({percent(c['floor_fraction'][phase])} of floor)"
            for c in columns
        ]
        rows.append([f"{phase} tok/s", *cells])
    rows.append(["weights + cache", *(megabytes(c["memory_bytes"]) for c in columns)])
    rows.append(["perplexity", *(_or_dash(c["perplexity"], "{:.3f}".format) for c in columns)])
    rows.append(["loss", *(_loss(c) for c in columns)])
    ratio, interval = result["speedup"], result["speedup_interval"]
    gains = ", ".join(
        f"{phase} {times(ratio[phase])} ({times(interval[phase][0])} to {times(interval[phase][1])})"
        for phase in ("decode", "prefill")
    )
    quality = result["quality"]
    certificate = (
        f"certificate {quality['verdict'].replace('_', ' ')}: {quality['clusters']} passages, "
        f"{quality['tokens']:,} tokens, opening {quality['k']}"
    )
    lines = [
        f"{result['model']['name']} on {result['hardware']['name']}, {result['threads']} threads, "
        f"{work['prompt']} + {work['output']} tokens, batch {work['batch']}",
        "",
        aligned(rows),
        "",
        f"recipe {result['optimized']['recipe']}; against {result['baseline']['name']}: {gains}",
        certificate,
        *([] if result["energy"] is None else [_energy(result["energy"])]),
        *([] if result["money"] is None else [_money(result["money"])]),
        *([] if result["traffic"] is None else [_traffic(result["traffic"])]),
        result["verdict"],
        f"report: {result['report']}",
        f"next: flatout run {result['artifact']}",
    ]
    if result["request"].get("portable") == "llama.cpp":
        lines.append(f"for llama.cpp: {TO_GGUF.replace('FOLDER', result['artifact'])}")
    return "\n".join(lines)


def _encoder_summary(result: Mapping[str, Any]) -> str:
    rows = [["", "texts/s"]]
    for column in (result["baseline"], result["engine_original"], result["optimized"]):
        if column is not None:
            rows.append([column["name"], rate(column["texts_per_s"])])
    work, quality = result["request"]["workload"], result["quality"]
    low, high = result["speedup_interval"]["texts"]
    return "\n".join(
        [
            f"{result['model']['name']} on {result['hardware']['name']}, {result['threads']} threads, "
            f"{work['prompt']} tokens, batch {work['batch']}",
            "",
            aligned(rows),
            "",
            f"recipe {result['optimized']['recipe']}; against PyTorch: {times(result['speedup']['texts'])} "
            f"({times(low)} to {times(high)})",
            f"certificate {quality['verdict'].replace('_', ' ')}: {len(quality['passages'])} passages, "
            f"{quality['pieces']:,} pieces, opening {quality['k']}; accuracy "
            f"{percent(quality['accuracy_original'])} to {percent(quality['accuracy_optimised'])}",
            result["verdict"],
            f'next: flatout.load("{result["artifact"]}").encode(["a text"])',
        ]
    )


def _energy(found: Mapping[str, Any]) -> str:
    joules, (low, high) = found["joules_per_token"], found["interval"]
    return (
        f"energy above idle: {joules['optimized']:.3g} J an output token, {joules['baseline']:.3g} with "
        f"transformers: {times(found['ratio'])} ({times(low)} to {times(high)})"
    )


def _money(found: Mapping[str, Any]) -> str:
    dollars = found["dollars_per_million_tokens"]
    return (
        f"at ${found['dollars_per_hour']:.2f} an hour a million output tokens cost "
        f"${dollars['optimized']:.2f}, ${dollars['baseline']:.2f} with transformers"
    )


def _traffic(found: Mapping[str, Any]) -> str:
    """Which candidates serve the trace, in a sentence."""
    parts = [
        f"{variant['name']} {percent(variant['share'])}"
        + ("" if variant["low"] == 0 else f" (prompt over {variant['low']:.2g}x the output)")
        for variant in found["variants"]
    ]
    saved = "" if len(parts) == 1 else f"; {percent(found['saving'])} less time than the best one alone"
    return f"traffic: {found['requests']:,} requests, best served by {', '.join(parts)}{saved}"


def _loss(column: Mapping[str, Any]) -> str:
    if column["loss"] is None:
        return "-"
    bound = column["loss_upper_bound"]
    most = "" if bound is None else f" (at most {percent(bound, signed=True)})"
    return percent(column["loss"], signed=True) + most


def _or_dash(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None else form(value)


@contextmanager
def _progress() -> Iterator[tuple[Listener, Callable[[str], None]]]:
    """(listener, note) that show stages with the time left on stderr: a moving line on a terminal, else a
    line each."""
    if not sys.stderr.isatty():
        yield _lines(), log
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[what]}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0, what="")

        def listen(status: Status) -> None:
            left = f"{status.what}  {_left(status)}".strip()
            stage = f"[{status.number}/{status.count}] {status.stage}" if status.count else status.stage
            bar.update(task, description=stage, completed=status.fraction, what=left)

        yield listen, lambda message: console.print(message, markup=False, highlight=False)


def _left(status: Status) -> str:
    """The time that is left; nothing where stages are not counted."""
    return f"about {seconds(max(status.eta_s, 1))} left" if status.count else ""


def _lines() -> Listener:
    """One line when a stage begins."""
    shown: list[str] = []

    def listen(status: Status) -> None:
        if status.stage not in shown:
            shown.append(status.stage)
            number = f"[{status.number}/{status.count}] " if status.count else ""
            log(f"{number}{status.stage}{f', {_left(status)}' if status.count else ''}")

    return listen
