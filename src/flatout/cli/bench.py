"""`flatout bench MODEL --against llama.cpp,transformers`: side by side with other engines, in one run."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from flatout.bench.peers import PEERS, Listener, parse_peers
from flatout.bench.phases import LOAD, PEAK_MEMORY, PHASES, TIMED, Phase, Row
from flatout.bench.record import BenchResult
from flatout.bench.run import bench as run_bench
from flatout.cli.output import aligned, log, print_json
from flatout.core.files import write_bytes
from flatout.core.types import to_json
from flatout.errors import ConfigError
from flatout.report.bench import bench_chart
from flatout.search.units import amount, percent, times


def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Ours: artifacts, checkpoint folders, GGUF files or built-in names."
        ),
    ],
    against: Annotated[str, typer.Option(help=f"Peers, comma-separated: {', '.join(PEERS)}.")],
    original: Annotated[
        str, typer.Option(help="What the peers run; by default the first MODEL, or what it was made from.")
    ] = "",
    threads: Annotated[int | None, typer.Option(help="Threads of each engine; all cores by default.")] = None,
    rounds: Annotated[int, typer.Option(help="Samples of every engine in every phase.", min=1)] = 5,
    passages: Annotated[
        int | None, typer.Option(help="Validation passages to score; all by default, 0: score nobody.", min=0)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the result to this file, too, and draw it beside.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object: rows, ratio_to_best_peer, ...")
    ] = False,
) -> None:
    """Measure MODELs beside other engines: same weights, prompts and threads, taking turns."""
    peers = parse_peers(against)
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir() or out.suffix == ".svg"):
        raise ConfigError("--out is a JSON file in a folder that exists", str(out), "--out bench.json")
    options = {"--against": ",".join(peers), "--original": original, "--threads": threads}
    options |= {"--rounds": rounds, "--passages": passages}
    given = [str(part) for pair in options.items() if pair[1] not in (None, "") for part in pair]
    with _progress() as listen:
        result = run_bench(
            models,
            peers,
            original=original or None,
            threads=threads,
            rounds=rounds,
            passages=passages,
            command=shlex.join(["flatout", "bench", *models, *given]),
            listen=listen,
        )
    if out is not None:
        write_bytes(out.with_suffix(".svg"), bench_chart(to_json(result)).encode())
        write_bytes(out, json.dumps(to_json(result), indent=1, allow_nan=False).encode() + b"\n")
    if as_json:
        print_json(result)
    else:
        print(summary(result))
    for note in _warnings(result):
        log(f"warning: {note}")


def summary(result: BenchResult) -> str:
    """The tables that people read: tokens/s by phase, starts, then ratios."""
    title = (
        f"{', '.join(result.models)} on {result.machine.name}, {result.threads} threads, "
        f"{result.rounds} rounds\n{_quality(result)}"
    )
    rows = [["", "tokens/s", "p20-p80", "n", "of floor", "perplexity", "loss"]]
    rows += _table(result, TIMED)
    starts = [["", "s or MB", "p20-p80", "n", "", "perplexity", "loss"], *_table(result, (LOAD, PEAK_MEMORY))]
    ratio_rows = [["ours is better by", "best peer", "", "best within 1 % loss", ""]]
    for phase in PHASES:
        ratio_rows.append(
            [
                phase.name,
                *_ratio(result.ratio_to_best_peer, result.best_peer, phase.name),
                *_ratio(result.ratio_at_equal_quality, result.best_peer_at_equal_quality, phase.name),
            ]
        )
    left_out = "not measured: " + "; ".join(result.not_measured)
    tables = [aligned(table) for table in (rows, starts) if len(table) > 1]
    return "\n\n".join([title, *tables, aligned(ratio_rows, right=False), left_out])


def _quality(result: BenchResult) -> str:
    text = result.text
    if text is None:
        return "not scored: the speeds stand without a perplexity"
    return (
        f"perplexity on {text.passages} passages ({text.tokens:,} tokens); "
        f"the original in float32: {text.original_perplexity:.3f}"
    )


def _table(result: BenchResult, phases: Sequence[Phase]) -> list[list[str]]:
    """For each phase that was measured its title and a line a contender."""
    found: list[list[str]] = []
    for phase in phases:
        same = [row for row in result.rows if row.phase == phase.name]
        if same:
            found += [[_title(same[0])], *map(_cells, same)]
    return found


def _title(row: Row) -> str:
    sequences = f"{row.batch} sequence{'s' if row.batch > 1 else ''}"
    if row.phase == "prefill":
        return f"prefill of {row.prompt} tokens, {sequences}"
    if row.phase == LOAD.name:
        return f"load: a fresh process to the token after {row.prompt}, s"
    if row.phase == PEAK_MEMORY.name:
        return "peak_memory of that process, MB"
    return f"decode of {row.output} tokens after {row.prompt}, {sequences}"


def _cells(row: Row) -> list[str]:
    floor = "" if row.floor_fraction is None else percent(row.floor_fraction)
    return [
        f"  {row.name}",
        amount(row.median, row.unit),
        f"{amount(row.p20, row.unit)}-{amount(row.p80, row.unit)}",
        str(row.n),
        floor,
        "not scored" if row.perplexity is None else f"{row.perplexity:.3f}",
        "" if row.loss is None else percent(row.loss, signed=True),
    ]


def _ratio(values: Any, names: Any, phase: str) -> list[str]:
    value = values[phase]
    return ["-", ""] if value is None else [times(value), str(names[phase])]


def _warnings(result: BenchResult) -> list[str]:
    noisy = sorted({row.phase for row in result.rows if row.kept_noisy})
    found = []
    if noisy:
        found.append(f"other processes used the machine during {', '.join(noisy)}: those figures are no good")
    impossible = [row.phase for row in result.rows if (row.floor_fraction or 0) > 1.05]
    if impossible:
        found.append(f"{', '.join(impossible)} above the floor: the ceilings were measured on a busy machine")
    return found


@contextmanager
def _progress() -> Iterator[Listener]:
    """A bar with the time left of the stage on stderr, gone when the work is done; without a terminal, a line
    a stage."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    columns = TextColumn("{task.description:<28}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("opening", total=None)
        yield lambda what, done, of: bar.update(task, description=what, completed=done, total=of)


def _lines() -> Listener:
    shown: set[str] = set()

    def listen(what: str, done: int, of: int) -> None:
        if what not in shown:
            shown.add(what)
            log(what)

    return listen
