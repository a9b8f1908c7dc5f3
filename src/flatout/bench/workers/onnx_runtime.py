"""ONNX Runtime as a peer: the model that ONNX Runtime GenAI's builder makes, driven as GenAI drives it.

Keys and values lie in buffers that are bound as past and as present, so that a step appends to them in place
(GenAI's past_present_share_buffer). GenAI itself hides the logits of a text. The head computes the wanted
positions only, which the builder can do for the last one.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from .greedy import Session

_MODEL = "model.onnx"
_CONFIG = "genai_config.json"
_ACCURACY_LEVEL = 4  # activations are multiplied in 8 bits
_GRANULE = 256  # positions that a cache grows by


def builder_arguments(source: str, target: str, block: int, symmetric: bool) -> list[str]:
    """Options of `python -m onnxruntime_genai.models.builder`.

    The embedding is no part of the head: the builder's file with both in one does not load when asymmetric.
    """
    options = {
        "block_size": block,
        "accuracy_level": _ACCURACY_LEVEL,
        "is_symmetric": str(symmetric).lower(),
        "shared_embeddings": "false",
    }
    arguments = ["-i", source, "-o", target, "-c", f"{source}/cache", "-p", "int4", "-e", "cpu"]
    return [*arguments, "--extra_options", *(f"{key}={value}" for key, value in options.items())]


class Peer(Session):
    """See `serve`."""

    def __init__(self) -> None:
        # By name: the package is in this peer's environment only.
        self._runtime: Any = importlib.import_module("onnxruntime")
        self._bindings: dict[tuple[int, int], Any] = {}

    def convert(self, source: str, target: str, threads: int, block: int, symmetric: bool) -> bool:
        """Build the transformers folder `source` into the folder `target`, weights in 4 bits."""
        arguments = builder_arguments(source, target, block, symmetric)
        module = "onnxruntime_genai.models.builder"
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
        )
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise RuntimeError(said[-1] if said else f"{module} gave {done.returncode}")
        _want_positions(Path(target) / _MODEL)
        return True

    def load(self, path: str, threads: int) -> dict[str, object]:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self._session = self._runtime.InferenceSession(
            str(Path(path) / _MODEL), options, providers=["CPUExecutionProvider"]
        )
        config = json.loads((Path(path) / _CONFIG).read_text(encoding="utf-8"))["model"]
        decoder = config["decoder"]
        self._layers = int(decoder["num_hidden_layers"])
        self._heads, self._head_size = int(decoder["num_key_value_heads"]), int(decoder["head_size"])
        return {
            "vocab_size": config["vocab_size"],
            "version": f"onnxruntime {self._runtime.__version__}",
            "details": f"accuracy level {_ACCURACY_LEVEL}, float32 KV cache in place",
        }

    def begin(self, sequences: int, positions: int) -> None:
        key = sequences, -(-positions // _GRANULE) * _GRANULE
        if key not in self._bindings:
            self._bindings[key] = self._bound(*key)
        self._binding = self._bindings[key]

    def step(self, tokens: np.ndarray, past: int, wanted: np.ndarray) -> np.ndarray:
        sequences, count = tokens.shape
        mask = np.ones((sequences, past + count), dtype=np.int64)
        self._binding.bind_cpu_input("input_ids", np.ascontiguousarray(tokens))
        self._binding.bind_cpu_input("attention_mask", mask)
        self._binding.bind_cpu_input("wanted", wanted)
        self._binding.bind_output("logits", "cpu")  # anew: the one of the last step has its shape
        self._session.run_with_iobinding(self._binding)
        logits: np.ndarray = self._binding.get_outputs()[0].numpy()
        return logits

    def _bound(self, sequences: int, positions: int) -> Any:
        """A binding with a cache of its own; what lies in it from earlier work is not looked at."""
        binding = self._session.io_binding()
        binding.bind_output("logits", "cpu")  # the first output
        shape = sequences, self._heads, positions, self._head_size
        for layer in range(self._layers):
            for kind in ("key", "value"):
                held = self._runtime.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype=np.float32))
                binding.bind_ortvalue_input(f"past_key_values.{layer}.{kind}", held)
                binding.bind_ortvalue_output(f"present.{layer}.{kind}", held)
        return binding


def _want_positions(path: Path) -> None:
    """Give the model an input `wanted`, the positions of which the head computes logits."""
    onnx: Any = importlib.import_module("onnx")
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    heads = [(i, node) for i, node in enumerate(graph.node) if "logits" in node.output]
    if len(heads) != 1 or not heads[0][1].op_type.startswith("MatMul"):
        raise RuntimeError("the logits must come out of one MatMul")
    place, head = heads[0]
    gather = onnx.helper.make_node("Gather", [head.input[0], "wanted"], ["wanted_hidden"], axis=1)
    head.input[0] = "wanted_hidden"
    graph.node.insert(place, gather)
    graph.input.append(onnx.helper.make_tensor_value_info("wanted", onnx.TensorProto.INT64, ["wanted"]))
    (logits,) = [output for output in graph.output if output.name == "logits"]
    logits.type.tensor_type.shape.dim[1].dim_param = "wanted"
    onnx.save(model, path)
