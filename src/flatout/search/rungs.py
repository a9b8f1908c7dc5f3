"""Rungs of the recovery ladder, and what an interrupted climb finds again.

    best/            the best model so far, an artifact whose flatout.json lists the rungs that were climbed
    RUNG/layers/     finished layers of the rung that is being climbed, where it rounds (compress/kept.py)
    RUNG/training/   its state and log, where it distils (train/state.py)
    RUNG/seconds     spent on it, by all processes

All of it goes when the climb ends.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatout.core.artifact import is_artifact, load_artifact, save_artifact, update_manifest
from flatout.core.files import write_bytes
from flatout.core.model import Model
from flatout.core.tokenizer import Tokenizer
from flatout.search.rows import Loss
from flatout.train.trainer import Progress
from flatout.verify.examination import Plan

_BEST, _SECONDS = "best", "seconds"
_EVERY_S = 1.0  # between two writes of the seconds spent


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One method tried. minutes: of all processes that worked on it; loss: on validation text;
    gain_per_minute: by how much it lowered the best perplexity increase so far, a fraction, for each of its
    minutes; None for the first. verdict: of the certificate, "" when the sealed text was not opened."""

    name: str
    minutes: float
    loss: Loss
    gain_per_minute: float | None
    plan: Plan
    verdict: str = ""

    def __str__(self) -> str:
        """One line for people."""
        gain = "" if self.gain_per_minute is None else f", {100 * self.gain_per_minute:+.2f} points a minute"
        judged = f"certificate {self.verdict.replace('_', ' ')}" if self.verdict else str(self.plan)
        return f"{self.name}: loss {self.loss.value:+.2%} after {self.minutes:.1f} min{gain}; {judged}"


class Climb:
    """The folder of a climb that was interrupted, or is about to begin."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self) -> tuple[list[Rung], Model | None]:
        """(rungs climbed, the best model so far); ([], None) at the beginning."""
        if not is_artifact(self._folder / _BEST):
            return [], None
        model, _, manifest = load_artifact(self._folder / _BEST)
        return [_rung(value) for value in manifest["recovery"]], model

    def save(self, rungs: Sequence[Rung], better: Model | None, tokenizer: Tokenizer) -> Model:
        """Keep that `rungs` were climbed; better: the last one's model where it is the best so far. Returns
        the best model, as a process that goes on finds it."""
        if better is None:
            update_manifest(self._folder / _BEST, {"recovery": rungs})
        else:
            save_artifact(better, tokenizer, self._folder / _BEST, {"recovery": rungs})
        shutil.rmtree(self._folder / rungs[-1].name, ignore_errors=True)
        return load_artifact(self._folder / _BEST)[0]

    def work(self, name: str) -> Path:
        """Where rung `name` keeps unfinished work."""
        (self._folder / name).mkdir(parents=True, exist_ok=True)
        return self._folder / name

    def done(self) -> None:
        """Forget the climb."""
        shutil.rmtree(self._folder, ignore_errors=True)


class Clock:
    """Seconds spent on a rung whose work lies in the folder `work`. It is what that work reports progress to:
    then they are written, so that they outlive the process."""

    def __init__(self, work: Path, progress: Progress | None) -> None:
        self._file, self._progress = work / _SECONDS, progress
        self._began = self._written = time.perf_counter()
        if self._file.exists():
            self._began -= float(self._file.read_text(encoding="utf-8"))

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(what, done, total)
        if time.perf_counter() - self._written >= _EVERY_S:
            write_bytes(self._file, repr(self.seconds).encode())
            self._written = time.perf_counter()


def _rung(value: Mapping[str, Any]) -> Rung:
    """The Rung that to_json wrote."""
    return Rung(**{**value, "loss": Loss(**value["loss"]), "plan": Plan(**value["plan"])})
