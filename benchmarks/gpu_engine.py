"""The GPU engine on the shape of Llama-3.1-8B: correct first, then ceilings, then a table.

    python benchmarks/gpu_engine.py [--model tests/data/offgrid] [--rows decode-1,prefill] [--out FILE.json]

1. Small models of every family and format, and the real model if one is given, against the reference runner.
2. What the card reaches: reading memory, matrix products in bf16 and fp8.
3. Decode and prefill through the engine's own loop, host included, with random weights of the right shape
   (speed does not depend on their values; answers mean nothing). A row is the median of single steps, its
   20th and 80th percentile, the share of the floor, and joules a token from the card's energy counter.
4. Drafts from what was said before: a model that continues a prompt with a copy of it in which every 16th
   token differs, with and without drafts. Drafts of a model of the shape of Llama-3.2-1B, which is wrong
   about one of 8 tokens of an answer that repeats nothing. The answers must be the same.
5. The start of a process to its first token, with Triton's cache warm and empty.

The floor of decode is (weights + keys and values) / measured read rate; of prefill, the products'
operations / measured rate of a large product + attention's at the bf16 rate; of offload, the bytes of the
layers that are streamed / measured rate of copies from the host, also where the processor computes some of
them (divided). Needs a GPU; about 6 minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_checks
import gpu_drafts
from flatout.core.formats import Recipe
from flatout.core.spec import ModelSpec, RopeScaling
from flatout.core.types import measurement, to_json
from flatout.engine.cuda import CudaRunner, open_device
from flatout.engine.cuda_compile import compile_ahead
from flatout.engine.cuda_stream import StreamedLayers
from flatout.engine.cuda_weights import GpuWeights, random_weights
from flatout.engine.engine import Engine, SamplingParams
from flatout.engine.speculate import Speculator
from flatout.hardware.meter import Meter, nvml_counters
from flatout.kernels import gpu

LLAMA_8B = ModelSpec(
    family="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32,
    num_heads=32, num_kv_heads=8, head_dim=128, max_positions=131072, rope_theta=500000.0,
    rope_scaling=RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    ),
)  # fmt: skip
LLAMA_1B = ModelSpec(
    family="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=16,
    num_heads=32, num_kv_heads=8, head_dim=64, max_positions=131072, rope_theta=500000.0,
)  # fmt: skip
LLAMA_70B = ModelSpec(
    family="llama", vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_layers=80,
    num_heads=64, num_kv_heads=8, head_dim=128, max_positions=131072, rope_theta=500000.0,
)  # fmt: skip
SHAPES = {"8B": LLAMA_8B, "1B": LLAMA_1B, "70B": LLAMA_70B}
RECIPES = {
    "bf16": Recipe(name="bf16"),
    "fp8": Recipe(name="fp8", layers="fp8", head="fp8"),
    "fp8-kv8": Recipe(name="fp8-kv8", layers="fp8", head="fp8", kv_cache="fp8"),
    "int8": Recipe(name="int8", layers="w8a16", head="w8a16"),
    "int4": Recipe(name="int4", layers="w4a16-g128", head="fp8"),
}
ROWS = [
    ("decode-1", "8B", "bf16", 1, 1024),
    ("decode-64", "8B", "bf16", 64, 1024),
    ("decode-256", "8B", "bf16", 256, 128),
    ("prefill", "8B", "bf16", 1, 4096),
    ("drafts", "8B", "bf16", 1, 1024),
    ("draft-model", "8B", "bf16", 1, 1024),
    ("decode-1", "8B", "fp8", 1, 1024),
    ("decode-64", "8B", "fp8", 64, 1024),
    ("decode-256", "8B", "fp8", 256, 128),
    ("prefill", "8B", "fp8", 1, 4096),
    ("decode-64", "8B", "fp8-kv8", 64, 1024),
    ("decode-256", "8B", "fp8-kv8", 256, 128),
    ("decode-1", "8B", "int4", 1, 1024),
    ("decode-1", "8B", "int8", 1, 1024),
    ("decode-1", "1B", "bf16", 1, 128),
    ("decode-1", "70B", "int4", 1, 1024),
    ("offload", "8B", "bf16", 1, 128),
    ("divided", "8B", "bf16", 1, 128),
]
"""(kind, shape, recipe, sequences, prompt)."""
NEW_TOKENS = 128
POWER_S = 1.5
"""Least seconds of which the power is the mean: the card renews its energy counter every 20 to 100 ms."""


class Wordless:
    """A tokenizer for prompts of random tokens, whose answers nobody reads."""

    eos = None
    adds_bos = False
    chat_template = None

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        return []

    def apply_chat_template(self, messages: Any) -> str:
        return ""

    def stream(self) -> Wordless:
        return self

    def push(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


def median_ms(work: Callable[[], Any], times: int = 15) -> float:
    """Milliseconds on the GPU."""
    for _ in range(3):
        work()
    found = []
    for _ in range(times):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return float(np.median(found))


def ceilings(device: torch.device) -> dict[str, float]:
    """bytes/s read and copied, operations/s of an 8192^3 product in bf16 and fp8, on random data."""
    big = torch.randint(-9, 9, (1 << 28,), dtype=torch.int64, device=device)
    other = torch.empty_like(big)
    host = torch.empty(1 << 29, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    found = {
        "host": host.nbytes / median_ms(lambda: there.copy_(host, non_blocking=True)) * 1e3,
        "read": big.nbytes / median_ms(big.sum) * 1e3,
        "copy": 2 * big.nbytes / median_ms(lambda: other.copy_(big)) * 1e3,
    }
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    found["bf16"] = 2 * 8192**3 / median_ms(lambda: a @ b.T) * 1e3
    a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=device)
    found["fp8"] = (
        2 * 8192**3
        / median_ms(
            lambda: torch._scaled_mm(
                a8, b8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
            )
        )
        * 1e3
    )  # fmt: skip
    rates = {name: rate / 1e12 for name, rate in found.items()}
    print(
        "  read {read:.2f}, copy {copy:.2f}, from the host {host:.3f} TB/s; "
        "bf16 {bf16:.0f}, fp8 {fp8:.0f} TFLOP/s".format(**rates),
        flush=True,
    )
    return found


def weight_bytes(weights: GpuWeights) -> int:
    """Bytes of weights that a decode step reads."""
    return weights.head.bytes + sum(w.bytes for layer in weights.layers for w in layer.linears)


@dataclass
class Bench:
    """One recipe's weights on the card, and the rows that use them."""

    spec: ModelSpec
    recipe: Recipe
    weights: GpuWeights
    peaks: dict[str, float]

    def runner(self, sequences: int, tokens: int) -> CudaRunner:
        kv_cache = "fp8" if self.recipe.kv_cache == "fp8" else "bf16"
        pages = sequences * -(-tokens // 64)
        return CudaRunner(self.spec, self.weights, pages, 64, kv_cache, max_batch=sequences)

    def engine(self, sequences: int, tokens: int, speculator: Speculator | None = None) -> Engine:
        runner = self.runner(sequences, tokens)
        return Engine(runner, Wordless(), max_batch=sequences, prefix_reuse=False, speculator=speculator)

    def decode(self, sequences: int, prompt: int, new: int = NEW_TOKENS) -> dict[str, Any]:
        """Steps in which all sequences get a token. One sequence goes on until its power is known."""
        layers = self.weights.layers
        goes_on = sequences == 1 and not isinstance(layers, StreamedLayers)
        more = round(POWER_S / self.decode_floor(1, prompt)) if goes_on else 0
        engine = self.engine(sequences, prompt + new + more + 64)
        meter = Meter(nvml_counters())
        self._fill(engine, sequences, prompt, min(new, 24))
        while engine.has_work:  # compiles and captures
            engine.step()
        self._fill(engine, sequences, prompt, new + more)
        seconds: list[float] = []
        tokens = 0
        while engine.has_work:
            running = engine.scheduler.running
            full = len(running) == sequences and all(s.computed >= s.prompt_length for s in running)
            if full and not seconds:
                meter.start()
            begin = time.perf_counter()
            engine.step()
            if full and len(engine.scheduler.running) == sequences and len(seconds) < new:
                seconds.append(time.perf_counter() - begin)
                tokens = len(engine.scheduler.running[0].tokens)
        energy = meter.stop()
        context = tokens - len(seconds) / 2
        floor = self.decode_floor(sequences, context)
        if isinstance(layers, StreamedLayers):
            floor = layers.streamed_bytes / self.peaks["host"]
        # The stretch ends with steps of fewer sequences, which are few.
        joules = {
            k: v / energy.seconds * float(np.median(seconds)) / sequences for k, v in energy.joules.items()
        }
        return self.row(seconds[2:], sequences, floor, joules, energy.missing) | {"context": context}

    def prefill(self, prompt: int) -> dict[str, Any]:
        """One prompt to its first token."""
        engine = self.engine(1, prompt + 64)
        meter = Meter(nvml_counters())
        seconds: list[float] = []

        def once() -> None:
            self._fill(engine, 1, prompt, 1)
            begin = time.perf_counter()
            while engine.has_work:
                engine.step()
            seconds.append(time.perf_counter() - begin)

        for _ in range(3):
            once()
        count = max(7, round(POWER_S / seconds[-1]))
        meter.start()
        for _ in range(count):
            once()
        energy = meter.stop()
        linears = 2.0 * prompt * sum(w.n * w.k for layer in self.weights.layers for w in layer.linears)
        attention = 2.0 * prompt**2 * self.spec.q_size * self.spec.num_layers
        fast = "fp8" if self.recipe.layers == "fp8" else "bf16"
        floor = linears / self.peaks[fast] + attention / self.peaks["bf16"]
        joules = {k: v / count / prompt for k, v in energy.joules.items()}
        return self.row(seconds[3:10], prompt, floor, joules, energy.missing)

    def decode_floor(self, sequences: int, context: float) -> float:
        size = 1 if self.recipe.kv_cache == "fp8" else 2
        cache = sequences * context * 2.0 * self.spec.num_layers * self.spec.kv_size * size
        return (weight_bytes(self.weights) + cache) / self.peaks["read"]

    def _fill(self, engine: Engine, sequences: int, prompt: int, new: int) -> None:
        draws = np.random.default_rng(sequences)
        params = SamplingParams(max_tokens=new, ignore_eos=True)
        for _ in range(sequences):
            engine.add_request(draws.integers(0, self.spec.vocab_size, prompt).tolist(), params)

    def row(
        self,
        seconds: list[float],
        tokens: int,
        floor: float,
        joules: dict[str, float],
        missing: dict[str, str],
    ) -> dict[str, Any]:
        found = measurement("step", "s", seconds)
        return {
            "seconds": to_json(found),
            "tokens_per_s": tokens / found.median,
            "floor_s": floor,
            "floor_fraction": floor / found.median,
            "joules_per_token": sum(joules.values()) if joules else None,
            "energy_missing": missing,
        }


def first_token(begin: float) -> None:
    """From nothing to a first and a second token in this process, weights drawn on the card; begin: when the
    process was asked for. Prints a JSON line of seconds since then."""
    passed = {"imports": time.time() - begin}
    device = open_device()
    recipe = RECIPES["fp8"]
    compiling = compile_ahead(LLAMA_8B, recipe, gpu.card(device), 64)
    passed["device"] = time.time() - begin
    weights = random_weights(LLAMA_8B, recipe, device)
    bench = Bench(LLAMA_8B, recipe, weights, {})
    engine = bench.engine(1, 1024)
    torch.cuda.synchronize()
    passed["weights"] = time.time() - begin
    compiling.join()
    passed["compiled"] = time.time() - begin
    bench._fill(engine, 1, 512, 2)
    while engine.has_work:
        engine.step()
        passed[f"token {len(passed) - 3}"] = time.time() - begin
    print(json.dumps(passed))


def starts() -> dict[str, dict[str, float]]:
    """Seconds of a process that does `first_token`, with an empty kernel cache and with a warm one."""
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            begin = time.time()
            run = subprocess.run(
                [sys.executable, __file__, "--start", str(begin)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "TRITON_CACHE_DIR": cache},
            )
            found[name] = {**json.loads(run.stdout), "end": time.time() - begin}
            shown = ", ".join(f"{what} {seconds:.1f}" for what, seconds in found[name].items())
            print(f"  start, {name} kernel cache: {shown} s", flush=True)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| row | tokens/s | median ms (p20, p80) | of floor | J/token |", "|---|--:|--:|--:|--:|"]
    for row in rows:
        ms = [1e3 * row["seconds"][key] for key in ("median", "p20", "p80")]
        joules = row["joules_per_token"]
        lines.append(
            f"| {row['kind']} {row['shape']} {row['recipe']}, {row['sequences']} x {row['prompt']} "
            f"| {row['tokens_per_s']:,.0f} "
            f"| {ms[0]:.3f} ({ms[1]:.3f}, {ms[2]:.3f}) | {row['floor_fraction']:.0%} "
            f"| {'-' if joules is None else f'{joules:.4f}'} |"
        )
    return "\n".join(lines)


def save(result: dict[str, Any], path: Path | None) -> None:
    """What there is so far."""
    if path is not None:
        path.write_text(json.dumps(to_json(result), indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, help="a real model to check against, e.g. SmolLM2's GGUF file")
    parser.add_argument("--rows", help="only rows of these kinds, e.g. decode-1,prefill,starts")
    parser.add_argument("--shapes", help="only these shapes, e.g. 8B,70B")
    parser.add_argument("--recipes", help="only these recipes, e.g. bf16,fp8")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--no-checks", action="store_true", help="speed alone")
    parser.add_argument("--start", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        first_token(options.start)
        return 0
    device = open_device()
    begin = time.perf_counter()
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
        "hardware": {"name": torch.cuda.get_device_name(device), "kind": "gpu", "cores": 1},
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "weights": "random, shapes of Llama-3.1-8B, Llama-3.2-1B and Llama-3.1-70B",
    }
    if not options.no_checks:
        print("checks against the reference runner")
        result["checks"] = list(gpu_checks.all_checks(options.model, device))
        print(f"  {len(result['checks'])} checks passed", flush=True)
    print("ceilings")
    result["ceilings"] = ceilings(device)
    rows: list[dict[str, Any]] = []
    result["rows"] = rows
    wanted = [
        row for row in ROWS
        if (not options.rows or row[0] in options.rows.split(","))
        and (not options.shapes or row[1] in options.shapes.split(","))
        and (not options.recipes or row[2] in options.recipes.split(","))
    ]  # fmt: skip
    held: tuple[tuple[str, str, str, bool], GpuWeights] | None = None
    for kind, shape, name, sequences, prompt in wanted:
        recipe, streamed = RECIPES[name], kind in ("offload", "divided")
        key = shape, recipe.layers, recipe.head, streamed
        if held is None or held[0] != key:
            held = None
            torch.cuda.empty_cache()
            resident = 0 if streamed else None
            held = key, random_weights(SHAPES[shape], recipe, device, resident=resident)
        bench = Bench(SHAPES[shape], recipe, held[1], result["ceilings"])
        if kind == "prefill":
            found = bench.prefill(prompt)
        elif kind == "drafts":
            found = gpu_drafts.measure(bench, prompt)
            held = None
        elif kind == "draft-model":
            guessing = random_weights(SHAPES["1B"], recipe, device, seed=1)
            found = gpu_drafts.measure(bench, prompt, Bench(SHAPES["1B"], recipe, guessing, {}))
            del guessing
            held = None
        else:
            layers = bench.weights.layers
            division = layers.divide() if kind == "divided" and isinstance(layers, StreamedLayers) else None
            found = bench.decode(sequences, prompt, 20 if streamed else NEW_TOKENS)
            if division is not None:
                print(f"  {division}", flush=True)
                found |= {"division": to_json(division), "predicted_s": division.predicted}
        shown = {"kind": kind, "shape": shape, "recipe": name, "sequences": sequences, "prompt": prompt}
        rows.append(shown | found)
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        save(result, options.out)
        del bench
        gc.collect()  # a runner and its decoder hold each other
        torch.cuda.empty_cache()
    if not options.rows or "starts" in options.rows.split(","):
        print("starts")
        del held
        torch.cuda.empty_cache()
        result["start_s"] = starts()
    print(table(rows))
    print(f"{time.perf_counter() - begin:.0f} s")
    save(result, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
