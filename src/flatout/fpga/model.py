"""A compressed model as integers, and its forward pass: the reference for every simulation.

Codes and scales are the model's own; a scale keeps 12 significant bits (float16 has 11) down to 2**-15 of the
largest of its tensor. Norms become 16-bit integers, the embedding 16-bit words, RoPE a table of 16-bit
sines. T tokens, D width, N outputs, K inputs, H query heads, G key/value heads, E head size, S positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from flatout.core.model import Model, dense
from flatout.core.quantized import QuantizedTensor
from flatout.core.spec import ModelSpec
from flatout.errors import UnsupportedModelError
from flatout.fpga import spec as integer
from flatout.fpga.spec import FRACTIONS, Constant, Integers, Multiplier, constant

ACCUMULATOR = 47
"""Bits of a sum without its sign; every row of every weight is checked against it."""
SHIFTS = (21, 52)
"""Of a linear. A token's own shift lies within -20..11, the sum must lie within 1..63."""
NORM_SHIFT = 15
"""gamma is below 2**15, so a word that fits 32 bits still fits after the multiplication: nothing saturates,
though some models' first token is 1,000 times as large as the others."""
Listen = Callable[[str, Integers], None]
"""Called with the name and value of each intermediate tensor."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IntegerLinear:
    """codes int8 or uint8 (N, K) minus zero, scales mantissa << exponent (N, groups), real = integer *
    2**-binary_point. minima: signed integers (N, groups) or None. bits: 4 or 8."""

    bits: int
    group: int
    zero: int
    codes: np.ndarray
    mantissas: Integers
    exponents: Integers
    minima: Integers | None
    binary_point: int

    def products(self) -> np.ndarray:
        """code * scale + minimum as float64 (N, K): integers, and so are all sums below 2**53."""
        n, k = self.codes.shape
        grouped = (self.codes.astype(np.float64) - self.zero).reshape(n, k // self.group, self.group)
        grouped *= (self.mantissas << self.exponents)[:, :, None]
        if self.minima is not None:
            grouped += self.minima[:, :, None]
        return grouped.reshape(n, k)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IntegerNorm:
    """gamma integers (D,) below 2**15; y = words * gamma >> NORM_SHIFT has `fraction` fractional bits."""

    gamma: Integers
    fraction: int
    epsilon: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IntegerModel:
    """chunk: activations that are spread together. linears: layers.I.{qkv,o,gate_up,down} and head.
    embedding: int16 (V, D), word = value << embedding_shift."""

    spec: ModelSpec
    chunk: int
    linears: dict[str, IntegerLinear]
    norms: dict[str, IntegerNorm]
    embedding: np.ndarray
    embedding_shift: int
    _products: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def sums(self, name: str, codes: Integers) -> Integers:
        """Exact sums (T, N) of codes (T, K) times linear `name`."""
        if name not in self._products:
            self._products[name] = self.linears[name].products()
        sums: Integers = (codes.astype(np.float64) @ self._products[name].T).astype(np.int64)
        return sums


def integer_model(model: Model, chunk: int = 64) -> IntegerModel:
    """The integers of `model` for hardware whose beat is `chunk` 8-bit weights. Raises UnsupportedModelError
    naming the layer and the limit."""
    spec = model.spec
    check_supported(spec)
    linears = {}
    for i in range(spec.num_layers):
        for linear in spec.linears():
            name = f"layers.{i}.{linear}"
            linears[name] = integer_linear(name, model.weights[name])
    linears["head"] = integer_linear("head", model.weights["head"])
    norm_names = [
        f"layers.{i}.{norm}" for i in range(spec.num_layers) for norm in ("input_norm", "post_norm")
    ]
    norms = {name: integer_norm(np.asarray(model.weights[name]), spec) for name in (*norm_names, "norm")}
    values = dense(model.weights["embedding"])
    bits = min(FRACTIONS.residual, 15 - math.frexp(float(np.abs(values).max()))[1])
    words = np.clip(np.rint(values * np.float32(2.0**bits)), -32767, 32767).astype(np.int16)
    integers = IntegerModel(
        spec=spec,
        chunk=chunk,
        linears=linears,
        norms=norms,
        embedding=words,
        embedding_shift=FRACTIONS.residual - bits,
    )
    check_shifts(integers)
    return integers


def check_shifts(model: IntegerModel) -> None:
    """Raise UnsupportedModelError for weights whose size leaves the shifters of the hardware no room."""
    low, high = SHIFTS
    wrong = [
        f"{name}: {linear_shift(model, name)}"
        for name in model.linears
        if not low <= linear_shift(model, name) <= high
    ]
    if wrong:
        raise UnsupportedModelError(
            f"shifts of linears lie within {low}..{high}",
            "; ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""),
            "weights of common size: largest scales of 1e-5 to 1, norms below 1,000",
        )


def check_supported(spec: ModelSpec) -> None:
    """Raise UnsupportedModelError for what the accelerator has no instruction for."""
    for what, setting, needed in (
        ("no biases of q, k and v", "qkv_bias", False),
        ("no norms of q and k", "qk_norm", False),
        ("the activation silu", "activation", "silu"),
        ("no offset of norm weights", "norm_offset", 0.0),
        ("no factor on embeddings", "embedding_scale", 1.0),
        ("no sliding window", "sliding_window", None),
    ):
        found = getattr(spec, setting)
        if found != needed:
            raise UnsupportedModelError(
                f"the accelerator runs Llama models, which have {what}",
                f"{setting}={found}",
                "a Llama or Mistral 0.3 model",
            )


def integer_linear(name: str, weight: object) -> IntegerLinear:
    """Scales of `weight` as integers with as many bits as the accumulator has room for."""
    remedy = "recipe w4a8-g64 or w8a8-g64"
    if (
        not isinstance(weight, QuantizedTensor)
        or weight.format.bits not in (4, 8)
        or weight.format.zero == "asymmetric"
    ):
        found = weight.format.name if isinstance(weight, QuantizedTensor) else "a float array"
        raise UnsupportedModelError(f"{name} must have symmetric 4 or 8 bits, or q4_1 blocks", found, remedy)
    if weight.format.activation != "int8":
        raise UnsupportedModelError(f"activations of {name} must have 8 bits", weight.format.name, remedy)
    n, k = weight.shape
    groups = weight.format.groups(k)
    codes = weight.codes.astype(np.float32) - weight.integer_zero
    scales = weight.scales.astype(np.float64)
    sizes = np.abs(codes).reshape(n, groups, -1).sum(axis=2) * scales
    if weight.minima is not None:
        sizes += np.abs(weight.minima.astype(np.float64)) * (k // groups)
    row_bound = float(sizes.sum(axis=1).max()) * integer.CODE
    largest = float(scales.max())
    if weight.minima is not None:
        largest = max(largest, float(np.abs(weight.minima).max()))
    binary_point = min(
        ACCUMULATOR - 1 - integer.SPREAD - math.frexp(row_bound)[1],
        integer.NARROW - 1 - math.frexp(largest)[1],
    )
    mantissas, exponents = nearest_scale(scales * 2.0**binary_point)
    minima = None
    if weight.minima is not None:
        real = weight.minima.astype(np.float64) * 2.0**binary_point
        mantissa, exponent = nearest_scale(np.abs(real))
        minima = np.where(real < 0, -1, 1) * (mantissa << exponent)
    return IntegerLinear(
        bits=weight.format.bits,
        group=k // groups,
        zero=weight.integer_zero,
        codes=weight.codes,
        mantissas=mantissas,
        exponents=exponents,
        minima=minima,
        binary_point=binary_point,
    )


def nearest_scale(values: np.ndarray) -> tuple[Integers, Integers]:
    """(mantissa, exponent) of the 12-bit scale nearest to each value in [0, 2**27)."""
    exponents = np.clip(np.frexp(values)[1] - integer.MANTISSA, 0, 15).astype(np.int64)
    mantissas = np.rint(values / 2.0**exponents).astype(np.int64)
    carried = mantissas == 1 << integer.MANTISSA
    return np.where(carried, 1 << (integer.MANTISSA - 1), mantissas), exponents + carried


def integer_norm(weight: np.ndarray, spec: ModelSpec) -> IntegerNorm:
    """The norm's weight with 15 bits and a sign."""
    bits = 15 - math.frexp(float(np.abs(weight).max()))[1]
    gamma = np.clip(np.rint(weight.astype(np.float64) * 2.0**bits), -32767, 32767).astype(np.int64)
    epsilon = max(1, round(spec.hidden_size * spec.rms_norm_eps * 4.0**FRACTIONS.square))
    return IntegerNorm(gamma=gamma, fraction=FRACTIONS.residual + bits - NORM_SHIFT, epsilon=epsilon)


def norm_constant(spec: ModelSpec) -> Constant:
    return constant(math.sqrt(spec.hidden_size) / integer.CODE)


def code_constant() -> Constant:
    return constant(1 / integer.CODE)


def score_constant(spec: ModelSpec) -> Constant:
    """Scores are powers of two."""
    return constant(math.log2(math.e) / math.sqrt(spec.head_dim) / integer.CODE**2)


def base_shift(factor: Constant, fraction_in: int, fraction_out: int, binary_point: int) -> int:
    """The right shift of a sum of codes times scales, apart from its Multiplier's own."""
    return factor.shift - integer.MANTISSA + fraction_in + binary_point - fraction_out


def linear_shift(model: IntegerModel, name: str) -> int:
    """The right shift of a linear, whose codes are spread, apart from its Multiplier's own."""
    point = model.linears[name].binary_point + integer.SPREAD
    if name.endswith((".o", ".down")):
        return base_shift(code_constant(), FRACTIONS.linear, FRACTIONS.residual, point)
    fraction = model.norms[norm_before(name)].fraction
    after_norm = base_shift(norm_constant(model.spec), fraction, FRACTIONS.linear, point)
    return after_norm + 15 - FRACTIONS.square  # the multiplier was divided by a root with 15 more bits


def norm_before(linear: str) -> str:
    """The norm whose results go into `linear`."""
    layer, _, kind = linear.rpartition(".")
    return {"qkv": f"{layer}.input_norm", "gate_up": f"{layer}.post_norm", "head": "norm"}[kind]


def rope_table(spec: ModelSpec, positions: np.ndarray) -> tuple[Integers, Integers]:
    """(cos, sin) (T, E/2) with 14 fractional bits."""
    from flatout.models.llama import rope_frequencies

    angles = np.asarray(positions, dtype=np.float64)[:, None] * rope_frequencies(spec).numpy().astype(
        np.float64
    )
    cos, sin = (np.rint(f(angles) * 16384).astype(np.int64) for f in (np.cos, np.sin))
    return cos, sin


class KeyValues:
    """Keys and values of one sequence: codes (S, G, E) and scales of each layer."""

    def __init__(self, spec: ModelSpec, capacity: int) -> None:
        shape = (spec.num_layers, 2, capacity, spec.num_kv_heads)
        self.codes = np.zeros((*shape, spec.head_dim), dtype=np.int64)
        self.mantissas = np.zeros(shape, dtype=np.int64)
        self.exponents = np.zeros(shape, dtype=np.int64)
        self.length = 0


def forward(
    model: IntegerModel, tokens: np.ndarray, memory: KeyValues, listen: Listen | None = None
) -> Integers:
    """Logits (T, V) with FRACTIONS.linear fractional bits of `tokens` (T,), which follow `memory`."""
    spec = model.spec
    say = listen or (lambda name, value: None)
    positions = np.arange(memory.length, memory.length + len(tokens))
    turns = rope_table(spec, positions)
    x = model.embedding[tokens].astype(np.int64) << model.embedding_shift
    for layer in range(spec.num_layers):
        p = f"layers.{layer}."
        qkv = normed_linear(model, p + "input_norm", p + "qkv", x)
        say(p + "qkv", qkv)
        read = attention(spec, layer, qkv, turns, positions, memory)
        say(p + "read", read)
        x = integer.saturate(x + plain_linear(model, p + "o", read), integer.WIDE)
        say(p + "attended", x)
        gate, up = np.split(normed_linear(model, p + "post_norm", p + "gate_up", x), 2, axis=1)
        hidden = integer.silu_product(gate, up)
        say(p + "hidden", hidden)
        x = integer.saturate(x + plain_linear(model, p + "down", hidden), integer.WIDE)
        say(p + "out", x)
    memory.length += len(tokens)
    logits = normed_linear(model, "norm", "head", x)
    say("logits", logits)
    return logits


def normed_linear(model: IntegerModel, norm: str, linear: str, x: Integers) -> Integers:
    weight, factor = model.norms[norm], norm_constant(model.spec)
    codes, by = integer.norm(x, weight.gamma, NORM_SHIFT, weight.epsilon, factor.mantissa, model.chunk)
    return integer.multiply(model.sums(linear, codes), by, linear_shift(model, linear))


def plain_linear(model: IntegerModel, linear: str, x: Integers) -> Integers:
    """What is added to the residual, at 32 bits: some models' first token is 100 times as large there."""
    factor = code_constant()
    codes, mantissa, exponent = integer.quantise_chunks(x, model.chunk)
    by = integer.multiplier_of(mantissa, exponent, factor.mantissa)
    return integer.multiply(model.sums(linear, codes), by, linear_shift(model, linear), integer.WIDE)


def attention(
    spec: ModelSpec,
    layer: int,
    qkv: Integers,
    turns: tuple[Integers, Integers],
    positions: np.ndarray,
    memory: KeyValues,
) -> Integers:
    """What each token reads, (T, H * E): its keys and values go to `memory` first, as codes."""
    tokens, end = len(qkv), int(positions[-1]) + 1
    heads = qkv.reshape(tokens, -1, spec.head_dim)
    H, G = spec.num_heads, spec.num_kv_heads
    turned = integer.rotate(heads[:, : H + G], *turns)
    for which, words in enumerate((turned[:, H:], heads[:, H + G :])):
        codes, mantissa, exponent = integer.quantise(words)
        memory.codes[layer, which, positions] = codes
        memory.mantissas[layer, which, positions] = mantissa
        memory.exponents[layer, which, positions] = exponent
    q_codes, q_mantissa, q_exponent = integer.quantise(turned[:, :H])
    factor = score_constant(spec)
    by = integer.multiplier_of(q_mantissa, q_exponent, factor.mantissa)
    shift = base_shift(factor, FRACTIONS.linear, FRACTIONS.score, FRACTIONS.linear)
    hidden = np.arange(end)[None, :] > positions[:, None]
    out = np.empty((tokens, H, spec.head_dim), dtype=np.int64)
    for h in range(H):
        g = h // (H // G)
        keys, values = memory.codes[layer, :, :end, g]
        scale = memory.mantissas[layer, 0, :end, g] << memory.exponents[layer, 0, :end, g]
        dots = (q_codes[:, h].astype(np.float32) @ keys.astype(np.float32).T).astype(np.int64)
        scores = integer.multiply(dots * scale, Multiplier(by.mantissa[:, h], by.shift[:, h]), shift)
        scores = np.where(hidden, -(1 << 30), scores)
        p = integer.exp2_below(scores.max(axis=1, keepdims=True) - scores)
        weights = integer.weigh(p, memory.mantissas[layer, 1, :end, g], memory.exponents[layer, 1, :end, g])
        read = (weights.astype(np.float64) @ values.astype(np.float64)).astype(np.int64)
        out[:, h] = integer.divide_by_sum(read, p.sum(axis=1), code_constant())
    return out.reshape(tokens, -1)
