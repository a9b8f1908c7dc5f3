"""Children of a model at a share of its predicted time, or of its parameters, before any training.

    python benchmarks/structure.py TEST.txt CALIBRATION.txt [--share 0.6] [--tokens N] [--write]

Importance is measured on 8 windows of 256 tokens of CALIBRATION, the loss of single cuts on 4 others
(compress/choice.py). For seconds (perf/predict.py with the ceilings of the newest demo result, bf16, 512 + 64
tokens) and for parameters the best structure is cut and scored on TEST by the cpu runner in bf16, as are each
kind of cut alone and the conversion to one key/value head. Predictions are labelled as such.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from flatout.compress.choice import choose, seconds_on
from flatout.compress.importance import measure
from flatout.compress.structure import cut
from flatout.core.checkpoint import Checkpoint, open_checkpoint
from flatout.core.fuse import Source, float_recipe
from flatout.core.spec import ModelSpec
from flatout.core.structure import Structure
from flatout.core.types import Ceiling, Hardware, Workload
from prune import perplexity, windows
from record import RESULTS, measured_here, write

PIECE, RANKED, JUDGED = 256, 8, 4


def described() -> Hardware:
    """The machine of the newest demo result."""
    newest = max(RESULTS.glob("demo_*.json"), key=lambda path: path.stem.rpartition("_")[2])
    found = json.loads(newest.read_text())["result"]["hardware"]
    ceilings = tuple(Ceiling(**ceiling) for ceiling in found["ceilings"])
    return Hardware(**{**found, "features": tuple(found["features"]), "ceilings": ceilings})


def pieces(checkpoint: Checkpoint, path: Path) -> list[np.ndarray]:
    tokens = np.asarray(checkpoint.tokenizer.encode(path.read_text(encoding="utf-8")), dtype=np.int64)
    starts = np.linspace(0, len(tokens) - PIECE, RANKED + JUDGED).astype(int)
    return [tokens[at : at + PIECE] for at in starts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("test", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep a results file")
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    spec, texts = checkpoint.spec, windows(checkpoint, args.test, args.tokens)
    given = pieces(checkpoint, args.calibration)
    ranked, judged = given[::3] + given[1::3], given[2::3]
    importance = measure(checkpoint, ranked)
    seconds = seconds_on(described(), float_recipe("bf16"), Workload(prompt=512, output=64))
    rows: list[dict[str, Any]] = []

    def row(what: str, source: Source, expected: float | None = None) -> None:
        value, error = perplexity(source, texts, args.threads)
        child: ModelSpec = source.spec
        rows.append(
            {
                "what": what,
                "layers": child.num_layers,
                "ffn": child.intermediate_size,
                "kv_heads": child.num_kv_heads,
                "heads": child.num_heads,
                "parameters": child.num_parameters(),
                "predicted_seconds_share": seconds(child) / seconds(spec),
                "expected_loss_nats": expected,
                "perplexity": value,
                "log_error": error,
            }
        )
        print(rows[-1], flush=True)

    row("as it is", checkpoint)
    for what, structure in (
        ("one layer of six gone", Structure(depth=spec.num_layers * 5 // 6)),
        ("a sixth of the channels gone", Structure(ffn=spec.intermediate_size * 5 // 6 // 64 * 64)),
        ("one head group gone", Structure(groups=spec.num_kv_heads - 1)),
        ("one key/value head by averaging", Structure(kv_heads=1)),
    ):
        row(what, cut(checkpoint, structure, importance))
    for what, cost in (("predicted seconds", seconds), ("parameters", lambda s: float(s.num_parameters()))):
        best = choose(checkpoint, importance, judged, args.share, cost)[0]
        child = cut(checkpoint, best.structure, importance)
        row(f"at most {args.share:.0%} of the {what}", child, best.expected_loss)
    if args.write:
        result = measured_here("numpy", "torch") | {
            "model": args.model,
            "sha256": checkpoint.sha256,
            "test": args.test.name,
            "tokens": sum(len(text) - 1 for text in texts),
            "rows": rows,
        }
        print(write("structure", result, "python " + " ".join(Path(a).name for a in sys.argv)))


if __name__ == "__main__":
    main()
