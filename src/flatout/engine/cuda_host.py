"""Layers of a model larger than the GPU's memory that the processor computes, while others are streamed.

A token needs every weight once, and a streamed layer (`cuda_stream`) waits for the bus. The processor reads
its memory at a rate of its own, so where it takes some of these layers, bus and processor work side by side:

    seconds of a step = max(streamed bytes / bus, computed bytes / processor)

both rates measured once, when the model is loaded, on its own layers and at the same time, because both take
from the same memory. The least of that over how many layers the processor takes is the prediction; where it
gains less than a tenth, all are streamed.

Norms and products alone are the processor's. Attention stays on the GPU with its keys and values, so a layer
costs two short round trips. Only steps of the matrix-vector kernels (one or two tokens) go this way; prompts
and larger batches have arithmetic enough for streaming. Only bf16, whose words are what PyTorch multiplies on
a processor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from flatout.core.spec import ModelSpec
from flatout.kernels.gpu import Activations, Product
from flatout.kernels.packed import PackedWeight
from flatout.models.llama import rms_norm

if TYPE_CHECKING:
    from flatout.engine.cuda_weights import LayerWeights

_LEAST_GAIN = 0.1  # of the time of streaming all: rates change from hour to hour

Attend = Callable[[Product, "LayerWeights"], Activations]
"""What a step's tokens read (T, H E), given a layer's product of qkv."""


@dataclass(frozen=True, slots=True)
class Division:
    """Who computes how many of the layers that do not fit. bus, processor: bytes/s, measured together.
    predicted, streamed_only: seconds a token for these layers, this way and without the processor."""

    layers: int
    computed: int
    bus: float
    processor: float
    predicted: float
    streamed_only: float

    def takes(self, layer: int) -> bool:
        """Whether that layer, of `layers`, is the processor's; these are spread evenly."""
        return (layer + 1) * self.computed // self.layers > layer * self.computed // self.layers

    def __str__(self) -> str:
        return (
            f"the processor computes {self.computed} of {self.layers} layers that do not fit: predicted "
            f"{1e3 * self.predicted:.0f} ms a token, {1e3 * self.streamed_only:.0f} with all of them copied "
            f"(bus {self.bus / 1e9:.0f} GB/s, processor {self.processor / 1e9:.0f} GB/s beside it)"
        )


def divide(layers: int, layer_bytes: float, bus_alone: float, bus: float, processor: float) -> Division:
    """The division with the least predicted time. bus, processor: bytes/s at the same time."""
    streamed_only = layers * layer_bytes / bus_alone
    times = {
        computed: max((layers - computed) * layer_bytes / bus, computed * layer_bytes / processor)
        for computed in range(1, layers + 1)
    }
    best = min(times, key=times.__getitem__)
    if times[best] > (1 - _LEAST_GAIN) * streamed_only:
        return Division(layers, 0, bus, processor, streamed_only, streamed_only)
    return Division(layers, best, bus, processor, times[best], streamed_only)


def computable(layer: LayerWeights) -> bool:
    """Whether the processor multiplies this layer's formats."""
    return all(weight.format == "bf16" for weight in layer.linears)


def processor_rate(layers: list[LayerWeights], busy: Callable[[], bool]) -> float:
    """bytes/s of one token's products with `layers`, whose weights are in the host's memory, in turn for as
    long as `busy`."""
    weights = [weight for layer in layers for weight in layer.linears]
    done, read, begin = 0, 0, time.perf_counter()
    while not done or busy():
        weight = weights[done % len(weights)]
        _product(torch.ones(1, weight.k, dtype=torch.bfloat16), weight)
        read += weight.bytes
        done += 1
    return read / (time.perf_counter() - begin)


@dataclass(frozen=True, slots=True, eq=False)
class HostLayer:
    """A layer of which only `weights.heads` are on the GPU."""

    weights: LayerWeights

    @torch.no_grad()
    def advance(self, spec: ModelSpec, x: Tensor, x_bf16: Tensor, attend: Attend) -> None:
        """The residual stream x float32 (T, D) on the GPU, after this layer; x_bf16 likewise."""
        layer, eps = self.weights, spec.rms_norm_eps
        there = x.cpu()
        qkv = _product(rms_norm(there, layer.input_norm.float(), eps).bfloat16(), layer.qkv)
        read = attend(Product(qkv.float().to(x.device)), layer).values.cpu()
        there += _product(read, layer.o)
        # Rows of gate and up take turns (`cuda_weights`).
        both = _product(rms_norm(there, layer.post_norm.float(), eps).bfloat16(), layer.gate_up).float()
        gate, up = both[:, ::2], both[:, 1::2]
        tanh = spec.activation == "gelu_tanh"
        activated = functional.gelu(gate, approximate="tanh") if tanh else functional.silu(gate)
        there += _product((activated * up).bfloat16(), layer.down)
        x.copy_(there)
        x_bf16.copy_(x)


def _product(x: Tensor, weight: PackedWeight) -> Tensor:
    """bfloat16 (T, N) of x bfloat16 (T, K)."""
    return functional.linear(x, weight.words.view(torch.bfloat16).view(weight.n, weight.k))
