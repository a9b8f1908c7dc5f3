"""The ledger of openings: how often a sealed hold-out has judged candidates of one original model.

Every opening spends part of the error level (`statistics.alpha_k`), whichever run or process does it, so
the count lives in the cache folder, one file for each pair of hold-out and original. Judging the same
candidate on the same clusters again repeats a computation instead of trying something new, and keeps its
number. A file lock serialises processes; a write replaces the file, so a kill leaves the old count or the
new one. A damaged ledger is an error: starting again from one would give the error level away twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from flatout.core.files import read_json_object, write_atomic
from flatout.core.sources import cache_dir
from flatout.errors import EvidenceError, FlatoutError, ResourceError


def next_k(holdout_sha256: str, original_sha256: str, folder: Path | None = None) -> int:
    """Number that the next new opening would get; the power analysis needs it before anything is opened."""
    return len(_read(_path(holdout_sha256, original_sha256, folder))) + 1


def record_opening(holdout_sha256: str, original_sha256: str, judged: str, folder: Path | None = None) -> int:
    """Count an opening, before any hold-out token is scored, and return its number k (from 1).

    judged: hash of candidate, runner and clusters; a known one keeps its k. folder: where openings are
    counted, the cache folder by default. Raises EvidenceError when the ledger is damaged, ResourceError
    when it cannot be written.
    """
    path = _path(holdout_sha256, original_sha256, folder)
    with _locked(path):
        rows = _read(path)
        known = [row["judged"] for row in rows]
        if judged not in known:
            known.append(judged)
            rows.append({"judged": judged, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
            content = {"holdout_sha256": holdout_sha256, "original_sha256": original_sha256, "openings": rows}
            _write(path, content)
        return known.index(judged) + 1


def _path(holdout_sha256: str, original_sha256: str, folder: Path | None) -> Path:
    key = hashlib.sha256(f"{holdout_sha256}\0{original_sha256}".encode()).hexdigest()[:32]
    return (folder or cache_dir() / "openings") / f"{key}.json"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file beside `path`; closing the file, or the end of the process, gives it back."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_suffix(".lock"), "a", encoding="utf-8")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ResourceError(
            "openings of a hold-out must be recorded",
            f"{path}: {error.strerror}",
            "FLATOUT_CACHE=<writable folder>",
        ) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, content: dict[str, Any]) -> None:
    def write(file: BinaryIO) -> None:
        file.write(json.dumps(content, indent=1).encode())

    write_atomic(path, write)


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    remedy = "restore the file, or fresh text (--text)"
    try:
        content = read_json_object(path)
    except FlatoutError as error:
        raise EvidenceError("the ledger of hold-out openings must be readable", str(error), remedy) from error
    rows = content.get("openings")
    if not isinstance(rows, list) or not all(
        isinstance(r, dict) and isinstance(r.get("judged"), str) for r in rows
    ):
        raise EvidenceError("the ledger of hold-out openings must list them", str(path), remedy)
    return rows
