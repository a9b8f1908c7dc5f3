"""Sentences a second of the encoder minilm, ours beside others on the same tokens, interleaved.

    python benchmarks/encoder.py [MODEL] [--rounds N] [--formats w8a8,bf16] [--threads N]

Every round takes each program in turn, at batch 1 and 32 of 128 tokens. Others: transformers in float32 and
bfloat16, and, where these packages are importable, ONNX Runtime (export by torch.onnx, dynamic int8 of
onnxruntime.quantization) and OpenVINO (from the same float export: in its own precision, and by nncf, where
that is importable too, in int8). Beside speed the cosine similarity of every program's vectors with the
float32 original's, over validation passages cut to 128 tokens. Prints a table and writes a file to
benchmarks/results.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import flatout
from flatout.core.encoder_folder import open_encoder
from flatout.data.passages import load_passages
from flatout.engine.encoder import Encoder
from flatout.hardware.detect import detect
from record import measured_here, write

TOKENS, BATCHES = 128, (1, 32)
SECONDS = 0.4  # of each program, batch and round
Program = Callable[[np.ndarray], np.ndarray]
"""Token ids (B, 128) -> vectors (B, D) of length 1."""


def pooled(states: np.ndarray) -> np.ndarray:
    """The mean over tokens of states (B, T, D), of length 1: none of these batches is padded."""
    mean = states.astype(np.float32).mean(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def ours(model: str, name: str, threads: int) -> Program:
    encoder = flatout.load(model, format=name, threads=threads)
    assert isinstance(encoder, Encoder)

    def run(ids: np.ndarray) -> np.ndarray:
        return encoder.pooled(ids.reshape(-1), np.arange(len(ids)) * TOKENS)

    return run


def transformers_program(folder: Path, dtype: str) -> Program:
    import torch
    from transformers import BertModel

    model = BertModel.from_pretrained(folder, dtype=getattr(torch, dtype), add_pooling_layer=False).eval()

    def run(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return pooled(model(torch.from_numpy(ids)).last_hidden_state.float().numpy())

    return run


def export(folder: Path, target: Path) -> None:
    """The float32 model as ONNX, token ids (batch, 128) -> states."""
    import torch
    from transformers import BertModel

    model = BertModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="eager").eval()

    class States(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids).last_hidden_state

    batch = torch.export.Dim("batch", min=1, max=1024)
    example = torch.ones(2, TOKENS, dtype=torch.int64)
    torch.onnx.export(
        States().eval(), (example,), str(target), dynamo=True, dynamic_shapes={"ids": {0: batch}},
        input_names=["ids"], output_names=["states"], external_data=False, verbose=False,
    )  # fmt: skip


def onnxruntime_program(path: Path, threads: int) -> Program:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda ids: pooled(session.run(None, {"ids": ids})[0])


def openvino_program(path: Path, threads: int, calibration: np.ndarray | None) -> Program:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    if calibration is not None:
        import nncf

        model = nncf.quantize(
            model,
            nncf.Dataset([{"ids": row[None]} for row in calibration]),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
        )
    compiled = core.compile_model(
        model, "CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    )
    request = compiled.create_infer_request()

    def run(ids: np.ndarray) -> np.ndarray:
        request.infer({"ids": ids})
        return pooled(request.get_output_tensor(0).data)

    return run


def importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def programs(model: str, formats: list[str], threads: int, calibration: np.ndarray) -> dict[str, Program]:
    folder = open_encoder(model).path
    found = {f"flatout {name}": ours(model, name, threads) for name in formats}
    for dtype in ("float32", "bfloat16"):
        found[f"transformers {dtype}"] = transformers_program(folder, dtype)
    if not importable("onnx"):
        return found
    with tempfile.TemporaryDirectory() as temporary:
        path, rounded = Path(temporary) / "model.onnx", Path(temporary) / "int8.onnx"
        export(folder, path)
        if importable("onnxruntime"):
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(path, rounded, weight_type=QuantType.QInt8, per_channel=True)
            found["ONNX Runtime float32"] = onnxruntime_program(path, threads)
            found["ONNX Runtime int8"] = onnxruntime_program(rounded, threads)
        if importable("openvino"):
            found["OpenVINO"] = openvino_program(path, threads, None)
            if importable("nncf"):
                found["OpenVINO int8"] = openvino_program(path, threads, calibration)
    return found


def sentences_per_s(program: Program, ids: np.ndarray) -> float:
    program(ids)
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        program(ids)
        times.append(time.perf_counter() - start)
    return len(ids) / float(np.median(times))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="minilm")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--formats", default="fp32,bf16,w8a16,w8a8")
    parser.add_argument("--threads", type=int, help="of every program; default all cores")
    args = parser.parse_args()
    threads = args.threads or detect().cores
    import torch

    torch.set_num_threads(threads)
    tokenizer = open_encoder(args.model).tokenizer()

    def ids_of(split: str, count: int) -> np.ndarray:
        rows = tokenizer.encode_batch([p.text for p in load_passages(split)])
        return np.array([row[:TOKENS] for row in rows if len(row) >= TOKENS][:count], np.int64)

    texts = ids_of("validation", 128)
    contestants = programs(args.model, args.formats.split(","), threads, ids_of("calibration", 64))
    exact = contestants["transformers float32"](texts)
    rows: list[dict[str, Any]] = []
    for name, program in contestants.items():
        similarity = (program(texts) * exact).sum(1)
        rows.append({
            "program": name,
            "cosine_mean": float(similarity.mean()),
            "cosine_min": float(similarity.min()),
            "sentences_per_s": {str(batch): [] for batch in BATCHES},
        })  # fmt: skip
    for _ in range(args.rounds):
        for batch in BATCHES:
            for row in rows:
                speed = sentences_per_s(contestants[row["program"]], texts[:batch])
                row["sentences_per_s"][str(batch)].append(speed)
    batches = " | ".join(f"batch {batch}: sentences/s (p20-p80)" for batch in BATCHES)
    print(f"| program | {batches} | cosine: mean | least |")
    print("|---|--:|--:|--:|--:|")
    for row in rows:
        for batch, speeds in row["sentences_per_s"].items():
            low, mid, high = (float(np.percentile(speeds, p)) for p in (20, 50, 80))
            row["sentences_per_s"][batch] = {"p20": low, "median": mid, "p80": high, "rounds": speeds}
        cells = [
            f"{s['median']:.0f} ({s['p20']:.0f}-{s['p80']:.0f})" for s in row["sentences_per_s"].values()
        ]
        print(
            f"| {row['program']} | {' | '.join(cells)} | {row['cosine_mean']:.5f} | {row['cosine_min']:.5f} |"
        )
    result = {
        **measured_here("torch", "transformers", "onnxruntime", "openvino", "nncf"),
        "tokens": TOKENS,
        "threads": threads,
        "texts": len(texts),
        "rows": rows,
    }
    print(write("encoder", result, command=" ".join(["python benchmarks/encoder.py", *sys.argv[1:]])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
