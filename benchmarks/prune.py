"""Perplexity of a model whose linears are pruned, by every method, beside the model as it is.

    python benchmarks/prune.py TEST.txt CALIBRATION.txt [--model smollm2-135m] [--tokens N] [--write]

TEST is one stream of tokens in windows of 1,024, scored by the cpu runner in bfloat16 (all but the first of
each); CALIBRATION gives 24 windows of 512 tokens, evenly spaced. The published runs are on WikiText-2: score
wiki.test.raw, calibrate on wiki.valid.raw. Prints a table and, with --write, keeps a results file.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flatout.compress.prune import prune
from flatout.core.checkpoint import Checkpoint, open_checkpoint
from flatout.core.fuse import Source, assemble, float_recipe
from flatout.core.sparsity import METHODS, parse_sparsity
from flatout.engine.cpu import CpuRunner
from flatout.engine.score import score_documents
from record import measured_here, write

WINDOW, PIECES, PIECE = 1024, 24, 512


def windows(checkpoint: Checkpoint, path: Path, most: int | None) -> list[np.ndarray]:
    """The text as one stream of tokens in windows; the last, shorter one counts, too."""
    tokens = np.asarray(checkpoint.tokenizer.encode(path.read_text(encoding="utf-8")), dtype=np.int64)[:most]
    return [tokens[at : at + WINDOW] for at in range(0, len(tokens) - 1, WINDOW)]


def calibration(checkpoint: Checkpoint, path: Path) -> list[np.ndarray]:
    tokens = np.asarray(checkpoint.tokenizer.encode(path.read_text(encoding="utf-8")), dtype=np.int64)
    starts = np.linspace(0, len(tokens) - PIECE, PIECES).astype(int)
    return [tokens[at : at + PIECE] for at in starts]


def perplexity(source: Source, texts: list[np.ndarray], threads: int) -> tuple[float, float]:
    """(perplexity, standard error of its logarithm over windows)."""
    model = assemble(source, replace(float_recipe("bf16"), name="bf16"), on_demand=True)
    runner = CpuRunner(model, threads=threads, num_pages=2 * WINDOW // 64 + 2)
    scores = [score.astype(np.float64) for score in score_documents(runner, texts)]
    tokens = np.array([len(score) for score in scores])
    sums = -np.array([score.sum() for score in scores])
    mean = sums.sum() / tokens.sum()
    spread = np.sqrt(((sums - mean * tokens) ** 2).sum()) / tokens.sum()
    return math.exp(mean), float(spread)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("test", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, help="of the test text; default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pattern", action="append", help="50%%, 2:4, 4:8 ...; default: 50%% and 2:4")
    parser.add_argument("--write", action="store_true", help="keep a results file")
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    texts, given = windows(checkpoint, args.test, args.tokens), calibration(checkpoint, args.calibration)
    count = sum(len(text) - 1 for text in texts)
    value, error = perplexity(checkpoint, texts, args.threads)
    rows: list[dict[str, Any]] = [{"name": "as it is", "perplexity": value, "log_error": error}]
    print(f"{count:,} tokens\n| weights | perplexity | pruned in | output error, median |\n|---|--:|--:|--:|")
    print(f"| as they are | {value:.2f} | | |", flush=True)
    for pattern in args.pattern or ["50%", "2:4"]:
        for method in METHODS:
            name = f"{method}-{pattern}"
            start = time.monotonic()
            pruned = prune(checkpoint, parse_sparsity(name), given)
            seconds = time.monotonic() - start
            value, error = perplexity(pruned, texts, args.threads)
            lost = float(np.median([report.output_error for report in pruned.reports]))
            rows.append(
                {
                    "name": name,
                    "perplexity": value,
                    "log_error": error,
                    "seconds": seconds,
                    "median_output_error": lost,
                }
            )
            shown = f"{lost:.1%}" if lost else "-"
            print(f"| `{name}` | {value:.2f} | {seconds:.0f} s | {shown} |", flush=True)
    if args.write:
        result = measured_here("numpy", "torch") | {
            "model": args.model,
            "sha256": checkpoint.sha256,
            "test": args.test.name,
            "calibration": args.calibration.name,
            "tokens": count,
            "threads": args.threads,
            "rows": rows,
        }
        print(write("prune", result, "python " + " ".join(Path(a).name for a in sys.argv)))


if __name__ == "__main__":
    main()
