"""GPTQ of a model in the shape of Llama-3.1-8B on a GPU: minutes, peak memory, and a kill on the way.

    python benchmarks/gptq_shape.py OUT.json [--format w4a16-g128-asym] [--tokens 16384] [--kill 3]

Weights are random, of sizes that keep activations finite: figures of quality mean nothing; seconds and bytes
do not depend on the values. They are drawn for one layer, and each further layer holds them in another order
of rows, as drawing seven billion numbers would take longer than rounding them. --kill N: a first process is
killed with SIGKILL as soon as N layers are kept, and a second one goes on; its result says from which layer.
Rounded layers are kept in OUT.json.kept while the work lasts.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from flatout.compress.gptq import gptq_layers
from flatout.compress.method import data_of
from flatout.core.formats import Recipe
from flatout.core.quantized import QuantizedTensor
from flatout.core.spec import ModelSpec, weight_names
from flatout.errors import FlatoutError
from record import measured_here

SHAPES = {
    "8b": ModelSpec(
        family="llama", vocab_size=8192, hidden_size=4096, intermediate_size=14336, num_layers=32,
        num_heads=32, num_kv_heads=8, head_dim=128, max_positions=8192,
    ),
    "tiny": ModelSpec(
        family="llama", vocab_size=256, hidden_size=256, intermediate_size=512, num_layers=4,
        num_heads=4, num_kv_heads=2, head_dim=64, max_positions=1024,
    ),
}  # fmt: skip
LENGTH = 512


@dataclass(frozen=True, eq=False)
class RandomSource:
    """A Source of random weights: those of layer 0, rows moved on by the layer's number."""

    spec: ModelSpec
    drawn: dict[str, np.ndarray] = field(default_factory=dict)

    def array(self, name: str) -> np.ndarray:
        first, layer = name, 0
        if ".layers." in name:
            number, rest = name.removeprefix("model.layers.").split(".", 1)
            first, layer = f"model.layers.0.{rest}", int(number)
        if first not in self.drawn:
            self.drawn[first] = self._draw(first)
        drawn = self.drawn[first]
        return np.roll(drawn, layer, axis=0) if layer else drawn

    def _draw(self, name: str) -> np.ndarray:
        shape = weight_names(self.spec)[name]
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        found: np.ndarray = (torch.randn(shape, generator=draw) / shape[1] ** 0.5).numpy()
        return found

    def native(self, name: str) -> QuantizedTensor | None:
        return None


def work(args: argparse.Namespace) -> None:
    """Round the model, or what an earlier process left of it, and write OUT.json."""
    spec = SHAPES[args.shape]
    spec = replace(spec, num_layers=args.layers or spec.num_layers)
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, spec.vocab_size, LENGTH) for _ in range(args.tokens // LENGTH)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seen: list[tuple[str, float]] = []
    start = time.perf_counter()

    def progress(what: str, done: int, total: int) -> None:
        seen.append((what, time.perf_counter() - start))
        if what.split(",")[0].endswith(".qkv"):
            print(f"{seen[-1][1]:7.1f} s  {what}", flush=True)

    recipe = Recipe(name=args.format, layers=args.format, embedding="bf16", head="bf16", method="gptq")
    data = data_of(documents, progress, Path(f"{args.out}.kept"), device)
    weights, report = gptq_layers(RandomSource(spec), data, recipe)
    gpu = device == "cuda"
    result = measured_here("torch", "numpy") | {
        "shape": args.shape, "recipe": args.format, "tokens": report.tokens, "device": device,
        "machine_gpu": torch.cuda.get_device_name() if gpu else "none",
        "seconds": report.seconds, "first_layer": seen[0][0].split(".")[1],
        "layers": spec.num_layers, "weights": sum(w.codes.size for w in weights.values()),
        "peak_gpu_gib": torch.cuda.max_memory_reserved() / 2**30 if gpu else None,
        "median_output_error": float(np.median(list(report.errors.values()))),
        "layer_starts": [[what.split(",")[0], at] for what, at in seen if ".qkv" in what],
    }  # fmt: skip
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print({key: value for key, value in result.items() if key != "layer_starts"})


def kill_and_go_on(args: argparse.Namespace) -> None:
    """Start the work, kill it once `args.kill` layers are kept, and start it again."""
    command = [sys.executable, *sys.argv, "--kill", "0"]
    kept = Path(f"{args.out}.kept")
    start = time.perf_counter()
    first = subprocess.Popen(command)
    while first.poll() is None and _kept_layers(kept) < args.kill:
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    killed = time.perf_counter() - start
    print(f"killed after {killed:.1f} s, {_kept_layers(kept)} layers kept", flush=True)
    subprocess.run(command, check=True)
    result = json.loads(Path(args.out).read_text(encoding="utf-8"))
    result |= {"killed_after_s": killed, "whole_s": time.perf_counter() - start}
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"both processes {result['whole_s']:.1f} s, the second went on at layer {result['first_layer']}")


def _kept_layers(folder: Path) -> int:
    """Layers from which another process goes on: those written before the newest state."""
    state = max((path.stat().st_mtime for path in folder.glob("*/state.npz")), default=0.0)
    return sum(path.stat().st_mtime <= state for path in folder.glob("*/layer-*.npz"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--format", default="w4a16-g128-asym")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--kill", type=int, default=0)
    parser.add_argument("--layers", type=int, default=0, help="fewer of them, to look into")
    args = parser.parse_args()
    (kill_and_go_on if args.kill else work)(args)


if __name__ == "__main__":
    try:
        main()
    except FlatoutError as error:
        sys.exit(f"gptq_shape: {error}")
