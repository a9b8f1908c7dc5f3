"""What fits on a GPU: pages of keys and values beside the weights, and if not all of these, how many
layers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from flatout.core.costs import kv_bytes_per_token
from flatout.core.formats import Recipe
from flatout.core.spec import ModelSpec
from flatout.errors import ResourceError
from flatout.hardware.detect import free_memory

MAX_STEP_TOKENS = 8192
HEAD_ROWS = 1024
"""Rows of logits computed at a time for scores."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Bytes that a model takes of a GPU: its weights, a step's own memory, and each page of its cache."""

    weights: float
    step: float
    page: float

    def total(self, pages: int) -> float:
        return self.weights + self.step + pages * self.page


def claim(spec: ModelSpec, recipe: Recipe, weight_bytes: float, page_size: int) -> Claim:
    """What `CudaRunner` takes for that model."""
    kv_cache = "fp8" if recipe.kv_cache == "fp8" else "bf16"
    step = MAX_STEP_TOKENS * (12.0 * spec.hidden_size + 4.0 * spec.qkv_size + 6.0 * spec.intermediate_size)
    step += 4.0 * HEAD_ROWS * spec.vocab_size + 0.5e9
    page = spec.num_layers * kv_bytes_per_token(spec, kv_cache) * page_size
    return Claim(weight_bytes, step, page)


def pages_that_fit(
    spec: ModelSpec,
    recipe: Recipe,
    weight_bytes: float,
    tokens: int | None,
    page_size: int,
    free: float,
    beside: Claim | None = None,
) -> int:
    """Pages for `tokens`, or by default for 32 sequences of 8192 tokens or as many as fit beside weights and
    a step's own memory, of `free` bytes. beside: of a draft model, whose cache has as many pages. Raises
    ResourceError when they, or one context, do not fit."""
    own, other = claim(spec, recipe, weight_bytes, page_size), beside or Claim(0.0, 0.0, 0.0)
    room = int((0.95 * free - own.total(0) - other.total(0)) // (own.page + other.page))
    context = -(-min(spec.max_positions, 4096) // page_size)
    wanted = (
        32 * -(-min(spec.max_positions, 8192) // page_size) if tokens is None else -(-tokens // page_size)
    )
    least = context if tokens is None else wanted
    if room < least:
        drafts = f", the draft model {other.total(least) / 1e9:.1f}" if beside is not None else ""
        raise ResourceError(
            f"the GPU must hold about {(own.total(least) + other.total(least)) / 1e9:.1f} GB: weights "
            f"{own.weights / 1e9:.1f}, KV cache {least * own.page / 1e9:.1f}, a step's own "
            f"{own.step / 1e9:.1f}{drafts}",
            f"{free / 1e9:.1f} GB free",
            "fewer max_tokens, a smaller format or model",
        )
    return min(wanted, room)


def layers_that_fit(
    spec: ModelSpec,
    recipe: Recipe,
    weight_bytes: float,
    tokens: int | None,
    page_size: int,
    free: float,
    beside: Claim | None = None,
) -> tuple[int | None, int]:
    """(layers that stay on the GPU, None for all; pages). The other layers are streamed from the host's
    memory through two places on the GPU, and a line on stderr says so. beside: as in `pages_that_fit`. Raises
    ResourceError when even that does not fit."""
    try:
        return None, pages_that_fit(spec, recipe, weight_bytes, tokens, page_size, free, beside)
    except ResourceError as error:
        shortage = error
    sizes = [
        sum(float(recipe.format_of(i, name).weight_bytes(n, k)) for name, (n, k) in spec.linears().items())
        for i in range(spec.num_layers)
    ]
    for resident in range(spec.num_layers - 3, -1, -1):
        streamed = sum(sizes[resident:])
        kept = weight_bytes - streamed + 2 * max(sizes[resident:])
        with suppress(ResourceError):
            pages = pages_that_fit(spec, recipe, kept, tokens, page_size, free, beside)
            host = free_memory()
            if 0 < host < 1.1 * streamed:
                raise shortage
            print(
                f"flatout: {spec.num_layers - resident} of {spec.num_layers} layers do not fit on the GPU: "
                f"{streamed / 1e9:.1f} GB are read from the host's memory in every step",
                file=sys.stderr,
            )
            return resident, pages
    raise shortage


@contextmanager
def memory_is_free() -> Iterator[None]:
    """Raise ResourceError where the GPU's memory runs out, because a process cannot even begin to use it or
    because there was enough only when it was counted."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError, or what the driver said
        if "out of memory" not in str(error):
            raise
        raise ResourceError(
            "the GPU's memory must hold what CUDA itself takes and stay free until the model is loaded",
            str(error).splitlines()[0],
            "end what else uses the GPU, fewer max_tokens, a smaller format or model",
        ) from error
