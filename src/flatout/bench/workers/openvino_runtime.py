"""OpenVINO as a peer: a stateful model on the CPU plugin, driven as OpenVINO GenAI drives it.

optimum-intel exports the model with its KV cache as state inside, NNCF compresses the weights, and the rest
are the plugin's defaults for latency: it chooses the arithmetic, quantises activations and holds the cache in
8 bits. GenAI's own pipeline hides the logits of a text; its speed is the same with this form of the model,
and lower for batches with its paged one. As there, the head computes the wanted positions only.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from .greedy import Session

_MODEL = "openvino_model.xml"


class Peer(Session):
    """See `serve`."""

    def __init__(self) -> None:
        # By name: the package is in this peer's environment only.
        self._openvino: Any = importlib.import_module("openvino")

    def convert(self, source: str, target: str, threads: int, bits: int, group: int) -> bool:
        """Export the transformers folder `source` to the folder `target`. 8 bits: a scale a row (group 0); 4
        bits: groups of `group`, embedding and head included."""
        nncf = importlib.import_module("nncf")
        model = self.exported(source, threads)
        if bits == 8:
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
        else:
            model = nncf.compress_weights(
                model,
                mode=nncf.CompressWeightsMode.INT4_ASYM,
                group_size=group,
                ratio=1.0,
                all_layers=True,
            )
        self.save(model, target)
        return True

    def exported(self, source: str, threads: int) -> Any:
        """The transformers folder `source` as a model of OpenVINO in float32."""
        export = importlib.import_module("optimum.exporters.openvino").export_from_model
        transformers, torch = importlib.import_module("transformers"), importlib.import_module("torch")
        torch.set_num_threads(threads)
        original = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        exported = Path(source) / "exported"
        export(original, exported, task="text-generation-with-past", stateful=True, preprocessors=None)
        del original
        return self._openvino.Core().read_model(exported / _MODEL)

    def save(self, model: Any, target: str) -> None:
        """Write the folder that `load` opens."""
        self._want_positions(model)
        self._openvino.save_model(model, Path(target) / _MODEL, compress_to_fp16=False)

    def load(self, path: str, threads: int) -> dict[str, object]:
        config = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": threads}
        model = self._openvino.Core().compile_model(Path(path) / _MODEL, "CPU", config)
        self._request = model.create_infer_request()
        arithmetic, cache, group = (
            model.get_property(key)
            for key in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
        )
        return {
            "vocab_size": model.output("logits").partial_shape[2].get_length(),
            "version": f"openvino {self._openvino.get_version()}",
            "details": f"latency hint, {arithmetic.to_string()} arithmetic, "
            f"activations in groups of {group}, {cache.to_string()} KV cache",
        }

    def begin(self, sequences: int, positions: int) -> None:
        self._request.reset_state()

    def step(self, tokens: np.ndarray, past: int, wanted: np.ndarray) -> np.ndarray:
        sequences, count = tokens.shape
        positions = np.arange(past, past + count, dtype=np.int64)
        inputs = {
            "input_ids": tokens,
            "attention_mask": np.ones((sequences, past + count), dtype=np.int64),
            "position_ids": np.repeat(positions[None], sequences, axis=0),
            "beam_idx": np.arange(sequences, dtype=np.int32),
            "wanted": wanted,
        }
        results = self._request.infer(inputs, share_inputs=True, share_outputs=True)
        logits: np.ndarray = results["logits"]
        return logits

    def _want_positions(self, model: Any) -> None:
        """Give the model an input `wanted`, the positions of which the head computes logits."""
        head = model.get_results()[0].input_value(0).get_node()
        if head.get_type_name() != "MatMul":
            raise RuntimeError(f"the logits must come out of a MatMul, not {head.get_type_name()}")
        operators: Any = importlib.import_module("openvino.opset13")
        wanted = operators.parameter([-1], np.int64, name="wanted")
        wanted.output(0).set_names({"wanted"})
        axis = operators.constant(1, dtype=np.int64)
        hidden = operators.gather(head.input_value(0), wanted, axis)
        head.input(0).replace_source_output(hidden.output(0))
        model.add_parameters([wanted])
        model.validate_nodes_and_infer_types()
