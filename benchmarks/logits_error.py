"""How far the CPU runner's logits lie from the PyTorch reference's on the same weights and recipe.

    python benchmarks/logits_error.py [MODEL] [--tokens N]

Prints a table for docs/formats.md and writes a file to benchmarks/results. Of every format: the
greatest and the root mean square difference of a logit over the greatest logit, and how often the greedy next
tokens agree. For integer formats also whether one step, chunks of 100 tokens, single tokens and one or all
threads gave the same bits.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from flatout.compress.apply import compress
from flatout.core.checkpoint import open_checkpoint
from flatout.core.fuse import float_recipe
from flatout.data.passages import load_passages
from flatout.engine.cpu import CpuRunner
from flatout.engine.reference import ReferenceRunner
from flatout.engine.runner import StepInput
from flatout.search.recipes import recipe_from_name
from record import measured_here, write

FORMATS = ("fp32", "bf16", "native", "w8a8", "w8a8-g64", "w8a16", "w4a8-g32", "w4a16-g64-asym")
CHUNK = 100


def forward(runner: CpuRunner | ReferenceRunner, tokens: np.ndarray, size: int) -> np.ndarray:
    """Logits (tokens, vocabulary) of one sequence, `size` tokens a step."""
    pages = np.arange(runner.num_pages, dtype=np.int32)[None]
    parts = []
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        step = StepInput(part, np.array([start], np.int32), np.array([len(part)], np.int32), pages)
        parts.append(runner.forward(step, "all"))
    return np.concatenate(parts)


def compare(model: str, name: str, tokens: np.ndarray) -> dict[str, object]:
    """One row of the table."""
    source = open_checkpoint(model)
    recipe = (
        float_recipe(name, kv_cache="bf16") if name in ("fp32", "bf16") else recipe_from_name(name, source)
    )
    compressed = compress(source, recipe)
    num_pages = -(-len(tokens) // 64)
    expected = forward(ReferenceRunner(compressed, num_pages), tokens, len(tokens))
    runner = CpuRunner(compressed, num_pages=num_pages)
    got = forward(runner, tokens, len(tokens))
    error = (got - expected).astype(np.float64) / np.abs(expected).max()
    row: dict[str, object] = {
        "format": name,
        "runner": runner.name,
        "max": float(np.abs(error).max()),
        "rms": float(np.sqrt(np.square(error).mean())),
        "same_next_token": float((got.argmax(-1) == expected.argmax(-1)).mean()),
    }
    if name not in ("fp32", "bf16"):
        one = forward(CpuRunner(compressed, threads=1, num_pages=num_pages), tokens, CHUNK)
        single = forward(runner, tokens[: 2 * CHUNK], 1)
        row["same_bits"] = bool((one == got).all() and (single == got[: 2 * CHUNK]).all())
    return row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=384)
    args = parser.parse_args()
    text = "\n\n".join(passage.text for passage in load_passages("validation")[:4])
    tokens = np.array(open_checkpoint(args.model).tokenizer.encode(text)[: args.tokens], np.int32)
    rows = [compare(args.model, name, tokens) for name in FORMATS]
    print("| format | greatest | root mean square | same next token | same bits however split |")
    print("|---|--:|--:|--:|---|")
    for row in rows:
        bits = {True: "yes", False: "NO", None: ""}[row.get("same_bits")]  # type: ignore[index]
        same = f"{row['same_next_token']:.1%}"
        print(f"| `{row['format']}` | {row['max']:.1e} | {row['rms']:.1e} | {same} | {bits} |")
    result = {
        **measured_here("torch", "numpy"),
        "model": args.model,
        "tokens": len(tokens),
        "rows": rows,
    }
    write("logits", result, " ".join(["python benchmarks/logits_error.py", *sys.argv[1:]]))
    return 0 if all(row.get("same_bits", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
