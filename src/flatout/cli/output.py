"""Printing that commands share: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from flatout.core.types import to_json
from flatout.search.units import seconds

_REDRAW_S = 0.1


def print_json(value: Any) -> None:
    """One JSON object on stdout (NaN and infinity become null)."""
    json.dump(to_json(value), sys.stdout, indent=2, allow_nan=False)
    sys.stdout.write("\n")


def log(message: str) -> None:
    """One line on stderr."""
    print(message, file=sys.stderr, flush=True)


class Progress:
    """Stages on stderr, one line each; a terminal sees the count move, with the time left. What follows a
    comma in a stage's name may change while it lasts."""

    def __init__(self) -> None:
        self._stage, self._start, self._first, self._shown = "", 0.0, 0, 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now, last = time.monotonic(), done >= total
        name = stage.partition(",")[0]
        if name != self._stage:
            self._stage, self._start, self._first, self._shown = name, now, done, 0.0
        if not sys.stderr.isatty():
            if last:
                log(stage)
            return
        if not last and now - self._shown < _REDRAW_S:
            return
        self._shown = now
        passed = done - self._first  # since then: what goes on from an earlier run is no measure
        left = (now - self._start) / passed * (total - done) if passed else 0.0
        ending = "\n" if last else f", {seconds(left)} left" if left >= 1 else ""
        sys.stderr.write(f"\r\x1b[K{stage} {done:,}/{total:,}{ending}")
        sys.stderr.flush()


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
