"""A Model's weights as the GPU reads them, or random ones of the same shapes for measuring speed.

Formats: bf16 and fp32 become bfloat16, fp8 e4m3 with a scale a row, integers of 8 and 4 bits keep their codes
and scales and meet activations of 16 bits, whatever activations their format names: nothing is rounded that
the file did not round. Rows of gate and up are woven, gate 0, up 0, gate 1 and so on, so that one program has
both at hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from flatout.core.formats import Format, Recipe, parse_format
from flatout.core.model import Model, dense
from flatout.core.quantized import QuantizedTensor
from flatout.core.spec import ModelSpec
from flatout.engine.cuda_host import HostLayer
from flatout.engine.cuda_stream import StreamedLayers, held
from flatout.errors import UnsupportedModelError
from flatout.kernels.gpu_attention import HeadWeights
from flatout.kernels.linear import as_tensor
from flatout.kernels.packed import PackedWeight, pack_4bit, pack_8bit, pack_bf16, pack_fp8


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One layer: gains bfloat16 (D,), linears packed."""

    input_norm: Tensor
    qkv: PackedWeight
    heads: HeadWeights
    o: PackedWeight
    post_norm: Tensor
    gate_up: PackedWeight
    down: PackedWeight

    @property
    def linears(self) -> tuple[PackedWeight, ...]:
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True, slots=True, eq=False)
class GpuWeights:
    """All weights. embedding: bfloat16 (V, D)."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...] | StreamedLayers
    norm: Tensor
    head: PackedWeight

    def few_layers(self) -> Iterable[LayerWeights | HostLayer]:
        """The layers as a step of few tokens goes through them."""
        return self.layers.divided() if isinstance(self.layers, StreamedLayers) else self.layers


def check_shapes(spec: ModelSpec, recipe: Recipe) -> None:
    """Raise UnsupportedModelError, with all that is wrong, for shapes and formats without a GPU kernel."""
    wrong = []
    if spec.head_dim not in (16, 32, 64, 128, 256):
        wrong.append(f"heads of {spec.head_dim}")
    linears = {f"layers.{i}.{name}": (k, recipe.format_of(i, name)) for i in range(spec.num_layers)
               for name, (_, k) in spec.linears().items()}  # fmt: skip
    linears["head"] = (spec.hidden_size, parse_format(recipe.head))
    for place, (k, fmt) in linears.items():
        width = 32 if fmt.bits == 4 else 16
        if k % width or (fmt.is_integer and fmt.bits not in (4, 8)):
            wrong.append(f"{place}: {fmt.name} on width {k}")
    if wrong:
        shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise UnsupportedModelError(
            "the cuda runner takes 4 and 8 bits, heads of 16, 32, 64, 128 or 256, and widths that 32 divides",
            shown,
            "--runner cpu",
        )


def load_weights(model: Model, device: torch.device, resident: int | None = None) -> GpuWeights:
    """The weights of `model` on `device`, one after another; layers from `resident` on, if given, stay in the
    host's memory and are streamed."""
    spec, recipe = model.spec, model.recipe
    check_shapes(spec, recipe)

    def vector(name: str) -> Tensor:
        return as_tensor(dense(model.weights[name])).to(device, torch.float32)

    def gains(name: str, offset: float = 0.0) -> Tensor:
        return (vector(name) + offset).bfloat16()

    def layer(i: int) -> LayerWeights:
        p = f"layers.{i}."

        def linear(name: str) -> PackedWeight:
            packed = _pack(model, p + name, recipe.format_of(i, name), device)
            return _woven(packed) if name == "gate_up" else packed

        heads = HeadWeights(
            bias=vector(p + "qkv_bias") if spec.qkv_bias else None,
            q_gains=gains(p + "q_norm") if spec.qk_norm else None,
            k_gains=gains(p + "k_norm") if spec.qk_norm else None,
        )
        return LayerWeights(
            gains(p + "input_norm", spec.norm_offset),
            linear("qkv"),
            heads,
            linear("o"),
            gains(p + "post_norm", spec.norm_offset),
            linear("gate_up"),
            linear("down"),
        )

    embedding = as_tensor(dense(model.weights["embedding"])).to(device, torch.bfloat16)
    head = parse_format(recipe.head)
    tied = spec.tie_embeddings and not head.is_integer and head.bits > 8
    return GpuWeights(
        embedding,
        held(map(layer, range(spec.num_layers)), resident),
        gains("norm", spec.norm_offset),
        pack_bf16(embedding) if tied else _pack(model, "head", head, device),
    )


def random_weights(
    spec: ModelSpec, recipe: Recipe, device: torch.device, seed: int = 0, resident: int | None = None
) -> GpuWeights:
    """Weights of the right shapes and formats and of variance 1 / K, drawn on the device: for measuring speed
    alone, or on the device "meta" for compiling kernels. resident: as in `load_weights`."""
    check_shapes(spec, recipe)
    draws = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(n: int, k: int) -> Tensor:
        return torch.randn(n, k, generator=draws, device=device, dtype=torch.bfloat16)

    def shape_of(n: int, k: int, fmt: Format) -> PackedWeight:
        """Arithmetic on "meta" has PyTorch import its compiler, for seconds."""
        bits = fmt.bits if fmt.is_integer or fmt.bits == 8 else 16
        name = f"int{bits}" if fmt.is_integer else "fp8" if bits == 8 else "bf16"
        words = torch.empty(n, k * bits // 32, dtype=torch.int32, device=device)
        scales = torch.empty(n, device=device)
        if fmt.is_integer and fmt.group:
            scales = torch.empty(n, k // fmt.group, dtype=torch.float16, device=device)
        minima = scales if fmt.is_integer and fmt.zero != "symmetric" else None
        group = fmt.group if fmt.is_integer else 0
        return PackedWeight(name, n, k, words, None if name == "bf16" else scales, minima, group)

    def matrix(n: int, k: int, fmt: Format) -> PackedWeight:
        if draws is None:
            return shape_of(n, k, fmt)
        if not fmt.is_integer:
            values = normal(n, k).mul_(k**-0.5)
            return pack_fp8(values) if fmt.bits == 8 else pack_bf16(values)
        words = torch.randint(
            -(1 << 31), 1 << 31, (n, k * fmt.bits // 32), generator=draws, device=device, dtype=torch.int32
        )
        deviation = k**-0.5 / (74.0 if fmt.bits == 8 else 4.6)  # of uniform codes
        shape = (n, k // fmt.group) if fmt.group else (n,)
        scales = torch.full(
            shape, deviation, device=device, dtype=torch.float16 if fmt.group else torch.float32
        )
        minima = None if fmt.zero == "symmetric" else torch.zeros_like(scales)
        return PackedWeight(f"int{fmt.bits}", n, k, words, scales, minima, fmt.group)

    def gains(size: int) -> Tensor:
        return torch.ones(size, device=device, dtype=torch.bfloat16)

    D, E = spec.hidden_size, spec.head_dim

    def layer(i: int) -> LayerWeights:
        made = {name: matrix(n, k, recipe.format_of(i, name)) for name, (n, k) in spec.linears().items()}
        heads = HeadWeights(
            bias=torch.zeros(spec.qkv_size, device=device) if spec.qkv_bias else None,
            q_gains=gains(E) if spec.qk_norm else None,
            k_gains=gains(E) if spec.qk_norm else None,
        )
        return LayerWeights(gains(D), made["qkv"], heads, made["o"], gains(D), made["gate_up"], made["down"])

    layers = held(map(layer, range(spec.num_layers)), resident)
    table = torch.empty(spec.vocab_size, D, device=device, dtype=torch.bfloat16)
    if draws is not None:
        table = normal(spec.vocab_size, D)
    head = matrix(spec.vocab_size, D, parse_format(recipe.head))
    return GpuWeights(table, layers, gains(D), head)


def _pack(model: Model, name: str, fmt: Format, device: torch.device) -> PackedWeight:
    weight = model.weights[name]
    if isinstance(weight, QuantizedTensor):
        return pack_codes(weight, device)
    values = as_tensor(weight).to(device)
    return pack_fp8(values) if fmt.bits == 8 else pack_bf16(values.bfloat16())


def pack_codes(weight: QuantizedTensor, device: torch.device) -> PackedWeight:
    """Integer codes, whose zeros and minima become one float a group: w = scale * code + minimum, with codes
    counted from the middle of their range."""
    fmt = weight.format
    n, k = weight.shape
    codes, scales = as_tensor(weight.codes).to(device), as_tensor(weight.scales).to(device)
    middle = 8.0 if fmt.bits == 4 else (128.0 if fmt.zero == "asymmetric" else 0.0)
    minima = None
    if weight.zeros is not None:
        minima = scales.float() * (middle - as_tensor(weight.zeros).to(device).float())
    elif weight.minima is not None:
        minima = as_tensor(weight.minima).to(device).float() + middle * scales.float()
    if fmt.bits == 4:
        words = pack_4bit(codes)
    else:
        words = pack_8bit(codes ^ 128 if fmt.zero == "asymmetric" else codes.view(torch.uint8))
    if fmt.group == 0:
        scales = scales.float()[:, 0].contiguous()
        minima = None if minima is None else minima[:, 0].contiguous()
    return PackedWeight(f"int{fmt.bits}", n, k, words, scales, minima, fmt.group)


def _woven(weight: PackedWeight) -> PackedWeight:
    """Rows 0 to F - 1 and F to 2 F - 1 in turn."""

    def weave(part: Tensor | None) -> Tensor | None:
        return None if part is None else torch.stack(part.chunk(2), dim=1).reshape(part.shape)

    words = weave(weight.words)
    assert words is not None
    return PackedWeight(
        weight.format, weight.n, weight.k, words, weave(weight.scales), weave(weight.minima), weight.group
    )
