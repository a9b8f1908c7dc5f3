"""What exports hold and cost: GGUF files in llama.cpp, entropy-coded folders in bytes and load time.

    python benchmarks/export.py [--model smollm2-135m] [--encoder minilm] [--write]

GGUF: for every recipe the file is written, loaded by llama.cpp (of `flatout bench --against llama.cpp`, which
installs it) and its logits on 64 tokens compared with those of the file's exact weights in float32; and a
text's tokens are compared. llama.cpp rounds activations and its KV cache, so small differences stay.
Coded: weight files before and after, and seconds to read and decode all weights beside reading plain ones
(best of three, pages of the file in memory, one thread of four decoding at a time as cores allow).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from flatout.bench.install import install
from flatout.core.checkpoint import open_checkpoint
from flatout.core.coded import open_weights
from flatout.core.encoder_folder import open_encoder
from flatout.export.coded import code_folder
from flatout.export.export import export
from flatout.models.llama import Llama
from record import measured_here, write

RECIPES = ("bf16", "native", "w8a8-g32", "w4a8-g32", "w4a16-g32-asym,head=w8a8-g32,embedding=w8a8-g32")
CODED = ("bf16", "w8a8", "w4a16-g32", "bf16,sparsity=magnitude-2:4")
TEXT = (
    "In 1999 the old man's boat wasn't there; caf\u00e9s were closed.\n\n"
    "  def f(x): return x**2 # \u4f60\u597d"
)
SCRIPT = """
import sys, numpy as np
from llama_cpp import Llama
path, ids, out, text = sys.argv[1], [int(i) for i in sys.argv[2].split(",")], sys.argv[3], sys.argv[4]
model = Llama(model_path=path, logits_all=True, n_ctx=256, verbose=False, n_threads=1)
model.eval(ids)
np.savez(out, logits=np.array(model.scores[:len(ids)]),
         tokens=model.tokenize(text.encode(), add_bos=False, special=True))
"""


def in_llama(python: Path, path: Path, ids: list[int], folder: Path) -> tuple[np.ndarray, list[int]]:
    """(logits (T, V), tokens of TEXT) that llama.cpp gives for a file."""
    out = folder / "out.npz"
    command = [str(python), "-c", SCRIPT, str(path), ",".join(map(str, ids)), str(out), TEXT]
    subprocess.run(command, check=True, capture_output=True)
    with np.load(out) as found:
        return found["logits"], found["tokens"].tolist()


def gguf_rows(model: str, folder: Path) -> list[dict[str, Any]]:
    python = install("llama.cpp", lambda *_: None)
    rows = []
    for recipe in RECIPES:
        path = folder / "m.gguf"
        result = export(model, "gguf", path, recipe=recipe)
        again = open_checkpoint(path)
        ids = (again.tokenizer.encode(TEXT) * 4)[:64]
        ours = Llama(again).forward(ids).numpy()
        theirs, tokens = in_llama(python, path, ids, folder)
        difference = ours - theirs
        rows.append(
            {
                "recipe": recipe,
                "bytes": result["bytes"],
                "rounded_minima": result["rounded_minima"],
                "max_logit_error_reread": result["max_logit_error"],
                "llama_cpp_greatest": float(np.abs(difference).max() / np.abs(ours).max()),
                "llama_cpp_rms": float(np.sqrt((difference**2).mean()) / np.abs(ours).max()),
                "llama_cpp_same_next_token": float((ours.argmax(1) == theirs.argmax(1)).mean()),
                "llama_cpp_same_tokens": tokens == again.tokenizer.encode(TEXT),
            }
        )
        print(rows[-1], flush=True)
    return rows


def read_all(folder: Path) -> float:
    """Seconds to have every tensor of a folder's weight files, the best of three."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for path in sorted(folder.glob("*.safetensors")):
            file = open_weights(path)
            for name in file.names:
                np.array(file.array(name), copy=True)
        best = min(best, time.perf_counter() - start)
    return best


def coded_row(name: str, plain: Path, folder: Path) -> dict[str, Any]:
    coded = folder / "coded"
    start = time.perf_counter()
    before, after = code_folder(plain, coded)
    seconds = time.perf_counter() - start
    row = {
        "what": name,
        "bytes": before,
        "coded_bytes": after,
        "share": after / before,
        "coding_s": seconds,
        "plain_read_s": read_all(plain),
        "coded_read_s": read_all(coded),
    }
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--write", action="store_true", help="keep a results file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        gguf = gguf_rows(args.model, Path(temporary))
    coded = []
    for recipe in CODED:
        with tempfile.TemporaryDirectory() as temporary:
            export(args.model, "folder", Path(temporary) / "plain", recipe=recipe)
            coded.append(coded_row(recipe, Path(temporary) / "plain", Path(temporary)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = open_encoder(args.encoder).path
        coded.append(coded_row(f"{args.encoder}, as it is", folder, Path(temporary)))
    if args.write:
        result = measured_here("numpy", "torch") | {"model": args.model, "gguf": gguf, "coded": coded}
        print(write("export", result, "python " + " ".join(Path(a).name for a in sys.argv)))


if __name__ == "__main__":
    main()
