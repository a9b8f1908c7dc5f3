"""One model on several GPUs of one machine, beside the same on one: correct first, then decode and prefill.

    python benchmarks/gpu_parallel.py [--gpus 2] [--tune] [--out FILE.json]

The shape of Llama-3.1-8B in bf16, random weights, as in benchmarks/gpu_engine.py. --tune first measures how
the kernels for one sequence are best launched on these cards, whole and cut; it takes a minute, and --out
then holds the table.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from flatout.core.formats import Recipe
from flatout.core.model import Model
from flatout.core.types import to_json
from flatout.engine.cuda import CudaRunner
from flatout.engine.cuda_parallel import ParallelRunner, head_of_rank, model_of_rank, share_of
from flatout.engine.cuda_ranks import Group, Rank
from flatout.engine.cuda_weights import load_weights, random_weights
from flatout.engine.engine import Engine
from flatout.kernels import gpu, gpu_linear
from flatout.perf.gpu_routes import tune
from gpu_engine import LLAMA_8B, RECIPES, Bench, Wordless, ceilings, check, table


def shared(model: Model, gpus: int, kv_cache: str) -> ParallelRunner:
    """Like the runner that `check` makes, on several GPUs."""
    devices = [torch.device("cuda", i) for i in range(gpus)]
    share = share_of(model.spec, gpus)

    def make(rank: int, group: Group) -> CudaRunner:
        whole = load_weights(model_of_rank(model, rank, gpus), devices[rank])
        weights = head_of_rank(whole, rank, gpus)
        return CudaRunner(share, weights, 8, 16, kv_cache, max_batch=4, rank=Rank(group, rank))

    return ParallelRunner(model.spec, devices, make, max_batch=4)


@dataclass
class SharedBench(Bench):
    """Rows of several GPUs. Each one's weights are random, the embeddings alike."""

    gpus: int = 2

    def engine(self, sequences: int, tokens: int, drafts: bool = False) -> Engine:
        devices = [torch.device("cuda", i) for i in range(self.gpus)]
        share = share_of(self.spec, self.gpus)
        pages = sequences * -(-tokens // 64)

        def make(rank: int, group: Group) -> CudaRunner:
            weights = head_of_rank(random_weights(share, self.recipe, devices[rank]), rank, self.gpus)
            return CudaRunner(share, weights, pages, 64, max_batch=sequences, rank=Rank(group, rank))

        runner = ParallelRunner(self.spec, devices, make, max_batch=sequences)
        return Engine(runner, Wordless(), max_batch=sequences, prefix_reuse=False)


def tuned(arguments: tuple[int, int]) -> dict[str, list[int]]:
    """Settings for one sequence on the GPU of that number, of the whole shape or of a share."""
    device, ranks = arguments
    torch.cuda.set_device(device)
    found = tune(share_of(LLAMA_8B, ranks), RECIPES["bf16"], 1, 1088, 14)
    return {key: list(setting) for key, setting in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    options = parser.parse_args()
    begin = time.perf_counter()
    gpus, device = options.gpus, torch.device("cuda", 0)
    name = torch.cuda.get_device_name(device)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python benchmarks/gpu_parallel.py", *sys.argv[1:]]),
        "hardware": {"name": f"{gpus} {name}", "kind": "gpu", "cores": gpus},
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "weights": "random, shape of Llama-3.1-8B",
    }
    if options.tune:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, mp_context=spawn) as pool:  # whose processes may have processes
            parts = list(pool.map(tuned, [(0, 1), (1, gpus)]))
        for part in parts:
            gpu.measured_routes(name).update(part)
        result["routes"] = {name: {**parts[1], **parts[0]}}
        gpu_linear.gemv_route.cache_clear()
        print(f"{time.perf_counter() - begin:.0f} s", flush=True)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tests.tiny import tiny_model, tiny_spec

    small = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    print("checks against the reference runner")
    result["checks"] = []
    for layers, head, bound in (("bf16", "bf16", 3e-2), ("w4a16-g32", "w8a16", 3e-2), ("fp8", "fp8", 3e-1)):
        recipe = Recipe(name="check", layers=layers, embedding="bf16", head=head)
        model = tiny_model(tiny_spec("llama", **small), recipe)
        runner = shared(model, gpus, "bf16")
        result["checks"].append(check(f"{gpus} GPUs, tiny llama {layers}", model, "bf16", bound, runner))
    result["ceilings"] = ceilings(device)
    rows: list[dict[str, Any]] = []
    recipe = RECIPES["bf16"]
    weights = random_weights(LLAMA_8B, recipe, device)
    benches = (
        Bench(LLAMA_8B, recipe, weights, result["ceilings"]),
        SharedBench(LLAMA_8B, recipe, weights, {k: v * gpus for k, v in result["ceilings"].items()}, gpus),
    )
    for bench in benches:
        for kind in ("decode-1", "prefill"):
            found = bench.prefill(4096) if kind == "prefill" else bench.decode(1, 1024)
            count = gpus if isinstance(bench, SharedBench) else 1
            shown = {"kind": kind, "shape": "8B", "recipe": "bf16", "sequences": 1}
            rows.append({"gpus": count, **shown, "prompt": 4096 if kind == "prefill" else 1024} | found)
            print(f"{count} GPUs: " + table(rows[-1:]).splitlines()[-1], flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    result["rows"] = rows
    result["gain"] = {kind: rows[i + 2]["tokens_per_s"] / rows[i]["tokens_per_s"] for i, kind in
                      enumerate(("decode-1", "prefill"))}  # fmt: skip
    print(f"{gpus} GPUs are {result['gain']['decode-1']:.2f} times one at one sequence, "
          f"{result['gain']['prefill']:.2f} in prefill; {time.perf_counter() - begin:.0f} s")  # fmt: skip
    if options.out is not None:
        options.out.write_text(json.dumps(to_json(result), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
