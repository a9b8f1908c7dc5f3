"""Tuning: rounding and scales of a whole layer, learned by signed gradients on what the layer makes.

    minimise  mean over tokens of |layer(x; Q) - target|^2 / |target|^2,     Q = s m (round(c) - z)

    c    codes before rounding, real numbers that start in the cell that GPTQ chose
    m    a factor near 1 for every scale
    step: c -= rate * sign(gradient),  m -= rate / levels * sign(gradient),  rate from 1/100 to 0 by steps

x are the activations behind the layers already rounded, target what the original's layer makes of its own.
The gradient passes the rounding as if it were not there (straight-through), and its sign alone is used, as
no other size of step fits all weights (Cheng et al., "SignRound", 2023, arXiv 2309.05516, the method of
AutoRound, which starts from rounding to nearest and lets c move by half a step). Attention, activation and
norms lie inside the layer, so rows that matter to them count, where GPTQ counts all rows alike.

Trade-off: a hundred passes over batches of the text for each layer, many times the work of GPTQ. Every weight
has a number of its own to learn, and 12,000 tokens are learned by heart: a layer's error on them fell by a
fifth and rose by a third on other text (docs/log.md). So a quarter of the documents judges and is not
learned from, and the best of four looks at it is kept; a layer never ends worse there than GPTQ left it.

Memory: that of compress/layers.py and one batch's activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flatout.compress.gptq import gptq_layers
from flatout.compress.inputs import Text
from flatout.compress.layers import Weights
from flatout.compress.method import Data, Report
from flatout.compress.rtn import storable
from flatout.core.formats import Recipe
from flatout.core.fuse import Source
from flatout.core.quantized import QuantizedTensor

STEPS = 100
BATCH_TOKENS = 2048
RATE = 0.01  # codes a step, AutoRound's for as many: a weight moves by half a code in all at most
_CHECKS = 4  # how often text that was not learned from says whether the layer has become better
_JUDGES = 0.25  # of the documents


def tune(source: Source, data: Data, recipe: Recipe) -> tuple[Mapping[str, QuantizedTensor], Report]:
    """As `gptq_layers`, each layer then tuned as a whole."""
    return gptq_layers(source, data, recipe, tune_layer, "tune")


def tune_layer(
    text: Text, layer: int, x: Tensor, target: Tensor, floats: Mapping[str, Tensor], rounded: Weights
) -> Weights:
    """`rounded` with codes and scales for which the layer makes more nearly `target` (T, D) of x (T, D).
    floats: the layer's weights that stay, among others."""
    parts = {name: _Learned.of(weight, floats[name]) for name, weight in rounded.items()}
    learned = len(text.documents) - round(_JUDGES * len(text.documents))
    batches = _batches(text, x, target, slice(learned))
    judges = _batches(text, x, target, slice(learned, None)) or batches  # of very few documents, the same
    best, least = rounded, _loss(layer, judges, floats, parts)
    for step in range(STEPS):
        rate = RATE * (1 - step / STEPS)
        batch = batches[step % len(batches)]
        with torch.enable_grad():
            loss = _batch_loss(layer, batch, floats, parts)
            leaves = [leaf for part in parts.values() for leaf in (part.codes, part.factors)]
            gradients = torch.autograd.grad(loss, leaves)
        for leaf, gradient, is_code in zip(leaves, gradients, [True, False] * len(parts), strict=True):
            levels = 1 if is_code else 16
            leaf -= gradient.sign() * (rate / levels)
        if (step + 1) % (STEPS // _CHECKS) == 0:
            found = _loss(layer, judges, floats, parts)
            if found < least:
                best, least = {name: part.rounded() for name, part in parts.items()}, found
    return best


@dataclass(frozen=True, slots=True, eq=False)
class _Learned:
    """A weight while it is learned. codes (N, K) and factors (N, G) carry gradients."""

    start: QuantizedTensor
    codes: Tensor
    factors: Tensor
    scales: Tensor
    zeros: Tensor
    low: int
    high: int

    @classmethod
    def of(cls, weight: QuantizedTensor, original: Tensor) -> _Learned:
        """Codes start where the original lies, or at the edge of the cell that was chosen for it."""
        n, k = weight.shape
        groups = weight.format.groups(k)
        device = original.device
        scales, zero = (
            torch.from_numpy(part).to(device)[:, :, None]
            for part in (weight.scales.astype(np.float32), weight.float_zeros)
        )
        low, high = weight.code_range
        chosen = torch.from_numpy(weight.codes).to(device).float().reshape(n, groups, -1)
        real = original.reshape(n, groups, -1) / scales + zero
        codes = torch.clamp(real, chosen - 0.45, chosen + 0.45)
        return cls(
            start=weight,
            codes=codes.requires_grad_(),
            factors=torch.ones(n, groups, 1, device=device).requires_grad_(),
            scales=scales,
            zeros=zero,
            low=low,
            high=high,
        )

    def value(self) -> Tensor:
        """The weight (N, K), differentiable in codes and factors."""
        clipped = torch.clamp(self.codes, self.low, self.high)
        nearest = clipped + (clipped.round() - clipped).detach()
        return ((nearest - self.zeros) * (self.scales * self.factors)).reshape(self.start.shape)

    def rounded(self) -> QuantizedTensor:
        codes = torch.clamp(self.codes.detach(), self.low, self.high).round().cpu().numpy()
        scales = (self.scales * self.factors.detach())[:, :, 0].cpu().numpy()
        if self.start.scales.dtype == np.float16:
            scales = storable(scales)
        return QuantizedTensor(
            format=self.start.format,
            codes=codes.reshape(self.start.shape).astype(self.start.codes.dtype),
            scales=scales.astype(self.start.scales.dtype),
            zeros=self.start.zeros,
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    text: Text
    x: Tensor
    target: Tensor


def _batches(text: Text, x: Tensor, target: Tensor, which: slice) -> list[_Batch]:
    """The documents `which`, whole and in turn, about BATCH_TOKENS tokens each."""
    chosen = text.documents[which]
    batches: list[_Batch] = []
    documents: list[np.ndarray] = []
    start = stop = sum(len(document) for document in text.documents[: which.start or 0])
    for i, document in enumerate(chosen):
        documents.append(document)
        stop += len(document)
        if stop - start >= BATCH_TOKENS or i == len(chosen) - 1:
            own = Text(text.source, documents, text.device)
            batches.append(_Batch(own, x[start:stop], target[start:stop]))
            documents, start = [], stop
    return batches


def _batch_loss(
    layer: int, batch: _Batch, floats: Mapping[str, Tensor], parts: Mapping[str, _Learned]
) -> Tensor:
    def linear(name: str, inputs: Tensor) -> Tensor:
        weight = parts[name].value() if name in parts else floats[name]
        return inputs @ weight.T

    with torch.autocast(batch.x.device.type, dtype=torch.bfloat16):
        made = batch.text.layer(layer, batch.x, linear)
    # An error in a token is soon divided by the size of its state in a norm.
    sizes = batch.target.square().mean(dim=1, keepdim=True)
    return ((made.float() - batch.target).square() / (sizes + 1e-12)).mean()


def _loss(
    layer: int,
    batches: Sequence[_Batch],
    floats: Mapping[str, Tensor],
    parts: Mapping[str, _Learned],
) -> float:
    found = [float(_batch_loss(layer, batch, floats, parts)) for batch in batches]
    return float(np.mean(found))
