"""Printing that commands share: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

from flatout.core.types import to_json


def print_json(value: Any) -> None:
    """One JSON object on stdout (NaN and infinity become null)."""
    json.dump(to_json(value), sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def log(message: str) -> None:
    """One line on stderr."""
    print(message, file=sys.stderr, flush=True)


def aligned(rows: list[list[str]], right: bool = True) -> str:
    """Rows of cells as aligned columns: the first to the left, the others to the right (or left)."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(widths[i]) if i == 0 or not right else cell.rjust(widths[i])
            for i, cell in enumerate(row)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
