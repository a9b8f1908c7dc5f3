"""Model: the weights of one spec under one recipe. What `compress` makes, the artifact stores and runners
load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from flatout.core.formats import Format, Recipe, parse_format
from flatout.core.quantized import QuantizedTensor
from flatout.core.spec import ModelSpec
from flatout.errors import ModelFileError

Weight = np.ndarray | QuantizedTensor
Shape = tuple[int, ...]


class OnDemand(Mapping[str, Weight]):
    """Weights that are read, and checked, whenever they are asked for: a runner that packs one after another
    never holds a second copy of all.

    forget: gives pages of the files back to the system; called before each weight is read.
    """

    def __init__(
        self,
        spec: ModelSpec,
        recipe: Recipe,
        read: Callable[[str, Shape, Format], Weight],
        forget: Callable[[], None] = lambda: None,
    ) -> None:
        self._expected = {name: (shape, fmt) for name, shape, fmt in expected_weights(spec, recipe)}
        self._read, self.forget = read, forget

    def __getitem__(self, name: str) -> Weight:
        shape, fmt = self._expected[name]
        self.forget()
        weight = self._read(name, shape, fmt)
        _check_weight(name, weight, shape, fmt)
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._expected)

    def __len__(self) -> int:
        return len(self._expected)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """Weights by fused name; see `expected_weights` for the names, shapes and formats.

    Float weights (fp32 and bf16 formats, norms, biases) are float32 arrays; a runner rounds to bf16 itself.
    """

    spec: ModelSpec
    recipe: Recipe
    weights: Mapping[str, Weight]

    def __post_init__(self) -> None:
        if isinstance(self.weights, OnDemand):
            return
        for name, shape, fmt in expected_weights(self.spec, self.recipe):
            weight = self.weights.get(name)
            if weight is None:
                raise ModelFileError(
                    "every weight of the spec must be there", f"no {name}", "re-create the model"
                )
            _check_weight(name, weight, shape, fmt)


def dense(weight: Weight) -> np.ndarray:
    """The weight as floats, (N, K) or (N,)."""
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight


def equal(a: Weight, b: Weight) -> bool:
    """Whether both hold the same numbers, which is quick for views of the same memory."""
    if a is b:
        return True
    if isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor):
        parts = (a.codes, b.codes), (a.scales, b.scales), (a.zeros, b.zeros), (a.minima, b.minima)
        return a.format == b.format and all(_same(*pair) for pair in parts)
    return isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and _same(a, b)


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None:
        return a is b
    views = (a.ctypes.data, a.shape, a.strides, a.dtype) == (b.ctypes.data, b.shape, b.strides, b.dtype)
    return views or np.array_equal(a, b)


def _check_weight(name: str, weight: Weight, shape: Shape, fmt: Format) -> None:
    if weight.shape != shape:
        raise ModelFileError(
            f"{name} must have shape {shape}", str(weight.shape), "check config.json against the weights"
        )
    found = weight.format if isinstance(weight, QuantizedTensor) else None
    if found != (fmt if fmt.is_integer else None):
        raise ModelFileError(
            f"{name} must be in format {fmt.name}",
            found.name if found is not None else "a float array",
            "re-create the model",
        )


def expected_weights(spec: ModelSpec, recipe: Recipe) -> Iterator[tuple[str, tuple[int, ...], Format]]:
    """(name, shape, format) of every weight of a Model.

    embedding (V, D), layers.I.{input_norm (D), qkv (N, D), o, post_norm (D), gate_up (2F, D), down (D, F)},
    optional layers.I.qkv_bias (N) and layers.I.{q_norm, k_norm} (E), norm (D), head (V, D). Rows of qkv are
    q, k, v; rows of gate_up are gate, up. RoPE pairs dimension e with e + E/2 (the Hugging Face order).
    """
    fp32 = parse_format("fp32")
    D = spec.hidden_size
    yield "embedding", (spec.vocab_size, D), parse_format(recipe.embedding)
    for i in range(spec.num_layers):
        p = f"layers.{i}."
        yield p + "input_norm", (D,), fp32
        for linear, shape in spec.linears().items():
            yield p + linear, shape, recipe.format_of(i, linear)
        yield p + "post_norm", (D,), fp32
        if spec.qkv_bias:
            yield p + "qkv_bias", (spec.qkv_size,), fp32
        if spec.qk_norm:
            yield p + "q_norm", (spec.head_dim,), fp32
            yield p + "k_norm", (spec.head_dim,), fp32
    yield "norm", (D,), fp32
    yield "head", (spec.vocab_size, D), parse_format(recipe.head)
