"""Fresh processes until their first token: what is timed, what is counted, and that ours needs no PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.tiny import tiny_checkpoint_folder, tiny_spec, write_tokenizer

from flatout.bench import peers, starts
from flatout.bench.peers import OURS, Variant, environment, launch
from flatout.bench.phases import Start
from flatout.bench.starts import Starter, peak_resident, take_starts, time_start
from flatout.bench.worker import Worker
from flatout.errors import BackendError
from flatout.verify.speed import Sample

PEER = """
import time
class Peer:
    def load(self, path, threads):
        self.held = bytearray(MEGABYTES << 20)
        time.sleep(0.05)
        return {"vocab_size": 3}
    def first(self, prompt):
        time.sleep(0.05)
        return ANSWER
"""


def starter(folder: Path, name: str, megabytes: int, answer: str = "True") -> Starter:
    (folder / f"{name}.py").write_text(PEER.replace("MEGABYTES", str(megabytes)).replace("ANSWER", answer))
    script = str(Path(peers.__file__).parent / "workers" / "serve.py")
    env = {"PYTHONPATH": str(folder)}
    return Starter(name, lambda: Worker(name, [sys.executable, script, name], env), "model")


def silent(stage: str, done: int, total: int) -> None:
    """No listener."""


def test_a_start_is_timed_from_the_process_to_the_first_token(tmp_path: Path) -> None:
    small, large = (time_start(starter(tmp_path, f"p{mb}", mb), [1], 1, 99) for mb in (1, 101))
    assert small.sample.seconds > 0.1  # both sleeps, and the interpreter
    assert small.peak_bytes is not None
    assert large.peak_bytes is not None
    assert 90 << 20 < large.peak_bytes - small.peak_bytes < 110 << 20


def test_a_start_without_a_token_is_none(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="the worker of p must answer first with one JSON object"):
        time_start(starter(tmp_path, "p", 1, "None"), [1], 1, 1)


def test_the_peak_is_read_from_the_process_status(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "status").write_text("Name:\tx\nVmPeak:\t  99 kB\nVmHWM:\t  12 kB\nVmRSS:\t 9 kB\n")
    assert peak_resident(7, tmp_path) == 12 << 10
    assert peak_resident(8, tmp_path) is None
    (tmp_path / "7" / "status").write_text("VmHWM:\tmany\n")
    assert peak_resident(7, tmp_path) is None


def test_everyone_starts_once_untimed_and_then_once_a_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    noisy = iter([True])

    def time_start(one: Starter, *rest: object) -> Start:
        log.append(one.name)
        timed = len(log) > 2
        return Start(Sample(float(len(log)), 0.0, timed and next(noisy, False)), 1)

    monkeypatch.setattr(starts, "time_start", time_start)
    both = [starter(tmp_path, name, 1) for name in "ab"]
    found = take_starts(both, [1], 1, 3, 2, silent, settle_s=0.0)
    assert log[:2] == ["a", "b"]
    assert [set(log[i : i + 2]) for i in range(2, len(log), 2)] == [{"a", "b"}] * 4  # one more for the noise
    assert {i: len(of) for i, of in found.items()} == {0: 4, 1: 4}
    assert all(start.sample.seconds > 2 for of in found.values() for start in of)


def test_noise_does_not_start_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "time_start", lambda *of: Start(Sample(1.0, 2.0, True), 1))
    assert len(take_starts([starter(tmp_path, "a", 1)], [1], 1, 3, 2, silent, settle_s=0.0)[0]) == 6


def test_our_own_start_is_the_shipped_path_without_torch(tmp_path: Path) -> None:
    spec = tiny_spec()
    folder = tiny_checkpoint_folder(tmp_path / "model", spec)
    write_tokenizer(folder, spec.vocab_size)
    with launch(Variant(engine=OURS, format="native"), Path(sys.executable)) as worker:
        facts = worker.load(str(folder), 1)
        worker.first([1] * 32)
        maps = Path(f"/proc/{worker.pid}/maps")
        mapped = maps.read_text() if maps.exists() else ""
    assert facts["vocab_size"] == spec.vocab_size
    assert "libtorch" not in mapped
    code = "import sys, flatout.bench.workers.shipped; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(OURS), check=False).returncode == 0
