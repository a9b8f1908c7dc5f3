"""Make the off-grid test model: the built-in model with every quantised weight moved inside its own cell.

    python benchmarks/make_offgrid.py OUT --seed 0

The built-in model's file is quantised already, so its weights lie on a grid, and a rounding method that
happens to find that grid again would look lossless. Here each weight w of a block with scale s becomes w +
(u - 1/2) * s, with u uniform in [0, 1) and seeded by tensor name: the same distribution of weights, on no
grid. The result is a checkpoint of its own, the original that recipes of it are compared with; norms are
kept.

Weights are stored as float32. Rounded to bfloat16 they would lie on a grid again, and the original would no
longer be what the file says. The folder loads in transformers like any other model (540 MB).
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from pathlib import Path

import numpy as np

from flatout.core.checkpoint import open_checkpoint
from flatout.core.folder import write_folder
from flatout.core.fuse import Source
from flatout.errors import ConfigError, FlatoutError


def dithered(checkpoint: Source, name: str, seed: int) -> np.ndarray:
    """Weight `name` as float32, moved by up to half a step where the file holds blocks."""
    values, blocks = checkpoint.array(name), checkpoint.native(name)
    if blocks is None:
        return values
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    steps = np.abs(blocks.scales.astype(np.float32)).repeat(blocks.format.group, axis=1)
    moved: np.ndarray = values + (rng.random(values.shape, dtype=np.float32) - np.float32(0.5)) * steps
    return moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="smollm2-135m")
    options = parser.parse_args()
    checkpoint, out = open_checkpoint(options.model), options.out
    if out.exists() and any(out.iterdir()):
        raise ConfigError("the output folder must be empty or absent", str(out), "another folder")
    moved = [name for name in checkpoint.names if checkpoint.native(name) is not None]
    if not moved:
        raise ConfigError("dither needs a model stored in GGUF blocks", options.model, "smollm2-135m")
    out.mkdir(parents=True, exist_ok=True)
    made_from = {
        "model": options.model,
        "sha256": checkpoint.sha256,
        "seed": options.seed,
        "moved": len(moved),
    }
    (out / "dither.json").write_text(json.dumps(made_from, indent=2) + "\n")
    weights = {name: dithered(checkpoint, name, options.seed) for name in checkpoint.names}
    write_folder(out, checkpoint.spec, checkpoint.tokenizer, weights)
    print(f"{out}: {len(moved)} of {len(checkpoint.names)} weights moved, seed {options.seed}")


if __name__ == "__main__":
    try:
        main()
    except FlatoutError as error:
        sys.exit(f"make_offgrid: {error}")
