"""Measurements kept on file: good for one version of what is written, for one boot, and for a while."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flatout.core.files import write_bytes


def store(path: Path, version: int, fields: Mapping[str, Any]) -> None:
    """Write plain JSON values to `path`, whose folder is made. Raises ResourceError."""
    record = {"version": version, "boot_id": _boot_id(), "measured_at": time.time(), **fields}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, json.dumps(record, indent=1).encode())


def read(path: Path, version: int, max_age_s: float) -> dict[str, Any] | None:
    """What `store` wrote; None (so measure again) if missing, old, from another boot, or unreadable."""
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        current = record["version"] == version and record["boot_id"] == _boot_id()
        young = 0 <= time.time() - record["measured_at"] <= max_age_s
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if current and young else None


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
