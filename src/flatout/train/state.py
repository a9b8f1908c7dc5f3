"""What a run keeps on disk: its state, from which it goes on exactly, and its log.

    state.safetensors   parameters, both moments of AdamW, the number of finished steps, the run's identity
    train.jsonl         a line for each logged step
    events.*            the same numbers for TensorBoard, where it is installed

The state is replaced by a rename, so a kill at any point leaves the old one or the new one. Lines of the log
that are newer than the state are dropped when a run goes on, since those steps are taken again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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
    folder: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.AdamW, step: int, identity: str
) -> None:
    """Write everything that step `step` starts from."""
    arrays = {f"parameter.{name}": tensor for name, tensor in parameters.items()}
    for name, tensor in parameters.items():
        arrays |= {f"{moment}.{name}": optimizer.state[tensor][moment] for moment in _MOMENTS}
    numbers = {name: tensor.detach().cpu().numpy() for name, tensor in arrays.items()}
    write_safetensors(folder / _STATE, numbers, {"step": str(step), "identity": identity})


def load_state(
    folder: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.AdamW, identity: str
) -> int:
    """Continue from the folder's state: fills parameters and moments, returns the finished steps, 0 without a
    state. Raises ConfigError for the state of another run."""
    if not (folder / _STATE).exists():
        return 0
    file = open_safetensors(folder / _STATE)
    if file.metadata.get("identity") != identity:
        raise ConfigError(
            "a run goes on with the model, data and settings it began with",
            f"others in {folder / _STATE}",
            "another folder, or --fresh",
        )
    step = int(file.metadata["step"])
    state: dict[int, dict[str, Tensor]] = {}
    with torch.no_grad():
        for place, (name, tensor) in enumerate(parameters.items()):
            tensor.copy_(torch.tensor(file.array(f"parameter.{name}")))
            state[place] = {moment: torch.tensor(file.array(f"{moment}.{name}")) for moment in _MOMENTS}
            state[place]["step"] = torch.tensor(float(step))
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


class Log:
    """Appends records with the key "step" to train.jsonl and to TensorBoard's files."""

    def __init__(self, folder: Path, step: int, note: Callable[[str], None]) -> None:
        self._path = folder / _LOG
        write_bytes(self._path, "".join(_kept(self._path, step)).encode())
        self._file = self._path.open("a", encoding="utf-8")
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            note(
                f"TensorBoard is not installed (pip install 'flatout[train]'): the log is {self._path} alone"
            )
        else:
            self._board = SummaryWriter(str(folder), purge_step=step)

    def write(self, record: Mapping[str, float | int]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in record.items():
                self._board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The records of train.jsonl, in order."""
    return [json.loads(line) for line in (folder / _LOG).read_text(encoding="utf-8").splitlines()]


def _kept(path: Path, step: int) -> list[str]:
    """Whole lines of steps up to `step`."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")]
    return [line for line in lines if json.loads(line)["step"] <= step]
