"""Is what the GPU computes right? The checks that benchmarks/gpu_engine.py begins with.

Small models of every family and format, and a trained one if it is given, against the reference runner; the
tensor cores' kernels on matrices of the real size against float64. Needs a GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu
from triton.runtime._async_compile import AsyncCompileMode

from flatout.core.checkpoint import open_checkpoint
from flatout.core.formats import Recipe
from flatout.core.fuse import assemble, native_recipe
from flatout.core.model import Model
from flatout.engine.cuda import CudaRunner, open_device
from flatout.engine.cuda_compile import compile_ahead
from flatout.engine.cuda_weights import load_weights
from flatout.engine.reference import ReferenceRunner
from flatout.engine.runner import Runner, StepInput
from flatout.kernels import gpu, gpu_linear, gpu_prompt
from flatout.kernels.gpu import Activations, Product
from flatout.kernels.linear import FP8_MAX
from flatout.kernels.packed import PackedWeight, dequantize, pack_bf16, pack_fp8


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


def check_wide(device: torch.device) -> Iterator[dict[str, Any]]:
    """Wide tiles, in parts, gated, and of more tokens than one band of tiles has, against float64."""
    card = gpu.card(device)
    if not card.wgmma:
        return
    for fmt, tokens in itertools.product(("bf16", "fp8"), (131, 256, 2500)):
        n, k, block_k = 14336, 4096, 64 if fmt == "bf16" else 128
        values = torch.randn(n, k, device=device, dtype=torch.bfloat16)
        weight = pack_fp8(values) if fmt == "fp8" else pack_bf16(values)
        x = Activations(torch.randn(tokens, k, device=device, dtype=torch.bfloat16))
        if fmt == "fp8":
            x = gpu.quantize(card, x.values)
        scales = 1.0 if x.scales is None else x.scales.double()[:, None]
        product = (x.values.double() * scales) @ dequantize(weight).double().T
        gate, up = product[:, 0::2], product[:, 1::2]
        for parts, epilogue, wanted in (
            (1, gpu_linear.gemm.PLAIN, product),
            (4, gpu_linear.gemm.PLAIN, product),
            (1, gpu_linear.gemm.SILU, silu(gate) * up),
            (1, gpu_linear.gemm.GELU, gelu(gate, approximate="tanh") * up),
        ):
            route = gpu_linear.TileRoute(224, block_k, 8, 3, 0, 0, parts)
            cut = gpu_linear.cut_of(n, k, route, card.units)
            out = torch.full((parts, *wanted.shape), torch.nan, dtype=torch.bfloat16, device=device)
            gpu_linear.multiply_tiles(card, x, weight, out, route, cut, epilogue)
            error = float((out.double().sum(0) - wanted).norm() / wanted.norm())
            name = f"wide {fmt} {tokens}x{n}x{k}, {parts} parts, epilogue {epilogue.value}"
            if not error < (4e-3 if fmt == "bf16" else 8e-3):
                raise SystemExit(f"{name}: {error:.1e} off")
            yield {"product": name, "relative_error": error}


PROMPTS = (
    # tokens, seen, query heads, key/value heads, head size, window
    (2, 2, 32, 8, 128, None),
    (127, 127, 4, 4, 64, None),
    (129, 129, 6, 2, 128, None),
    (1000, 1000, 32, 8, 128, None),
    (4096, 4096, 32, 8, 128, None),
    (2049, 2049, 32, 8, 64, None),
    (65, 1089, 8, 2, 128, None),
    (300, 5001, 9, 3, 64, None),
    (3000, 3000, 8, 8, 128, 512),
    (513, 2000, 4, 2, 64, 100),
    (640, 640, 8, 1, 128, 1),
)
"""Attention of a prompt: lengths that end anywhere in a tile, with and without tokens before, and windows."""


def attention_reference(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """float64 (T, H E) of q (T, H, E), k and v (S, G, E)."""
    tokens, heads, head_dim = q.shape
    seen, repeat = k.shape[0], heads // k.shape[1]
    at = torch.arange(seen, device=q.device)
    distance = at[seen - tokens :, None] - at[None, :]
    hidden = (distance < 0) | (distance >= (window or seen))
    read = []
    for head in range(heads):  # one at a time: float64 scores of 4,096 tokens are 134 MB a head
        keys, values = k[:, head // repeat].double(), v[:, head // repeat].double()
        scores = (q[:, head].double() @ keys.T) * head_dim**-0.5
        read.append(scores.masked_fill(hidden, -torch.inf).softmax(1) @ values)
    return torch.cat(read, 1)


def check_prompts(device: torch.device) -> Iterator[dict[str, Any]]:
    """The project's attention of prompts against float64. Queries and later keys are large, so that the
    greatest score moves as a row is read. bfloat16 weights and results leave 2e-3."""
    card = gpu.card(device)
    if not card.wgmma:
        return
    for tokens, seen, heads, kv_heads, head_dim, window in PROMPTS:
        qkv = torch.randn(seen, heads + 2 * kv_heads, head_dim, device=device, dtype=torch.bfloat16)
        qkv[:, :heads] *= 4
        qkv[seen // 2 :, heads : heads + kv_heads] *= 3
        q, k, v = qkv[seen - tokens :, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
        found = gpu_prompt.attend(card, q, k, v, window)
        wanted = attention_reference(q, k, v, window)
        error = float((found.double() - wanted).norm() / wanted.norm())
        name = f"attention of {tokens} of {seen}, {heads}/{kv_heads} x {head_dim}, window {window}"
        if not error < 4e-3:
            raise SystemExit(f"{name}: {error:.1e} off")
        yield {"attention": name, "relative_error": error}


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


def all_checks(path: Path | None, device: torch.device) -> Iterator[dict[str, Any]]:
    """Of everything; `path`: a trained model."""
    yield from checks(path)
    yield from check_products(device)
    yield from check_wide(device)
    yield from check_prompts(device)
