"""TrialStore: results of finished work, on disk, found again by the hash of everything they depend on.

A trial is one JSON file (and one .npz for arrays) named by the SHA-256 of its inputs: model, recipe, text,
code and, for timings, the run. Files are written beside their place and renamed, so a kill at any point loses
at most the trial that was running. Nothing is ever updated: other inputs are another name. The store lives in
the cache folder, not beside the output, because a trial depends on its inputs and not on where the artifact
goes: the next search with another budget or folder finds it too, and nothing is left next to the user's
files.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flatout.core.files import write_atomic
from flatout.core.types import Trial, to_json
from flatout.errors import ResourceError

Arrays = dict[str, np.ndarray]


def key_of(inputs: Mapping[str, Any]) -> str:
    """SHA-256 of the inputs as canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(to_json(dict(inputs)), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class TrialStore:
    """Trials of one model under `folder`. `fresh` ignores what earlier processes left and replaces it."""

    def __init__(self, folder: Path, fresh: bool = False) -> None:
        self.folder = folder
        self.fresh = fresh
        self.hits = 0
        self._done: set[str] = set()  # written by this process, so valid even when fresh
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(
                "the trial store needs a folder it can write",
                f"{folder}: {error.strerror}",
                "set FLATOUT_CACHE",
            ) from error

    def get(self, key: str) -> Trial | None:
        """The trial with this key, or None. A file that cannot be read counts as absent: the work is done
        again.
        """
        if self.fresh and key not in self._done:
            return None
        try:
            raw = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(raw, dict) or raw.get("key") != key or not isinstance(raw.get("result"), dict):
            return None
        return Trial(
            key=key, recipe=str(raw.get("recipe")), stage=str(raw.get("stage")), result=raw["result"]
        )

    def arrays(self, key: str) -> Arrays | None:
        """Arrays stored with the trial, or None."""
        if self.fresh and key not in self._done:
            return None
        try:
            with (self.folder / f"{key}.npz").open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def put(self, trial: Trial, arrays: Arrays | None = None) -> None:
        """Write a trial; arrays first, so that a JSON file always has its arrays."""
        if arrays is not None:
            write_atomic(self.folder / f"{trial.key}.npz", lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
        record = {
            "key": trial.key,
            "recipe": trial.recipe,
            "stage": trial.stage,
            "result": to_json(trial.result),
        }
        _write_json(self.folder / f"{trial.key}.json", record)
        self._done.add(trial.key)

    def result(
        self, stage: str, recipe: str, inputs: Mapping[str, Any], compute: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The stored result of these inputs, computed and stored if there is none."""
        key = key_of({"stage": stage, **inputs})
        found = self.get(key)
        if found is not None:
            self.hits += 1
            return found.result
        result: dict[str, Any] = to_json(compute())
        self.put(Trial(key=key, recipe=recipe, stage=stage, result=result))
        return result

    def scores(
        self, stage: str, recipe: str, inputs: Mapping[str, Any], compute: Callable[[], list[np.ndarray]]
    ) -> list[np.ndarray]:
        """Like `result` for a list of float32 arrays, one a document."""
        key = key_of({"stage": stage, **inputs})
        found = self.get(key)
        arrays = self.arrays(key) if found is not None else None
        if arrays is not None and set(arrays) == {"values", "lengths"}:
            self.hits += 1
            return np.split(arrays["values"], np.cumsum(arrays["lengths"])[:-1])
        documents = [np.asarray(document, dtype=np.float32) for document in compute()]
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        values = np.concatenate(documents)
        shape = {"documents": len(documents), "tokens": len(values)}
        self.put(
            Trial(key=key, recipe=recipe, stage=stage, result=shape), {"values": values, "lengths": lengths}
        )
        return documents


class Run:
    """One search from its start to its end, however often it was interrupted.

    Quality trials hold for ever; timings hold only for the run they belong to, because machines change. A run
    that did not finish keeps its identity, so that resuming finds its timings; a finished one does not.
    """

    def __init__(self, store: TrialStore, request: Mapping[str, Any]) -> None:
        self._path = store.folder / f"run-{key_of(request)[:32]}.json"
        started = None if store.fresh else _started(self._path)
        self.resumed = started is not None
        self.identity = started or f"{time.time():.6f}-{os.getpid()}"
        _write_json(self._path, {"started": self.identity, "request": to_json(dict(request))})

    def finish(self) -> None:
        """Forget the run: the next one with the same request measures its own timings."""
        self._path.unlink(missing_ok=True)


def _started(path: Path) -> str | None:
    try:
        started = json.loads(path.read_text(encoding="utf-8"))["started"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return started if isinstance(started, str) else None


def _write_json(path: Path, value: Any) -> None:
    text = (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()

    def write(file: BinaryIO) -> None:
        file.write(text)

    write_atomic(path, write)
