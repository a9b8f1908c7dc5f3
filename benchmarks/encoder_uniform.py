"""An optimised encoder beside uniform recipes of its original, by the same yardsticks.

    python benchmarks/encoder_uniform.py ORIGINAL ARTIFACT [--uniform w8a8,w8a8/smooth,w8a8-g128]
                                         [--max-loss 1%] [--workload 128] [--threads N]

ARTIFACT is what `flatout optimize ORIGINAL` made. Each recipe of the whole model is judged on the sealed
passages like ARTIFACT, with one opening each, and timed against it in pairs that take turns. Prints a table
and writes a file to benchmarks/results. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

import flatout
from flatout.compress.encoder import compress_encoder
from flatout.core.encoder_folder import open_encoder
from flatout.core.types import to_json
from flatout.data.passages import load_passages
from flatout.engine.encoder import Encoder
from flatout.hardware.detect import available_cores
from flatout.models.bert import Bert
from flatout.search.encoder import FORMATS, encoder_workload, workload_batch
from flatout.search.encoder_joint import batch_timer
from flatout.search.encoder_recipes import encoder_from_name
from flatout.search.request import parse_max_loss
from flatout.verify.speed import ab_test
from flatout.verify.vectors import examine_vectors, pieces_of
from record import measured_here, write

ALPHA = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("original")
    parser.add_argument("artifact")
    parser.add_argument("--uniform", default=",".join(f for f in FORMATS if f.startswith("w8")))
    parser.add_argument("--max-loss", default="1%")
    parser.add_argument("--workload", help="TOKENS or TOKENSxBATCH, default as of `flatout optimize`")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--seconds", type=float, default=30.0, help="of each A/B test")
    parser.add_argument("--theme", default="encoderuniform", help="of the results file")
    args = parser.parse_args()
    margin, work = parse_max_loss(args.max_loss), encoder_workload(args.workload, "latency")
    checkpoint, passages = open_encoder(args.original), load_passages("holdout")
    texts = [text for _, text in pieces_of(passages)]
    tokenizer = checkpoint.tokenizer()
    batch = workload_batch(tokenizer, load_passages("validation"), work)
    how = {"pooling": checkpoint.pooling, "normalize": True}
    exact = Encoder(Bert(compress_encoder(checkpoint, "fp32")), tokenizer, **how).encode(texts)

    def judged(name: str, encoder: Encoder) -> dict[str, Any]:
        vectors = encoder.encode(texts)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        verdict = examine_vectors(passages, exact, vectors, margin, ALPHA)
        return {"name": name, **{key: value for key, value in to_json(verdict).items() if key != "passages"}}

    ours = flatout.load(args.artifact, threads=args.threads)
    if not isinstance(ours, Encoder):
        parser.error(f"{args.artifact} is no encoder")
    found = [judged("flatout", ours) | {"race": None}]
    for name in args.uniform.split(","):
        other = Encoder.of(encoder_from_name(checkpoint, name), tokenizer, threads=args.threads, **how)
        race = ab_test(batch_timer(other, batch), batch_timer(ours, batch), max_seconds=args.seconds)
        found.append(judged(name, other) | {"race": to_json(race)})
    print(
        "| | verdict | 1 - cosine | at most | misplaced, at most | takes longer |\n|---|---|--:|--:|--:|--:|"
    )
    for row in found:
        race = row["race"]
        ratio = f"{race['ratio']:.3f}x ({race['low']:.3f} to {race['high']:.3f})" if race else ""
        print(
            f"| {row['name']} | {row['verdict']} | {row['distance']:.4%} | {row['distance_upper']:.4%} "
            f"| {row['lost_upper']:+.2%} | {ratio} |"
        )
    result = {
        **measured_here("torch"),
        "threads": args.threads,
        "margin": margin,
        "workload": to_json(work),
        "rows": found,
    }
    print(
        write(args.theme, result, command=" ".join(["python benchmarks/encoder_uniform.py", *sys.argv[1:]]))
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
