"""Compile the kernels of a model's first steps while its weights are read.

A runner of two layers on PyTorch's "meta" device, which computes nothing, takes the first steps; where it
would launch a kernel, a thread compiles it, or finds it in Triton's cache. Larger batches compile when they
first occur.
"""

from __future__ import annotations

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Thread

import numpy as np
import torch
from triton.runtime._async_compile import AsyncCompileMode, FutureKernel

from flatout.core.formats import Recipe
from flatout.core.spec import ModelSpec
from flatout.engine.cuda import CudaRunner
from flatout.engine.cuda_weights import random_weights
from flatout.engine.runner import StepInput
from flatout.kernels.gpu import Card
from flatout.kernels.gpu_linear import TILE_ROWS

_PROMPT = TILE_ROWS[-1] + 1
"""Tokens of a prompt that goes through the vendor's products, as most do."""


def compile_ahead(spec: ModelSpec, recipe: Recipe, card: Card, page_size: int) -> Thread:
    """A thread that ends when the kernels of a prompt and of one sequence's tokens are compiled. An error is
    left to the first launch, which meets it again."""
    thread = Thread(target=first_steps, args=(spec, recipe, card, page_size), daemon=True)
    thread.start()
    return thread


def first_steps(spec: ModelSpec, recipe: Recipe, card: Card, page_size: int) -> None:
    """Compile what `compile_ahead` says."""
    two, device = dataclasses.replace(spec, num_layers=2), torch.device("meta")  # the last one differs
    kv_cache = "fp8" if recipe.kv_cache == "fp8" else "bf16"
    pages = -(-_PROMPT // page_size)
    prompt = StepInput(
        np.zeros(_PROMPT, dtype=np.int32),
        np.zeros(1, dtype=np.int32),
        np.array([_PROMPT], dtype=np.int32),
        np.arange(pages, dtype=np.int32)[None, :],
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        with torch.no_grad(), AsyncCompileMode(pool, ignore_errors=True) as compiling:
            weights = random_weights(two, recipe, device)
            dry = dataclasses.replace(card, dry=True)
            runner = CudaRunner(two, weights, pages, page_size, kv_cache, max_batch=1, card=dry)
            runner.dry_run(prompt)
        list(pool.map(_load, compiling.future_kernels.values()))


def _load(kernel: FutureKernel) -> None:
    """Load a compiled kernel and build what launches it: a C compiler's third of a second for each
    signature."""
    with suppress(Exception):
        _ = kernel.result().run
