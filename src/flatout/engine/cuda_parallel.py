"""One model on several GPUs: each has its share of the heads, of the feed-forward's columns and of the
vocabulary (tensor parallelism as in Megatron-LM, Shoeybi et al., arXiv:1909.08053).

Two sums a layer, of what `o` and `down` give, and one maximum a step go between the GPUs (`cuda_ranks`).
Every GPU has all norms and embeddings, and the keys and values of its own heads. Greedy tokens are chosen on
the GPUs; others are drawn on the host from all logits, which is slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from threading import BrokenBarrierError
from typing import Literal, TypeVar

import numpy as np
import torch

from flatout.core.formats import Format
from flatout.core.model import Model, OnDemand, Shape, Weight
from flatout.core.spec import ModelSpec
from flatout.engine.cuda import CudaRunner, check_formats, open_device
from flatout.engine.cuda_memory import memory_is_free, pages_that_fit
from flatout.engine.cuda_ranks import Group, Rank
from flatout.engine.cuda_weights import GpuWeights, load_weights
from flatout.engine.runner import StepInput, sampled_rows
from flatout.engine.sampler import sample
from flatout.engine.scheduler import MAX_DRAFTED_ROWS
from flatout.errors import ConfigError
from flatout.kernels import gpu
from flatout.kernels.packed import PackedWeight

_Found = TypeVar("_Found")


def share_of(spec: ModelSpec, ranks: int) -> ModelSpec:
    """The shape that each of `ranks` GPUs computes. Raises ConfigError when they cannot share alike."""
    for what, size in (
        ("key/value heads", spec.num_kv_heads),
        ("intermediate size", spec.intermediate_size),
        ("vocabulary", spec.vocab_size),
    ):
        if size % ranks:
            raise ConfigError(
                "the number of GPUs divides heads, intermediate size and vocabulary",
                f"{ranks} GPUs, {what} {size}",
                "another number of GPUs",
            )
    return replace(
        spec,
        num_heads=spec.num_heads // ranks,
        num_kv_heads=spec.num_kv_heads // ranks,
        intermediate_size=spec.intermediate_size // ranks,
    )


def model_of_rank(model: Model, rank: int, ranks: int) -> Model:
    """A GPU's share of the layers, cut when it is asked for; embedding and head are whole. Raises
    ConfigError when a group of columns that share a scale would be cut."""
    spec = share_of(model.spec, ranks)
    share = slice(rank, rank + 1)

    def read(name: str, shape: Shape, fmt: Format) -> Weight:
        weight = model.weights[name]
        kind = name.rpartition(".")[2]
        if kind in ("qkv", "qkv_bias"):
            sizes = [model.spec.q_size, model.spec.kv_size, model.spec.kv_size]
        elif kind == "gate_up":
            sizes = [model.spec.intermediate_size] * 2
        elif kind in ("o", "down"):
            return _columns(weight, rank, ranks, name)
        else:
            return weight
        blocks, first = [], 0
        for size in sizes:
            blocks.append(np.arange(first, first + size).reshape(ranks, -1)[share].ravel())
            first += size
        return _rows(weight, np.concatenate(blocks))

    return Model(spec=spec, recipe=model.recipe, weights=OnDemand(spec, model.recipe, read))


def head_of_rank(weights: GpuWeights, rank: int, ranks: int) -> GpuWeights:
    """The same with a GPU's share of the head's rows."""
    head = weights.head
    n = head.n // ranks
    rows = slice(rank * n, (rank + 1) * n)

    def cut(part: torch.Tensor | None) -> torch.Tensor | None:
        return None if part is None else part[rows].clone()

    own = PackedWeight(
        head.format, n, head.k, head.words[rows].clone(), cut(head.scales), cut(head.minima), head.group
    )
    return replace(weights, head=own)


def _rows(weight: Weight, index: np.ndarray) -> Weight:
    if isinstance(weight, np.ndarray):
        return np.ascontiguousarray(weight[index])
    return replace(
        weight,
        codes=weight.codes[index],
        scales=weight.scales[index],
        zeros=None if weight.zeros is None else weight.zeros[index],
        minima=None if weight.minima is None else weight.minima[index],
    )


def _columns(weight: Weight, rank: int, ranks: int, name: str) -> Weight:
    """The rank's share of a weight's columns."""

    def cut(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.split(array, ranks, axis=1)[rank])

    if isinstance(weight, np.ndarray):
        return cut(weight)
    k, group = weight.shape[1], weight.format.group
    if group == 0:  # a scale a row goes with every share
        return replace(weight, codes=cut(weight.codes))
    if k % (ranks * group):
        raise ConfigError(
            f"the GPUs' shares of {name} hold whole groups of {group} columns", f"{k} columns", "fewer GPUs"
        )
    return replace(
        weight,
        codes=cut(weight.codes),
        scales=cut(weight.scales),
        zeros=None if weight.zeros is None else cut(weight.zeros),
        minima=None if weight.minima is None else cut(weight.minima),
    )


class ParallelRunner:
    """Runs every step on all GPUs.

    spec: of the whole model. make: given a rank's number and its side of the exchange, its CudaRunner; called
    in the thread that will run it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        devices: Sequence[torch.device],
        make: Callable[[int, Group], CudaRunner],
        max_batch: int = 256,
    ) -> None:
        self.spec = spec
        self._group = Group(devices, max(max_batch, MAX_DRAFTED_ROWS) * spec.hidden_size)
        self._threads = [ThreadPoolExecutor(1) for _ in devices]
        self._ranks: list[CudaRunner] = []

        def first(rank: int) -> CudaRunner:
            if devices[rank].type == "cuda":
                torch.cuda.set_device(devices[rank])
            return make(rank, self._group)

        self._ranks = self._in_threads(first)
        self._all(_prove)
        one = self._ranks[0]
        self.page_size, self.num_pages = one.page_size, one.num_pages
        self.max_step_tokens = one.max_step_tokens
        self.name = f"{len(devices)} x {one.name}"

    def forward(self, batch: StepInput, rows: Literal["last", "all"]) -> np.ndarray:
        return np.concatenate(self._all(lambda runner: runner.forward(batch, rows)), axis=1)

    def score(self, batch: StepInput, targets: np.ndarray) -> np.ndarray:
        chosen, totals = zip(*self._all(lambda runner: runner.score_parts(batch, targets)), strict=True)
        found: np.ndarray = np.max(chosen, axis=0) - np.logaddexp.reduce(totals, axis=0)
        return found

    def sample(
        self,
        batch: StepInput,
        temperature: np.ndarray,
        top_k: np.ndarray,
        top_p: np.ndarray,
        seeds: np.ndarray,
        rows: Literal["last", "all"] = "last",
    ) -> np.ndarray:
        if (temperature > 0).any():
            of, positions = sampled_rows(batch, rows)
            logits = self.forward(batch, rows)
            return sample(logits, positions, temperature[of], top_k[of], top_p[of], seeds[of])
        return self._all(lambda runner: runner.sample(batch, temperature, top_k, top_p, seeds, rows))[0]

    def _all(self, work: Callable[[CudaRunner], _Found]) -> list[_Found]:
        return self._in_threads(lambda rank: work(self._ranks[rank]))

    def _in_threads(self, work: Callable[[int], _Found]) -> list[_Found]:
        """What `work` gives on every rank; the error that came first, if any did."""

        def run(rank: int) -> _Found:
            with self._group.turn():
                return work(rank)

        futures = [thread.submit(run, rank) for rank, thread in enumerate(self._threads)]
        wait(futures)
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            self._group.barrier.reset()
            raise next((e for e in errors if not isinstance(e, BrokenBarrierError)), errors[0])
        return [future.result() for future in futures]


def _prove(runner: CudaRunner) -> None:
    if runner.rank is not None:
        runner.rank.prove()


@memory_is_free()
def open_parallel(
    model: Model, gpus: int, weight_bytes: float, tokens: int | None, page_size: int, max_batch: int
) -> ParallelRunner:
    """A runner for `model` on the first `gpus` GPUs. Raises as `cuda.open_runner` does, and ConfigError when
    there are fewer or they cannot share alike."""
    open_device()
    found = torch.cuda.device_count()
    if gpus > found:
        raise ConfigError(
            "there must be as many GPUs as are asked for", f"{gpus}, not {found}", f"gpus={found}"
        )
    devices = [torch.device("cuda", i) for i in range(gpus)]
    share = share_of(model.spec, gpus)
    for device in devices:
        check_formats(model.recipe, gpu.card(device))
    free = min(torch.cuda.mem_get_info(device)[0] for device in devices)
    own = weight_bytes / gpus + 2.0 * model.spec.vocab_size * model.spec.hidden_size  # the embedding is whole
    pages = pages_that_fit(share, model.recipe, own, tokens, page_size, free)
    kv_cache = "fp8" if model.recipe.kv_cache == "fp8" else "bf16"

    def make(rank: int, group: Group) -> CudaRunner:
        whole = load_weights(model_of_rank(model, rank, gpus), devices[rank])
        weights = head_of_rank(whole, rank, gpus)
        return CudaRunner(
            share, weights, pages, page_size, kv_cache, max_batch, rank=Rank(group, rank)
        )  # fmt: skip

    return ParallelRunner(model.spec, devices, make, max_batch)
