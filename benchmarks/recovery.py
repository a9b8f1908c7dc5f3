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
from flatout.errors import FlatoutError
from flatout.search.recovery import RUNGS, recover


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="tests/data/offgrid")
    parser.add_argument("--recipe", default="w4a8-g64")
    parser.add_argument("--max-loss", default="3%")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rungs", default=",".join(RUNGS))
    options = parser.parse_args()
    result = measured_here("flatout", "torch", "numpy") | recover(
        options.model,
        options.out / "model",
        options.recipe,
        max_loss=options.max_loss,
        threads=options.threads,
        steps=options.steps,
        learning_rate=options.rate,
        rungs=options.rungs.split(","),
        ledger=options.out / "ledger",
        tell=lambda rung: log(str(rung)),
        progress=Progress(),
    )
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    try:
        main()
    except FlatoutError as error:
        sys.exit(f"recovery: {error}")
