"""One model on several GPUs of one machine, beside the same on one: correct first, then decode and prefill.

    python benchmarks/gpu_parallel.py [--gpus 2] [--tune] [--recipes bf16,fp8] [--out FILE.json]

The shape of Llama-3.1-8B, random weights, as in benchmarks/gpu_engine.py. --tune first measures how kernels
are best launched for one sequence, on one GPU, and of a share on all of them. Without progress for a minute
and a half the process says where it stands and ends.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import gc
import itertools
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton.runtime._async_compile import AsyncCompileMode

sys.path.insert(0, str(Path(__file__).resolve().parent))
from flatout.core.formats import Recipe
from flatout.core.model import Model
from flatout.core.spec import ModelSpec
from flatout.engine.cuda import CudaRunner
from flatout.engine.cuda_compile import compile_ahead
from flatout.engine.cuda_parallel import ParallelRunner, head_of_rank, model_of_rank, share_of
from flatout.engine.cuda_ranks import Group, Rank
from flatout.engine.cuda_weights import load_weights, random_weights
from flatout.engine.engine import Engine
from flatout.engine.scheduler import MAX_DRAFTED_ROWS
from flatout.kernels import gpu, gpu_attention, gpu_linear
from flatout.kernels.gpu import Exchange
from flatout.perf.gpu_routes import Setting, attention_settings, few_settings, tune
from gpu_checks import check
from gpu_engine import LLAMA_8B, RECIPES, Bench, Wordless, ceilings, median_ms, save, table

SILENCE_S = 90
_begin = time.perf_counter()


def say(text: str) -> None:
    """Print it with the seconds so far, and have a minute's silence from now on end the process."""
    faulthandler.dump_traceback_later(SILENCE_S, exit=True)
    print(f"[{time.perf_counter() - _begin:.0f} s] {text}", flush=True)


def links(gpus: int) -> dict[str, float]:
    """bytes/s of copies between every two GPUs, right to the last byte. Raises SystemExit if they are not."""
    found = {}
    for a, b in itertools.permutations(range(gpus), 2):
        reach = torch.cuda.can_device_access_peer(a, b)
        here = torch.randint(0, 255, (1 << 28,), dtype=torch.uint8, device=torch.device("cuda", a))
        there = torch.empty_like(here, device=torch.device("cuda", b))
        there.copy_(here)
        if not torch.equal(there.cpu(), here.cpu()):
            raise SystemExit(f"what GPU {a} copies to GPU {b} does not arrive")
        with torch.cuda.device(a):
            rate = here.nbytes / median_ms(lambda there=there, here=here: there.copy_(here)) * 1e3  # type: ignore[misc]
        found[f"{a} to {b}"] = rate
        say(f"GPU {a} to {b}: {rate / 1e9:.0f} GB/s, peer access {reach}")
    return found


def shared(model: Model, gpus: int, kv_cache: str) -> ParallelRunner:
    """Like the runner that `check` makes, on several GPUs."""
    devices = [torch.device("cuda", i) for i in range(gpus)]
    share = share_of(model.spec, gpus)
    compile_ahead(share, model.recipe, gpu.card(devices[0]), 16).join()

    def make(rank: int, group: Group) -> CudaRunner:
        whole = load_weights(model_of_rank(model, rank, gpus), devices[rank])
        weights = head_of_rank(whole, rank, gpus)
        return CudaRunner(share, weights, 15, 16, kv_cache, max_batch=8, rank=Rank(group, rank))

    return ParallelRunner(model.spec, devices, make, max_batch=8)


def random_shares(
    spec: ModelSpec, recipe: Recipe, gpus: int, pages: int, kv_cache: str, sequences: int
) -> ParallelRunner:
    """Each GPU's weights are random, the embeddings alike."""
    devices = [torch.device("cuda", i) for i in range(gpus)]
    share = share_of(spec, gpus)

    def make(rank: int, group: Group) -> CudaRunner:
        weights = head_of_rank(random_weights(share, recipe, devices[rank]), rank, gpus)
        return CudaRunner(share, weights, pages, 64, kv_cache, max_batch=sequences, rank=Rank(group, rank))

    return ParallelRunner(spec, devices, make, max_batch=sequences)


@dataclass
class SharedBench(Bench):
    """Rows of several GPUs."""

    gpus: int = 2

    def engine(self, sequences: int, tokens: int, drafts: bool = False) -> Engine:
        kv_cache = "fp8" if self.recipe.kv_cache == "fp8" else "bf16"
        pages = sequences * -(-tokens // 64)
        runner = random_shares(self.spec, self.recipe, self.gpus, pages, kv_cache, sequences)
        return Engine(runner, Wordless(), max_batch=sequences, prefix_reuse=False)


def step_us(runner: ParallelRunner, context: int, steps: int = 12) -> float:
    """Microseconds of a step of one sequence on all GPUs, without the host: replays in a row."""
    graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def capture(one: CudaRunner) -> None:
        assert one.rank is not None
        decoder: Any = one._decoder
        decoder._positions[0] = context
        decoder._pages[0, :] = torch.arange(decoder._width, device=one.device)
        decoder._run(1, False)
        decoder._positions[0] = context
        torch.cuda.synchronize()
        graphs[one.rank.index] = graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=decoder._stream, capture_error_mode="thread_local"):
            decoder._run(1, False)
        one.rank.meet()

    def replay(one: CudaRunner) -> float:
        assert one.rank is not None
        graph = graphs[one.rank.index]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        graph.replay()
        for i, event in enumerate(events):
            if i % 4 == 0:
                one.rank.meet()  # so that no GPU's queue fills up with what waits for another
            event.record()
            graph.replay()
        one.rank.meet()
        torch.cuda.synchronize()
        one.rank.check()
        times = [a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(events)]
        return sorted(times)[steps // 2]

    with torch.no_grad():
        runner._all(capture)
        return max(runner._all(replay))


def precompile(runner: ParallelRunner, recipe: Recipe, settings: dict[str, list[Setting]]) -> None:
    """Fill Triton's cache with all of them, but for the head's."""
    one = runner._ranks[0]
    card = dataclasses.replace(one.card, dry=True)
    share = dataclasses.replace(one.spec, num_layers=1)
    weights = random_weights(share, recipe, torch.device("meta"))
    named = dict(zip(settings, weights.layers[0].linears, strict=False))

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for name, weight in named.items():
            x, out = empty(1, weight.k, dtype=torch.bfloat16), empty(1, weight.n)
            gains = empty(weight.k, dtype=torch.bfloat16)
            for setting in settings[name]:
                how: list[dict[str, Any]] = [{}]
                if name in ("qkv", "gate_up"):
                    how = [{"gains": gains, "eps": 1e-5}]
                    if name == "gate_up":
                        out = empty(1, weight.n // 2, dtype=torch.bfloat16)
                        how[0]["epilogue"] = gpu_linear.SILU
                else:
                    rooms, state = empty(2, dtype=torch.int64), empty(2, dtype=torch.int32)
                    more = {"residual": out, "out_bf16": empty(1, weight.n, dtype=torch.bfloat16)}
                    capacity = MAX_DRAFTED_ROWS * one.spec.hidden_size
                    how = [more | {"exchange": Exchange(rooms, state, r, 2, capacity)} for r in range(2)]
                for extra in how:
                    gpu_linear.multiply_few(card, x, weight, out, route=setting[:4], **extra)  # type: ignore[arg-type]


def tune_shares(recipe: Recipe, gpus: int, context: int) -> dict[str, list[int]]:
    """The best settings for steps of one sequence, one kernel after another; used from now on."""
    eight = dataclasses.replace(LLAMA_8B, num_layers=8)
    runner = random_shares(eight, recipe, gpus, 20, "bf16", 1)
    one = runner._ranks[0]
    table = gpu.measured_routes(one.card.name)
    named = dict(zip(("qkv", "o", "gate_up", "down"), one.weights.layers[0].linears, strict=True))
    named["head"] = one.weights.head
    keys = {name: f"{w.format} {w.n}x{w.k} 1" for name, w in named.items()}
    settings = {name: few_settings(w.format, w.n, w.k, name) for name, w in named.items()}
    precompile(runner, recipe, settings)
    plan = gpu_attention.attention_plan(one.card, one.spec, 1, one.device)
    keys["attention"] = gpu_attention.route_key(one.caches[0].keys.element_size(), plan.splits)
    settings["attention"] = attention_settings()
    lowest = step_us(runner, context)
    say(f"8 layers: {lowest:.0f} us to begin with")
    kept = settings
    for again in (False, True):
        for name, key in keys.items():
            before, times = table.get(key), {}
            for setting in kept[name]:
                table[key] = list(setting)
                gpu_linear.gemv_route.cache_clear()
                times[setting] = step_us(runner, context)
            ranked = sorted(times, key=times.__getitem__)
            best = ranked[0]
            if before is not None and times[best] > lowest - 0.5:
                table[key] = before
            else:
                table[key], lowest = list(best), times[best]
            gpu_linear.gemv_route.cache_clear()
            kept = {**kept, name: ranked[:4]}
            shown = ", ".join(f"{s} {times[s]:.0f}" for s in ranked[:5])
            say(f"{name}{' again' if again else ''}: {table[key]} {lowest:.0f} us; {shown}")
    return {key: table[key] for key in keys.values()}


def tune_whole(recipe: Recipe, context: int) -> dict[str, list[int]]:
    """The same on one GPU (perf/gpu_routes.py)."""
    found = tune(LLAMA_8B, recipe, 1, context, 14, say)
    routes = {key: list(setting) for key, setting in found.items()}
    gpu.measured_routes(torch.cuda.get_device_name(0)).update(routes)
    gpu_linear.gemv_route.cache_clear()
    return routes


def measured(
    benches: list[tuple[int, Bench]], kinds: list[str], result: dict[str, Any], path: Path | None
) -> None:
    for count, bench in benches:
        for kind in kinds:
            found = bench.prefill(4096) if kind == "prefill" else bench.decode(1, 1024)
            shown = {"kind": kind, "shape": "8B", "recipe": bench.recipe.name, "sequences": 1}
            shown["prompt"] = 4096 if kind == "prefill" else 1024
            result["rows"].append({"gpus": count, **shown, **found})
            say(f"{count} GPUs: " + table(result["rows"][-1:]).splitlines()[-1])
            save(result, path)
            gc.collect()
            torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--recipes", default="bf16")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    options = parser.parse_args()
    gpus, device = options.gpus, torch.device("cuda", 0)
    say(f"{torch.cuda.device_count()} GPUs")
    name = torch.cuda.get_device_name(device)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python benchmarks/gpu_parallel.py", *sys.argv[1:]]),
        "hardware": {"name": f"{gpus} {name}", "kind": "gpu", "cores": gpus},
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "weights": "random, shape of Llama-3.1-8B",
        "checks": [],
        "rows": [],
        "links": links(gpus),
    }
    if not any(key.endswith(" 1") for key in gpu.measured_routes(name)):
        gpu.measured_routes(name).update(gpu.measured_routes("NVIDIA H100 80GB HBM3"))
        say("launched as measured on an H100")
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tests.tiny import tiny_model, tiny_spec

    small = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    for layers, head in (("bf16", "bf16"), ("w4a16-g32", "w8a16")):
        recipe = Recipe(name="check", layers=layers, embedding="bf16", head=head)
        model = tiny_model(tiny_spec("llama", **small), recipe)
        runner = shared(model, gpus, "bf16")
        say(f"a runner on {gpus} GPUs")
        result["checks"].append(check(f"{gpus} GPUs, tiny llama {layers}", model, "bf16", 3e-2, runner))
        save(result, options.out)
        say("checked")
    result["ceilings"] = ceilings(device)
    say("ceilings measured")
    peaks = {k: v * gpus for k, v in result["ceilings"].items()}
    for recipe_name in options.recipes.split(","):
        recipe = RECIPES[recipe_name]
        weights = random_weights(LLAMA_8B, recipe, device)
        one = [(1, Bench(LLAMA_8B, recipe, weights, result["ceilings"]))]
        both: list[tuple[int, Bench]] = [(gpus, SharedBench(LLAMA_8B, recipe, weights, peaks, gpus))]
        tuned = result.setdefault("routes", {})
        if options.tune:
            tuned |= tune_whole(recipe, 1088)
            say("tuned on one")
        measured(one * 2, ["decode-1"], result, options.out)
        if options.tune:
            tuned["shares"] = tune_shares(recipe, gpus, 1088)
            gc.collect()
            torch.cuda.empty_cache()
        measured(both * 2, ["decode-1"], result, options.out)
        if recipe_name == "bf16":
            measured(one + both, ["prefill"], result, options.out)
        rates = [
            (row["gpus"], row["tokens_per_s"])
            for row in result["rows"]
            if row["recipe"] == recipe.name and row["kind"] == "decode-1"
        ]
        gain = max(r for n, r in rates if n == gpus) / max(r for n, r in rates if n == 1)
        result.setdefault("gain", {})[recipe.name] = gain
        say(f"{recipe.name}: {gpus} GPUs are {gain:.2f} times one at one sequence")
        save(result, options.out)
        del weights, one, both
        gc.collect()
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
