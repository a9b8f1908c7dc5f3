"""Layer by layer: a model rounded in order, each linear for what it receives behind those already rounded.

Two streams of activations pass through the layers: that of the original, y, and that of the rounded model,
x. A linear that receives X where the original's received Y is rounded for X, but aims at the original's
output Y W^T. Without rounding the best weight for that is

    W' = W + strength * W (Y - X)^T X (X^T X + damping)^-1                       (T tokens a row)

by ridge regression; o and down add what their layer's input lacks of the original's, so that errors do not
pile up in the residual stream. Rounding W' by GPTQ under H = X^T X minimises |Y W^T - X Q^T|^2 (Li et al.,
"GPTAQ", 2025, arXiv 2504.02692, and Zhang et al., "Qronos", 2025, arXiv 2505.11695, fold the same correction
into the sweep over the columns).

Trade-off: a second stream of activations and a solve for every linear. The whole way (strength 1) learns the
calibration text and harms on other text; GPTQ goes a quarter of it (docs/log.md).

Memory: one layer's float weights, one Hessian and both streams' activations of the text, about 4 bytes x
tokens x (4 x intermediate size + 6 x hidden size).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from flatout.compress.inputs import (
    Text,
    check_activations,
    exact_products,
    fast_products,
    gram,
    kept_memory,
    product,
)
from flatout.compress.kept import Kept
from flatout.compress.method import Data, check_weight, format_in, is_made
from flatout.core.formats import Recipe
from flatout.core.fuse import Source, float_weight, native_weight
from flatout.core.quantized import QuantizedTensor
from flatout.kernels.linear import as_tensor

RoundLinear = Callable[[str, Tensor, Tensor], QuantizedTensor]
"""round_linear(name, weight (N, K), hessian (K, K)) -> the rounded weight."""
Weights = dict[str, QuantizedTensor]
_DAMPING = 0.01  # of the mean of H's diagonal
_TOGETHER = 1024  # tokens


Improve = Callable[[Text, int, Tensor, Tensor, dict[str, Tensor], Weights], Weights]
"""improve(text, layer, x, target, floats, rounded): other weights for the layer that reads x (T, D) and whose
original makes `target` of its own input."""


@torch.no_grad()
@kept_memory()
def round_layers(
    source: Source,
    data: Data,
    recipe: Recipe,
    method: str,
    round_linear: RoundLinear,
    strength: float,
    improve: Improve | None = None,
) -> tuple[Weights, dict[str, float]]:
    """(weights, errors) by fused name of every linear that `recipe` has made into integers.

    Linears in float and native formats are used as they are. errors: the part of the energy of the
    original's output that is wrong. With `data.keep`, work goes on where an earlier run with the same
    arguments was interrupted. Raises ConfigError, naming the linear, for weights or activations that are not
    finite.
    """
    spec, text = source.spec, Text(source, data.documents, data.device)
    linears = list(spec.linears())
    kept = Kept(source, data, recipe, f"{method} {strength}")
    done, state = kept.load()
    rounded: Weights = {name: weight for layer in done for name, weight in layer.items()}
    errors = {
        str(name): float(e) for name, e in zip(state.get("names", ()), state.get("errors", ()), strict=True)
    }
    x = y = text.embed()
    if done:
        x, y = (torch.from_numpy(state[stream]).to(data.device) for stream in ("x", "y"))
    start = time.perf_counter()
    last = _layers_to_pass(source, recipe)
    for layer in range(len(done), last):
        step = _Layer(text, data, recipe, layer, x, y, round_linear, strength)

        def tell(linear: str, layer: int = layer) -> None:
            if data.progress is not None:
                spent, passed = time.perf_counter() - start, layer - len(done)
                left = spent / passed * (last - layer) if passed else 0.0
                eta = f", about {left:.0f} s left" if passed else ""
                place = layer * len(linears) + linears.index(linear)
                data.progress(f"layers.{layer}.{linear}{eta}", place, spec.num_layers * len(linears))

        with fast_products():
            after, target = step.run(tell)
        if improve is not None and step.rounded:
            step.rounded = improve(text, layer, x, target, step.floats, step.rounded)
            after = text.layer(layer, x, step.product)
        x, y = after, target
        rounded |= step.rounded
        errors |= step.errors
        names = np.array(list(errors), dtype=np.str_)
        values = np.array(list(errors.values()), dtype=np.float64)
        streams = {"x": x.cpu().numpy(), "y": y.cpu().numpy()}
        kept.save(layer, step.rounded, streams | {"names": names, "errors": values})
    kept.done()
    return rounded, errors


def _layers_to_pass(source: Source, recipe: Recipe) -> int:
    """Layers up to the last one of which something is rounded."""
    made = [
        layer + 1
        for layer in range(source.spec.num_layers)
        if any(is_made(source, recipe, f"layers.{layer}.{linear}") for linear in source.spec.linears())
    ]
    return max(made, default=0)


class _Layer:
    """One layer while it is rounded. rounded: its weights so far; floats: the original's."""

    def __init__(
        self,
        text: Text,
        data: Data,
        recipe: Recipe,
        layer: int,
        x: Tensor,
        y: Tensor,
        round_linear: RoundLinear,
        strength: float,
    ) -> None:
        self._text, self._recipe, self._round, self._strength = text, recipe, round_linear, strength
        self._layer, self._x, self._y = layer, x, y
        self._missing = y - x  # of the residual stream
        self._wanted: dict[str, tuple[Tensor, Tensor]] = {}
        self.rounded: Weights = {}
        self.floats: dict[str, Tensor] = {}
        self.errors: dict[str, float] = {}

    def run(self, tell: Callable[[str], None]) -> tuple[Tensor, Tensor]:
        """(x, y) behind the layer."""
        target = self._text.layer(self._layer, self._y, self._original)

        def linear(name: str, inputs: Tensor) -> Tensor:
            tell(name.rpartition(".")[2])
            return self._rounding(name, inputs)

        return self._text.layer(self._layer, self._x, linear), target

    def _original(self, name: str, inputs: Tensor) -> Tensor:
        """As the original multiplies; what goes in and comes out is kept for the other stream."""
        source, fmt = self._text.source, format_in(self._recipe, name)
        weight = (
            native_weight(source, name, fmt).dequantize() if fmt.is_native else float_weight(source, name)
        )
        check_weight(name, weight)
        self.floats[name] = as_tensor(weight).to(inputs.device)
        output = product(inputs, self.floats[name].T)
        self._wanted[name] = inputs, output
        return output

    def _rounding(self, name: str, inputs: Tensor) -> Tensor:
        """Round linear `name`, which receives `inputs` here, and multiply by what became of it."""
        theirs, wanted = self._wanted.pop(name)
        sizes = self._sizes() if name.endswith((".o", ".down")) else None
        if is_made(self._text.source, self._recipe, name):
            ideal, hessian = self._ideal(name, inputs, theirs, wanted, sizes)
            del theirs
            with exact_products():
                self.rounded[name] = self._round(name, ideal, hessian)
        output = self.product(name, inputs)
        if name in self.rounded:
            self.errors[name] = _part_wrong(wanted, output, sizes)
        if name.endswith(".o"):
            self._missing += wanted - output
        return output

    def _ideal(
        self, name: str, inputs: Tensor, theirs: Tensor, wanted: Tensor, sizes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(weight, Hessian): the float weight that makes most nearly `wanted` (T, N), the original's output
        of `theirs`, of `inputs`; both (T, K). Tokens are divided by `sizes`."""
        weight = self.floats[name]
        if sizes is not None:
            inputs = inputs / sizes
        hessian = gram(inputs).div_(len(inputs))
        check_activations(name, hessian.diagonal())
        if not self._strength:
            return weight, hessian
        if sizes is None:
            right = product(inputs.T, theirs - inputs) @ weight.T
        else:  # the same product, narrow outputs first, with what the residual stream lacks
            lacks = (wanted + self._missing) / sizes - product(inputs, weight.T)
            right = product(inputs.T, lacks)
        damped = hessian.clone()
        damped.diagonal().add_(_DAMPING * hessian.diagonal().mean() + 1e-12)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            added = torch.linalg.solve(damped, right / len(inputs)).T
        else:
            added = torch.cholesky_solve(right / len(inputs), lower).T
        return weight + self._strength * added, hessian

    def _sizes(self) -> Tensor:
        """(T, 1): how large the tokens' states are; an error in one is soon divided by that in a norm."""
        return torch.clamp(self._x.square().mean(dim=1, keepdim=True).sqrt(), min=1e-6)

    def product(self, name: str, inputs: Tensor) -> Tensor:
        """As the rounded model multiplies."""
        if name not in self.rounded:
            return product(inputs, self.floats[name].T)
        return product(inputs, dequantized(self.rounded[name], inputs.device).T)


def dequantized(weight: QuantizedTensor, device: torch.device) -> Tensor:
    """The rounded `weight` as float32 (N, K) on `device`, to which its codes travel."""
    n, k = weight.shape
    codes = as_tensor(weight.codes).to(device).float().reshape(n, weight.format.groups(k), -1)
    scales, zeros = (
        torch.from_numpy(part).to(device)[:, :, None]
        for part in (weight.scales.astype(np.float32), weight.float_zeros)
    )
    return codes.sub_(zeros).mul_(scales).reshape(n, k)


def _part_wrong(wanted: Tensor, found: Tensor, sizes: Tensor | None) -> float:
    """|found - wanted|^2 over |wanted|^2 of (T, N), tokens divided by `sizes`; some tokens at a time, since
    fresh memory takes longer than the sums."""
    wrong = energy = 0.0
    for start in range(0, len(wanted), _TOGETHER):
        own = slice(start, start + _TOGETHER)
        right, lost = wanted[own], found[own] - wanted[own]
        if sizes is not None:
            right, lost = right / sizes[own], lost / sizes[own]
        wrong += float(torch.linalg.vector_norm(lost)) ** 2
        energy += float(torch.linalg.vector_norm(right)) ** 2
    return wrong / (energy + 1e-30)
