"""Temporary files and folders of processes that may be killed at any moment, and the last step of a write.

Whoever makes one holds a lock on it, which the system gives back when the process ends, however it ends. So
what a killed process left is told from what a living one is writing, and the next process removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".*.tmp"
"""Pattern of the names of temporary files."""


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """(name, open file): a new file beside `path`, which goes with the block unless it was moved away."""
    while True:
        temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
        try:
            with temporary.open("xb") as file:
                # Between its creation and its lock it may have been taken for a leftover.
                if _lock(file.fileno(), without_locks=True) and os.fstat(file.fileno()).st_nlink:
                    yield temporary, file
                    return
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent`, which goes with the block. What killed processes left there under the same
    prefix goes first."""
    import tempfile

    remove_leftovers(parent, f"{glob.escape(prefix)}*")
    while True:
        with tempfile.TemporaryDirectory(dir=parent, prefix=prefix, ignore_cleanup_errors=True) as folder:
            descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _lock(descriptor, without_locks=True) and os.path.exists(folder):
                    yield Path(folder)
                    return
            finally:
                os.close(descriptor)


def remove_leftovers(folder: Path, pattern: str = TEMPORARY) -> None:
    """Remove files and folders in `folder` that match `pattern` and whose process has ended."""
    import shutil

    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):  # gone meanwhile, or not ours to open
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if not _lock(descriptor, without_locks=False):
                    continue
                if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                    shutil.rmtree(path)
                else:
                    path.unlink()
            finally:
                os.close(descriptor)


def _lock(descriptor: int, *, without_locks: bool) -> bool:
    """Whether the lock of an open file or folder could be had; `without_locks` where the file system has
    none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return without_locks
    return True


def replace_folder(new: Path, old: Path) -> None:
    """Swap the folder `new` with `old`, which may be absent, in one step: whoever is killed meanwhile leaves
    one of the two at `old`, whole.

    Where the system cannot exchange folders, `old` is moved aside first; should the process be killed in
    between, it lies beside its place as .NAME.XXXX.replaced.
    """
    if not old.exists():
        os.rename(new, old)
    elif not _exchange(new, old):
        aside = old.with_name(f".{old.name}.{secrets.token_hex(6)}.replaced")
        os.rename(old, aside)
        try:
            os.rename(new, old)
        except BaseException:
            os.rename(aside, old)
            raise
        os.rename(aside, new)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths; whether the system could (renameat2 of Linux 3.15, on most of its file systems)."""
    import ctypes

    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0)
