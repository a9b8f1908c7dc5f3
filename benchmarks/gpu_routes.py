"""Measure how the kernels that multiply are best launched on this card (perf/gpu_routes.py).

    python benchmarks/gpu_routes.py [--recipes bf16,int4] [--rows 1,64] [--shape 8B] [--write FILE.json]

Shapes of Llama, random weights. Prints the table; --write puts it into a file that has the form of
src/flatout/kernels/triton/routes.json. About a minute for each recipe and number of rows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from flatout.perf.gpu_routes import KERNELS, Setting, supported, table_text, tune

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_engine import RECIPES, SHAPES

CONTEXTS = {1: 1088, 64: 1088, 128: 512, 256: 192}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipes", default="bf16,fp8,int8,int4")
    parser.add_argument("--rows", default="1")
    parser.add_argument("--shape", default="8B", choices=SHAPES)
    parser.add_argument("--write", type=Path, help="where the table goes; what is there already stays")
    parser.add_argument("--kernels", default=",".join(KERNELS), help="only these")
    options = parser.parse_args()
    kernels = options.kernels.split(",")
    found: dict[str, Setting] = {}
    for name in options.recipes.split(","):
        for rows in map(int, options.rows.split(",")):
            if not supported(RECIPES[name], rows):
                continue
            begin = time.perf_counter()
            processes = min(14, os.cpu_count() or 1)
            # The first measurement of a weight stands: int4 has its head in fp8.
            found = (
                tune(SHAPES[options.shape], RECIPES[name], rows, CONTEXTS[rows], processes, kernels=kernels)
                | found
            )
            print(f"{time.perf_counter() - begin:.0f} s", flush=True)
            torch.cuda.empty_cache()
            if options.write is not None:
                there = options.write.read_text(encoding="utf-8") if options.write.exists() else "{}"
                table = json.loads(there)
                table.setdefault(torch.cuda.get_device_name(), {}).update(found)
                options.write.write_text(table_text(table), encoding="utf-8")
    print(table_text({torch.cuda.get_device_name(): {k: list(v) for k, v in found.items()}}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
