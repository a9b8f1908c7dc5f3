"""Which layers lost most: each block of the optimised model against the original's, on the original's input.

Both models get the same hidden state at the start of every block, so a block's error is its own and not that
of those before it:

    output error   |f'(x) - f(x)| / |f(x)|, f(x) what attention or MLP adds to the hidden state, over all
                   tokens; f' in the numerics that serve, the cache's rounding included
    weight error   |W' - W| / |W| of the block's linears together

Methods such as SmoothQuant and AWQ move scales between a weight and the one before it, which changes both
and no output. Such weights cannot be compared; the block's weight error is then None. They are recognised by
rows or columns whose projection on the original's is typically off by more than _MOVED.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flatout.core.formats import Format, parse_format
from flatout.core.fuse import Source, float_weight
from flatout.core.model import Model, dense
from flatout.errors import EvidenceError
from flatout.kernels.linear import as_tensor, linear_reference
from flatout.models.llama import Cache, Llama, decoder_layer, rms_norm, rope_turns

_MOVED = 0.15
_CONSPICUOUS = 2.0
_BLOCKS = {"attention": ("qkv", "o"), "mlp": ("gate_up", "down")}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLoss:
    """One block's own errors, relative. block: "attention", "mlp", or "head" (layer None); formats: of its
    linears, as they run; weight_error: None where scales were moved between weights."""

    layer: int | None
    block: str
    formats: tuple[str, ...]
    output_error: float
    weight_error: float | None

    @property
    def name(self) -> str:
        return self.block if self.layer is None else f"layers.{self.layer} {self.block}"


@torch.no_grad()
def block_losses(original: Model | Source, optimised: Model, tokens: Sequence[int]) -> tuple[BlockLoss, ...]:
    """Every block's loss on `tokens`, in the order of the model. Holds a few weights at a time.

    Raises EvidenceError for models of different shapes or without tokens.
    """
    spec = original.spec
    mine, theirs = (spec.num_layers, spec.linears()), (optimised.spec.num_layers, optimised.spec.linears())
    if mine != theirs:
        raise EvidenceError(
            "blocks are compared between models of one shape", "different layers", "its original"
        )
    if not len(tokens):
        raise EvidenceError("a comparison of blocks needs tokens", "none", "a longer text")
    ids = torch.tensor(np.asarray(tokens, dtype=np.int64))
    positions = torch.arange(len(ids))
    turns = rope_turns(spec, positions)
    x = Llama(original).embed(ids)
    losses: list[BlockLoss] = []
    for layer in range(spec.num_layers):
        exact = _Exact(original)
        after = decoder_layer(
            spec, layer, x, positions, turns, linear=exact.linear, vector=exact.vector, cache=Cache()
        )
        served = _Served(optimised, exact)
        decoder_layer(
            spec,
            layer,
            x,
            positions,
            turns,
            linear=served.linear,
            vector=served.vector,
            cache=Cache(),
            kv_cache=optimised.recipe.kv_cache,
        )
        for block, parts in _BLOCKS.items():
            names = [f"layers.{layer}.{part}" for part in parts]
            losses.append(
                BlockLoss(
                    layer=layer,
                    block=block,
                    formats=tuple(optimised.recipe.format_of(layer, part).name for part in parts),
                    output_error=served.errors[names[1]],
                    weight_error=_weight_error([(exact.weights[n], served.weights[n]) for n in names]),
                )
            )
        x = after
    exact = _Exact(original)
    served = _Served(optimised, exact)
    exact.linear("head", _last_norm(exact, x))
    served.linear("head", _last_norm(served, x))
    losses.append(
        BlockLoss(
            layer=None,
            block="head",
            formats=(optimised.recipe.head,),
            output_error=served.errors["head"],
            weight_error=_weight_error([(exact.weights["head"], served.weights["head"])]),
        )
    )
    return tuple(losses)


def _last_norm(side: _Exact | _Served, x: Tensor) -> Tensor:
    return rms_norm(x, side.vector("norm"), side.spec.rms_norm_eps, side.spec.norm_offset)


class _Exact:
    """The original's weights as float32; keeps what the linears of one layer gave."""

    def __init__(self, source: Model | Source) -> None:
        self._source, self.spec = source, source.spec
        self.weights: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def vector(self, name: str) -> Tensor:
        if isinstance(self._source, Model):
            return as_tensor(dense(self._source.weights[name]))
        return as_tensor(float_weight(self._source, name))

    def linear(self, name: str, x: Tensor) -> Tensor:
        self.weights[name] = self.vector(name)
        self.outputs[name] = x @ self.weights[name].T
        return self.outputs[name]


class _Served:
    """The optimised weights in the numerics that serve. What a block gives is compared with the original and
    replaced by it, so that the next block starts from the same hidden state."""

    def __init__(self, model: Model, exact: _Exact) -> None:
        self._model, self._exact, self.spec = model, exact, model.spec
        self.weights: dict[str, Tensor] = {}
        self.errors: dict[str, float] = {}

    def vector(self, name: str) -> Tensor:
        return as_tensor(dense(self._model.weights[name]))

    def linear(self, name: str, x: Tensor) -> Tensor:
        weight = self._model.weights[name]
        self.weights[name] = as_tensor(dense(weight))
        y = linear_reference(x, weight, self._format(name))
        if name.endswith((".qkv", ".gate_up")):
            return y
        wanted = self._exact.outputs[name]
        self.errors[name] = _relative(y, wanted)
        return wanted

    def _format(self, name: str) -> Format:
        if name == "head":
            return parse_format(self._model.recipe.head)
        _, layer, part = name.split(".")
        return self._model.recipe.format_of(int(layer), part)


def _relative(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|; 0 where both are 0."""
    difference, size = float((found - wanted).norm()), float(wanted.norm())
    return difference / size if size > 0 else (0.0 if difference == 0 else math.inf)


def _weight_error(pairs: list[tuple[Tensor, Tensor]]) -> float | None:
    """Relative error of several weights together; None when scales were moved in one of them."""
    if any(_moved(before, after) for before, after in pairs):
        return None
    difference = sum(float((after - before).square().sum()) for before, after in pairs)
    size = sum(float(before.square().sum()) for before, _ in pairs)
    return math.sqrt(difference / size) if size > 0 else 0.0


def _moved(before: Tensor, after: Tensor) -> bool:
    """Whether rows or columns of `after` are typically those of `before` times something else than 1."""
    products, squares = before * after, before.square()
    for axis in (0, 1):
        projections = products.sum(axis) / squares.sum(axis).clamp_min(1e-30)
        if float((projections - 1).abs().median()) > _MOVED:
            return True
    return False


def conspicuous(losses: Sequence[BlockLoss]) -> list[BlockLoss]:
    """Blocks with more than twice the median output error, worst first: those to give more bits."""
    middle = float(np.median([loss.output_error for loss in losses]))
    worst = [loss for loss in losses if loss.output_error > _CONSPICUOUS * middle]
    return sorted(worst, key=lambda loss: -loss.output_error)
