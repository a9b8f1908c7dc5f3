"""Measure how the kernels that multiply are best launched on this card, where they run: inside a decode step.

A kernel alone, repeated, prefers other settings than in its place between others, whose multiprocessors it
shares while they end and begin; so one kernel's setting is changed at a time and the whole step timed, twice
over all kernels. Weights are random and the model is cut to a few layers, which together still are many times
what the second-level cache holds. The result is a table as `kernels/triton/routes.json` has it.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from flatout.core.files import write_bytes
from flatout.core.formats import Recipe
from flatout.core.sources import cache_dir
from flatout.core.spec import ModelSpec
from flatout.engine.cuda import CudaRunner, open_device
from flatout.engine.cuda_weights import random_weights
from flatout.engine.load import shape_and_recipe
from flatout.errors import ConfigError
from flatout.kernels import gpu, gpu_attention, gpu_linear, gpu_wide
from flatout.kernels.gpu import Card
from flatout.kernels.gpu_linear import FEW_ROWS, TILE_ROWS, VENDOR, TileRoute
from flatout.kernels.packed import PAIRS, PackedWeight

Setting = tuple[int, ...]
"""A gpu_linear.Route, gpu_linear.TileRoute or gpu_attention.DecodeRoute."""
KERNELS = ("qkv", "o", "gate_up", "down", "head", "attention")
LAYERS = 8
_SHARED_BYTES = 226 << 10  # of a multiprocessor
_KEPT = 4  # settings of a kernel that are timed a second time
_START_S, _COMPILE_S = 120.0, 10.0
"""Most that a process may take to start and for each setting, several times what it does."""
_Part = TypeVar("_Part")


def few_settings(fmt: str, n: int, k: int, name: str) -> list[Setting]:
    """(chunks of a tile, rows, warps, programs a multiprocessor) of the matrix-vector kernel."""
    chunks = k // (8 * PAIRS[fmt])
    whole = 1 << (chunks - 1).bit_length()
    found: list[Setting] = []
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


def tile_settings(fmt: str, tile_rows: int, name: str) -> list[Setting]:
    """Settings of the tensor cores' kernel that fill a multiprocessor's shared memory with what is under way,
    and the vendor's library."""
    size = 2 if fmt == "bf16" else 1
    found: list[Setting] = [VENDOR]
    for block_n in (64, 128, 256):
        if tile_rows * block_n > 256 * 128:  # sums of a tile live in registers
            continue
        for width in (128, 256):  # bytes of a block's row
            stage = (block_n + tile_rows) * width
            for programs in (1, 2, 3, 4):
                stages = min(8, _SHARED_BYTES // programs // stage)
                if stages < 3 or (stages == 8 and stage * 8 * programs < _SHARED_BYTES / 2):
                    continue
                sums = tile_rows * block_n
                warps = 8 if sums > 128 * 128 else 4
                route = TileRoute(block_n, width // size, warps, stages, programs, 4)
                if name != "head":  # whose product is read as it is
                    found.append(route)
                if programs > 1 or name in ("head", "gate_up"):
                    found.append(route._replace(programs=0))
                if sums == 128 * 128:
                    found.append((*found[-1][:2], 8, *found[-1][3:]))
    return list(dict.fromkeys(tuple(route) for route in found))


def wide_settings(fmt: str, n: int, k: int, name: str) -> list[Setting]:
    """Settings of wide tiles that cut an (n, k) weight evenly."""
    block_k = 64 if fmt == "bf16" else 128
    found: list[Setting] = []
    for block_n in (96, 128, 160, 192, 224):
        stages = min(6, gpu_wide.most_stages(block_n))
        for parts in (1,) if name == "gate_up" else (1, 2, 4):
            blocks, rest = divmod(k, block_k * parts)
            if n % (2 * block_n) == 0 and rest == 0 and blocks >= stages:
                found.append(TileRoute(block_n, block_k, 8, stages, 0, 0, parts))
    return found


def attention_settings() -> list[Setting]:
    """Of attention of one new token a sequence: gpu_attention.DecodeRoute."""
    return [
        (block, warps, stages)
        for block in (16, 32, 64)
        for warps in (1, 2, 4)
        for stages in (2, 3, 5)  # with one, one and two blocks under way
        if 16 <= block // warps <= 32
    ]


class Bench:
    """A step of `rows` sequences at `context` tokens, whose kernels' settings can be set by name. card: one
    that is dry, to compile without weights."""

    def __init__(
        self, spec: ModelSpec, recipe: Recipe, rows: int, context: int, card: Card | None = None
    ) -> None:
        device = open_device() if card is None else torch.device("meta")
        self.spec = dataclasses.replace(spec, num_layers=min(LAYERS, spec.num_layers))
        self.rows, self.context = rows, context
        weights = random_weights(self.spec, recipe, device)
        width = -(-(context + 64) // 64)
        kv_cache = "fp8" if recipe.kv_cache == "fp8" else "bf16"
        self.runner = CudaRunner(self.spec, weights, rows * width, 64, kv_cache, max_batch=rows, card=card)
        self.decoder: Any = self.runner._decoder
        pages = torch.arange(rows * width, device=device, dtype=torch.int32).view(rows, width)
        self.decoder._pages[:, :width] = pages
        self.few = self.runner.few(rows)
        self.tile_rows = next(size for size in TILE_ROWS if size >= rows)
        layer = weights.layers[0]
        self.weights = dict(zip(("qkv", "o", "gate_up", "down"), layer.linears, strict=True))
        self.weights["head"] = weights.head
        self.keys = {name: self._key(weight) for name, weight in self.weights.items()}
        plan = gpu_attention.attention_plan(self.runner.card, spec, rows, device)
        self.keys["attention"] = gpu_attention.route_key(
            self.runner.caches[0].keys.element_size(), plan.splits
        )

    def _key(self, weight: PackedWeight) -> str:
        size = f"{weight.format} {weight.n}x{weight.k}"
        return f"{size} {self.rows}" if self.few else f"{size} tile {self.tile_rows}"

    def settings(self, name: str) -> list[Setting]:
        if name == "attention":
            return attention_settings()
        weight = self.weights[name]
        if self.few:
            return few_settings(weight.format, weight.n, weight.k, name)
        found = tile_settings(weight.format, self.tile_rows, name)
        if self.runner.card.wgmma and self.rows > TILE_ROWS[1] and name != "head":
            found += wide_settings(weight.format, weight.n, weight.k, name)
        return found

    def first(self) -> dict[str, Setting]:
        """Settings as the table or the rule has them."""
        card = self.runner.card.name
        found: dict[str, Setting] = {}
        for name, w in self.weights.items():
            if self.few:
                found[self.keys[name]] = gpu_linear.gemv_route(card, w.format, w.n, w.k, self.rows)
            else:
                found[self.keys[name]] = gpu_linear.gemm_route(
                    self.runner.card, w.format, w.n, w.k, self.tile_rows
                )
        _, bits, _, splits = self.keys["attention"].split()
        found[self.keys["attention"]] = gpu_attention.decode_route(card, int(bits) // 8, int(splits))
        return found

    def use(self, chosen: Mapping[str, Setting]) -> None:
        """Launch kernels so, from now on and in this process."""
        gpu.measured_routes(self.runner.card.name).update({k: list(v) for k, v in chosen.items()})
        for route in (gpu_linear.gemv_route, gpu_linear.gemm_route, gpu_linear.prompt_route):
            route.cache_clear()

    def microseconds(self) -> float:
        """Of a step, the median of some replays."""
        self.decoder._positions[:] = self.context
        self.decoder._run(self.rows, False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.decoder._run(self.rows, False)
        times = []
        for _ in range(12):
            self.decoder._positions[:] = self.context
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        median: float = sorted(times[2:])[5]
        return median


def _compile(
    spec: ModelSpec, recipe: Recipe, rows: int, context: int, card: Card, part: list[tuple[str, Setting]]
) -> None:
    """Fill Triton's cache, one process of several."""
    one = dataclasses.replace(spec, num_layers=1)
    bench = Bench(one, recipe, rows, context, dataclasses.replace(card, dry=True))
    first = bench.first()
    for name, setting in part:
        bench.use({**first, bench.keys[name]: setting})
        # What the compiler refuses is refused again, and said, when it is to be timed.
        with suppress(Exception):
            bench.decoder._run(rows, False)


def apart(work: Callable[[_Part], None], parts: Sequence[_Part], seconds: float) -> int:
    """Do `work` on each part in a process of its own; how many of these failed, died, or had to be ended
    because they took longer than `seconds`."""
    # Not a pool, which starts anew what dies and waits for it for ever; spawned, since CUDA is in use here.
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=work, args=(part,), daemon=True) for part in parts]
    for process in running:
        process.start()
    end = time.monotonic() + seconds
    for process in running:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return sum(process.exitcode != 0 for process in running)


def tune(
    spec: ModelSpec,
    recipe: Recipe,
    rows: int,
    context: int,
    processes: int,
    say: Callable[[str], None] = print,
    kernels: Collection[str] = KERNELS,
) -> dict[str, Setting]:
    """Settings for steps of `rows` sequences of `context` tokens, as the table names them."""
    bench = Bench(spec, recipe, rows, context)
    names = {name: key for name, key in bench.keys.items() if name in kernels}
    card = bench.runner.card
    jobs = [(name, setting) for name in names for setting in bench.settings(name) if -1 not in setting]
    work = partial(_compile, spec, recipe, rows, context, card)
    parts = [part for i in range(processes) if (part := jobs[i::processes])]
    unfinished = apart(work, parts, _START_S + _COMPILE_S * max(map(len, parts), default=0))
    if unfinished:
        say(f"  {unfinished} of {len(parts)} compiling processes failed: the rest is compiled when timed")
    best = bench.first()
    lowest = bench.microseconds()
    say(f"{recipe.name}, {rows} sequences: {lowest:.0f} us with the table as it is")
    second: dict[str, list[Setting]] = {}
    for again in (False, True):
        for name, key in names.items():
            times: list[tuple[float, Setting]] = []
            for setting in second[name] if again else bench.settings(name):
                bench.use({**best, key: setting})
                try:
                    times.append((bench.microseconds(), setting))
                except Exception as error:  # a setting that the compiler or the card refuses
                    say(f"  {name} {setting}: {type(error).__name__}")
            times.sort()
            kept = [setting for _, setting in times[:_KEPT]]
            if not (again or bench.few or name == "attention"):  # how much to fetch, with the rest settled
                kept += [
                    (*s[:5], fetch) for s in kept[:2] if s[4] >= 0 and not any(s[6:]) for fetch in (0, 8, 16)
                ]
            second[name] = kept
            if times and times[0][0] < lowest - 0.5:
                lowest, best[key] = times[0]
            bench.use(best)
            say(f"  {name}: {best[key]} {lowest:.0f} us; " + ", ".join(f"{s} {t:.0f}" for t, s in times[:6]))
    return {key: best[key] for key in names.values()}


def table_text(table: gpu.Table) -> str:
    """One line a setting."""
    cards = []
    for card, entries in table.items():
        lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in entries.items())
        cards.append(f" {json.dumps(card)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(cards) + "\n}\n"


def tune_model(
    model: str, rows: int, context: int, say: Callable[[str], None] = print
) -> tuple[Path, dict[str, Setting]]:
    """Measure on this GPU, with random weights, how kernels are best launched in steps of `rows` sequences of
    `context` tokens of that model, and keep it for this machine: the file, and what was measured. Raises
    BackendError without a GPU and ConfigError for steps whose kernels have no settings."""
    open_device()
    spec, recipe = shape_and_recipe(model)
    if not supported(recipe, rows):
        raise ConfigError(
            f"kernels for {recipe.name} have settings for up to {max(FEW_ROWS.values())} sequences",
            str(rows),
            "a smaller batch",
        )
    found = tune(spec, recipe, rows, context, min(14, os.cpu_count() or 1), say)
    table = gpu.own_routes()
    table.setdefault(torch.cuda.get_device_name(), {}).update({k: list(v) for k, v in found.items()})
    path = cache_dir() / gpu.ROUTES
    write_bytes(path, table_text(table).encode())
    return path, found


def supported(recipe: Recipe, rows: int) -> bool:
    """Whether steps of so many sequences go through kernels that have settings."""
    return rows <= max(FEW_ROWS.values()) or recipe.layers in ("bf16", "fp8")
