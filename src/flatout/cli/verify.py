"""`flatout verify`: audit a checkpoint against its original, or check a certificate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flatout.cli.output import Progress, aligned, print_json
from flatout.errors import ConfigError
from flatout.search.request import parse_max_loss
from flatout.search.units import percent, rate, times

if TYPE_CHECKING:
    from flatout.verify.layers import BlockLoss

_SHOWN_BLOCKS = 5


def verify(
    model: Annotated[
        str, typer.Argument(help="The optimised model, or a certificate (CERT.json, an artifact).")
    ],
    against: Annotated[str, typer.Option(help="The original that the model is compared with.")] = "",
    margin: Annotated[str, typer.Option(help="Largest increase of the perplexity, e.g. 1%.")] = "1%",
    text: Annotated[
        str, typer.Option(help="UTF-8 text or .jsonl to judge by, instead of the shipped one.")
    ] = "",
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Items to answer: .jsonl or .jsonl.gz (cloze, choices, schemas, pairs). Repeatable."
        ),
    ] = None,
    task_margin: Annotated[str, typer.Option(help="Largest loss of a task's accuracy, in points.")] = "1%",
    limit: Annotated[int | None, typer.Option(help="Items of each task, chosen by hash.", min=1)] = None,
    speed_seconds: Annotated[
        float, typer.Option(help="Time for each of prefill and decode; 0 leaves speed out.", min=0)
    ] = 60.0,
    rerun: Annotated[bool, typer.Option("--rerun", help="Score a certificate's text again.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: quality, blocks, tasks, speed.")
    ] = False,
) -> int:
    """Prove or refute that MODEL is as good as --against and faster; without --against, check a certificate.

    Exit code 0: all passed. 3: one failed, or text or items cannot decide.
    """
    show = None if as_json else Progress()
    if against and not rerun:
        from flatout.core.types import to_json
        from flatout.verify.audit import audit

        found = audit(
            model,
            against,
            margin=parse_margin(margin),
            text=text or None,
            tasks=task or (),
            task_margin=parse_margin(task_margin, "--task-margin", "a loss of accuracy"),
            limit=limit,
            speed_seconds=speed_seconds,
            listen=show,
        )
        if as_json:
            print_json(found)
        else:
            print(_quality_table(to_json(found.quality)))
            print("\n" + _block_table(found.blocks))
            if found.tasks:
                print("\n" + _task_table(to_json(found.tasks)))
            if found.speed is not None:
                print("\n" + _speed_table(to_json(found.speed)))
        return 0 if found.passed else 3
    if margin != "1%" or text or task:
        raise ConfigError(
            "a certificate fixes margin and text",
            "--margin, --text or --task",
            "flatout verify A --against B",
        )
    return _certificate(model, against or None, rerun, show, as_json)


def parse_margin(text: str, flag: str = "--margin", what: str = "a perplexity increase") -> float:
    """ "1%" or "0.01" as a fraction. Raises ConfigError."""
    try:
        return parse_max_loss(text)
    except ConfigError as error:
        rule = f"{flag} is {what} above 0% and below 100%"
        raise ConfigError(rule, repr(text), f"{flag} 1%") from error


def _certificate(path: str, original: str | None, rerun: bool, show: Any, as_json: bool) -> int:
    from flatout.core.types import to_json
    from flatout.verify.audit import again
    from flatout.verify.certificate import recompute

    if not Path(path).exists():
        raise ConfigError(
            "a certificate is a file, or an artifact's folder", path, "flatout verify A --against B"
        )
    certificate = recompute(path)
    result: dict[str, Any] = {"quality": certificate, "speed": None}
    if rerun:
        _, new = again(path, original=original, listen=show)
        pairs = zip(certificate.clusters, new.clusters, strict=True)
        largest = max(abs(old.loss - fresh.loss) / old.tokens for old, fresh in pairs)
        result |= {
            "rerun": new,
            "largest_difference": largest,
            "verdict_stands": new.verdict == certificate.verdict,
        }
        certificate = new
    if as_json:
        print_json(result)
    else:
        print(_quality_table(to_json(certificate)))
        if rerun:
            kept = "the verdict stands" if result["verdict_stands"] else "the verdict changed"
            print(
                f"\nrerun: losses differ by at most {result['largest_difference']:.2e} nats a token; {kept}"
            )
    return 0 if certificate.passed and result.get("verdict_stands", True) else 3


def _loss(value: float | None) -> str:
    return "unbounded" if value is None else percent(value, signed=True)


def _most(quality: dict[str, Any]) -> str:
    if quality["loss_upper"] is None:
        return "no upper bound can be made"
    return f"at most {_loss(quality['loss_upper'])} ({quality['method']})"


def _quality_table(quality: dict[str, Any]) -> str:
    verdict = quality["verdict"].replace("_", " ")
    rows = [
        ["verdict", f"{verdict}: {quality['reason']}"],
        [
            "loss",
            f"{_loss(quality['loss'])}, {_most(quality)}",
        ],
        [
            "perplexity",
            f"{_number(quality['perplexity_original'])} -> {_number(quality['perplexity_optimised'])}",
        ],
        [
            "text",
            f"{quality['tokens']:,} tokens in {len(quality['clusters'])} passages, opening {quality['k']}",
        ],
        ["confidence", f"{1 - quality['alpha_k']:.2%} for this opening, {1 - quality['alpha']:.0%} over all"],
        ["worst domain", f"{quality['worst_domain']}: {_loss(quality['worst_domain_loss'])}"],
        ["optimised", f"{quality['optimised']['source']} ({quality['optimised']['recipe']})"],
        ["original", f"{quality['original']['source']} ({quality['original']['recipe']})"],
    ]
    divergence = quality["divergence"]
    if divergence is not None:
        flips = f"{percent(divergence['flip_rate'])} of greedy tokens change"
        rows.append(["predictions", f"KL {divergence['mean_kl']:.2e} nats a token, {flips}"])
    rows += [["note", note] for note in quality["notes"]]
    return aligned(rows, right=False)


def _block_table(blocks: Sequence[BlockLoss]) -> str:
    """The blocks that lose most by themselves, and what to do about those that stand out."""
    from flatout.verify.layers import conspicuous

    rows = [["block by itself", "output error", "weight error", "runs as"]]
    worst = sorted(blocks, key=lambda block: -block.output_error)[:_SHOWN_BLOCKS]
    for block in worst:
        weights = "moved" if block.weight_error is None else percent(block.weight_error)
        rows.append([block.name, percent(block.output_error), weights, ", ".join(block.formats)])
    bad = conspicuous(blocks)
    names = ", ".join(block.name for block in bad[:_SHOWN_BLOCKS])
    advice = f"more than twice the median of {len(blocks)} blocks: {names}; give those more bits first"
    return aligned(rows) + (f"\n{advice}" if bad else "")


def _task_table(tasks: list[dict[str, Any]]) -> str:
    """A row a task, then what counts as right in each."""
    rows = [["task", "items", "original", "optimised", "change", "interval", "lost", "gained", "p"]]
    notes = []
    for task in tasks:
        rows.append(
            [
                task["task"],
                f"{task['n']:,}",
                f"{task['accuracy_original']:.2%}",
                f"{task['accuracy_optimised']:.2%}",
                f"{task['change']:+.2%}",
                f"{task['low']:+.2%} to {task['high']:+.2%}",
                str(task["lost"]),
                str(task["gained"]),
                f"{task['mcnemar_p']:.3f}",
            ]
        )
        verdict = task["verdict"].replace("_", " ")
        notes.append(f"{task['task']}: {verdict}, {task['reason']}; right if {task['rule']}{_second(task)}")
    return aligned(rows) + "\n" + "\n".join(notes)


def _second(task: dict[str, Any]) -> str:
    """The figures beside the accuracy that decides."""
    if task["accuracy_original_plain"] is not None:
        plain = [f"{task[f'accuracy_{side}_plain']:.2%}" for side in ("original", "optimised")]
        return f" (by plain log-probability {plain[0]} -> {plain[1]})"
    if task["form"] == "cloze":
        found = [_number(task[f"perplexity_{side}"]) for side in ("original", "optimised")]
        return f" (perplexity {found[0]} -> {found[1]})"
    return ""


def _number(value: Any) -> str:
    return "unbounded" if value is None else f"{value:.3f}"


def _speed_table(speed: dict[str, Any]) -> str:
    rows = [["", "original", "optimised", "ratio", "interval", "pairs", "thrown away"]]
    work = speed["workload"]
    for phase, tokens in (("prefill", work["prompt"]), ("decode", work["output"])):
        result = speed[phase]
        rates = [work["batch"] * tokens / result[side]["median"] for side in ("seconds_a", "seconds_b")]
        rows.append(
            [
                phase,
                *(f"{rate(value)} tokens/s" for value in rates),
                times(result["ratio"]),
                f"{result['low']:.2f}-{result['high']:.2f}",
                str(result["pairs"]),
                str(result["thrown_away"]),
            ]
        )
    return aligned(rows)
