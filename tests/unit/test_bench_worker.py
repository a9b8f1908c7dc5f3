"""A peer's process: the protocol, and every way in which the other end can misbehave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import flatout
from flatout.bench import worker as module
from flatout.bench.worker import Worker, cpu_seconds
from flatout.bench.workers import serve
from flatout.errors import BackendError
from flatout.verify.foreign_load import Ticks

SOURCE = Path(flatout.__file__).parents[1]

PEER = """
import os, sys, time
print("noise at import")
class Peer:
    def load(self, path, threads):
        print("noise on stdout", flush=True)
        print("noise on stderr", file=sys.stderr)
        return {"vocab_size": len(path), "version": "1", "details": str(threads)}
    def prefill(self, prompts):
        return float(sum(map(sum, prompts)))
    def decode(self, prompts, tokens):
        if tokens == 1: raise RuntimeError("out of cheese\\nsecond line")
        if tokens == 2: print("last words", file=sys.stderr, flush=True); os._exit(7)
        if tokens == 3: os.kill(os.getpid(), 11)
        if tokens == 4: time.sleep(600)
        if tokens == 5: return "fast"
        return 0.5
    def score(self, document):
        return [-0.25] * (len(document) - 1)
"""

Start = Callable[[], Worker]


@pytest.fixture
def served(tmp_path: Path) -> Start:
    """Starts a worker that runs PEER inside the real serve.py."""
    (tmp_path / "fake_peer.py").write_text(PEER)
    command = [sys.executable, str(Path(serve.__file__)), "fake_peer"]
    return lambda: Worker("fake 1.0", command, {**os.environ, "PYTHONPATH": str(tmp_path)})


def scripted(code: str) -> Worker:
    """A worker that runs `code` once a request has come."""
    return Worker("fake 1.0", [sys.executable, "-c", f"import sys, time\ninput()\n{code}"])


def gone(pid: int) -> bool:
    """Whether a process has ended (nobody may have collected a stranger's exit code yet)."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def soon(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_requests_are_answered_whatever_the_peer_prints(served: Start) -> None:
    with served() as worker:
        assert worker.load("four", 2) == {"vocab_size": 4, "version": "1", "details": "2"}
        assert worker.prefill([[1, 2], [3, 4]]) == 10.0
        assert worker.decode([[1]], 9) == 0.5
        assert worker.score([5, 6, 7]) == [-0.25, -0.25]
    assert gone(worker.pid)


def test_an_error_is_quoted_on_one_line_and_the_worker_lives_on(served: Start) -> None:
    with served() as worker:
        with pytest.raises(
            BackendError, match=r"fake 1.0 must be able to decode; found: RuntimeError: out of"
        ):
            worker.decode([[1]], 1)
        with pytest.raises(BackendError, match="no command 'close'"):
            worker.request("close")
        assert worker.decode([[1]], 9) == 0.5


@pytest.mark.parametrize(("tokens", "how"), [(2, "exit code 7: last words"), (3, "signal SIGSEGV")])
def test_a_crash_says_how_and_what_was_last_said(served: Start, tokens: int, how: str) -> None:
    with served() as worker:
        with pytest.raises(BackendError, match=f"worker of fake 1.0 must live through decode; found: {how}"):
            worker.decode([[1]], tokens)
        assert gone(worker.pid)


def test_a_worker_that_died_before_is_a_crash_too(served: Start) -> None:
    with served() as worker:
        worker.prefill([[1]])
        os.kill(worker.pid, signal.SIGKILL)
        assert soon(lambda: gone(worker.pid))
        with pytest.raises(BackendError, match="signal SIGKILL"):
            worker.prefill([[1]])


def test_a_silent_worker_is_killed(served: Start) -> None:
    with served() as worker:
        with pytest.raises(
            BackendError, match=r"fake 1.0 must answer decode within 0.2 s; found: nothing came"
        ):
            worker.request("decode", 0.2, prompts=[[1]], tokens=4)
        assert gone(worker.pid)


@pytest.mark.parametrize(
    "line", ["garbage", "[1]", "{}", '{"value": NaN', "\\xff\\x00", '{"value": "fast"}', '{"value": 3}']
)
def test_garbage_is_refused(line: str) -> None:
    with scripted(f"sys.stdout.buffer.write(b'{line}\\n'); sys.stdout.flush(); time.sleep(600)") as worker:
        with pytest.raises(BackendError, match="must answer prefill with one JSON object of the agreed form"):
            worker.prefill([[1]])
        assert gone(worker.pid)


@pytest.mark.parametrize(
    ("value", "ask"),
    [
        (3, lambda worker: worker.score([1, 2])),
        (["x"], lambda worker: worker.score([1, 2])),
        (None, lambda worker: worker.score([1, 2])),
        ([1.0], lambda worker: worker.load("x", 1)),
        (None, lambda worker: worker.load("x", 1)),
    ],
)
def test_scores_and_facts_have_their_form(value: object, ask: Callable[[Worker], object]) -> None:
    code = f"print({json.dumps({'value': value})!r}, flush=True); time.sleep(600)"
    with scripted(code) as worker, pytest.raises(BackendError, match="agreed form"):
        ask(worker)


def test_an_endless_line_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONGEST_ANSWER", 1000)
    code = "sys.stdout.write('x' * 5000); sys.stdout.flush(); time.sleep(600)"
    with scripted(code) as worker, pytest.raises(BackendError, match="bytes without an end"):
        worker.prefill([[1]])


def test_a_missing_interpreter_is_one_error() -> None:
    with pytest.raises(BackendError, match="worker of fake must start"):
        Worker("fake", ["/nonexistent/python"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGKILL, -9)])
def test_no_process_outlives_an_interrupted_parent(tmp_path: Path, number: int, code: int) -> None:
    """Ctrl-C: the parent kills the worker and its children. A killed parent takes its worker along."""
    part, pids = tmp_path / "part", tmp_path / "pids"
    (tmp_path / "fake_peer.py").write_text(
        "import os, pathlib, subprocess, sys, time\n"
        "class Peer:\n"
        "    def prefill(self, prompts):\n"
        "        child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"        part = pathlib.Path({str(part)!r})\n"
        "        part.write_text(f'{os.getpid()} {child.pid}')\n"
        f"        part.rename({str(pids)!r})\n"
        "        time.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import signal, sys\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from flatout.bench.worker import Worker\n"
            f"with Worker('fake', [sys.executable, {str(Path(serve.__file__))!r}, 'fake_peer']) as worker:\n"
            "    worker.prefill([[1]])\n",
        ],
        env={**os.environ, "PYTHONPATH": f"{SOURCE}{os.pathsep}{tmp_path}"},
        stderr=subprocess.DEVNULL,
    )
    try:
        assert soon(pids.exists)
        worker, child = map(int, pids.read_text().split())
        parent.send_signal(number)
        assert parent.wait(timeout=20) == code
        assert soon(lambda: gone(worker))
        if number == signal.SIGINT:
            assert soon(lambda: gone(child))
        elif not gone(child):  # nobody is left to kill what the worker itself had started
            os.kill(child, signal.SIGKILL)
    finally:
        parent.kill()
        parent.wait()


def test_time_of_the_worker_is_not_foreign(served: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "read_ticks", lambda: Ticks(10.0, 20.0, 1.5, 5.0))
    with served() as worker:
        monkeypatch.setattr(module, "cpu_seconds", lambda pid: 3.0 if pid == worker.pid else None)
        assert worker.ticks() == Ticks(10.0, 20.0, 4.5, 5.0)
        monkeypatch.setattr(module, "cpu_seconds", lambda pid: None)
        assert worker.ticks() is None


def test_cpu_seconds_reads_past_a_name_with_brackets(tmp_path: Path) -> None:
    (tmp_path / "42").mkdir()
    fields = "S 1 42 42 0 -1 4194304 100 0 0 0 300 50 7 3 20 0 1 0 1000"
    (tmp_path / "42" / "stat").write_text(f"42 (a ) b) {fields}\n")
    assert cpu_seconds(42, tmp_path) == pytest.approx(360 / os.sysconf("SC_CLK_TCK"))
    assert cpu_seconds(43, tmp_path) is None
    (tmp_path / "42" / "stat").write_text("42 (a) S 1\n")
    assert cpu_seconds(42, tmp_path) is None


def test_serve_answers_bad_lines_with_errors() -> None:
    for line in ("", "garbage", "[]", "{}", '{"command": "__init__"}', '{"command": "load"}'):
        assert set(serve.answer(object(), line)) == {"error"}


def test_the_modules_of_peers_are_found_without_flatout(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").touch()  # a library that lacks everything
    command = [sys.executable, str(Path(serve.__file__)), "workers.onnx_runtime"]
    with Worker("fake 1.0", command, {"PYTHONPATH": str(tmp_path)}) as worker:
        with pytest.raises(BackendError, match="has no attribute 'SessionOptions'"):
            worker.load("model", 1)
        with pytest.raises(BackendError, match="no command 'quantize'"):
            worker.request("quantize")
