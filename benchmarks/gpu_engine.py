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
import dataclasses
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.runtime._async_compile import AsyncCompileMode

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_drafts
from flatout.core.checkpoint import open_checkpoint
from flatout.core.formats import Recipe
from flatout.core.fuse import assemble, native_recipe
from flatout.core.model import Model
from flatout.core.spec import ModelSpec, RopeScaling
from flatout.core.types import measurement, to_json
from flatout.engine.cuda import CudaRunner, open_device
from flatout.engine.cuda_compile import compile_ahead
from flatout.engine.cuda_stream import StreamedLayers
from flatout.engine.cuda_weights import GpuWeights, load_weights, random_weights
from flatout.engine.engine import Engine, SamplingParams
from flatout.engine.reference import ReferenceRunner
from flatout.engine.runner import Runner, StepInput
from flatout.engine.speculate import Speculator
from flatout.hardware.meter import Meter, nvml_counters
from flatout.kernels import gpu, gpu_linear
from flatout.kernels.gpu import Activations, Product
from flatout.kernels.linear import FP8_MAX
from flatout.kernels.packed import PackedWeight, dequantize, pack_bf16, pack_fp8

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


def step(tokens: Any, starts: Any, lengths: Any, pages: Any) -> StepInput:
    arrays = (
        np.ascontiguousarray(np.asarray(part, dtype=np.int32)) for part in (tokens, starts, lengths, pages)
    )
    return StepInput(*arrays)


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def check(
    name: str, model: Model, kv_cache: str, bound: float, runner: Runner | None = None
) -> dict[str, Any]:
    """Logits of prompts, of chunks beside single tokens and of single tokens, and tokens chosen by graphs,
    against the reference runner, which multiplies as the formats are written. Raises SystemExit beyond the
    bound."""
    spec, device = model.spec, open_device()
    reference = ReferenceRunner(model, num_pages=15, page_size=16, as_served=False)
    if runner is None:
        runner = CudaRunner(spec, load_weights(model, device), 15, 16, kv_cache, max_batch=8)
    draws = np.random.default_rng(0)
    pages = [[3, 1, 4], [0, 5, 2], [7, 6, 8], [10, 9, 11], [14, 12, 13]]
    batches = [
        (step(draws.integers(3, spec.vocab_size, 20), [0, 0], [13, 7], pages[:2]), "all"),
        (step(draws.integers(3, spec.vocab_size, 6), [13, 7], [1, 5], pages[:2]), "last"),
        (step(draws.integers(3, spec.vocab_size, 2), [14, 12], [1, 1], pages[:2]), "last"),
    ]
    errors = []
    for batch, rows in batches:
        errors.append(relative(runner.forward(batch, rows), reference.forward(batch, rows)))  # type: ignore[arg-type]
    gaps = []
    for count in (5, 2, 1):
        current, starts = draws.integers(3, spec.vocab_size, count), np.array([15, 13, 0, 0, 0][:count])
        greedy = (np.zeros(count, np.float32), np.zeros(count, np.int32), np.ones(count, np.float32))
        for _ in range(12):
            batch = step(current, starts, [1] * count, pages[:count])
            logits = reference.forward(batch, "last")
            current = runner.sample(batch, *greedy, np.zeros(count, np.uint64))
            gaps += [(row.max() - row[token]) / row.std() for row, token in zip(logits, current, strict=True)]
            starts = starts + 1
    row = {"model": name, "relative_error": max(errors), "bound": bound, "worst_choice_sd": float(max(gaps))}
    print(
        f"  {name:34} error {max(errors):.1e} (bound {bound:.0e}), choice within {max(gaps):.3f} sd",
        flush=True,
    )
    if not max(errors) < bound or not max(gaps) < 4 * bound:
        raise SystemExit(f"{name}: the GPU's logits differ from the reference's by more than the bound")
    return row


def checks(path: Path | None) -> Iterator[dict[str, Any]]:
    """Rows of `check`. bf16 rounds activations before each linear and what attention reads; with seven
    linears deep models and random weights that leaves about 1e-2. fp8 rounds both factors to 3 bits of
    mantissa, 5e-2 a product."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tests.tiny import tiny_model, tiny_spec

    small = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    cases = [
        ("llama", "bf16", "bf16", "bf16", 3e-2),
        ("qwen3", "w4a16-g32", "w8a16", "bf16", 3e-2),
        ("qwen2", "w8a8-g32-asym", "w8a8", "bf16", 3e-2),
        ("gemma", "q4_1", "q8_0", "bf16", 3e-2),
        ("llama", "w4a16-g128", "fp8", "bf16", 2e-1),
        ("llama", "fp8", "fp8", "bf16", 3e-1),
        ("mistral", "fp8", "fp8", "fp8", 3e-1),
    ]
    found: list[tuple[str, Model, str, float]] = []
    for family, layers, head, kv_cache, bound in cases:
        recipe = Recipe(name="check", layers=layers, embedding="bf16", head=head, kv_cache=kv_cache)
        model = tiny_model(tiny_spec(family, **small), recipe)
        found.append((f"tiny {family} {layers}, cache {kv_cache}", model, kv_cache, bound))
    if path is not None:
        checkpoint = open_checkpoint(path)
        own = assemble(checkpoint, native_recipe(checkpoint, kv_cache="bf16"), True)
        found.append((f"{path.name}, the file's own blocks", own, "bf16", 6e-2))
        recipe = Recipe(name="bf16")
        found.append((f"{path.name} in bf16", assemble(checkpoint, recipe, True), "bf16", 6e-2))
    card = gpu.card(open_device())
    compiling = [compile_ahead(model.spec, model.recipe, card, 16) for _, model, _, _ in found]
    for thread in compiling:
        thread.join()
    for case in found:
        yield check(*case)


def product_cases(device: torch.device) -> Iterator[tuple[Activations, PackedWeight, gpu_linear.TileRoute]]:
    """Activations, weights of the real size, and how they are cut."""
    for fmt, n, k in itertools.product(("bf16", "fp8"), (6144, 4096), (4096, 14336)):
        values = torch.randn(n, k, device=device, dtype=torch.bfloat16)
        weight = pack_fp8(values) if fmt == "fp8" else pack_bf16(values)
        for tokens in (3, 64, 100, 256):
            rows = next(size for size in gpu_linear.TILE_ROWS if size >= tokens)
            rule = gpu_linear.TileRoute(128, 64 if fmt == "bf16" else 128, 4 if rows == 64 else 8, 4, 1, 4)
            x = Activations(torch.randn(tokens, k, device=device, dtype=torch.bfloat16))
            both = [x]
            if fmt == "fp8":  # a scale a token, and one for each 512 columns
                groups = x.values.float().view(tokens, -1, 512)
                scales = groups.abs().amax(2) / FP8_MAX
                codes = (groups / scales[:, :, None]).view(tokens, k).to(torch.float8_e4m3fn)
                whole = x.values.float().abs().amax(1) / FP8_MAX
                both = [Activations(codes, scales)]
                both += [Activations((x.values / whole[:, None]).to(torch.float8_e4m3fn), whole)]
            for inputs in both:
                yield inputs, weight, rule
                if inputs.scales is None or inputs.scales.dim() == 1:
                    yield inputs, weight, rule._replace(programs=0, fetch=0)


def launched(
    card: gpu.Card, x: Activations, weight: PackedWeight, route: gpu_linear.TileRoute
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The product as whoever reads it adds it up; of whole tiles also in float32, and its greatest."""
    tokens, device = x.values.shape[0], x.values.device
    cut = gpu_linear.cut_of(weight.n, weight.k, route, card.units)
    out = torch.full((cut[0], tokens, weight.n), torch.nan, dtype=torch.bfloat16, device=device)
    gpu_linear.multiply_tiles(card, x, weight, out, route, cut)
    stream = torch.zeros(tokens, weight.n, device=device)
    gains = torch.ones(weight.n, dtype=torch.bfloat16, device=device)
    gpu.add_norm(card, stream, Product(out, cut=cut), gains, 1e-5, False)
    if route.programs:
        return stream, None, None
    keys = torch.full((tokens,), -(1 << 63), dtype=torch.int64, device=device)
    full = torch.empty(1, tokens, weight.n, device=device)
    gpu_linear.multiply_tiles(card, x, weight, full, route, cut)
    gpu_linear.multiply_tiles(card, x, weight, keys, route, cut, gpu_linear.gemm.ARGMAX)
    return stream, full[0], keys


def check_products(device: torch.device) -> Iterator[dict[str, Any]]:
    """The tensor cores' kernel on matrices of the real size, cut in every way, against float64. Parts are
    rounded to bfloat16, 2^-9 of each, and e4m3 sums lose bits on the tensor cores."""
    card = gpu.card(device)
    with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for x, weight, route in product_cases(torch.device("meta")):
            launched(dataclasses.replace(card, dry=True), x, weight, route)
    for x, weight, route in product_cases(device):
        values = x.values.double()
        if x.scales is not None:
            scales = x.scales.double().view(len(values), -1, 1)
            values = (values.view(len(values), scales.shape[1], -1) * scales).view(len(values), -1)
        stream, full, keys = launched(card, x, weight, route)
        error = relative(stream.cpu().numpy(), (values @ dequantize(weight).double().T).cpu().numpy())
        name = f"{weight.format} {len(values)}x{weight.n}x{weight.k}, {route}"
        if (
            full is not None
            and keys is not None
            and not torch.equal(0xFFFFFFFF - (keys & 0xFFFFFFFF), full.argmax(dim=1))
        ):
            raise SystemExit(f"{name}: not the greatest")
        if not error < (4e-3 if weight.format == "bf16" else 8e-3):
            raise SystemExit(f"{name}: {error:.1e} off")
        yield {"product": name, "relative_error": error}


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
        """Steps in which all sequences get a token."""
        engine = self.engine(sequences, prompt + new + 64)
        meter = Meter(nvml_counters())
        self._fill(engine, sequences, prompt, min(new, 24))
        while engine.has_work:  # compiles and captures
            engine.step()
        self._fill(engine, sequences, prompt, new)
        seconds: list[float] = []
        tokens = 0
        while engine.has_work:
            running = engine.scheduler.running
            full = len(running) == sequences and all(s.computed >= s.prompt_length for s in running)
            if full and not seconds:
                meter.start()
            begin = time.perf_counter()
            engine.step()
            if full and len(engine.scheduler.running) == sequences:
                seconds.append(time.perf_counter() - begin)
                tokens = len(engine.scheduler.running[0].tokens)
        energy = meter.stop()
        context = tokens - len(seconds) / 2
        floor = self.decode_floor(sequences, context)
        layers = self.weights.layers
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
        seconds = []
        for i in range(10):
            if i == 3:
                meter.start()
            self._fill(engine, 1, prompt, 1)
            begin = time.perf_counter()
            while engine.has_work:
                engine.step()
            seconds.append(time.perf_counter() - begin)
        energy = meter.stop()
        linears = 2.0 * prompt * sum(w.n * w.k for layer in self.weights.layers for w in layer.linears)
        attention = 2.0 * prompt**2 * self.spec.q_size * self.spec.num_layers
        fast = "fp8" if self.recipe.layers == "fp8" else "bf16"
        floor = linears / self.peaks[fast] + attention / self.peaks["bf16"]
        joules = {k: v / 7 / prompt for k, v in energy.joules.items()}
        return self.row(seconds[3:], prompt, floor, joules, energy.missing)

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
        result["checks"] = list(checks(options.model)) + list(check_products(device))
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
