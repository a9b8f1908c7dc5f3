"""The RTL as a Python call: Verilator makes a library of it, ctypes calls the library.

A build is kept in the cache under the hash of everything it is made from, and Verilator's own library beside
it, which is the same for every accelerator.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import numpy as np

from flatout.core.files import write_bytes
from flatout.core.sources import cache_dir, lock
from flatout.errors import BackendError, ConfigError
from flatout.fpga.compile import Compiled, Shape, store_cache
from flatout.fpga.model import KeyValues
from flatout.fpga.program import includes
from flatout.hardware.detect import detect
from flatout.hardware.verilator import REMEDY, require_verilator

BUILD_SECONDS = 3600
OPTIMISATION: tuple[str, ...] = ("OPT_FAST=-O3",)
"""Of Verilator's makefile: text on a real model is simulated for longer than its simulator compiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryModel:
    """Timing in cycles of the accelerator. row_cycles: for a burst that does not follow the last one;
    turn_cycles: for a write between reads; stall_percent: random pauses of every handshake (for tests)."""

    latency: int = 60
    outstanding: int = 8
    refresh_interval: int = 0
    refresh_cycles: int = 0
    row_cycles: int = 0
    turn_cycles: int = 0
    stall_percent: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pass:
    """One run of the program. logits: int32 (T, V). cycles_by_name: of each named instruction.
    vector_memory: int32 (instructions, T, words), as each instruction left it."""

    cycles: int
    logits: np.ndarray
    best: np.ndarray
    beats_read: int
    beats_written: int
    beats_consumed: int
    cycles_by_name: dict[str, int] = field(default_factory=dict)
    vector_memory: np.ndarray | None = None


def parameters(shape: Shape) -> dict[str, int]:
    """Parameters of the top module."""
    return {
        "KW": shape.lanes, "C": shape.columns, "CB": shape.column_log2, "PC": shape.program_log2,
        "ROWS_LOG2": shape.rows_log2, "CODES_LOG2": shape.codes_log2, "CONTEXT_LOG2": shape.context_log2,
        "FIFO_LOG2": shape.fifo_log2, "BURST_LOG2": shape.burst_log2, "HEADS_LOG2": shape.heads_log2,
        "GROUP": shape.weighing, "HEAD_CHUNKS": shape.head_chunks,
    }  # fmt: skip


def sources() -> dict[str, str]:
    """RTL and harness by file name, includes made."""
    folder = files("flatout.fpga")
    texts = {
        p.name: p.read_text() for p in folder.joinpath("rtl").iterdir() if p.name.endswith((".sv", ".svh"))
    }
    texts["harness.cpp"] = folder.joinpath("harness.cpp").read_text()
    return texts | includes()


def build(shape: Shape, primitives: Path | None = None, netlist: Mapping[str, str] | None = None) -> Path:
    """The library of an accelerator of `shape`; primitives: a file with a DSP48E2, used instead of sums;
    netlist: Verilog files that take the place of the RTL. Raises BackendError as build_library does."""
    texts = sources()
    if netlist is not None:
        texts = {"harness.cpp": texts["harness.cpp"], **netlist}
        return build_library("accelerator", texts, [], "-O1 -DNETLIST")
    options = ["-DPROBE", *(f"-G{name}={value}" for name, value in parameters(shape).items())]
    if primitives is not None:
        options.append("-DUSE_DSP48E2")
        texts[primitives.name] = primitives.read_text()
    else:
        del texts["mac_chain.sv"]
    options += ["--output-split", "0"]  # one file, which needs no precompiled headers
    return build_library("accelerator", texts, options)


def build_library(
    top: str, texts: Mapping[str, str], options: Sequence[str], flags: str = "-march=native"
) -> Path:
    """The library that Verilator and g++ make of module `top`: `texts` are sources by file name, one of them
    C++ that calls it; options are Verilator's, flags the compiler's. Raises BackendError without a simulator
    or compiler, or when one of them fails."""
    verilator = require_verilator()
    missing = [name for name in ("g++", "make", "perl") if shutil.which(name) is None]
    if missing:
        raise BackendError(
            "simulation needs g++, make and perl beside Verilator",
            "no " + ", ".join(missing),
            REMEDY,
        )
    flags += " -fPIC -std=c++17"
    options = [
        "--cc", "--exe", "--top-module", top, "-Wno-fatal", "-Wno-lint",
        "-O3", "--x-assign", "fast", "--x-initial", "fast", "--no-timing",
        "-CFLAGS", flags, "-LDFLAGS", "-shared", *options,
    ]  # fmt: skip
    make = ["make", "-C", "obj_dir", "-f", f"V{top}.mk", "CXX=g++", "LINK=g++"]
    make += ["CFG_CXXFLAGS_PCH_I=-include", *OPTIMISATION]
    compiler = (str(verilator.command), verilator.version, flags, OPTIMISATION, detect().name)
    folder = cache_dir() / "fpga" / _digest(sorted(texts.items()), options, compiler)
    runtime = folder.with_name(f"runtime-{_digest(compiler)}")
    library = folder / "obj_dir" / f"V{top}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder.parent / f"{folder.name}.lock"):
        if library.is_file():
            return library
        building = folder.with_name(f"{folder.name}.building")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        for name, text in texts.items():
            (building / name).write_text(text)
        inputs = [name for name in texts if name.endswith((".sv", ".v", ".cpp"))]
        environment = {**os.environ, **verilator.environment}
        _run([str(verilator.command), *options, *inputs], building, environment)
        made = building / "obj_dir"
        for kept in runtime.glob("*.o"):  # younger than what Verilator has just written, so make uses them
            shutil.copyfile(kept, made / kept.name)
        _run(make, building, environment)
        runtime.mkdir(exist_ok=True)
        for compiled in made.glob("verilated*.o"):
            if not (runtime / compiled.name).exists():
                write_bytes(runtime / compiled.name, compiled.read_bytes())
        building.rename(folder)
    return library


def _digest(*what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:24]


def _run(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
    """Run a step of a build in `folder`. Raises BackendError."""
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=BUILD_SECONDS,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError("Verilator must build the simulation", str(error), REMEDY) from error
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if "rror" in line]
        said = " ".join(lines[:3]) or f"exit code {done.returncode} of {command[0]}"
        raise BackendError("Verilator must build the simulation", said, REMEDY)


class Accelerator:
    """A simulated accelerator with its memory, which keeps keys and values between passes."""

    def __init__(
        self,
        compiled: Compiled,
        memory: MemoryModel | None = None,
        seed: int = 1,
        primitives: Path | None = None,
        netlist: Mapping[str, str] | None = None,
    ) -> None:
        self.compiled = compiled
        self.length = 0
        self._image = np.ascontiguousarray(compiled.image).copy()
        self._library = ctypes.CDLL(str(build(compiled.shape, primitives, netlist)))
        self._library.simulation_new.restype = ctypes.c_void_p
        self._library.simulation_run.restype = ctypes.c_int64
        model = memory or MemoryModel()
        numbers = (ctypes.c_uint32 * 7)(
            model.latency, model.outstanding, model.refresh_interval, model.refresh_cycles, model.row_cycles,
            model.turn_cycles, model.stall_percent,
        )  # fmt: skip
        lanes, columns = compiled.shape.lanes, compiled.shape.columns
        self._handle = ctypes.c_void_p(
            self._library.simulation_new(
                self._image.ctypes.data_as(ctypes.c_void_p), len(self._image), lanes, columns, numbers,
                ctypes.c_uint64(seed),
            )
        )  # fmt: skip
        words = np.array(compiled.program, dtype=np.uint64)
        self._library.simulation_program(self._handle, words.ctypes.data_as(ctypes.c_void_p), len(words))

    def close(self) -> None:
        if self._handle:
            self._library.simulation_delete(self._handle)
            self._handle = ctypes.c_void_p()

    def __enter__(self) -> Accelerator:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    @property
    def image(self) -> np.ndarray:
        """The memory, with keys and values as the accelerator has written them."""
        return self._image

    def resume(self, cache: KeyValues) -> None:
        """Go on after the tokens of `cache`, whose keys and values are put into the memory."""
        if cache.length > self.compiled.context:
            raise ConfigError(
                f"a cache holds up to {self.compiled.context} tokens", str(cache.length), "a larger context"
            )
        store_cache(self.compiled, self._image, cache)
        self.length = cache.length

    def rewind(self, length: int) -> None:
        """Forget the tokens after the first `length`; their keys and values will be written over."""
        if not 0 <= length <= self.length:
            raise ConfigError(f"there are {self.length} tokens", str(length), "a length up to that")
        self.length = length

    def run(self, tokens: Sequence[int], limit: int = 1 << 40, trace: bool = False) -> Pass:
        """One pass: up to `columns` tokens that follow what was run before. trace: keep the vector memory."""
        compiled, columns = self.compiled, self.compiled.shape.columns
        count, spec = len(tokens), self.compiled.model.spec
        if not 1 <= count <= columns or self.length + count > compiled.context:
            raise ConfigError(
                f"a pass takes 1 to {columns} tokens, {compiled.context} in all",
                f"{count} after {self.length}", "fewer tokens or a larger context",
            )  # fmt: skip
        positions = np.minimum(self.length + np.arange(columns), self.length + count - 1)
        padded = np.zeros(columns, dtype=np.uint32)
        padded[:count] = tokens
        block = (positions // compiled.block_tokens).astype(np.uint32)
        offset = (positions % compiled.block_tokens).astype(np.uint32)
        logits = np.zeros((count, spec.vocab_size), dtype=np.int32)
        by_pc = np.zeros(1 << compiled.shape.program_log2, dtype=np.uint64)
        best = np.zeros(columns, dtype=np.uint32)
        statistics = np.zeros(3, dtype=np.uint64)
        rows, words = 1 << compiled.shape.rows_log2, compiled.shape.words
        memory = np.zeros((len(compiled.program), rows, columns, words) if trace else 0, dtype=np.int32)
        pointers = [
            a.ctypes.data_as(ctypes.c_void_p)
            for a in (padded, block, offset, logits, by_pc, best, statistics)
        ]
        cycles = self._library.simulation_run(
            self._handle, count, pointers[0], self.length, pointers[1], pointers[2], pointers[3],
            spec.vocab_size, pointers[4], ctypes.c_uint64(limit), pointers[5], pointers[6],
            memory.ctypes.data_as(ctypes.c_void_p) if trace else None, rows,
        )  # fmt: skip
        if cycles <= 0:
            found = "an address outside the memory" if cycles < 0 else f"no end after {limit} cycles"
            raise BackendError("the simulated accelerator must finish", found, "a report of this as a bug")
        self.length += count
        left = memory.transpose(0, 2, 1, 3)[:, :count].reshape(len(memory), count, -1) if trace else None
        return Pass(
            cycles=cycles, logits=logits, best=best[:count], beats_read=int(statistics[0]),
            beats_written=int(statistics[1]), beats_consumed=int(statistics[2]),
            cycles_by_name={name: int(by_pc[pc]) for pc, name in compiled.names.items()},
            vector_memory=left,
        )  # fmt: skip
