"""optimize() with its page: what `flatout.optimize` and `flatout optimize` call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flatout.report.page import render
from flatout.search.loop import optimize as search


def optimize(model: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """search.loop.optimize with the report page; see there for the options, the result and the errors."""
    return search(model, out, render=render, **options)
