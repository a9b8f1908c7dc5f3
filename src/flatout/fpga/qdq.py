"""A Llama model as an ONNX graph with QuantizeLinear and DequantizeLinear, as AMD's NPU tools read it.

Opset 17, static shapes: one pass over T tokens from an empty cache. Every linear takes int8 weights with one
scale a row and int8 activations with one scale for the whole tensor, fixed by a calibration text: that is
coarser than the accelerator's own arithmetic, and models whose first token is far larger than the others lose
much by it. `StaticLlama` is the same in PyTorch. Never run on an NPU. Operators: onnx.ai/onnx/operators.

Legend: T tokens, V vocabulary, D width, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatout.core.model import Model
from flatout.core.quantized import QuantizedTensor
from flatout.errors import BackendError, UnsupportedModelError
from flatout.fpga.model import check_supported
from flatout.models.llama import Llama, rope_turns

OPSET, IR = 17, 8
CODE = 127


class Observer(Llama):
    """Runs the model exactly and notes the largest size of each linear's inputs."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.ranges: dict[str, float] = {}

    def _linear(self, name: str, x: Tensor) -> Tensor:
        self.ranges[name] = max(self.ranges.get(name, 0.0), float(x.abs().max()))
        return super()._linear(name, x)


class StaticLlama(Llama):
    """What the graph computes: activations rounded to int8 with the scale of `ranges`, half to even."""

    def __init__(self, model: Model, ranges: Mapping[str, float]) -> None:
        super().__init__(model)
        self._ranges = ranges

    def _linear(self, name: str, x: Tensor) -> Tensor:
        scale = np.float32(scale_of(self._ranges[name]))
        codes = torch.clamp(torch.round(x / float(scale)), -CODE - 1, CODE)
        return super()._linear(name, codes * float(scale))


def scale_of(largest: float) -> float:
    """The scale of int8 codes for values up to `largest`."""
    return max(largest, 1e-9) / CODE


def calibrate(model: Model, tokens: Sequence[int] | np.ndarray) -> dict[str, float]:
    """The largest input of each linear on `tokens` (T,)."""
    observer = Observer(model)
    observer.forward(tokens)
    return observer.ranges


def write_qdq(model: Model, ranges: Mapping[str, float], tokens: int, path: Path) -> None:
    """Write the graph for `tokens` tokens: input "tokens" int64 (T,), output "logits" float (T, V).

    Raises BackendError without the package onnx, UnsupportedModelError for a model or a format that the graph
    does not hold.
    """
    try:
        import onnx
    except ImportError as error:
        raise BackendError("an ONNX file needs the package onnx", str(error), "pip install onnx") from error
    check_supported(model.spec)
    graph = _Graph(onnx)
    _decoder(graph, model, ranges, tokens)
    made = graph.finish(tokens, model.spec.vocab_size)
    onnx.checker.check_model(made)
    onnx.save(made, str(path))


class _Graph:
    """Nodes and constants under construction; names are given where nobody asks for one."""

    def __init__(self, onnx: Any) -> None:
        self._onnx = onnx
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}

    def constant(self, name: str, value: np.ndarray) -> str:
        if name not in self._constants:
            self._constants[name] = self._onnx.numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def add(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Append a node; returns the name of its output, or of all of them."""
        names = [f"{kind}_{len(self._nodes)}_{i}" for i in range(outputs)]
        self._nodes.append(self._onnx.helper.make_node(kind, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def shape(self, x: str, *sizes: int) -> str:
        name = self.constant("shape_" + "_".join(map(str, sizes)), np.array(sizes, dtype=np.int64))
        found: str = self.add("Reshape", x, name)
        return found

    def finish(self, tokens: int, vocabulary: int) -> Any:
        helper, types = self._onnx.helper, self._onnx.TensorProto
        self._nodes[-1].output[0] = "logits"
        graph = helper.make_graph(
            self._nodes, "flatout",
            [helper.make_tensor_value_info("tokens", types.INT64, [tokens])],
            [helper.make_tensor_value_info("logits", types.FLOAT, [tokens, vocabulary])],
            list(self._constants.values()),
        )  # fmt: skip
        opset = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opset, ir_version=IR, producer_name="flatout")


def _decoder(graph: _Graph, model: Model, ranges: Mapping[str, float], tokens: int) -> None:
    spec = model.spec
    H, G, E = spec.num_heads, spec.num_kv_heads, spec.head_dim
    cos, sin = (turn.numpy() for turn in rope_turns(spec, torch.arange(tokens)))
    turns = [
        graph.constant("cos", np.concatenate([cos, cos], axis=2)),
        graph.constant("sin", np.concatenate([-sin, sin], axis=2)),
    ]
    hidden = np.triu(np.full((tokens, tokens), -1e30, dtype=np.float32), 1)
    graph.constant("hidden", hidden)
    graph.constant("score", np.array(E**-0.5, dtype=np.float32))
    graph.constant("epsilon", np.array(spec.rms_norm_eps, dtype=np.float32))
    graph.constant("split_qkv", np.array([spec.q_size, spec.kv_size, spec.kv_size], dtype=np.int64))

    def norm(name: str, x: str) -> str:
        mean = graph.add("ReduceMean", graph.add("Mul", x, x), axes=[1], keepdims=1)
        root = graph.add("Sqrt", graph.add("Add", mean, "epsilon"))
        weight = graph.constant(name, np.asarray(model.weights[name], dtype=np.float32))
        scaled: str = graph.add("Mul", graph.add("Div", x, root), weight)
        return scaled

    def linear(name: str, x: str) -> str:
        weight = _rows(name, model.weights[name])
        scale = graph.constant(f"{name}.input_scale", np.array(scale_of(ranges[name]), dtype=np.float32))
        zero = graph.constant("zero", np.zeros((), dtype=np.int8))
        codes = graph.constant(f"{name}.codes", weight.codes.T)
        scales = graph.constant(f"{name}.scales", weight.scales[:, 0].astype(np.float32))
        zeros = graph.constant(f"zeros_{len(weight.codes)}", np.zeros(len(weight.codes), dtype=np.int8))
        rounded = graph.add("DequantizeLinear", graph.add("QuantizeLinear", x, scale, zero), scale, zero)
        product: str = graph.add(
            "MatMul", rounded, graph.add("DequantizeLinear", codes, scales, zeros, axis=1)
        )
        return product

    def heads(x: str, count: int, turned: bool) -> str:
        x = graph.shape(x, tokens, count, E)
        if turned:
            first, second = graph.add("Split", x, outputs=2, axis=2)
            swapped = graph.add("Concat", second, first, axis=2)
            x = graph.add("Add", graph.add("Mul", x, turns[0]), graph.add("Mul", swapped, turns[1]))
        return graph.shape(graph.add("Transpose", x, perm=[1, 0, 2]), G, count // G, tokens, E)

    table = _rows("embedding", model.weights["embedding"])
    codes = graph.add("Gather", graph.constant("embedding.codes", table.codes), "tokens", axis=0)
    scales = graph.constant("embedding.scales", table.scales.astype(np.float32))
    x = graph.add("Mul", graph.add("Cast", codes, to=1), graph.add("Gather", scales, "tokens", axis=0))
    for layer in range(spec.num_layers):
        p = f"layers.{layer}."
        qkv = linear(p + "qkv", norm(p + "input_norm", x))
        q, k, v = graph.add("Split", qkv, "split_qkv", outputs=3, axis=1)
        q, k, v = heads(q, H, True), heads(k, G, True), heads(v, G, False)
        products = graph.add("MatMul", q, graph.add("Transpose", k, perm=[0, 1, 3, 2]))
        scores = graph.add("Add", graph.add("Mul", products, "score"), "hidden")
        read = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v)
        read = graph.add("Transpose", graph.shape(read, H, tokens, E), perm=[1, 0, 2])
        x = graph.add("Add", x, linear(p + "o", graph.shape(read, tokens, H * E)))
        gate, up = graph.add("Split", linear(p + "gate_up", norm(p + "post_norm", x)), outputs=2, axis=1)
        silu = graph.add("Mul", gate, graph.add("Sigmoid", gate))
        x = graph.add("Add", x, linear(p + "down", graph.add("Mul", silu, up)))
    linear("head", norm("norm", x))


def _rows(name: str, weight: object) -> QuantizedTensor:
    """`weight` if it has one symmetric 8-bit scale a row."""
    if isinstance(weight, QuantizedTensor) and weight.codes.dtype == np.int8 and weight.scales.shape[1] == 1:
        return weight
    found = weight.format.name if isinstance(weight, QuantizedTensor) else "a float array"
    raise UnsupportedModelError(f"{name} must have 8 bits and one scale a row", found, "recipe w8a8")
