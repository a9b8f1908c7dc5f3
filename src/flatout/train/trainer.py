"""The training loop, on one device: AdamW, warm-up and cosine, bfloat16 products, gradients added up over
parts of a step, resumed exactly.

A step depends on the state and on its number alone (train/data.py:Packed.step), so a run that was killed
repeats the steps since its last state and gets the same losses, bit for bit; on a GPU PyTorch is asked for
deterministic kernels. Ctrl-C ends the run after the step that it interrupts and saves; a second one ends it
at once.

AdamW: Loshchilov and Hutter, 2019, arXiv 1711.05101, as in PyTorch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor

from flatout.errors import BackendError, ConfigError
from flatout.train.config import TrainConfig
from flatout.train.data import Batch, Packed
from flatout.train.distill import Objective
from flatout.train.state import load_state, open_log, save_state
from flatout.train.trainable import Trainable

Progress = Callable[[str, int, int], None]
"""progress(what, done, total)."""

_WARMING = 3  # first steps of a process that do not count for tokens_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """loss: of the last step, nats a token; tokens_per_s: without the first steps, 0 when there were no
    more; seconds: of this process; finished: False when it was interrupted."""

    loss: float
    steps: int
    tokens_per_s: float
    seconds: float
    finished: bool


def open_device(name: str) -> torch.device:
    """The device called cpu, cuda or auto. Raises BackendError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise BackendError("training on cuda needs a GPU and a PyTorch built for it", "none", "device='cpu'")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def train(
    model: Trainable,
    objective: Objective,
    data: Packed,
    config: TrainConfig,
    folder: str | Path,
    *,
    purpose: str = "",
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda message: None,
    evaluate: Callable[[], Mapping[str, float]] = dict,
) -> Outcome:
    """Train `model`, whose tensors change in place, and keep state and log in `folder`.

    purpose: words that tell this objective from others, part of the run's identity. evaluate: numbers that
    join the log every `judge_every` steps. Raises ConfigError for token ids that the model does not have, and
    when the loss is no longer finite.
    """
    folder, parameters = Path(folder), model.trained()
    if not parameters:
        raise ConfigError("training needs something to train", "a frozen model", "frozen=False")
    highest, ids = int(data.tokens.max()), model.spec.vocab_size
    if highest >= ids:
        raise ConfigError(f"token ids are below {ids}", str(highest), "the model's own tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    device = next(iter(parameters.values())).device
    optimizer = _adamw(parameters, config)
    identity = _identity(parameters, data, config, purpose)
    first, loss = load_state(folder, parameters, optimizer, identity)
    tokens, warm, began, step = 0, 0.0, time.perf_counter(), first
    with open_log(folder, first, note) as log, _deterministic(device), _patient() as stopping:
        last = step == config.steps
        while not last:
            start = time.perf_counter()
            batch = data.step(step, config.rows, config.seed)
            total = add_gradients(model, objective, batch, config)
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip)
            for group in optimizer.param_groups:
                group["lr"] = config.rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            last = step == config.steps or stopping.is_set()
            saving, judging, logging = (
                last or step % every == 0
                for every in (config.save_every, config.judge_every, config.log_every)
            )
            if saving or judging or logging:
                loss = float(total)  # waits for the device
                if not math.isfinite(loss):
                    found = f"{loss} in step {step}"
                    raise ConfigError("the loss must stay finite", found, "a lower learning_rate")
            if step - first > _WARMING:
                tokens, warm = tokens + batch.count, warm + time.perf_counter() - start
            if judging or logging:
                record = {"step": step, "loss": loss, "rate": config.rate(step - 1), "norm": float(norm)}
                record |= {"seconds": time.perf_counter() - began, **(evaluate() if judging else {})}
                log(record)
            if saving:  # after the log, whose lines are dropped where the state does not reach
                save_state(folder, parameters, optimizer, step, loss, identity)
            if progress is not None:
                known = "" if math.isnan(loss) else f", loss {loss:.4f}"
                progress(f"training{known}", step, config.steps)
    return Outcome(
        loss=loss,
        steps=step,
        tokens_per_s=tokens / warm if warm else 0.0,
        seconds=time.perf_counter() - began,
        finished=step == config.steps,
    )


def add_gradients(model: Trainable, objective: Objective, batch: Batch, config: TrainConfig) -> Tensor:
    """The loss a position, whose gradients are added to those of the model's parameters."""
    device = next(iter(model.trained().values())).device
    total = torch.zeros((), device=device)
    for part in batch.split(config.together or config.rows, device):
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = objective(model, part) / max(batch.count, 1)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total


@torch.no_grad()
def mean_loss(model: Trainable, objective: Objective, data: Packed, rows: int = 8) -> float:
    """`objective` in nats a position over all of `data`, `rows` rows at a time, in float32."""
    device = next(iter({**model.parameters, **model.fixed}.values())).device
    whole = data.take(np.arange(len(data)))
    return sum(float(objective(model, part)) for part in whole.split(rows, device)) / whole.count


def _adamw(parameters: Mapping[str, Tensor], config: TrainConfig) -> torch.optim.AdamW:
    """Weight decay for matrices that are weights; norms, biases and scales keep their size."""
    decays = {name: t.ndim == 2 and not name.endswith(".stretch") for name, t in parameters.items()}
    groups = [
        {"params": [t for name, t in parameters.items() if decays[name] is matrix], "weight_decay": decay}
        for matrix, decay in ((True, config.weight_decay), (False, 0.0))
    ]
    on_gpu = next(iter(parameters.values())).is_cuda
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=on_gpu or None)


def _identity(parameters: Mapping[str, Tensor], data: Packed, config: TrainConfig, purpose: str) -> str:
    """Hash of what the losses of a run depend on, initial values left out: the seed and `purpose` stand for
    them."""
    kept = asdict(replace(config, device="auto", save_every=1, judge_every=1, log_every=1))
    shapes = {name: list(tensor.shape) for name, tensor in parameters.items()}
    text = json.dumps([kept, shapes, data.sha256, purpose], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Kernels whose sums have one order; PyTorch refuses those that have none."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def _patient() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, instead of stopping in the middle of a step; the second one does stop."""
    asked, before = threading.Event(), signal.getsignal(signal.SIGINT)
    handles = threading.current_thread() is threading.main_thread()  # no other may

    def stop(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    if handles:
        signal.signal(signal.SIGINT, stop)
    try:
        yield asked
    finally:
        if handles:
            signal.signal(signal.SIGINT, before)
