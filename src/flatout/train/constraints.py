"""Constraints: what a trained weight is put through before it is used, with a gradient that ignores rounding.

    Mask     w * keep                                        pruned weights stay zero
    Levels   s * (clamp(round(w / s) + z, low, high) - z)    integers, a scale s and a zero z a group

The gradient of round is taken to be one (straight-through: Bengio et al., 2013, arXiv 1308.3432), so that of
the clamp stops weights outside the range, and the scale's is (code - z) - w / s inside the range and (code -
z) outside (learned step size: Esser et al., 2020, arXiv 1902.08153). Scales are trained as s = s0 exp(u), so
that a learning rate means the same for small and large ones. The forward pass computes what the stored
integers mean, scales rounded to float16 included: what is trained is what is delivered.

Limits: activations and the KV cache stay floats while training.

Legend: N rows, K columns, G groups along K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from flatout.core.formats import Format
from flatout.core.quantized import QuantizedTensor
from flatout.errors import ConfigError

_INSIDE = 0.45  # of a step that a weight may lie from its code's level at the start


class Constraint(Protocol):
    """What a weight (N, K) passes through."""

    def __call__(self, weight: Tensor) -> Tensor: ...

    def parameters(self) -> dict[str, Tensor]:
        """What is trained of the constraint itself."""
        ...

    def pack(self, weight: Tensor) -> QuantizedTensor | None:
        """The weight as integers, None for a constraint that keeps floats."""
        ...

    def to(self, device: torch.device) -> Constraint: ...


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """keep: (N, K), 1 where a weight stays and 0 where it is pruned."""

    keep: Tensor

    def __call__(self, weight: Tensor) -> Tensor:
        return weight * self.keep

    def parameters(self) -> dict[str, Tensor]:
        return {}

    def pack(self, weight: Tensor) -> QuantizedTensor | None:
        return None

    def to(self, device: torch.device) -> Mask:
        return Mask(self.keep.to(device, torch.float32))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Levels:
    """The levels of an integer format. start, zeros float32 (N, G): scales at the start, and zeros; stretch
    (N, G), trained: the logarithm of what a scale has been multiplied by; keep float32 (N, K): 0 where a
    weight is pruned, which every format can say."""

    format: Format
    start: Tensor
    stretch: Tensor
    zeros: Tensor
    low: int
    high: int
    keep: Tensor | None = None

    def scales(self) -> Tensor:
        """float32 (N, G), values that float16 holds."""
        return _straight(self.start * self.stretch.exp(), lambda s: s.half().float())

    def codes(self, weight: Tensor, scales: Tensor) -> Tensor:
        """float32 (N, G, K / G) integers in [low, high]."""
        weight = weight if self.keep is None else weight * self.keep
        grouped = weight.reshape(*scales.shape, -1) / scales[:, :, None]
        return torch.clamp(_straight(grouped, torch.round) + self.zeros[:, :, None], self.low, self.high)

    def __call__(self, weight: Tensor) -> Tensor:
        scales = self.scales()
        return (scales[:, :, None] * (self.codes(weight, scales) - self.zeros[:, :, None])).flatten(1)

    def parameters(self) -> dict[str, Tensor]:
        return {"stretch": self.stretch}

    @torch.no_grad()
    def pack(self, weight: Tensor) -> QuantizedTensor:
        scales = self.scales()
        codes = self.codes(weight, scales).flatten(1).cpu().numpy()
        return QuantizedTensor(
            format=self.format,
            codes=codes.astype(np.int8 if self.low < 0 else np.uint8),
            scales=scales.half().cpu().numpy(),
            zeros=self.zeros.cpu().numpy().astype(np.uint8) if self.format.zero == "asymmetric" else None,
        )

    def to(self, device: torch.device) -> Levels:
        return Levels(
            format=self.format,
            start=self.start.to(device),
            stretch=self.stretch.detach().to(device, copy=True).requires_grad_(),
            zeros=self.zeros.to(device),
            low=self.low,
            high=self.high,
            keep=None if self.keep is None else self.keep.to(device),
        )


def _straight(x: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """rounded(x), with the gradient of x."""
    return x + (rounded(x) - x).detach()


def has_levels(tensor: QuantizedTensor) -> bool:
    """Whether `levels_of` takes it."""
    return tensor.minima is None and not tensor.format.is_native


def levels_of(tensor: QuantizedTensor, pruned: bool = False) -> Levels:
    """The levels that `tensor` is rounded to. pruned: what is zero stays zero.

    Raises ConfigError for formats whose blocks are only taken from files.
    """
    fmt = tensor.format
    if not has_levels(tensor):
        raise ConfigError("levels of w{8,4}a{8,16} formats can be trained", fmt.name, "w4a8-g64")
    scales = torch.from_numpy(tensor.scales.astype(np.float32))
    if not bool((scales.half().float() == scales).all()):
        raise ConfigError("trained scales are float16", f"larger ones in {fmt.name}", "smaller weights")
    low, high = tensor.code_range
    return Levels(
        format=fmt,
        start=scales,
        stretch=torch.zeros_like(scales).requires_grad_(),
        zeros=torch.from_numpy(tensor.float_zeros),
        low=low,
        high=high,
        keep=torch.from_numpy((tensor.dequantize() != 0).astype(np.float32)) if pruned else None,
    )


def inside(original: Tensor, tensor: QuantizedTensor) -> Tensor:
    """`original` (N, K) moved as little as makes it round to the codes of `tensor`: where training starts, so
    that its first step has the loss of `tensor`."""
    level = torch.from_numpy(tensor.dequantize())
    group = tensor.shape[1] // tensor.scales.shape[1]
    room = _INSIDE * torch.from_numpy(tensor.scales.astype(np.float32)).repeat_interleave(group, dim=1)
    return torch.clamp(original.cpu(), level - room, level + room)
