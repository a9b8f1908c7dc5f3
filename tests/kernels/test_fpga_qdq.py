"""The ONNX file in ONNX Runtime's CPU provider against the same arithmetic in PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.tiny import tiny_model, tiny_spec

from flatout.core.formats import uniform
from flatout.errors import UnsupportedModelError
from flatout.fpga.qdq import StaticLlama, calibrate, write_qdq
from flatout.models.llama import Llama


@pytest.mark.parametrize("tokens", [1, 9])
def test_the_file_computes_the_same(tokens: int, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxruntime")
    pytest.importorskip("onnx", reason="pip install onnx onnxruntime")
    spec = tiny_spec(num_layers=3, num_heads=6, num_kv_heads=2, rms_norm_eps=1e-6)
    model = tiny_model(spec, uniform("w8a8"))
    text = np.random.default_rng(4).integers(0, spec.vocab_size, 40)
    ranges = calibrate(model, text)
    path = tmp_path / "model.onnx"
    write_qdq(model, ranges, tokens, path)
    # Without rewriting, every QuantizeLinear and MatMul runs as it stands in the file.
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"tokens": text[:tokens].astype(np.int64)})
    expected = StaticLlama(model, ranges).forward(text[:tokens]).numpy()
    np.testing.assert_array_equal(found.argmax(axis=1), expected.argmax(axis=1))
    # Sums in another order may move an input of a rounding across its border: one code of one linear.
    exact = Llama(model).forward(text[:tokens]).numpy()
    assert np.abs(found - expected).max() < 0.1 * np.abs(exact - expected).max()


def test_other_formats_are_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("onnx", reason="pip install onnx")
    model = tiny_model(tiny_spec(), uniform("w4a8-g32"))
    with pytest.raises(UnsupportedModelError, match="must have 8 bits and one scale a row"):
        write_qdq(model, calibrate(model, np.arange(5)), 5, tmp_path / "model.onnx")
