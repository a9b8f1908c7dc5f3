"""What OpenVINO's and ONNX Runtime's workers share, and what each tells its library."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flatout.bench.workers import greedy, onnx_runtime, openvino_runtime

VOCABULARY = 11


class Counting(greedy.Session):
    """A session that predicts token + 1 and writes down what it is asked."""

    def __init__(self) -> None:
        self.began: list[tuple[int, int]] = []
        self.seen: list[tuple[list[list[int]], int, list[int]]] = []

    def begin(self, sequences: int, positions: int) -> None:
        self.began.append((sequences, positions))

    def step(self, tokens: np.ndarray, past: int, wanted: np.ndarray) -> np.ndarray:
        self.seen.append((tokens.tolist(), past, wanted.tolist()))
        logits: np.ndarray = np.eye(VOCABULARY, dtype=np.float32)[(tokens[:, wanted] + 1) % VOCABULARY]
        return logits


def test_decode_feeds_each_sequence_its_own_last_prediction() -> None:
    session = Counting()
    assert session.decode([[1, 2, 3], [7, 8, 9]], 2) > 0
    assert session.began == [(2, 5)]
    assert session.seen == [
        ([[1, 2, 3], [7, 8, 9]], 0, [2]),
        ([[4], [10]], 3, [0]),
        ([[5], [0]], 4, [0]),
    ]


def test_prefill_asks_for_the_last_logits_only() -> None:
    session = Counting()
    assert session.prefill([[1, 2, 3, 4]]) > 0
    assert (session.began, session.seen) == ([(1, 4)], [([[1, 2, 3, 4]], 0, [3])])


def test_a_first_token_takes_in_the_prompt_once() -> None:
    session = Counting()
    assert session.first([1, 2, 3]) is True
    assert session.seen == [([[1, 2, 3]], 0, [2])]


def test_scores_are_log_probabilities_of_the_next_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy, "_ROWS", 2)
    total = np.log(np.e + VOCABULARY - 1)  # one logit of 1, the others 0
    session = Counting()
    scores = session.score([1, 2, 3, 4, 5, 9])
    assert scores == pytest.approx([1 - total] * 4 + [-total])
    assert len(session.seen) == 1
    assert all(isinstance(score, float) for score in scores)


def test_batches_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one length, not \[1, 2\]"):
        Counting().prefill([[1], [1, 2]])


class FakeRequest:
    """An infer request whose logits are the token + 1, at the wanted positions."""

    def __init__(self) -> None:
        self.inputs: list[dict[str, Any]] = []
        self.resets = 0

    def reset_state(self) -> None:
        self.resets += 1

    def infer(self, inputs: dict[str, Any], share_inputs: bool, share_outputs: bool) -> dict[str, np.ndarray]:
        self.inputs.append(inputs)
        following = (inputs["input_ids"][:, inputs["wanted"]] + 1) % VOCABULARY
        return {"logits": np.eye(VOCABULARY, dtype=np.float32)[following]}


def test_openvino_gets_positions_and_a_mask_of_everything_so_far() -> None:
    peer = openvino_runtime.Peer.__new__(openvino_runtime.Peer)
    peer._request = FakeRequest()
    assert peer.decode([[1, 2, 3], [7, 8, 9]], 1) > 0
    first, second = peer._request.inputs
    assert peer._request.resets == 1
    assert first["position_ids"].tolist() == [[0, 1, 2]] * 2
    assert second["position_ids"].tolist() == [[3]] * 2
    assert second["attention_mask"].shape == (2, 4)
    assert second["beam_idx"].tolist() == [0, 1]
    assert second["input_ids"].tolist() == [[4], [10]]


class FakeBinding:
    """An IO binding: the last input by name; past and present that were bound."""

    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}

    def bind_output(self, name: str, device: str) -> None:
        self.outputs.setdefault(name, None)

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.inputs[name] = value

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        self.outputs[name] = value

    def bind_cpu_input(self, name: str, value: np.ndarray) -> None:
        self.inputs[name] = value

    def get_outputs(self) -> list[Any]:
        tokens = self.inputs["input_ids"][:, self.inputs["wanted"]]
        logits = np.eye(VOCABULARY, dtype=np.float32)[(tokens + 1) % VOCABULARY]
        assert next(iter(self.outputs)) == "logits"
        return [SimpleNamespace(numpy=lambda: logits)]


@pytest.fixture
def onnx() -> onnx_runtime.Peer:
    peer = onnx_runtime.Peer.__new__(onnx_runtime.Peer)
    peer._runtime = SimpleNamespace(OrtValue=SimpleNamespace(ortvalue_from_numpy=lambda array: array))
    peer._session = SimpleNamespace(io_binding=FakeBinding, run_with_iobinding=lambda binding: None)
    peer._layers, peer._heads, peer._head_size, peer._bindings = 2, 3, 4, {}
    return peer


def test_onnx_runtime_appends_to_its_cache_in_place(onnx: onnx_runtime.Peer) -> None:
    assert onnx.decode([[1, 2, 3]], 2) > 0
    binding = onnx._binding
    for layer in range(2):
        for kind in ("key", "value"):
            past = binding.inputs[f"past_key_values.{layer}.{kind}"]
            assert past is binding.outputs[f"present.{layer}.{kind}"]
            assert past.shape == (1, 3, 256, 4)
    assert binding.inputs["attention_mask"].shape == (1, 5)
    assert binding.inputs["input_ids"].tolist() == [[5]]


def test_onnx_runtime_keeps_a_cache_for_each_size_of_work(onnx: onnx_runtime.Peer) -> None:
    onnx.prefill([[1] * 256])
    first = onnx._binding
    onnx.decode([[1] * 200], 4)
    assert onnx._binding is first
    onnx.decode([[1] * 256], 1)
    onnx.decode([[1]] * 8, 1)
    assert sorted(onnx._bindings) == [(1, 256), (1, 512), (8, 256)]


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_builder_is_told_the_recipe(symmetric: bool) -> None:
    arguments = onnx_runtime.builder_arguments("in", "out", 32, symmetric)
    assert arguments[:4] == ["-i", "in", "-o", "out"]
    assert {"-p", "int4", "-e", "cpu"} <= set(arguments)
    options = arguments[arguments.index("--extra_options") + 1 :]
    assert {"block_size=32", "accuracy_level=4", f"is_symmetric={symmetric}".lower()} <= set(options)
