"""One training from start to end: text and a shape, or a model, in; a Hugging Face folder out.

    1 tokenizer   the model's, a folder's, or one learned from the text
    2 weights     new ones, or the model's
    3 training    on the text, or on a teacher's predictions (train/trainer.py)
    4 folder      weights in bfloat16; read again, and judged as they were stored

OUT/run holds state and log; the same call goes on where it stopped.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flatout.core.checkpoint import Checkpoint, open_checkpoint
from flatout.core.costs import step_costs, total
from flatout.core.folder import write_folder
from flatout.core.fuse import float_recipe
from flatout.core.spec import ModelSpec
from flatout.core.tokenizer import Tokenizer
from flatout.errors import ConfigError
from flatout.train.config import TrainConfig
from flatout.train.data import Packed, pack
from flatout.train.distill import Distillation, Objective, distillation, text_loss
from flatout.train.tokenizer import train_tokenizer
from flatout.train.trainable import initial_weights, make_trainable, source_weights, to_source
from flatout.train.trainer import Progress, mean_loss, open_device, train

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What `flatout train` does. documents, heldout: texts. Either `spec`, for new weights, or `model`.

    tokenizer: a folder that has one; by default the model's or the teacher's, or else one learned from
    `documents`. teacher: whose predictions are followed as `distillation` says; without one, the text is.
    rank: train thin matrices beside the linears instead of all weights.
    """

    documents: Sequence[str]
    config: TrainConfig
    heldout: Sequence[str] = ()
    spec: ModelSpec | None = None
    model: str | None = None
    tokenizer: str | None = None
    teacher: str | None = None
    distillation: Distillation = field(default_factory=Distillation)
    rank: int = 0

    def __post_init__(self) -> None:
        if (self.spec is None) == (self.model is None):
            raise ConfigError(
                "a training starts from a shape or from a model",
                "neither" if self.spec is None else "both",
                'model="smollm2-135m", or spec=ModelSpec(...)',
            )
        if not any(self.documents):
            raise ConfigError("training needs text", "no documents", "documents=[...]")


def run(
    training: Training,
    out: str | Path,
    *,
    fresh: bool = False,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda message: None,
) -> Json:
    """Train, write the folder `out` and return the JSON object of the command contract.

    fresh: begin anew instead of going on. Raises ConfigError for settings that do not fit and for a folder
    that holds something else.
    """
    out, config = Path(out), training.config
    state = out / "run"
    if out.exists() and not state.is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError("the output is a new folder or that of a training", str(out), "another folder")
    if fresh and state.is_dir():
        shutil.rmtree(state)
    device = open_device(config.device)
    began = None if training.model is None else open_checkpoint(training.model)
    teacher = None if training.teacher is None else open_checkpoint(training.teacher)
    tokenizer = _tokenizer(training, began or teacher)
    spec = began.spec if began is not None else _with_end(training.spec, tokenizer)
    _check(spec, config, tokenizer, teacher)
    weights = source_weights(began) if began is not None else initial_weights(spec, config.seed)
    model = make_trainable(spec, weights, device=device, rank=training.rank, seed=config.seed)
    objective: Objective = text_loss
    if teacher is not None:
        taught = make_trainable(teacher.spec, source_weights(teacher), device=device, frozen=True)
        objective = distillation(taught, training.distillation)
    data = pack(encode(tokenizer, training.documents), config.length)
    heldout = pack(encode(tokenizer, training.heldout), config.length) if any(training.heldout) else None
    note(
        f"{spec.num_parameters() / 1e6:.1f}M parameters on {device.type}, {data.tokens.size / 1e6:.2f}M "
        f"tokens, {config.steps * config.rows / len(data):.1f} epochs in {config.steps} steps"
    )

    def judge(judged: Any, against: Packed) -> float:
        return mean_loss(judged, text_loss, against, config.together or config.rows)

    outcome = train(
        model,
        objective,
        data,
        config,
        state,
        purpose=f"{training.model} {training.teacher} {training.distillation} {training.rank}",
        progress=progress,
        note=note,
        evaluate=dict if heldout is None else lambda: {"heldout": judge(model, heldout)},
    )
    write_folder(out, spec, tokenizer, to_source(model).arrays, "bfloat16")
    stored = make_trainable(spec, source_weights(open_checkpoint(out)), device=device, frozen=True)
    found = None if heldout is None else judge(stored, heldout)
    products = 3 * _operations(spec, config) + (0 if teacher is None else _operations(teacher.spec, config))
    return {
        "command": "train",
        "loss": outcome.loss,
        "heldout_loss": found,
        "heldout_perplexity": None if found is None else math.exp(found),
        "steps": outcome.steps,
        "finished": outcome.finished,
        "tokens_per_s": outcome.tokens_per_s,
        "mfu": outcome.tokens_per_s * products / product_rate(device, config.precision),
        "seconds": outcome.seconds,
        "parameters": spec.num_parameters(),
        "device": device.type,
        "artifact": str(out),
    }


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each document, its end marked where the tokenizer has a token for it."""
    end = [] if tokenizer.eos is None else [tokenizer.eos]
    return [np.array([*tokenizer.encode(text), *end], dtype=np.int32) for text in documents if text]


def _tokenizer(training: Training, model: Checkpoint | None) -> Tokenizer:
    if training.tokenizer is not None:
        return Tokenizer.from_folder(training.tokenizer)
    if model is not None:
        return model.tokenizer
    assert training.spec is not None
    return train_tokenizer(training.documents, training.spec.vocab_size)


def _with_end(spec: ModelSpec | None, tokenizer: Tokenizer) -> ModelSpec:
    assert spec is not None
    return replace(spec, eos_token_ids=() if tokenizer.eos is None else (tokenizer.eos,))


def _check(spec: ModelSpec, config: TrainConfig, tokenizer: Tokenizer, teacher: Checkpoint | None) -> None:
    if tokenizer.vocab_size > spec.vocab_size:
        raise ConfigError(
            "the vocabulary must hold the tokenizer's ids", f"{spec.vocab_size} < {tokenizer.vocab_size}",
            f"vocab_size={tokenizer.vocab_size}",
        )  # fmt: skip
    if config.length > spec.max_positions:
        raise ConfigError(
            "rows are at most as long as the model's positions", f"{config.length} > {spec.max_positions}",
            f"length={spec.max_positions}",
        )  # fmt: skip
    if teacher is not None and (
        teacher.spec.vocab_size != spec.vocab_size or teacher.tokenizer.sha256 != tokenizer.sha256
    ):
        raise ConfigError(
            "student and teacher share one tokenizer", "two", "a student of the teacher's vocabulary"
        )


def _operations(spec: ModelSpec, config: TrainConfig) -> float:
    """Of one forward pass, a token."""
    costs = step_costs(
        spec, float_recipe("bf16"), batch=1, tokens=config.length, context=0, logits=config.length
    )
    return total(costs).flops / config.length


def product_rate(device: torch.device, precision: str) -> float:
    """Operations a second of a large matrix product, measured: what MFU is a share of."""
    size = 8192 if device.type == "cuda" else 1024
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    fastest = math.inf
    for _ in range(4):
        float((a @ b)[0, 0])  # waits for the device
        start = time.perf_counter()
        float((a @ b)[0, 0])
        fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * size**3 / fastest
