"""The worker of benchmarks/automatic.py: NNCF's automatic modes on OpenVINO. Runs in that peer's environment.

accuracy    nncf.quantize_with_accuracy_control: weights and activations in 8 bits, operations put back into
            floats until the loss on validation text is within the budget
mixed       nncf.compress_weights to 4 bits with AWQ and scale estimation; NNCF's sensitivity puts the rest
            into 8 bits: of the shares it is asked for, the largest whose loss on validation text is within
            the budget
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from workers.greedy import log_probabilities
from workers.openvino_runtime import Peer as OpenVino

_SHARES = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
_GROUP = 64


class Peer(OpenVino):
    """See `workers.serve`."""

    def convert(  # type: ignore[override]
        self, source: str, target: str, threads: int, mode: str, texts: str, budget: float
    ) -> bool:
        """Write the folder `target`. texts: a JSON file of token lists, "calibration" and "validation".
        budget: nats a token that may be lost."""
        nncf = importlib.import_module("nncf")
        content = json.loads(Path(texts).read_text())
        calibration = nncf.Dataset([_inputs(tokens) for tokens in content["calibration"]])
        validation = nncf.Dataset(content["validation"])
        Path(target).mkdir()
        if mode == "accuracy":
            model = nncf.quantize_with_accuracy_control(
                self.exported(source, threads),
                calibration,
                validation,
                self._likelihood,
                max_drop=budget,
                drop_type=nncf.DropType.ABSOLUTE,
                model_type=nncf.ModelType.TRANSFORMER,
            )
            self.save(model, target)
            return True
        before = self._mean(self.exported(source, threads), content["validation"])
        for share in _SHARES:
            model = self.exported(source, threads)
            if share:
                model = nncf.compress_weights(
                    model,
                    mode=nncf.CompressWeightsMode.INT4_ASYM,
                    ratio=share,
                    group_size=_GROUP,
                    dataset=calibration,
                    awq=True,
                    scale_estimation=True,
                )
            else:
                model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
            lost = before - self._mean(model, content["validation"])
            print(f"mixed, {share:.0%} of the layers in 4 bits: {lost:.4f} nats a token", flush=True)
            if lost <= budget:
                break
        self.save(model, target)
        return True

    def _mean(self, model: Any, documents: list[list[int]]) -> float:
        return self._likelihood(self._openvino.Core().compile_model(model, "CPU"), documents)[0]

    def _likelihood(self, compiled: Any, documents: Iterable[list[int]]) -> tuple[float, None]:
        """Mean log-probability of the documents' tokens, as NNCF asks for a metric: more is better."""
        request, found = compiled.create_infer_request(), []
        for document in documents:
            request.reset_state()
            logits = request.infer(_inputs(document[:-1]))["logits"]
            found += log_probabilities(logits[0], np.array(document[1:]))
        return float(np.mean(found)), None


def _inputs(tokens: list[int]) -> dict[str, np.ndarray]:
    count = len(tokens)
    return {
        "input_ids": np.array([tokens], dtype=np.int64),
        "attention_mask": np.ones((1, count), dtype=np.int64),
        "position_ids": np.arange(count, dtype=np.int64)[None],
        "beam_idx": np.zeros(1, dtype=np.int32),
    }
