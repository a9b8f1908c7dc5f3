"""A peer's process: requests and answers are JSON lines over pipes (`workers/serve.py` is the other end).

A process of its own keeps a peer's thread pools, allocator and package versions away from ours, while one
parent decides whose turn it is. Nothing outlives the `with` block: the process leads a session of its own,
which Ctrl-C does not reach and which is killed as a whole; should the parent be killed, its input ends and
it leaves.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from flatout.core.files import shown
from flatout.errors import BackendError
from flatout.verify.foreign_load import Ticks, read_ticks

LOAD_S = 1800.0
WORK_S = 600.0
"""Longest time for loading or converting a model, and for anything else."""

_LONGEST_ANSWER = 1 << 24  # bytes
_TAIL = 4096  # bytes of what the process printed that an error looks at


class Worker:
    """A running worker. `name` says which peer it is. Use it in a `with` block, which kills it at the end.

    Every method raises BackendError when the process crashes, answers nothing in time, answers with anything
    but one JSON object, or reports an error.
    """

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._buffer = bytearray()
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=None if env is None else dict(env),
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            self._log.close()
            raise BackendError(
                f"the worker of {name} must start", shown(str(error), 200), "install the peer again"
            ) from error

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        """Kill the process and everything it started; may be called twice."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone already
            if self._process.returncode is None:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                pipe.close()

    def load(self, path: str, threads: int) -> dict[str, Any]:
        """Open the model: {"vocab_size", "version", "details"}."""
        value = self.request("load", LOAD_S, path=path, threads=threads)
        if not isinstance(value, dict):
            raise self._broken("load", value)
        return value

    def first(self, prompt: Sequence[int]) -> None:
        """Returns when the token after the prompt is there."""
        value = self.request("first", prompt=prompt)
        if value is not True:
            raise self._broken("first", value)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> float:
        """Seconds, as `verify.drivers.Driver` says."""
        return self._seconds("prefill", prompts=prompts)

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """Seconds, as `verify.drivers.Driver` says."""
        return self._seconds("decode", prompts=prompts, tokens=tokens)

    def score(self, document: Sequence[int]) -> list[float]:
        """log p of tokens 1.. of the document."""
        value = self.request("score", document=document)
        if not isinstance(value, list) or not all(isinstance(score, float) for score in value):
            raise self._broken("score", value)
        return value

    def ticks(self) -> Ticks | None:
        """The meter of foreign load, on which this worker's own time does not count as foreign."""
        ticks, used = read_ticks(), cpu_seconds(self.pid)
        if ticks is None or used is None:
            return None
        return replace(ticks, own_s=ticks.own_s + used)

    def request(self, command: str, timeout_s: float = WORK_S, **arguments: Any) -> Any:
        """The value that the worker answers `command` with."""
        message = json.dumps({"command": command, **arguments}).encode() + b"\n"
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(message)  # well below what a pipe holds: it does not block
        except BrokenPipeError:
            raise self._crashed(command) from None
        line = self._line(command, time.monotonic() + timeout_s, timeout_s)
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or not answer.keys() & {"value", "error"}:
            raise self._broken(command, line.decode(errors="replace"))
        if "error" in answer:
            raise BackendError(
                f"{self.name} must be able to {command}",
                shown(str(answer["error"]), 300),
                "leave this peer out of --against",
            )
        return answer["value"]

    def _seconds(self, command: str, **arguments: Any) -> float:
        value = self.request(command, **arguments)
        if not isinstance(value, float):
            raise self._broken(command, value)
        return value

    def _line(self, command: str, deadline: float, timeout_s: float) -> bytes:
        """The next line of the worker's output, without its end."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.close()
                    raise BackendError(
                        f"{self.name} must answer {command} within {timeout_s:g} s",
                        "nothing came",
                        "a smaller model, or leave this peer out of --against",
                    )
                read = os.read(self._process.stdout.fileno(), 1 << 16)
                if not read:
                    raise self._crashed(command)
                self._buffer += read
                if len(self._buffer) > _LONGEST_ANSWER:
                    raise self._broken(command, f"{len(self._buffer)} bytes without an end")
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer = bytearray(rest)
        return line

    def _crashed(self, command: str) -> BackendError:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:  # it closed its output but lives
            code = 0
        said = self._last_words()
        self.close()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return BackendError(
            f"the worker of {self.name} must live through {command}",
            f"{how}{': ' if said else ''}{said}",
            "leave this peer out of --against, or report this",
        )

    def _broken(self, command: str, found: object) -> BackendError:
        self.close()
        return BackendError(
            f"the worker of {self.name} must answer {command} with one JSON object of the agreed form",
            shown(found, 120),
            "install the peer again",
        )

    def _last_words(self) -> str:
        """The last line the process printed on stderr."""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _TAIL))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return shown(lines[-1], 300) if lines else ""


def cpu_seconds(pid: int, root: Path = Path("/proc")) -> float | None:
    """CPU time that a process and its finished children have used, or None without a meter."""
    try:
        content = (root / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = content.rpartition(")")[2].split()  # a name may hold spaces; the state comes after it
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") if len(fields) > 14 else None
