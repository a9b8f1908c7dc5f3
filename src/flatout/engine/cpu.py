"""The CPU runner: a thin cover of the C++ extension, which executes a whole step in one call. No PyTorch."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any, Literal

import numpy as np

from flatout.core.formats import Format, Recipe
from flatout.core.gguf_blocks import BlockTensor
from flatout.core.model import Model, OnDemand, Weight, equal, expected_weights
from flatout.core.quantized import QuantizedTensor
from flatout.engine.runner import MAX_STEP_TOKENS, StepInput
from flatout.errors import BackendError, ConfigError, ResourceError, UnsupportedModelError
from flatout.hardware.detect import available_cores


def extension() -> ModuleType:
    """The compiled module flatout._cpu. Raises BackendError when it was not built or does not load."""
    try:
        from flatout import _cpu
    except ImportError as error:
        raise BackendError(
            "the cpu runner needs flatout's compiled extension",
            str(error),
            "reinstall flatout, or --runner reference",
        ) from error
    module: ModuleType = _cpu
    return module


def choose(cpu: ModuleType, isa: str | None, threads: int | None) -> tuple[str, int]:
    """The instruction set and the number of threads, this machine's best and all cores by default. Raises
    BackendError for an isa this machine has not, ConfigError for an impossible number."""
    usable: list[str] = list(cpu.isas())
    if isa is not None and isa not in usable:
        raise BackendError(
            f"the instruction set must be one this machine has: {', '.join(usable)}", repr(isa), usable[0]
        )
    if threads is None:
        threads = available_cores()
    if not 1 <= threads <= 1024:
        raise ConfigError("threads lie between 1 and 1024", str(threads), f"--threads {available_cores()}")
    return isa or usable[0], threads


def check_formats(recipe: Recipe) -> None:
    """Raise ConfigError for a recipe with formats that only GPUs, or only the reference, have."""
    places = {
        "layers": recipe.layers,
        "embedding": recipe.embedding,
        "head": recipe.head,
        **dict(recipe.overrides),
    }
    for place, name in [*places.items(), ("the KV cache", recipe.kv_cache)]:
        if name == "fp8":
            raise ConfigError(
                "the cpu runner has no fp8",
                f"{place} in {recipe.name}",
                'bf16 or w8a16, or flatout.load(..., runner="cuda")',
            )
        if name == "int4":
            raise ConfigError(
                "the cpu runner has no int4 cache",
                f"{place} in {recipe.name}",
                'int8, or flatout.load(..., runner="reference")',
            )


class CpuRunner:
    """A Model packed for this machine's instructions, with its own threads and KV cache.

    threads: default all cores this process may use. isa: one of the extension's paths by name ("amx",
    "avx512", "avxvnni", "avx2", "portable"), default the best. num_pages: pages of `page_size` tokens. The
    Model's arrays are copied, not kept. Raises BackendError for an isa this machine has not,
    UnsupportedModelError for a model the kernels cannot run, ResourceError when memory does not suffice.
    """

    def __init__(
        self, model: Model, threads: int | None = None, isa: str | None = None, num_pages: int = 64
    ) -> None:
        cpu = extension()
        isa, threads = choose(cpu, isa, threads)
        check_formats(model.recipe)
        self.spec = model.spec
        self.recipe = model.recipe
        try:
            self._model: Any = cpu.Model(
                dataclasses.asdict(model.spec) | {"kv_cache": model.recipe.kv_cache},
                threads,
                isa,
                num_pages,
            )
            set_weights(self._model, model)
            self._model.finalize()
        except ValueError as error:
            raise UnsupportedModelError(
                "the model must fit the cpu runner's kernels", str(error), "--runner reference"
            ) from error
        except MemoryError as error:
            raise ResourceError(
                "weights and KV cache must fit into memory", str(error), "a smaller cache or recipe"
            ) from error
        self.threads = threads
        self.page_size: int = self._model.page_size
        self.num_pages: int = self._model.num_pages
        self.max_step_tokens = MAX_STEP_TOKENS
        self.name = f"cpu ({self._model.isa}, {threads} thread{'s' if threads > 1 else ''})"

    def forward(self, batch: StepInput, rows: Literal["last", "all"]) -> np.ndarray:
        logits: np.ndarray = self._model.forward(
            batch.tokens, batch.starts, batch.lengths, batch.pages, rows == "all"
        )
        return logits

    def score(self, batch: StepInput, targets: np.ndarray) -> np.ndarray:
        scores: np.ndarray = self._model.score(
            batch.tokens, batch.starts, batch.lengths, batch.pages, targets
        )
        return scores

    def sample(
        self,
        batch: StepInput,
        temperature: np.ndarray,
        top_k: np.ndarray,
        top_p: np.ndarray,
        seeds: np.ndarray,
        rows: Literal["last", "all"] = "last",
    ) -> np.ndarray:
        step = batch.tokens, batch.starts, batch.lengths, batch.pages
        tokens: np.ndarray = self._model.sample(*step, temperature, top_k, top_p, seeds, rows == "all")
        return tokens

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weights."""
        return int(self._model.weight_bytes)

    def profile(self, enable: bool) -> None:
        """Switch the timers of the phases on or off."""
        self._model.profile(enable)

    def timings(self) -> dict[str, float]:
        """Seconds of each phase since the last call."""
        return dict(self._model.timings())


def set_weights(target: Any, model: Model) -> None:
    """Hand a decoder's weights to the extension, both ends first: a tied pair is read while little else is in
    memory."""
    formats = {name: fmt for name, _, fmt in expected_weights(model.spec, model.recipe)}
    embedding, head = model.weights["embedding"], model.weights["head"]
    set_weight(target, "embedding", embedding, formats.pop("embedding"))
    if isinstance(head, QuantizedTensor) and equal(embedding, head):
        target.tie_head()
    else:
        set_weight(target, "head", head, formats["head"])
    del embedding, head, formats["head"]
    for name, fmt in formats.items():
        set_weight(target, name, model.weights[name], fmt)
    if isinstance(model.weights, OnDemand):
        model.weights.forget()


def set_weight(target: Any, name: str, weight: Weight, fmt: Format) -> None:
    """Hand one weight to a model of the extension, which copies and packs it. 3-bit codes become 4-bit ones
    with the zeros they have: the same numbers."""
    if isinstance(weight, BlockTensor):
        target.set_blocks(name, np.ascontiguousarray(weight.blocks), fmt.bits, fmt.zero)
    elif isinstance(weight, QuantizedTensor):
        zeros = weight.zeros
        if fmt.bits == 3 and zeros is None:
            zeros = np.full(weight.scales.shape, weight.integer_zero, dtype=np.uint8)
        target.set_quantized(
            name,
            np.ascontiguousarray(weight.codes),
            np.ascontiguousarray(weight.scales),
            None if zeros is None else np.ascontiguousarray(zeros),
            None if weight.minima is None else np.ascontiguousarray(weight.minima),
            max(fmt.bits, 4),
            fmt.group,
            fmt.zero if zeros is None else "asymmetric",
            fmt.activation,
            fmt.activation_group,
            fmt.scale_bits == 8,
        )
    else:
        target.set_float(name, np.ascontiguousarray(weight, dtype=np.float32), fmt.name)
