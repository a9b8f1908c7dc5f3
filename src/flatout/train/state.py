"""What a run keeps on disk: its state, from which it goes on exactly, and its log.

    state.safetensors   parameters, both moments of AdamW, the number of finished steps, the run's identity
    train.jsonl         a line for each logged step
    events.*            the same numbers for TensorBoard, where it is installed

The state is replaced by a rename, so a kill at any point leaves the old one or the new one. Lines of the log
that are newer than the state are dropped when a run goes on, since those steps are taken again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatout.core.files import write_bytes
from flatout.core.safetensors import open_safetensors, write_safetensors
from flatout.errors import ConfigError

_STATE, _LOG = "state.safetensors", "train.jsonl"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(
    folder: Path,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
    loss: float,
    identity: str,
) -> None:
    """Write everything that step `step`, counted from 0, starts from, and the loss of the one before."""
    arrays = {f"parameter.{name}": tensor for name, tensor in parameters.items()}
    for name, tensor in parameters.items():
        arrays |= {f"{moment}.{name}": optimizer.state[tensor][moment] for moment in _MOMENTS}
    stored = {name: tensor.detach().cpu().numpy() for name, tensor in arrays.items()}
    facts = {"step": str(step), "loss": repr(loss), "identity": identity}
    write_safetensors(folder / _STATE, stored, facts)


@torch.no_grad()
def load_state(
    folder: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, identity: str
) -> tuple[int, float]:
    """Continue from the folder's state: fills parameters and moments, returns (finished steps, loss of the
    last), (0, NaN) without a state. Raises ConfigError for the state of another run."""
    if not (folder / _STATE).exists():
        return 0, math.nan
    file = open_safetensors(folder / _STATE)
    if file.metadata.get("identity") != identity:
        raise ConfigError(
            "a run goes on with the model, data and settings it began with",
            f"others in {folder / _STATE}",
            "another folder, or --fresh",
        )

    def read(name: str, like: Tensor) -> Tensor:
        return torch.tensor(file.array(name)).to(like.device)

    step = int(file.metadata["step"])
    for name, tensor in parameters.items():
        tensor.copy_(read(f"parameter.{name}", tensor))
        moments = {moment: read(f"{moment}.{name}", tensor) for moment in _MOMENTS}
        optimizer.state[tensor] = {"step": torch.tensor(float(step), device=tensor.device), **moments}
    return step, float(file.metadata["loss"])


@contextmanager
def open_log(
    folder: Path, step: int, note: Callable[[str], None]
) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """A function that appends a record with the key "step" to train.jsonl and to TensorBoard's files; records
    behind `step` go first."""
    path = folder / _LOG
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    write_bytes(path, "".join(line for line in whole if json.loads(line)["step"] <= step).encode())
    boards = []
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        note(f"TensorBoard is not installed (pip install 'flatout[train]'): the log is {path} alone")
    else:
        boards.append(SummaryWriter(str(folder), purge_step=step))

    def write(record: Mapping[str, float]) -> None:
        file.write(json.dumps(record) + "\n")
        file.flush()
        for board in boards:
            for name, value in record.items():
                board.add_scalar(name, value, record["step"])

    with path.open("a", encoding="utf-8") as file:
        try:
            yield write
        finally:
            for board in boards:
                board.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of train.jsonl, in order."""
    return [json.loads(line) for line in (folder / _LOG).read_text(encoding="utf-8").splitlines()]
