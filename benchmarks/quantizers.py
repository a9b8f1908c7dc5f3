"""What other programs make of the same weights, judged as benchmarks/methods.py judges ours.

`--tools FOLDER`: GPTQ and AWQ of llm-compressor and AutoRound, each on the calibration windows that ours had
(benchmarks/quantizer_tools.py). `--others`: llama.cpp's own quantiser. The program is the one that `flatout
bench --against llama.cpp` installs. Its files are read back by the gguf library and scored as floats on our
engine, so that only the weights differ. K-quants need widths that 256 divides; where they do not (576 here)
llama.cpp takes its 32-wide blocks of more bits instead, which the bits a weight show.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

from flatout.core.checkpoint import Checkpoint
from flatout.core.folder import write_folder
from flatout.core.fuse import assemble, float_recipe
from flatout.core.gguf_config import gguf_name, unpermuted_rows
from flatout.core.model import Model
from flatout.core.quantized import QuantizedTensor
from flatout.core.sources import cache_dir
from flatout.core.spec import ModelSpec
from flatout.export.gguf import write_model
from flatout.hardware.detect import detect

TOOLS = {
    "llm-compressor GPTQ": "gptq", "llm-compressor AWQ": "awq", "AutoRound, 200 iterations": "autoround",
}  # fmt: skip
TYPES = {"Q3_K_M": 12, "Q4_0": 2, "Q4_1": 3, "Q4_K_M": 15}
"""Names and numbers of llama.h's llama_ftype."""
_MAKE = """
import sys, llama_cpp
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype, parameters.nthread, parameters.allow_requantize = int(sys.argv[3]), int(sys.argv[4]), True
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), parameters))
"""


def other_rows(
    source: Checkpoint, judge: Callable[[Model], dict[str, float]], threads: int, kept: Path
) -> list[dict[str, Any]]:
    """A row for each of TYPES, kept as methods.py keeps its own; [] where llama.cpp is not installed."""
    python = cache_dir() / "peers" / "llama.cpp" / "bin" / "python"
    if not python.exists():
        print("llama.cpp is not installed: flatout bench MODEL --against llama.cpp", file=sys.stderr)
        return []
    rows = []
    with tempfile.TemporaryDirectory(dir=kept) as folder:
        floats = Path(folder) / "float.gguf"
        for name, number in TYPES.items():
            key = hashlib.sha256(json.dumps([source.sha256, name]).encode()).hexdigest()[:32]
            file = kept / f"{key}.json"
            if not file.exists():
                if not floats.exists():
                    write_model(assemble(source, float_recipe("fp32")), source.tokenizer, floats, "float")
                made, start = Path(folder) / f"{name}.gguf", time.perf_counter()
                command = [str(python), "-c", _MAKE, str(floats), str(made), str(number), str(threads)]
                subprocess.run(command, check=True, capture_output=True)
                seconds = time.perf_counter() - start
                model = assemble(GgufWeights(made, source.spec), float_recipe("bf16"))
                found = {
                    "row": f"llama.cpp {name}",
                    "bits_per_weight": file_bits(made),
                    "seconds": seconds,
                    **judge(model),
                }
                made.unlink()
                file.write_text(json.dumps(found), encoding="utf-8")
            rows.append(json.loads(file.read_text(encoding="utf-8")))
            print(rows[-1], flush=True)
    return rows


def tool_rows(
    source: Checkpoint,
    calibration: list[list[int]],
    judge: Callable[[Model], dict[str, float]],
    packages: Path,
    threads: int,
    kept: Path,
    chosen: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Rows of TOOLS, whose packages lie in the folder `packages`, at 4 and 3 bits, a scale for 64 weights.
    chosen: only these, such as "gptq-4"."""
    rows = []
    with tempfile.TemporaryDirectory(dir=kept) as temporary:
        folder, made = Path(temporary), Path(temporary) / "made.npz"
        np.save(folder / "tokens.npy", np.array(calibration, dtype=np.int64))
        for bits, (name, tool) in itertools.product((4, 3), TOOLS.items()):
            if chosen and f"{tool}-{bits}" not in chosen:
                continue
            key = hashlib.sha256(json.dumps([source.sha256, name, bits, calibration]).encode()).hexdigest()
            file = kept / f"{key[:32]}.json"
            if not file.exists():
                if not (folder / "config.json").exists():
                    arrays = {tensor: source.array(tensor) for tensor in source.names}
                    write_folder(folder, source.spec, source.tokenizer, arrays)
                script = Path(__file__).with_name("quantizer_tools.py")
                command = [
                    sys.executable,
                    str(script),
                    tool,
                    str(folder),
                    str(folder / "tokens.npy"),
                    str(made),
                ]
                environment = os.environ | {
                    "PYTHONPATH": str(packages), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
                }  # fmt: skip
                subprocess.run([*command, "--bits", str(bits)], check=True, env=environment)
                with np.load(made) as weights:
                    seconds, cpu_seconds = weights["seconds"].tolist()
                    model = assemble(Loaded(source, dict(weights)), float_recipe("bf16"))
                found = {
                    "row": f"{name}, w{bits} g64",
                    "machine": detect().name,
                    "bits_per_weight": bits + (16 + bits) / 64,
                    "seconds": seconds,
                    "cpu_seconds": cpu_seconds,
                    **judge(model),
                }
                file.write_text(json.dumps(found), encoding="utf-8")
            rows.append(json.loads(file.read_text(encoding="utf-8")))
            print(rows[-1], flush=True)
    return rows


@dataclass(frozen=True, eq=False)
class Loaded:
    """A Source of another's tensors, some of them changed."""

    original: Checkpoint
    changed: dict[str, np.ndarray]

    @property
    def spec(self) -> ModelSpec:
        return self.original.spec

    def array(self, name: str) -> np.ndarray:
        return self.changed[name] if name in self.changed else self.original.array(name)

    def native(self, name: str) -> QuantizedTensor | None:
        return None


class GgufWeights:
    """A Source of any GGUF file of a Llama, by the dequantisation of the gguf library."""

    def __init__(self, path: Path, spec: ModelSpec) -> None:
        self.spec = spec
        self._tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}

    def array(self, name: str) -> np.ndarray:
        tensor = self._tensors[gguf_name(name)]
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        array = array.reshape([int(size) for size in reversed(tensor.shape)])
        rows = unpermuted_rows(self.spec, "llama", name)
        return array if rows is None else array[rows]

    def native(self, name: str) -> QuantizedTensor | None:
        return None


def file_bits(path: Path) -> float:
    """Bits a weight of the layers' linears as the file holds them."""
    linears = [t for t in GGUFReader(path).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    return 8 * sum(int(t.n_bytes) for t in linears) / sum(int(t.n_elements) for t in linears)
