"""`flatout train RECIPE.py --out DIR`: run what the file's training() describes, print what came of it."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Annotated, Any

import typer

from flatout.cli.output import Progress, log, print_json
from flatout.errors import ConfigError
from flatout.search.units import percent, rate


def train(
    recipe: Annotated[Path, typer.Argument(help="A Python file with training() -> flatout Training.")],
    out: Annotated[Path, typer.Option(help="Folder for the model: new, or that of the same training.")],
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Begin anew, or go on where the folder's run stopped.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Train a model from scratch, from a checkpoint or from a teacher, and write an ordinary folder.

    Ctrl-C ends after the current step and keeps everything; the same command goes on from there.
    """
    from flatout.train.recipe import Training, run

    if not recipe.is_file():
        raise ConfigError("the recipe is a Python file", str(recipe), "a path that exists")
    make = runpy.run_path(str(recipe)).get("training")
    training = make() if callable(make) else None
    if not isinstance(training, Training):
        raise ConfigError(
            "the recipe defines training(), which returns a flatout.train.recipe.Training",
            f"{type(training).__name__} in {recipe}",
            "docs/training.md",
        )
    result = run(training, out, fresh=fresh, progress=Progress(), note=log)
    if as_json:
        print_json(result)
    else:
        print(_summary(result))
    return 0 if result["finished"] else 130


def _summary(result: dict[str, Any]) -> str:
    heldout = result["heldout_perplexity"]
    judged = "" if heldout is None else f", perplexity of held-out text {heldout:.2f}"
    state = f"finished {result['steps']} steps" if result["finished"] else f"stopped after {result['steps']}"
    pace = f"{rate(result['tokens_per_s'])} tokens/s, {percent(result['mfu'])} of a product's operations"
    return f"{state}: loss {result['loss']:.4f}{judged}\n{pace}\nnext: flatout run {result['artifact']}"
