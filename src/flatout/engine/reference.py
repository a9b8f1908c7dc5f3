"""The reference runner: models/llama.py over pages, sequence by sequence. Slow, runs anywhere, and defines
what the fast runners must compute. Imports PyTorch."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flatout.core.fuse import Source
from flatout.core.model import Model
from flatout.core.spec import ModelSpec
from flatout.engine.runner import MAX_STEP_TOKENS, StepInput, check_step, sampled_rows
from flatout.engine.sampler import sample
from flatout.errors import ConfigError
from flatout.models.llama import Cache, Llama

_HEAD_ROWS = 128
"""Tokens whose float32 logits are held at a time: memory that the allocator keeps, instead of fetching and
clearing new pages for every step."""


class ReferenceRunner:
    """A Model as its recipe serves it (integer activations, the recipe's KV cache), or a Checkpoint exactly,
    in float32. `as_served` overrides that choice."""

    def __init__(
        self, model: Model | Source, num_pages: int, page_size: int = 64, as_served: bool | None = None
    ) -> None:
        if num_pages < 1 or page_size < 1:
            raise ConfigError(
                "the KV cache needs at least one page of one token",
                f"{num_pages} x {page_size}",
                "num_pages=64",
            )
        served = isinstance(model, Model) if as_served is None else as_served
        self._llama = Llama(model, as_served=served)
        self.spec: ModelSpec = model.spec
        self.recipe = self._llama.recipe
        self.name = f"reference ({'as served' if served else 'exact'})"
        self.page_size = page_size
        self.num_pages = num_pages
        self.max_step_tokens = MAX_STEP_TOKENS
        shape = (self.spec.num_layers, num_pages * page_size, self.spec.num_kv_heads, self.spec.head_dim)
        # NaN rather than zeros: reading a slot that was never written shows in the logits.
        self._keys = torch.full(shape, torch.nan)
        self._values = torch.full(shape, torch.nan)

    def forward(self, batch: StepInput, rows: Literal["last", "all"]) -> np.ndarray:
        hidden = self._hidden(batch)
        if rows == "last":
            hidden = hidden[torch.from_numpy(np.cumsum(batch.lengths) - 1)]
        logits: np.ndarray = self._llama.head(hidden).numpy()
        return logits

    def score(self, batch: StepInput, targets: np.ndarray) -> np.ndarray:
        hidden, ids = self._hidden(batch), torch.from_numpy(np.asarray(targets, dtype=np.int64))
        scores = torch.empty(len(ids))
        for start in range(0, len(ids), _HEAD_ROWS):
            piece = slice(start, start + _HEAD_ROWS)
            scores[piece] = _log_probabilities(self._llama.head(hidden[piece]), ids[piece])
        found: np.ndarray = scores.numpy()
        return found

    def _hidden(self, batch: StepInput) -> Tensor:
        """Hidden states (T, D) of all new tokens, sequence by sequence."""
        check_step(batch, self.spec, self.page_size, self.num_pages)
        found, first = [], 0
        for start, length, pages in zip(batch.starts, batch.lengths, batch.pages, strict=True):
            cache = _Pages(self._keys, self._values, pages, self.page_size, int(start), int(length))
            found.append(self._llama.hidden(batch.tokens[first : first + length], cache))
            first += length
        return torch.cat(found)

    def sample(
        self,
        batch: StepInput,
        temperature: np.ndarray,
        top_k: np.ndarray,
        top_p: np.ndarray,
        seeds: np.ndarray,
        rows: Literal["last", "all"] = "last",
    ) -> np.ndarray:
        of, positions = sampled_rows(batch, rows)
        logits = self.forward(batch, rows)
        return sample(logits, positions, temperature[of], top_k[of], top_p[of], seeds[of])


def _log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """float32 (T,): `sampler.log_probabilities`, with exponentials in float32 (each right to 1e-7), summed in
    float64. Overwrites the logits."""
    top = logits.amax(dim=1, keepdim=True)
    chosen = (logits.gather(1, targets[:, None]) - top)[:, 0].double()
    total = logits.sub_(top).exp_().sum(dim=1, dtype=torch.float64)
    return (chosen - total.log()).float()


class _Pages(Cache):
    """One sequence's view of the pages: `length` tokens are in them, `new` more are about to be written."""

    def __init__(
        self, keys: Tensor, values: Tensor, pages: np.ndarray, page_size: int, start: int, new: int
    ) -> None:
        super().__init__()
        positions = np.arange(start + new)
        slots = pages[positions // page_size].astype(np.int64) * page_size + positions % page_size
        self._store = keys, values
        self._slots = torch.from_numpy(slots)
        self._start = start

    @property
    def length(self) -> int:
        return self._start

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._store
        keys[layer, self._slots[self._start :]] = k
        values[layer, self._slots[self._start :]] = v
        if self._start == 0:
            return k, v
        return keys[layer, self._slots], values[layer, self._slots]
