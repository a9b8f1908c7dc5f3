"""`flatout fpga MODEL --board kv260`: compile, simulate, compare with the specification, fit to a board."""

from __future__ import annotations

from typing import Annotated

import typer

from flatout.cli.output import Progress, aligned, log, print_json
from flatout.errors import BackendError


def fpga(
    model: Annotated[str, typer.Argument(help="Artifact, checkpoint folder, GGUF file, or built-in name.")],
    board: Annotated[str, typer.Option(help="The board that it should fit.")] = "kv260",
    recipe: Annotated[str, typer.Option(help="How a checkpoint is rounded; an artifact is not.")] = (
        "w4a8-g64"
    ),
    tokens: Annotated[int, typer.Option(help="Tokens of text to simulate and compare.", min=2)] = 64,
    context: Annotated[int, typer.Option(help="Tokens before the one that is timed.", min=0)] = 512,
    columns: Annotated[int, typer.Option(help="Tokens that share each weight.", min=1, max=8)] = 4,
    answer: Annotated[
        int, typer.Option(help="Tokens to decode, guesses judged together with them.", min=0)
    ] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: fit, cycles_per_token, bit_exact, mbu.")
    ] = False,
) -> int:
    """Simulate MODEL on a generated accelerator, cycle by cycle, and compare all with the specification.

    Exit code 0: equal, and it fits. 3: it does not fit, or a number differs.
    """
    import numpy as np

    from flatout.compress.apply import compress
    from flatout.core.artifact import is_artifact, load_artifact
    from flatout.core.checkpoint import open_checkpoint
    from flatout.core.formats import uniform
    from flatout.data.passages import load_passages
    from flatout.fpga.boards import board as board_of
    from flatout.fpga.compile import Shape
    from flatout.fpga.evaluate import evaluate
    from flatout.hardware.verilator import REMEDY, find_verilator

    target = board_of(board)
    if find_verilator() is None:
        raise BackendError("simulation needs Verilator", "none found", REMEDY)
    if is_artifact(model):
        loaded, tokenizer, _ = load_artifact(model)
    else:
        checkpoint = open_checkpoint(model)
        tokenizer = checkpoint.tokenizer
        log(f"rounding {model} to {recipe}")
        loaded = compress(checkpoint, uniform(recipe))
    text: list[int] = []
    for passage in load_passages("validation"):
        text += tokenizer.encode(passage.text, add_bos=not text)
        if len(text) > max(tokens, context) + 1:
            break
    found = evaluate(
        loaded, target, np.array(text), shape=Shape(columns=columns), tokens=tokens, context=context,
        answer=answer,        progress=None if as_json else Progress(),
    )  # fmt: skip
    if as_json:
        print_json(found)
    else:
        verdict = "equal to the specification" if found.bit_exact else f"{found.differences} numbers differ"
        rows = [
            ["simulated", f"{found.tokens} tokens and one after {found.decode.context}: {verdict}"],
            ["perplexity", f"{found.perplexity:.3f} on these tokens"],
            ["cycles", f"{found.cycles_per_token:,} a token, {found.mbu:.1%} of what the memory could carry"],
            ["cycle model", f"{found.decode.predicted_cycles / found.decode.cycles - 1:+.2%}"],
            ["together", f"{found.together.cycles:,} for {found.together.tokens} tokens"],
        ]
        rows += [
            ["predicted", f"{s.tokens_per_s:.0f} tokens/s at {s.clock_mhz} MHz, "
             f"{s.joules_per_token[0] * 1e3:.0f}-{s.joules_per_token[1] * 1e3:.0f} mJ each"]
            for s in found.speed
        ]  # fmt: skip
        rows += [[r.name, f"{r.needed:,} of {r.available:,}"] for r in found.fit.resources]
        rows += [["does not fit", reason] for reason in found.fit.why_not]
        rows += [["not done", "synthesis, timing, any FPGA"]]
        print(aligned(rows, right=False))
    return 0 if found.bit_exact and found.fit.fits else 3
