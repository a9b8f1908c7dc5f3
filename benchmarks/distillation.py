"""What distillation gives back: a 2:4-pruned model, and a child of half the layers, over minutes.

    python benchmarks/distillation.py BOOKS OUT [--model smollm2-135m] [--minutes 2:4=2,child=3]
        [--child depth=24,ffn=768] [--also FILE] [--continue SECONDS] [--judge wiki.test.raw] [--compile]

2:4     two of four neighbouring weights of every layer's linears stay, those of the largest |w| * rms(input)
        (Wanda: Sun et al., 2023, arXiv 2306.11695); all weights that stay are trained
child   the most important layers and feed-forward channels, as many as --child says; all weights are trained

Both follow the whole model's predictions (forward KL, all tokens) on BOOKS (benchmarks/books.py), with --also
on other texts (as often as they are named) and with --continue on what the whole model itself writes behind
beginnings from those (benchmarks/continuations.py); none of it is judged. Losses are nats a token on rows of
512 tokens, in float32 (TF32 products on a GPU), of three held-out books and, with --judge, of another text,
of that also on 64 windows of 1,024 tokens as benchmarks/methods.py has them. The share of the gap that is
closed counts from the model as it was cut to the whole one. The child is also judged with its linears rounded
to nearest in --small, and written as a folder in bfloat16. Writes OUT/distillation.json. --compile: PyTorch
joins the operations of the divergence into kernels of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.books import read_books
from benchmarks.continuations import continuations
from torch import Tensor

from flatout._version import __version__
from flatout.cli.output import Progress, log
from flatout.compress.importance import measure
from flatout.compress.inputs import linear_inputs
from flatout.compress.rtn import round_to_nearest
from flatout.compress.structure import cut
from flatout.compress.wanda import wanda
from flatout.core.checkpoint import Checkpoint, open_checkpoint
from flatout.core.folder import write_folder
from flatout.core.formats import Format, parse_format
from flatout.core.sparsity import parse_sparsity
from flatout.core.structure import Structure
from flatout.core.types import to_json
from flatout.errors import ConfigError, FlatoutError
from flatout.train import distill
from flatout.train.config import TrainConfig
from flatout.train.constraints import Constraint, Mask
from flatout.train.data import Packed, pack
from flatout.train.distill import Distillation, Objective, distillation, text_loss
from flatout.train.recipe import encode
from flatout.train.state import read_log
from flatout.train.trainable import Trainable, make_trainable, source_weights, to_source
from flatout.train.trainer import add_gradients, mean_loss, open_device, train

LENGTH, TOGETHER = 512, 16
CALIBRATION = 16  # rows of the training text whose activations choose what stays
LOOKS = 10  # at judged text during a training
WARMING, PACE = 3, 5  # steps; the latter say how many fit into the minutes
PROMPT = 64  # tokens of another text that the whole model continues
WINDOWS, WINDOW = 64, 1024  # that benchmarks/methods.py judges by


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
    for step in range(WARMING + PACE):
        start = time.perf_counter()
        loss = add_gradients(student, bench.objective, bench.data.step(step, config.rows, 1), config)
        for tensor in student.trained().values():
            tensor.grad = None
        float(loss)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[WARMING:])[PACE // 2]


def recover(
    bench: Bench,
    whole: Mapping[str, float],
    name: str,
    cut: Callable[[Bench], Trainable],
    minutes: float,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Cut the model and distil it for `minutes`; what was lost, and what came back when."""
    student = cut(bench)
    before = bench.losses(student)
    log(f"{name}: whole {shown(whole)}, cut {shown(before)}")
    plan = TrainConfig(
        steps=10, rows=options.rows, length=LENGTH, together=options.together, learning_rate=options.rate,
        final=options.final, weight_decay=0.0, precision="bf16" if bench.device.type == "cuda" else "fp32",
        save_every=10**9,
    )  # fmt: skip
    step_s = pace(bench, student, plan)
    start = time.perf_counter()
    bench.losses(student, rows=64)
    looks = LOOKS * (time.perf_counter() - start)
    seconds = minutes * 60
    if options.deadline:
        seconds = options.deadline - (start - options.began) - options.reserve
    steps = max(4, int((seconds - looks) / (1.05 * step_s)))
    config = replace(
        plan, steps=steps, warmup=min(100, steps // 10), judge_every=max(1, steps // LOOKS), log_every=10
    )
    log(f"{name}: {step_s:.2f} s a step, {steps} steps, {steps * config.rows / len(bench.data):.1f} epochs")
    folder = options.out / name.replace(":", "-") / "run"
    outcome = train(
        student, bench.objective, bench.data, config, folder, purpose=name, progress=Progress(), note=log,
        evaluate=lambda: bench.losses(student, rows=64),
    )  # fmt: skip
    after = bench.losses(student)
    small = bench.losses(rounded(student, parse_format(options.small)))
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
        "small": {"format": options.small, **small},
        "gap_closed": closed,
        "perplexity": {t: [math.exp(x[t]) for x in (whole, before, after)] for t in whole},
        "curve": [record for record in read_log(folder) if any(text in record for text in whole)],
        "minutes": outcome.seconds / 60,
        "tokens_per_s": outcome.tokens_per_s,
        "config": to_json(config),
    }


@torch.no_grad()
def rounded(student: Trainable, fmt: Format) -> Trainable:
    """The student with the linears of its layers rounded to nearest."""
    weights = {name: student.weight(name).detach() for name in student.parameters}
    for name, weight in weights.items():
        if weight.ndim == 2 and name.startswith("layers."):
            near = round_to_nearest(weight.float().cpu().numpy(), fmt, search_clip=True)
            weights[name] = torch.from_numpy(near.dequantize())
    device = next(iter(student.parameters.values())).device
    return make_trainable(student.spec, weights, device=device, frozen=True)


def shown(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())


def evenly(tokens: Sequence[int]) -> Packed:
    """The windows of benchmarks/methods.py, as far as the text has them."""
    length = min(WINDOW, len(tokens))
    starts = np.linspace(0, len(tokens) - length, WINDOWS).astype(int)
    rows = np.asarray(tokens, dtype=np.int32)[starts[:, None] + np.arange(length)]
    return Packed(tokens=rows, documents=np.zeros_like(rows))


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
    parser.add_argument("--final", type=float, default=0.1, help="part of the rate that is left at the end")
    parser.add_argument("--rows", type=int, default=32, help="of 512 tokens, in a step")
    parser.add_argument("--together", type=int, default=TOGETHER, help="of them at a time")
    parser.add_argument("--also", type=Path, action="append", default=[], help="more text to train on")
    parser.add_argument("--continue", type=float, default=0.0, dest="seconds", help="how long to draw text")
    parser.add_argument("--drawn", type=int, default=4096, help="rows of that at a time")
    parser.add_argument("--small", default="w6a16-g64-asym")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--deadline", type=float, help="seconds after the start: train until then instead")
    parser.add_argument("--reserve", type=float, default=45.0, help="seconds of them for what comes behind")
    parser.add_argument("--judge", type=Path, help="another text to judge by")
    parser.add_argument("--characters", type=int, help="of each text, to try this out")
    options = parser.parse_args()
    options.began = time.perf_counter()
    documents, heldout = read_books(options.books)
    others = [path.read_text(encoding="utf-8") for path in options.also]
    texts = {"books": heldout}
    if options.judge is not None:
        texts[options.judge.name] = [options.judge.read_text(encoding="utf-8")]
    if options.characters:
        documents = [documents[0][: options.characters]]
        others = [text[: options.characters] for text in others]
        texts = {name: [text[0][: options.characters]] for name, text in texts.items()}
    torch.set_float32_matmul_precision("high")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if options.compile:
        vars(distill)["divergence"] = torch.compile(distill.divergence, dynamic=False)
    device = open_device("auto")
    source = open_checkpoint(options.model)
    teacher = make_trainable(source.spec, source_weights(source), device=device, frozen=True)
    data = pack(encode(source.tokenizer, [*documents, *others]), LENGTH)
    judged = {name: pack(encode(source.tokenizer, text), LENGTH) for name, text in texts.items()}
    if options.judge is not None:
        judged["windows"] = evenly(source.tokenizer.encode(texts[options.judge.name][0]))
    drawn = 0
    if options.seconds:
        begin = np.concatenate(encode(source.tokenizer, list(dict.fromkeys(others))))
        start = time.perf_counter()
        more = continuations(
            teacher, begin, options.seconds, length=LENGTH, prompt=PROMPT, rows=options.drawn
        )
        drawn = len(more)
        log(f"{drawn} rows drawn in {time.perf_counter() - start:.0f} s")
        data = Packed(
            tokens=np.concatenate([data.tokens, more.tokens]),
            documents=np.concatenate([data.documents, more.documents]),
        )
    bench = Bench(
        source=source,
        teacher=teacher,
        objective=distillation(teacher, Distillation()),
        data=data,
        judged=judged,
        device=device,
    )
    cuts = {"2:4": two_of_four, "child": lambda bench: child(bench, options.child)}
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "model": options.model,
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": {"flatout": __version__, "torch": torch.__version__},
        "command": " ".join(["python benchmarks/distillation.py", *map(str, sys.argv[1:])]),
        "training_tokens": int(bench.data.tokens.size),
        "drawn_tokens": drawn * LENGTH,
        "structure": to_json(options.child),
        "rows": {},
    }
    whole = bench.losses(bench.teacher)
    for name, minutes in options.minutes.items():
        row = recover(bench, whole, name, cuts[name], minutes, options)
        result["rows"][name] = row
        text = json.dumps(to_json(result), indent=1) + "\n"
        (options.out / "distillation.json").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except FlatoutError as error:
        sys.exit(f"distillation: {error}")
