"""Measure how the matrix-vector kernels are best launched on this card, where they run: inside a decode step.

    python benchmarks/gpu_routes.py [--recipes bf16,fp8,int4] [--write]

One sequence, the shape of Llama-3.1-8B, random weights, the whole step in a graph. A kernel alone, repeated,
prefers other settings than in its place between others, whose multiprocessors it shares while they end and
begin; so one kernel's setting is changed at a time and the whole step timed, twice over all kernels. --write
puts the result into src/flatout/kernels/triton/routes.json. About two minutes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import torch

from flatout.engine.cuda import CudaRunner, open_device
from flatout.engine.cuda_weights import random_weights
from flatout.kernels import gpu
from flatout.kernels.gpu import PackedWeight
from flatout.kernels.packed import PAIRS

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_engine import LLAMA_8B, RECIPES

TABLE = Path(gpu.__file__).parent / "triton" / "routes.json"
CONTEXT = 1088
ORIGINAL = gpu.gemv_route
CHOSEN: dict[str, gpu.Route] = {}


def candidates(fmt: str, name: str, k: int) -> list[gpu.Route]:
    """(chunks of a tile, rows, warps, programs a multiprocessor)."""
    chunks = k // (8 * PAIRS[fmt])
    whole = 1 << (chunks - 1).bit_length()
    found: list[gpu.Route] = []
    for tile in sorted({min(whole, 128), min(whole, 256), whole}):
        for rows in (2, 4, 8, 16) if name == "gate_up" else (1, 2, 4, 8, 16):
            for warps in (4, 8, 16):
                # 16-byte loads of a thread at a time: too few leave memory idle, too many spill.
                loads = tile * rows / (32 * warps)
                if not 2 <= loads <= 16 or (warps == 16 and tile < 1024) or rows * tile < 512:
                    continue
                found.append((tile, rows, warps, 0))
                if tile == whole and loads <= 8:
                    found += [(tile, rows, warps, 2)]
                    if warps == 8:
                        found += [(tile, rows, warps, 1)]
    return found


class Bench:
    """A runner whose routes can be set by weight."""

    def __init__(self, recipe: str) -> None:
        device = open_device()
        weights = random_weights(LLAMA_8B, RECIPES[recipe], device)
        self.runner = CudaRunner(LLAMA_8B, weights, 32, 64, "bf16", max_batch=1)
        self.decoder: Any = self.runner._decoder
        self.decoder._pages[0, :32] = torch.arange(32, device=device)
        layer = weights.layers[0]
        self.kernels = dict(zip(("qkv", "o", "gate_up", "down"), layer.linears, strict=True))
        self.kernels["head"] = weights.head

    def microseconds(self) -> float:
        """Of a step, the median of some replays."""
        self.decoder._positions[0] = CONTEXT
        self.decoder._run(1, False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.decoder._run(1, False)
        times = []
        for _ in range(12):
            self.decoder._positions[0] = CONTEXT
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        return sorted(times[2:])[5]


def key(weight: PackedWeight) -> str:
    return f"{weight.format} {weight.n}x{weight.k} 1"


def compile_some(part: list[tuple[str, str, gpu.Route]]) -> None:
    """Fill Triton's cache, one process of several."""
    device = open_device()
    for fmt, name, route in part:
        n, k = {**LLAMA_8B.linears(), "head": (LLAMA_8B.vocab_size, LLAMA_8B.hidden_size)}[name]
        group = 128 if fmt == "int4" else 0
        words = torch.zeros(n, k // (2 * PAIRS[fmt]), dtype=torch.int32, device=device)
        shape, dtype = ((n, k // group), torch.float16) if group else ((n,), torch.float32)
        scales = None if fmt == "bf16" else torch.zeros(shape, dtype=dtype, device=device)
        weight = PackedWeight(fmt, n, k, words, scales, None, group)
        gpu.multiply_few(
            gpu.card(device), torch.zeros(1, k, dtype=torch.bfloat16, device=device), weight,
            torch.zeros(1, n, dtype=torch.bfloat16 if name == "gate_up" else torch.float32, device=device),
            gains=None if name in ("o", "down") else torch.zeros(k, dtype=torch.bfloat16, device=device),
            residual=torch.zeros(1, n, device=device) if name in ("o", "down") else None,
            out_bf16=torch.zeros(1, n, dtype=torch.bfloat16, device=device),
            epilogue=gpu.SILU if name == "gate_up" else gpu.PLAIN,
            route=route,
        )  # fmt: skip


def tune(recipe: str) -> dict[str, gpu.Route]:
    bench = Bench(recipe)
    best = {key(w): ORIGINAL(bench.runner.card.name, w.format, w.n, w.k, 1) for w in bench.kernels.values()}
    CHOSEN.update(best)
    gpu.gemv_route = lambda name, fmt, n, k, m: CHOSEN[f"{fmt} {n}x{k} {m}"]  # type: ignore[assignment]
    lowest = bench.microseconds()
    print(f"{recipe}: {lowest:.0f} us with the table as it is", flush=True)
    second: dict[str, list[gpu.Route]] = {}
    for round_ in range(2):
        for name, weight in bench.kernels.items():
            tried = candidates(weight.format, name, weight.k) if round_ == 0 else second[name]
            times: list[tuple[float, gpu.Route]] = []
            for route in tried:
                CHOSEN[key(weight)] = route
                try:
                    times.append((bench.microseconds(), route))
                except Exception as error:  # a setting the compiler or the card refuses
                    print(f"  {name} {route}: {type(error).__name__}")
            times.sort()
            if round_ == 0:
                second[name] = [route for _, route in times[:4]]
            if times and times[0][0] < lowest - 0.5:
                lowest, best[key(weight)] = times[0]
            CHOSEN[key(weight)] = best[key(weight)]
            print(f"  {name}: {best[key(weight)]} {lowest:.0f} us; "
                  + ", ".join(f"{r} {t:.0f}" for t, r in times[:4]), flush=True)  # fmt: skip
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipes", default="bf16,fp8,int8,int4")
    parser.add_argument("--write", action="store_true", help="into the table that ships")
    options = parser.parse_args()
    recipes = options.recipes.split(",")
    jobs = []
    shapes = LLAMA_8B.linears()
    for recipe in recipes:
        fmt = {"bf16": "bf16", "fp8": "fp8", "int8": "int8", "int4": "int4"}[recipe]
        jobs += [(fmt, name, route) for name, (_, k) in shapes.items() for route in candidates(fmt, name, k)]
        head = "fp8" if fmt == "int4" else fmt
        jobs += [(head, "head", route) for route in candidates(head, "head", LLAMA_8B.hidden_size)]
    begin = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        pool.map(compile_some, [jobs[i::14] for i in range(14)], chunksize=1)
    print(f"{len(jobs)} settings compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    found: dict[str, gpu.Route] = {}
    for recipe in recipes:
        found |= {k: v for k, v in tune(recipe).items() if recipe != "int4" or not k.startswith("fp8")}
        torch.cuda.empty_cache()
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    rows = table.setdefault(torch.cuda.get_device_name(), {})
    rows |= {k: list(v) for k, v in found.items()}
    cards = []
    for card, entries in table.items():
        lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in entries.items())
        cards.append(f" {json.dumps(card)}: {{\n{lines}\n }}")
    text = "{\n" + ",\n".join(cards) + "\n}\n"
    print(text)
    if options.write:
        TABLE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
