"""Whether learned rotations pay: SpinQuant beside random ones on the off-grid test model, judged alike.

    python benchmarks/learned_rotation.py [--steps 100] [--formats w3a16-g64-asym] [--seeds 0 1] [--json OUT]

SpinQuant (Liu et al., 2024, arXiv 2405.16406) learns the rotation of the residual stream and that of the
values of a head by descent on the Stiefel manifold, of what a rounded model loses. Here it is the divergence
from the original, R = R0 (I - A)^-1 (I + A) for a skew A that starts at zero (Cayley's transform, of a random
R0) and Adam on A; weights are rounded to nearest in each step with a straight-through gradient, their scales
are functions of R. Each R, before and after learning, is judged with codes to nearest and by GPTQ as
benchmarks/methods.py judges its rows.

Legend: D hidden size, E head size.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatout.compress.apply import apply
from flatout.compress.method import data_of
from flatout.compress.rotate import Rotated, orthogonal
from flatout.core.checkpoint import Checkpoint, open_checkpoint
from flatout.core.formats import parse_format
from flatout.core.fuse import float_weight
from flatout.core.spec import ModelSpec
from flatout.train.data import Batch
from flatout.train.trainable import Trainable, source_weights
from methods import CALIBRATED, Judge, read, row_recipe, windows


class Turned:
    """The original's float weights by fused name, norms folded in, under any rotation, rounded."""

    def __init__(self, source: Checkpoint, fmt: str) -> None:
        self.spec: ModelSpec = replace(source.spec, tie_embeddings=False)
        self._format = parse_format(fmt)
        self._ones = torch.ones(source.spec.hidden_size)

        def weight(name: str) -> Tensor:
            return torch.from_numpy(float_weight(source, name).copy())

        self._layers: list[dict[str, Tensor]] = []
        for i in range(self.spec.num_layers):
            own = {name: weight(f"layers.{i}.{name}") for name in self.spec.linears()}
            own["qkv"] *= weight(f"layers.{i}.input_norm")
            own["gate_up"] *= weight(f"layers.{i}.post_norm")
            self._layers.append(own)
        self._embedding, self._head = weight("embedding"), weight("head") * weight("norm")

    def model(self, residual: Tensor, values: Tensor) -> Trainable:
        """residual (D, D), values (E, E)."""
        size, value_rows = self.spec.head_dim, self.spec.num_kv_heads * self.spec.head_dim
        turned = {"embedding": self._embedding @ residual, "head": self._head @ residual, "norm": self._ones}
        for i, own in enumerate(self._layers):
            qkv = own["qkv"] @ residual
            v = qkv[-value_rows:].unflatten(0, (-1, size))
            o = (own["o"].unflatten(1, (-1, size)) @ values).flatten(1)
            made = {
                "qkv": torch.cat([qkv[:-value_rows], (values.T @ v).flatten(0, 1)]),
                "o": residual.T @ o,
                "gate_up": own["gate_up"] @ residual,
                "down": residual.T @ own["down"],
            }
            turned |= {f"layers.{i}.{name}": self._rounded(weight) for name, weight in made.items()}
            turned |= {f"layers.{i}.{name}": self._ones for name in ("input_norm", "post_norm")}
        return Trainable(spec=self.spec, parameters={}, fixed=turned)

    def _rounded(self, weight: Tensor) -> Tensor:
        """To nearest between the least and the largest of a group, with a gradient that ignores rounding."""
        grouped = weight.unflatten(1, (-1, self._format.group))
        low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
        scale = (high - low) / (2**self._format.bits - 1)
        codes = (grouped - low) / scale
        return ((codes + (codes.round() - codes).detach()) * scale + low).flatten(1)


def learned(
    source: Checkpoint,
    fmt: str,
    calibration: list[list[int]],
    start: tuple[Tensor, Tensor],
    steps: int,
    rows: int,
    rate: float,
) -> tuple[Tensor, Tensor]:
    """(residual, values) after `steps`, which print their divergence in nats."""
    turned, batches = Turned(source, fmt), torch.tensor(calibration)
    original = Trainable(spec=source.spec, parameters={}, fixed=source_weights(source))
    free = [torch.zeros_like(matrix, requires_grad=True) for matrix in start]
    adam = torch.optim.Adam(free, lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.01, steps)
    for step in range(steps):
        ids = batches[(step * rows + torch.arange(rows)) % len(batches)]
        batch = Batch(tokens=ids, targets=ids, documents=torch.zeros_like(ids), mixed=0)
        with torch.no_grad():
            expected = original.logits(original.hidden(batch)[0]).log_softmax(1)
        student = turned.model(*_turned(start, free))
        found = student.logits(student.hidden(batch)[0]).log_softmax(1)
        loss = torch.nn.functional.kl_div(found, expected, reduction="batchmean", log_target=True)
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        schedule.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: {float(loss.detach()):.5f}", flush=True)
    residual, values = _turned(start, [matrix.detach() for matrix in free])
    return residual, values


def _turned(start: tuple[Tensor, Tensor], free: list[Tensor]) -> list[Tensor]:
    """Each start matrix times Cayley's transform of the skew part."""
    found = []
    for matrix, parameter in zip(start, free, strict=True):
        skew, one = parameter - parameter.T, torch.eye(len(matrix))
        found.append(matrix @ torch.linalg.solve(one - skew, one + skew))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="tests/data/offgrid")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=4, help="of 512 tokens, a step")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--kinds", nargs="+", default=["random", "learned"], help="which are judged")
    parser.add_argument("--formats", nargs="+", default=["w3a16-g64-asym", "w4a16-g64-asym"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = open_checkpoint(args.model)
    calibration = windows(read(source.tokenizer, None, "calibration"), 32, CALIBRATED)
    judge = Judge(source, read(source.tokenizer, None, "validation"), 32, args.threads)
    rows: list[dict[str, Any]] = []
    for fmt in args.formats:
        for seed in args.seeds:
            spec = source.spec
            start = (
                torch.from_numpy(orthogonal(spec.hidden_size, seed)),
                torch.from_numpy(orthogonal(spec.head_dim, seed + 1)),
            )
            begun = time.process_time()
            better = learned(source, fmt, calibration, start, args.steps, args.rows, args.rate)
            spent = time.process_time() - begun
            for kind, (residual, values) in (("random", start), ("learned", better)):
                if kind not in args.kinds:
                    continue
                rotated = Rotated(
                    spec=replace(spec, tie_embeddings=False),
                    original=source,
                    residual=np.asarray(residual, dtype=np.float32),
                    values=np.asarray(values, dtype=np.float32),
                )
                for method in ("rtn", "gptq"):
                    recipe = row_recipe(f"{fmt}/{method}", source)
                    found = judge.row(apply(rotated, data_of(calibration), recipe)[0])
                    rows.append({"format": fmt, "seed": seed, "rotation": kind, "method": method, **found})
                    rows[-1] |= {"learning_cpu_seconds": spent if kind == "learned" else 0.0}
                    print(rows[-1], flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
