"""Trainable: a decoder whose weights are trained, and its forward pass over packed rows.

The pass is `models/llama.py:decoder_layer`, the specification, on all rows at once. What is trained need not
be what is multiplied by: a weight is a parameter, or the sum of a fixed weight and a product of two thin
matrices (LoRA: Hu et al., 2021, arXiv 2106.09685), either of them passed through a constraint that prunes
or rounds (train/constraints.py).

Legend: B rows, T tokens of a row, M = B * T, D hidden size, H, G query and key/value heads, E head size,
N rows and K columns of a weight, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flatout.core.formats import Recipe
from flatout.core.fuse import Source, float_recipe, float_weight, source_names
from flatout.core.model import Model, Weight, expected_weights
from flatout.core.quantized import QuantizedTensor
from flatout.core.spec import ModelSpec, weight_names
from flatout.errors import ConfigError
from flatout.models.llama import Cache, decoder_layer, rms_norm, rope_turns
from flatout.train.constraints import Constraint
from flatout.train.data import Batch

_SPREAD = 0.02  # standard deviation of new weights (Radford et al., 2019)
_LORA_SCALE = 2.0  # alpha / rank


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trainable:
    """parameters: what is trained, float32, by fused name; of a low-rank update, NAME.a (rank, K) and NAME.b
    (N, rank). fixed: weights that are not trained. constraints: what a weight passes through before it is
    used."""

    spec: ModelSpec
    parameters: Mapping[str, Tensor]
    fixed: Mapping[str, Tensor] = field(default_factory=dict)
    constraints: Mapping[str, Constraint] = field(default_factory=dict)

    def free(self, name: str) -> Tensor:
        """The weight before its constraint. A tied head is the embedding."""
        if name == "head" and name not in self.parameters and name not in self.fixed:
            name = "embedding"
        weight = self.parameters.get(name)
        if weight is None:
            weight = self.fixed[name]
        if f"{name}.a" in self.parameters:
            weight = weight + _LORA_SCALE * (self.parameters[f"{name}.b"] @ self.parameters[f"{name}.a"])
        return weight

    def weight(self, name: str) -> Tensor:
        """The weight as it is used."""
        constraint = self.constraints.get(name)
        return self.free(name) if constraint is None else constraint(self.free(name))

    def trained(self) -> dict[str, Tensor]:
        """Every leaf tensor that has a gradient, those of constraints included, by name."""
        own = {f"{n}.{part}": t for n, c in self.constraints.items() for part, t in c.parameters().items()}
        return {**self.parameters, **own}

    def hidden(self, batch: Batch, layers: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """(states (M, D) after the last norm, states after each of `layers`), layers counted from 0."""
        rows, tokens = batch.tokens.shape
        spec, device = self.spec, batch.tokens.device
        cache = _Rows(rows, _visible(batch.documents[: batch.mixed]), spec, tokens)
        positions = torch.arange(tokens)
        cos, sin = (turn.to(device).repeat(rows, 1, 1) for turn in rope_turns(spec, positions))
        table = self.weight("embedding")
        x = torch.nn.functional.embedding(batch.tokens.reshape(-1), table) * spec.embedding_scale
        kept = []
        for layer in range(spec.num_layers):
            x = decoder_layer(
                spec,
                layer,
                x,
                positions,
                (cos, sin),
                linear=lambda name, inputs: inputs @ self.weight(name).T,
                vector=self.weight,
                cache=cache,
            )
            if layer in layers:
                kept.append(x)
        return rms_norm(x, self.weight("norm"), spec.rms_norm_eps, spec.norm_offset), kept

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (M, V) of states (M, D)."""
        return hidden @ self.weight("head").T


class _Rows(Cache):
    """Attention of packed rows, each token within its own document. visible: masks of the first rows; the
    others are of one document each. Nothing is kept."""

    def __init__(self, rows: int, visible: Tensor, spec: ModelSpec, tokens: int) -> None:
        super().__init__()
        self._rows, self._repeat = rows, spec.num_heads // spec.num_kv_heads
        self._visible = visible
        window = spec.sliding_window
        if window is not None and window < tokens:
            raise ConfigError(
                "rows are at most as long as the sliding window", f"{tokens} > {window}", f"length={window}"
            )

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None
    ) -> Tensor:
        q, k, v = (x.reshape(self._rows, -1, *x.shape[1:]).transpose(1, 2).to(v.dtype) for x in (q, k, v))
        k, v = (x.repeat_interleave(self._repeat, dim=1) for x in (k, v))
        attend, mixed, read = torch.nn.functional.scaled_dot_product_attention, len(self._visible), []
        if mixed:
            read.append(attend(q[:mixed], k[:mixed], v[:mixed], attn_mask=self._visible))
        if mixed < self._rows:
            read.append(attend(q[mixed:], k[mixed:], v[mixed:], is_causal=True))
        return torch.cat(read).transpose(1, 2).flatten(0, 1).flatten(1)


def _visible(documents: Tensor) -> Tensor:
    """bool (B, 1, T, T): whether a token (third axis) sees another: of its document, and not after it."""
    tokens = documents.shape[1]
    same = documents[:, :, None] == documents[:, None, :]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=documents.device).tril()
    return (same & causal)[:, None]


def initial_weights(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    """New float32 weights by fused name: normal, those that write to the residual stream smaller by
    sqrt(2 x layers) (Radford et al., 2019), norms that multiply by one."""
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in _shapes(spec).items():
        if name.endswith("norm"):
            weights[name] = torch.full(shape, 1.0 - spec.norm_offset)
        elif name.endswith("bias"):
            weights[name] = torch.zeros(shape)
        else:
            spread = _SPREAD / math.sqrt(2 * spec.num_layers) if name.endswith((".o", ".down")) else _SPREAD
            weights[name] = torch.randn(shape, generator=draw) * spread
    return weights


def source_weights(source: Source) -> dict[str, Tensor]:
    """Float32 copies of every weight of `source` by fused name."""
    return {name: torch.from_numpy(float_weight(source, name).copy()) for name in _shapes(source.spec)}


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Fused name -> shape of every weight; a tied head is not listed."""
    shapes = {name: shape for name, shape, _ in expected_weights(spec, float_recipe("fp32"))}
    if spec.tie_embeddings:
        del shapes["head"]
    return shapes


def make_trainable(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    constraints: Mapping[str, Constraint] | None = None,
    rank: int = 0,
    frozen: bool = False,
    seed: int = 0,
) -> Trainable:
    """`weights` (float32, by fused name) as something to train on `device`.

    rank: train thin matrices beside the linears of the layers and nothing else, 0 trains all weights.
    frozen: train nothing (a teacher).
    """
    placed = {name: weight.detach().to(device, torch.float32, copy=True) for name, weight in weights.items()}
    chosen = {name: constraint.to(torch.device(device)) for name, constraint in (constraints or {}).items()}
    if frozen:
        return Trainable(spec=spec, parameters={}, fixed=placed, constraints=chosen)
    if rank == 0:
        parameters = {name: weight.requires_grad_() for name, weight in placed.items()}
        return Trainable(spec=spec, parameters=parameters, constraints=chosen)
    draw = torch.Generator().manual_seed(seed)
    thin = {}
    for name, weight in placed.items():
        if weight.ndim == 2 and name.startswith("layers."):
            n, k = weight.shape
            a = torch.randn(rank, k, generator=draw) / math.sqrt(k)
            thin[f"{name}.a"] = a.to(device).requires_grad_()
            thin[f"{name}.b"] = torch.zeros(n, rank, device=device, requires_grad=True)
    return Trainable(spec=spec, parameters=thin, fixed=placed, constraints=chosen)


@torch.no_grad()
def to_model(trainable: Trainable, recipe: Recipe) -> Model:
    """What was trained as a Model under `recipe`: constraints that round give its integer weights.

    Raises ConfigError where the recipe wants integers and no constraint makes them.
    """
    weights: dict[str, Weight] = {}
    for name, _, fmt in expected_weights(trainable.spec, recipe):
        if not fmt.is_integer:
            weights[name] = trainable.weight(name).float().cpu().numpy()
            continue
        constraint = trainable.constraints.get(name)
        packed = None if constraint is None else constraint.pack(trainable.free(name))
        if packed is None:
            raise ConfigError(f"{name} in {fmt.name} needs weights trained on its levels", "floats", "bf16")
        weights[name] = packed
    return Model(spec=trainable.spec, recipe=recipe, weights=weights)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arrays:
    """A Source of float32 arrays by Hugging Face name."""

    spec: ModelSpec
    arrays: Mapping[str, np.ndarray]

    def array(self, name: str) -> np.ndarray:
        tied = name == "lm_head.weight" and self.spec.tie_embeddings
        return self.arrays["model.embed_tokens.weight" if tied else name]

    def native(self, name: str) -> QuantizedTensor | None:
        return None


@torch.no_grad()
def to_source(trainable: Trainable) -> Arrays:
    """What was trained as float weights by Hugging Face name."""
    spec, shapes, arrays = trainable.spec, weight_names(trainable.spec), {}
    for fused in _shapes(spec):
        rows = trainable.weight(fused).float().cpu().numpy()
        for name in source_names(spec, fused):
            count = shapes[name][0]
            arrays[name], rows = rows[:count], rows[count:]
    return Arrays(spec=spec, arrays={name: arrays[name] for name in shapes})
