"""`flatout fpga MODEL --board kv260`: compile, simulate, compare with the specification, fit to a board."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flatout.cli.output import Progress, aligned, log, print_json
from flatout.errors import ConfigError

if TYPE_CHECKING:
    from flatout.fpga.boards import Board
    from flatout.fpga.evaluate import Accuracy

_SHOWN = 8


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
    explore: Annotated[
        bool,
        typer.Option(
            "--explore",
            help="Compare designs (bits, FFN, columns, bus) under the board's limits only.",
        ),
    ] = False,
    synth: Annotated[
        bool, typer.Option("--synth", help="Count cells by synthesis with Yosys (minutes), not by structure.")
    ] = False,
    out: Annotated[
        str,
        typer.Option(help="Folder for what AMD's tools take: RTL, AXI wrapper, TCL, memory image, driver."),
    ] = "",
    report: Annotated[str, typer.Option(help="Write a page with the result to this HTML file.")] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: fit, cycles_per_token, bit_exact, mbu.")
    ] = False,
) -> int:
    """Simulate MODEL on a generated accelerator, cycle by cycle, and compare all with the specification.

    Exit code 0: equal, and it fits. 3: it does not fit, or a number differs.
    """
    from pathlib import Path

    import numpy as np

    from flatout.compress.apply import compress
    from flatout.core.artifact import is_artifact, load_artifact
    from flatout.core.checkpoint import open_checkpoint
    from flatout.core.formats import uniform
    from flatout.data.passages import load_passages
    from flatout.fpga.boards import board as board_of
    from flatout.fpga.compile import shape_for
    from flatout.fpga.evaluate import evaluate
    from flatout.fpga.synthesis import find_tool, synthesise
    from flatout.hardware.verilator import require_verilator

    target = board_of(board)
    if report and not Path(report).absolute().parent.is_dir():
        raise ConfigError("the folder of the report must exist", report, "another folder")
    if explore:
        return _explore(model, target, context, as_json)
    require_verilator()
    checkpoint = None if is_artifact(model) else open_checkpoint(model)
    if checkpoint is None:
        loaded, tokenizer, _ = load_artifact(model)
    else:
        tokenizer = checkpoint.tokenizer
        log(f"rounding {model} to {recipe}")
        loaded = compress(checkpoint, uniform(recipe))
    text: list[int] = []
    for passage in load_passages("validation"):
        text += tokenizer.encode(passage.text, add_bos=tokenizer.bos is not None and not text)
        if len(text) > max(tokens, context) + 1:
            break
    shape = shape_for(loaded.spec, columns=columns)
    if synth:
        find_tool("yosys")
    found = evaluate(
        loaded, target, np.array(text), shape=shape,
        synthesise=(lambda: synthesise(shape, "xcup")) if synth else None,
        tokens=tokens, context=context, original=checkpoint,
        answer=answer, out=Path(out) if out else None,
        progress=None if as_json else Progress(),
    )  # fmt: skip
    if as_json:
        print_json(found)
    else:
        verdict = "equal to the specification" if found.bit_exact else f"{found.differences} numbers differ"
        rows = [
            ["simulated", f"{found.tokens} tokens and one after {found.decode.context}: {verdict}"],
            ["perplexity", f"{found.perplexity:.3f} on these tokens{_beside(found.accuracy)}"],
            ["cycles", f"{found.cycles_per_token:,} a token, {found.mbu:.1%} of what the memory could carry"],
            ["cycle model", f"{found.decode.predicted_cycles / found.decode.cycles - 1:+.2%}"],
            ["together", f"{found.together.cycles:,} for {found.together.tokens} tokens"],
        ]
        if found.speculative is not None:
            guessed = found.speculative
            rows.append(
                ["with guesses", f"{guessed.tokens_per_pass:.2f} tokens a pass, {guessed.gain:.2f}x "
                 f"the tokens a cycle; {guessed.accepted} of {guessed.guesses} guesses came true; "
                 f"{'the same tokens' if guessed.identical else 'OTHER TOKENS'} as one by one"]
            )  # fmt: skip
        for s in found.speed:
            energy = s.joules_per_token
            rows.append(
                ["predicted", f"{s.tokens_per_s:.0f} tokens/s at {s.clock_mhz} MHz"
                 + (f", {energy[0] * 1e3:.0f}-{energy[1] * 1e3:.0f} mJ each" if energy else "")]
            )  # fmt: skip
        rows += [[r.name, f"{r.needed:,} of {r.available:,}"] for r in found.fit.resources]
        rows += [["does not fit", reason] for reason in found.fit.why_not]
        rows += [["resources", found.fit.tier], ["not done", "place and route, timing, any FPGA"]]
        print(aligned(rows, right=False))
    if report:
        from flatout.core.files import write_bytes
        from flatout.core.types import to_json
        from flatout.report.fpga import render

        write_bytes(Path(report), render(model, to_json(found)).encode())
    same = found.speculative is None or found.speculative.identical
    return 0 if found.bit_exact and same and found.fit.fits else 3


def _beside(accuracy: Accuracy | None) -> str:
    """What rounding cost on the same tokens, for an artifact nothing."""
    if accuracy is None:
        return ""
    return (
        f", {accuracy.perplexity_original:.3f} of the original: "
        f"{accuracy.nats:+.3f} nats a token, standard error {accuracy.standard_error:.3f}"
    )


def _explore(model: str, board: Board, context: int, as_json: bool) -> int:
    """Print all designs, the best first; the table shows those that fit and the first that do not."""
    from flatout.core.artifact import is_artifact, load_artifact
    from flatout.core.checkpoint import open_checkpoint
    from flatout.fpga.evaluate import CLOCKS_MHZ
    from flatout.fpga.explore import ACCEPTANCE, TIER, explore

    spec = load_artifact(model)[0].spec if is_artifact(model) else open_checkpoint(model).spec
    clock = CLOCKS_MHZ[-1]
    found = explore(spec, board, clock, context, ACCEPTANCE)
    if as_json:
        print_json(
            {"board": board.name, "clock_mhz": clock, "context": context, "acceptance": ACCEPTANCE,
             "tier": TIER, "designs": found}
        )  # fmt: skip
        return 0
    rows = [["bits", "FFN", "together", "bus", "tokens/s", "with guesses", "DSP", "BRAM", ""]]
    fitting = [design for design in found if not design.why_not]
    for d in fitting + [design for design in found if design.why_not][:_SHOWN]:
        rows.append(
            [str(d.bits), f"{d.kept:.0%}", str(d.columns), f"{8 * d.lanes}", f"{d.tokens_per_s:.0f}",
             f"{d.guessing_tokens_per_s:.0f}", str(d.dsp_blocks), str(d.block_rams), "; ".join(d.why_not)]
        )  # fmt: skip
    print(aligned(rows, right=False))
    print(f"{TIER}; {clock} MHz, after {context} tokens, {ACCEPTANCE:.0%} of guesses come true")
    return 0
