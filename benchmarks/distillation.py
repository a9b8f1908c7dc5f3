"""What distillation gives back: a 2:4-pruned model, and a child of half the layers, over minutes.

    python benchmarks/distillation.py BOOKS OUT [--model smollm2-135m] [--minutes 2:4=2,child=3]
        [--child depth=24,ffn=768] [--also FILE] [--judge wiki.test.raw]

2:4     two of four neighbouring weights of every layer's linears stay, those of the largest |w| * rms(input)
        (Wanda: Sun et al., 2023, arXiv 2306.11695); all weights that stay are trained
child   the most important layers and feed-forward channels, as many as --child says; all weights are trained

Both follow the whole model's predictions (forward KL, all tokens) on BOOKS (benchmarks/books.py) and, with
--also, on another text; none of it is judged. Losses are nats a token on rows of 512 tokens, in float32 (TF32
products on a GPU), of three held-out books and, with --judge, of another text. The share of the gap that is
closed counts from the model as it was cut to the whole one. Writes OUT/distillation.json, and the child's
folder in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.books import read_books
from torch import Tensor

from flatout._version import __version__
from flatout.cli.output import Progress, log
from flatout.compress.importance import measure
from flatout.compress.inputs import linear_inputs
from flatout.compress.structure import cut
from flatout.compress.wanda import wanda
from flatout.core.checkpoint import Checkpoint, open_checkpoint
from flatout.core.folder import write_folder
from flatout.core.sparsity import parse_sparsity
from flatout.core.structure import Structure
from flatout.core.types import to_json
from flatout.errors import ConfigError, FlatoutError
from flatout.train.config import TrainConfig
from flatout.train.constraints import Constraint, Mask
from flatout.train.data import Packed, pack
from flatout.train.distill import Distillation, Objective, distillation, text_loss
from flatout.train.recipe import encode
from flatout.train.state import read_log
from flatout.train.trainable import Trainable, make_trainable, source_weights, to_source
from flatout.train.trainer import mean_loss, open_device, train

LENGTH, TOGETHER = 512, 16
CALIBRATION = 16  # rows of the training text whose activations choose what stays
PACE = 5  # steps that say how many fit into the minutes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bench:
    """The whole model, what is trained on and what is judged."""

    source: Checkpoint
    teacher: Trainable
    objective: Objective
    data: Packed
    judged: Mapping[str, Packed]
    device: torch.device

    def losses(self, model: Trainable, rows: int | None = None) -> dict[str, float]:
        """Nats a token of each judged text, of its first rows where given."""
        found = {}
        for name, packed in self.judged.items():
            part = replace(packed, tokens=packed.tokens[:rows], documents=packed.documents[:rows])
            found[name] = mean_loss(model, text_loss, part, TOGETHER)
        return found


def two_of_four(bench: Bench) -> Trainable:
    """The model with half of the weights of its layers, by Wanda's score."""
    keep: dict[str, Constraint] = {}
    rows = bench.data.tokens[np.random.default_rng(0).permutation(len(bench.data))[:CALIBRATION]]

    def see(name: str, inputs: Tensor, hidden: Tensor, weight: np.ndarray) -> None:
        if name != "head":
            kept = wanda(weight, inputs.square().mean(dim=0).numpy(), parse_sparsity("wanda-2:4"))
            keep[name] = Mask(torch.from_numpy(kept).float())

    linear_inputs(bench.source, [row.astype(np.int64) for row in rows], see)
    weights = source_weights(bench.source)
    return make_trainable(bench.source.spec, weights, device=bench.device, constraints=keep)


def child(bench: Bench, structure: Structure) -> Trainable:
    """Cut by the importance that rows of the training text show."""
    rows = bench.data.tokens[np.random.default_rng(0).permutation(len(bench.data))[:CALIBRATION]]
    small = cut(bench.source, structure, measure(bench.source, [row.astype(np.int64) for row in rows]))
    log(f"child: layers {small.layers}, {small.spec.num_parameters() / 1e6:.1f}M parameters")
    return make_trainable(small.spec, source_weights(small), device=bench.device)


def pace(bench: Bench, student: Trainable, config: TrainConfig) -> float:
    """Seconds of a step, without AdamW's own."""
    seconds = []
    for step in range(PACE):
        start = time.perf_counter()
        for part in bench.data.step(step, config.rows, 1).split(TOGETHER):
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss = bench.objective(student, part.to(bench.device))
            loss.backward()
        for tensor in student.trained().values():
            tensor.grad = None
        float(loss.detach())
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[PACE // 2]


def recover(
    bench: Bench,
    whole: Mapping[str, float],
    name: str,
    cut: Callable[[Bench], Trainable],
    minutes: float,
    rate: float,
    out: Path,
) -> dict[str, Any]:
    """Cut the model and distil it for `minutes`; what was lost, and what came back when."""
    student = cut(bench)
    before = bench.losses(student)
    log(f"{name}: whole {shown(whole)}, cut {shown(before)}")
    plan = TrainConfig(
        steps=10, rows=32, length=LENGTH, together=TOGETHER, learning_rate=rate, weight_decay=0.0,
        precision="bf16" if bench.device.type == "cuda" else "fp32", save_every=10**9,
    )  # fmt: skip
    step_s = pace(bench, student, plan)
    steps = max(4, int(minutes * 60 / (1.1 * step_s)))
    config = replace(
        plan, steps=steps, warmup=min(100, steps // 10), judge_every=max(1, steps // 10), log_every=10
    )
    log(f"{name}: {step_s:.2f} s a step, {steps} steps, {steps * config.rows / len(bench.data):.1f} epochs")
    folder = out / name.replace(":", "-") / "run"
    outcome = train(
        student, bench.objective, bench.data, config, folder, purpose=name, progress=Progress(), note=log,
        evaluate=lambda: bench.losses(student, rows=64),
    )  # fmt: skip
    after = bench.losses(student)
    closed = {text: (before[text] - after[text]) / (before[text] - whole[text]) for text in whole}
    log(f"{name}: after {shown(after)}, of the gap {shown(closed)}")
    spec = student.spec
    if spec != bench.source.spec:
        write_folder(folder.parent, spec, bench.source.tokenizer, to_source(student).arrays, "bfloat16")
    return {
        "parameters": spec.num_parameters(),
        "of_the_whole": spec.num_parameters() / bench.source.spec.num_parameters(),
        "whole": whole,
        "cut": before,
        "distilled": after,
        "gap_closed": closed,
        "perplexity": {t: [math.exp(x[t]) for x in (whole, before, after)] for t in whole},
        "curve": [record for record in read_log(folder) if any(text in record for text in whole)],
        "minutes": outcome.seconds / 60,
        "tokens_per_s": outcome.tokens_per_s,
        "config": to_json(config),
    }


def shown(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


def parse_minutes(text: str) -> dict[str, float]:
    found = re.findall(r"(2:4|child)=([\d.]+)", text)
    if not found:
        raise ConfigError("--minutes is 2:4=MINUTES,child=MINUTES, or one of them", repr(text), "2:4=2")
    return {name: float(value) for name, value in found}


def parse_structure(text: str) -> Structure:
    return Structure.of(
        tuple((name, int(size)) for name, _, size in (p.partition("=") for p in text.split(",")))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("books", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--minutes", type=parse_minutes, default="2:4=2,child=3")
    parser.add_argument("--child", type=parse_structure, default="depth=24,ffn=768")
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--also", type=Path, action="append", default=[], help="more text to train on")
    parser.add_argument("--judge", type=Path, help="another text to judge by")
    parser.add_argument("--characters", type=int, help="of each text, to try this out")
    options = parser.parse_args()
    documents, heldout = read_books(options.books)
    documents += [path.read_text(encoding="utf-8") for path in options.also]
    texts = {"books": heldout}
    if options.judge is not None:
        texts[options.judge.name] = [options.judge.read_text(encoding="utf-8")]
    if options.characters:
        documents = [documents[0][: options.characters]]
        texts = {name: [text[0][: options.characters]] for name, text in texts.items()}
    torch.set_float32_matmul_precision("high")
    device = open_device("auto")
    source = open_checkpoint(options.model)
    teacher = make_trainable(source.spec, source_weights(source), device=device, frozen=True)
    bench = Bench(
        source=source,
        teacher=teacher,
        objective=distillation(teacher, Distillation()),
        data=pack(encode(source.tokenizer, documents), LENGTH),
        judged={name: pack(encode(source.tokenizer, text), LENGTH) for name, text in texts.items()},
        device=device,
    )
    cuts = {"2:4": two_of_four, "child": lambda bench: child(bench, options.child)}
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "model": options.model,
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": {"flatout": __version__, "torch": torch.__version__},
        "training_tokens": int(bench.data.tokens.size),
        "structure": to_json(options.child),
        "rows": {},
    }
    whole = bench.losses(bench.teacher)
    for name, minutes in options.minutes.items():
        row = recover(bench, whole, name, cuts[name], minutes, options.rate, options.out)
        result["rows"][name] = row
        text = json.dumps(to_json(result), indent=1) + "\n"
        (options.out / "distillation.json").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except FlatoutError as error:
        sys.exit(f"distillation: {error}")
