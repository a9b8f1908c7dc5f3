"""Careful access to files: map one read-only, hash it, replace one atomically. Shared by every reader and
writer.

A model file is hostile until proven otherwise: only regular files are opened (a pipe would hang), nothing is
allocated from a number in a header before that number was checked, and names from a file are shown escaped.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import reprlib
import stat
from collections import Counter
from collections.abc import Callable, Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

from flatout.core.scratch import temporary_file
from flatout.errors import ModelFileError, ResourceError

REMEDY = "download or convert the file again"


def shown(value: object, limit: int = 80) -> str:
    """`value` on one printable ASCII line of at most about `limit` characters, for error messages."""
    # reprlib, because the full repr of a hostile list can be larger than the file.
    text = value if isinstance(value, str) else reprlib.repr(value)
    text = ascii(text[: 4 * limit])[1:-1]
    return text if len(text) <= limit else text[: limit - 3] + "..."


def corrupt(path: Path, rule: str, value: object, remedy: str = REMEDY) -> ModelFileError:
    """The error for a file that breaks `rule`, naming the file."""
    return ModelFileError(rule, f"{shown(value)} in {shown(str(path), 300)}", remedy)


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading. Raises ModelFileError for anything else."""
    where = shown(str(path), 300)
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to waits for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ModelFileError("the file must exist", where, "check the path") from error
    except (OSError, ValueError) as error:
        raise ModelFileError(
            "the file must be readable", f"{where}: {shown(str(error))}", "check it"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelFileError("a model file must be a regular file", where, "a path to a file")
    return os.fdopen(descriptor, "rb")


def map_file(path: Path) -> mmap.mmap:
    """Map a file read-only; pages are read when touched. Raises ModelFileError if missing, unreadable or
    empty."""
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise corrupt(path, "a model file must not be empty", "0 bytes")
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise corrupt(path, "the file must be mappable into memory", str(error)) from error


def read_text(path: Path, limit: int = 1 << 28) -> str:
    """A UTF-8 text file of at most `limit` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise corrupt(path, f"the file must hold at most {limit} bytes", size)
        data = file.read(limit)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise corrupt(path, "the file must be UTF-8 text", str(error)) from error


def parse_json_object(text: str | bytes, path: Path) -> dict[str, Any]:
    """`text` (from `path`) as a JSON object without duplicate keys. Raises ModelFileError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise corrupt(path, "a JSON object must not repeat a key", twice)
        return keys

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise corrupt(path, "the file must hold valid JSON", str(error)) from error
    if not isinstance(value, dict):
        raise corrupt(path, "the file must hold a JSON object", value)
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`. Raises ModelFileError if missing or malformed."""
    return parse_json_object(read_text(path), path)


def sha256_of(paths: Iterable[Path]) -> str:
    """Hex SHA-256 of one file, or of the digests of several in the order given."""
    digests = []
    for path in paths:
        with open_regular(path) as file:
            digests.append(hashlib.file_digest(file, "sha256"))
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(d.digest() for d in digests)).hexdigest()


def write_atomic(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename: all or nothing.

    Raises ResourceError when the folder is missing, not writable or full.
    """
    try:
        with temporary_file(path) as (temporary, file):
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except (OSError, ValueError) as error:
        raise ResourceError(
            "the output must be writable",
            f"{shown(str(path), 300)}: {shown(str(error))}",
            "another folder or more disk",
        ) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` atomically. Raises ResourceError."""
    write_atomic(path, lambda file: _write_all(file, data))


def _write_all(file: BinaryIO, data: bytes) -> None:
    file.write(data)
