"""`flatout export MODEL --to FORM --out PATH`: parse, write, read back, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flatout.cli.output import Progress, aligned, print_json
from flatout.search.units import megabytes, percent


def export(
    model: Annotated[
        str, typer.Argument(help="A GGUF file, a folder, an artifact, a Hugging Face id or a built-in name.")
    ],
    to: Annotated[str, typer.Option(help="gguf, folder, coded (for transfer) or decoded.")],
    out: Annotated[Path, typer.Option(help="The .gguf file, or the folder: new, empty or an artifact.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Formats and cuts, e.g. w4a8-g32/gptq or bf16,sparsity=wanda-2:4 or bf16,ffn=1024."
        ),
    ] = None,
    vocabulary: Annotated[
        Path | None, typer.Option(help="UTF-8 text: keep only the tokens that it uses.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text or .jsonl to calibrate on, instead of the shipped one.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: path, max_logit_error.")
    ] = False,
) -> None:
    """Write MODEL in another form and compare what is read back. Nothing is certified: optimize does that."""
    from flatout.export.export import export as run

    show = None if as_json else Progress()
    result = run(model, to, out, recipe=recipe, vocabulary=vocabulary, text=text, progress=show)
    if as_json:
        print_json(result)
    else:
        print(summary(result))


def summary(result: dict[str, Any]) -> str:
    """What was written, how large it is and how it was checked."""
    size = megabytes(result["bytes"])
    if "bytes_before" in result:
        share = percent(result["bytes"] / result["bytes_before"])
        rows = [["weights", f"{megabytes(result['bytes_before'])} -> {size} ({share})"]]
        rows.append(["read back", "the same bits"])
    else:
        rows = [["size", size], ["recipe", result["recipe"]]]
        error = f"largest difference of logits {result['max_logit_error']:.1e} of the largest"
        rows.append(["read back", error])
    return aligned([["written", result["path"]], *rows], right=False)
