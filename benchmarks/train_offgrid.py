"""Train the off-grid test model: a small Llama, from scratch, on public-domain books.

    python benchmarks/train_offgrid.py BOOKS OUT [--size 10m] [--epochs 10] [--weight-decay 0.5]

Its weights come from training and were never rounded to integers, so they lie on no grid that a rounding
method could find again; they are stored, and defined, in bfloat16. Widths are multiples of 128 and heads 64
wide, so every format of the engine fits. The passages that ship with the package are not in the training
text (benchmarks/books.py, which also describes BOOKS). Ctrl-C or a kill loses nothing: the same command goes
on.

Prints one JSON object: losses in nats a token on the shipped validation passages, by which settings were
chosen, and on three books of which no page was trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from benchmarks.books import read_books

from flatout._version import __version__
from flatout.cli.output import Progress, log
from flatout.core.checkpoint import open_checkpoint
from flatout.core.files import sha256_of
from flatout.core.spec import ModelSpec
from flatout.core.types import to_json
from flatout.data.passages import load_passages
from flatout.errors import FlatoutError
from flatout.train.config import TrainConfig
from flatout.train.data import pack
from flatout.train.distill import text_loss
from flatout.train.recipe import Training, encode, run
from flatout.train.trainable import make_trainable, source_weights
from flatout.train.trainer import mean_loss, open_device

SHARED = {"family": "llama", "head_dim": 64, "num_kv_heads": 2, "max_positions": 2048, "tie_embeddings": True}
SPECS = {
    "10m": ModelSpec(
        **SHARED, vocab_size=8192, hidden_size=256, intermediate_size=768, num_layers=10, num_heads=4
    ),
    "22m": ModelSpec(
        **SHARED, vocab_size=8192, hidden_size=384, intermediate_size=1024, num_layers=12, num_heads=6
    ),
    "tiny": ModelSpec(
        **SHARED, vocab_size=512, hidden_size=128, intermediate_size=256, num_layers=2, num_heads=2
    ),
}
"""22m is twice as large as a test's data should be; tiny tries this command out on a processor."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("books", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SPECS, default="10m")
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.5)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--characters", type=int, help="of the training text, to try this out")
    parser.add_argument("--tokenizer", help="a folder that has one, instead of learning it")
    options = parser.parse_args()
    documents, heldout = read_books(options.books)
    if options.characters:
        documents, heldout = [documents[0][: options.characters]], [heldout[0][: options.characters]]
    spec, length = SPECS[options.size], 512
    # About 4.2 bytes a token with 8,192 ids.
    tokens = sum(map(len, documents)) / (4.2 if spec.vocab_size > 512 else 2.5)
    config = TrainConfig(
        steps=max(10, round(options.epochs * tokens / (options.rows * length))),
        rows=options.rows,
        length=length,
        learning_rate=options.rate,
        warmup=10 if options.characters else 100,
        final=0.05,
        weight_decay=options.weight_decay,
        save_every=1000,
        judge_every=150,
        log_every=10,
    )
    result = run(
        Training(
            documents=documents,
            heldout=[passage.text for passage in load_passages("validation")],
            spec=spec,
            tokenizer=options.tokenizer,
            config=config,
        ),
        options.out,
        progress=Progress(),
        note=log,
    )
    checkpoint = open_checkpoint(options.out)
    device = open_device("auto")
    stored = make_trainable(checkpoint.spec, source_weights(checkpoint), device=device, frozen=True)
    unseen = mean_loss(stored, text_loss, pack(encode(checkpoint.tokenizer, heldout), length), 16)
    result |= {
        "books_loss": unseen,
        "books_perplexity": math.exp(unseen),
        "config": to_json(config),
        "spec": to_json(spec),
        "sha256": checkpoint.sha256,
        "books_sha256": sha256_of([options.books / "train.txt.gz", options.books / "heldout.txt.gz"]),
        "versions": {"flatout": __version__, "torch": torch.__version__},
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }
    print(json.dumps(to_json(result), indent=1))


if __name__ == "__main__":
    try:
        main()
    except FlatoutError as error:
        sys.exit(f"train_offgrid: {error}")
