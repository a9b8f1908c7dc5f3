"""Climb the recovery ladder of one recipe: rounding, GPTQ, tuning, distillation, until a certificate passes.

    python benchmarks/recovery.py OUT [--model tests/data/offgrid] [--recipe w4a8-g64] [--max-loss 3%]
        [--steps 200] [--rungs rtn,gptq,lora-kd,full-kd]

A line for each rung (search/recovery.py): perplexity increase on the shipped validation passages by the cpu
runner, minutes, and what each minute brought. Openings of the sealed passages are counted in OUT, not among
those of the user. Prints one JSON object, and leaves the best model in OUT/model.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.record import measured_here

from flatout.cli.output import Progress, log
from flatout.core.checkpoint import open_checkpoint
from flatout.core.model import Model
from flatout.core.types import to_json
from flatout.engine.cpu import CpuRunner
from flatout.engine.reference import ReferenceRunner
from flatout.errors import FlatoutError
from flatout.hardware.detect import available_cores
from flatout.search.recipes import recipe_from_name
from flatout.search.recovery import RUNGS, climb
from flatout.search.request import parse_max_loss
from flatout.search.texts import read_texts
from flatout.train.config import TrainConfig

PAGES = 33  # two texts of 1,024 tokens and one page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="tests/data/offgrid")
    parser.add_argument("--recipe", default="w4a8-g64")
    parser.add_argument("--max-loss", default="3%")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--rungs", default=",".join(RUNGS))
    options = parser.parse_args()
    source = open_checkpoint(options.model)
    threads = available_cores()

    def serve(model: Model) -> CpuRunner:
        return CpuRunner(model, threads=threads, num_pages=PAGES)

    config = TrainConfig(
        steps=options.steps, rows=4, length=256, learning_rate=options.rate, warmup=options.steps // 10,
        weight_decay=0.0, precision="fp32", device="auto", log_every=10,
    )  # fmt: skip
    found = climb(
        source,
        recipe_from_name(options.recipe, source),
        read_texts(source.tokenizer, source.tokenizer.sha256, source.spec),
        options.out / "model",
        config,
        original=ReferenceRunner(source, PAGES),
        serve=serve,
        margin=parse_max_loss(options.max_loss),
        rungs=options.rungs.split(","),
        ledger=options.out / "ledger",
        tell=lambda rung: log(str(rung)),
        progress=Progress(),
    )
    certificate = found.certificate
    result = {
        **measured_here("flatout", "torch", "numpy"),
        "model": options.model,
        "recipe": options.recipe,
        "margin": options.max_loss,
        "config": config,
        "rungs": found.rungs,
        "certified": None if certificate is None else {"k": certificate.k, "upper": certificate.loss_upper},
    }
    print(json.dumps(to_json(result), indent=1))


if __name__ == "__main__":
    try:
        main()
    except FlatoutError as error:
        sys.exit(f"recovery: {error}")
