"""Peers that load files of their own: what is installed, what is made of a checkpoint, and where it is
kept."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.tiny import tiny_checkpoint_folder, tiny_spec, write_tokenizer

from flatout.bench import install as installing
from flatout.bench import models, peers, run
from flatout.bench.install import contents, install, pip_arguments
from flatout.bench.models import cache_name, model_file
from flatout.bench.peers import PEERS, Variant, environment, variants
from flatout.bench.worker import Worker
from flatout.core.checkpoint import Checkpoint, open_checkpoint
from flatout.errors import BackendError, ResourceError

EXPORTED = ("openvino", "onnxruntime", "ctranslate2")
PIN = re.compile(r"[a-z0-9-]+==[0-9.]+")

PEER = """
import json, pathlib
class Peer:
    def convert(self, source, target, threads, **recipe):
        if recipe.get("bits") == 3: raise ValueError("no 3 bits")
        folder = pathlib.Path(target)
        folder.mkdir()
        found = sorted(path.name for path in pathlib.Path(source).iterdir())
        (folder / "made.json").write_text(json.dumps({"found": found, "threads": threads, **recipe}))
        return True
"""


def silent(stage: str, done: int, total: int) -> None:
    """No listener."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    spec = tiny_spec()
    folder = tiny_checkpoint_folder(tmp_path / "model", spec)
    write_tokenizer(folder, spec.vocab_size)
    return open_checkpoint(folder)


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Workers are made of PEER; the list of those that were launched."""
    names: list[str] = []
    (tmp_path / "fake_peer.py").write_text(PEER)

    def launch(variant: Variant, python: Path) -> Worker:
        names.append(variant.name)
        script = str(Path(peers.__file__).parent / "workers" / "serve.py")
        return Worker(variant.name, [sys.executable, script, "fake_peer"], {"PYTHONPATH": str(tmp_path)})

    monkeypatch.setenv("FLATOUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "launch", launch)
    return names


def test_peers_that_export_read_any_checkpoint(checkpoint: Checkpoint) -> None:
    assert [variant.name for peer in EXPORTED for variant in variants(peer, checkpoint)] == [
        "openvino int8",
        "openvino int4 g64 all layers",
        "onnxruntime int4 g32 symmetric",
        "onnxruntime int4 g32 asymmetric",
        "ctranslate2 int8",
    ]
    with pytest.raises(BackendError, match=r"llama\.cpp reads GGUF files"):
        variants("llama.cpp", checkpoint)


@pytest.mark.parametrize("peer", EXPORTED)
def test_every_package_has_one_exact_version(peer: str) -> None:
    pins = contents(peer)["packages"]
    assert isinstance(pins, list)
    assert all(PIN.fullmatch(pin) for pin in pins)
    asked = [word for call in pip_arguments(peer) for word in call if not word.startswith("--")]
    assert sorted(asked) == sorted(pins)
    assert "torch==2.13.0" in pins


def test_installing_goes_to_an_environment_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    stages: list[str] = []

    def build(command: list[str], env: dict[str, str], log: Path, progress: Any) -> None:
        commands.append(command)
        Path(command[0]).parent.mkdir(parents=True, exist_ok=True)
        Path(command[0]).touch()

    monkeypatch.setenv("FLATOUT_CACHE", str(tmp_path))
    monkeypatch.setattr(installing, "_make_environment", lambda peer, folder: None)
    monkeypatch.setattr(installing, "run_build", build)
    python = install("openvino", lambda stage, done, total: stages.append(stage))
    assert python == tmp_path.resolve() / "peers" / "openvino" / "bin" / "python"
    assert [command[:4] for command in commands] == [[str(python), "-m", "pip", "install"]] * 2
    assert "--no-deps" in commands[1]
    assert stages[0] == "making an environment for openvino"
    assert set(stages[1:]) == {"installing openvino, once"}
    install("openvino", silent)
    assert len(commands) == 2
    monkeypatch.setattr(installing, "OPENVINO_PACKAGES", ("openvino==2026.5.0",))
    install("openvino", silent)
    assert len(commands) == 4


def test_a_full_disk_is_noticed_before_the_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLATOUT_CACHE", str(tmp_path))
    monkeypatch.setattr(installing.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 30))
    with pytest.raises(ResourceError, match="installing onnxruntime needs about 3 GiB"):
        install("onnxruntime", silent)


def test_environments_are_offline() -> None:
    assert {environment(peer)["HF_HUB_OFFLINE"] for peer in PEERS} == {"1"}


def test_a_model_is_made_once_from_a_transformers_folder(
    checkpoint: Checkpoint, launched: list[str], tmp_path: Path
) -> None:
    first, second = variants("openvino", checkpoint)
    path = model_file(first, Path(sys.executable), checkpoint, 2, silent)
    made = json.loads((path / "made.json").read_text())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(made["found"])
    assert (made["threads"], made["bits"], made["group"]) == (2, 8, 0)
    assert model_file(first, Path(sys.executable), checkpoint, 2, silent) == path
    assert model_file(second, Path(sys.executable), checkpoint, 2, silent) != path
    assert launched == [first.name, second.name]
    kept = sorted(entry.name for entry in path.parent.iterdir())
    assert len(kept) == 3  # two models and the lock: nothing temporary is left


def test_a_model_that_failed_is_not_kept(checkpoint: Checkpoint, launched: list[str]) -> None:
    wrong = Variant(engine="openvino", format="int3", recipe={"bits": 3})
    for _ in range(2):
        with pytest.raises(BackendError, match=r"openvino int3 must be able to convert; .*no 3 bits"):
            model_file(wrong, Path(sys.executable), checkpoint, 1, silent)
    assert len(launched) == 2


def test_a_folder_written_for_peers_is_the_original(checkpoint: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    weights = {name: checkpoint.array(name) for name in checkpoint.names}
    models.write_folder(out, checkpoint.spec, checkpoint.tokenizer, weights)
    again = open_checkpoint(out)
    assert again.spec == checkpoint.spec
    for name in again.names:
        np.testing.assert_array_equal(again.array(name), weights[name])
    assert again.tokenizer.sha256 == checkpoint.tokenizer.sha256


def test_original_files_are_loaded_as_they_are(checkpoint: Checkpoint, launched: list[str]) -> None:
    (variant,) = variants("transformers", checkpoint)
    assert model_file(variant, Path(sys.executable), checkpoint, 1, silent) == checkpoint.path
    assert launched == []


def test_room_is_asked_for_before_a_model_is_made(
    checkpoint: Checkpoint, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = variants("onnxruntime", checkpoint)[0]
    with monkeypatch.context() as patch:
        patch.setattr(models, "free_memory", lambda: 1)
        with pytest.raises(ResourceError, match="making onnxruntime int4 g32 symmetric needs about"):
            model_file(variant, Path(sys.executable), checkpoint, 1, silent)
    monkeypatch.setattr(models.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(ResourceError, match="must have room to make onnxruntime int4 g32 symmetric"):
        model_file(variant, Path(sys.executable), checkpoint, 1, silent)
    assert launched == []


def test_names_in_the_cache_tell_everything_apart() -> None:
    variant = Variant(engine="openvino", format="int4 g64", recipe={"bits": 4, "group": 64})
    names = {
        cache_name(variant, "5e" * 32, {"packages": ["a==1"]}),
        cache_name(variant, "70" * 32, {"packages": ["a==1"]}),
        cache_name(variant, "5e" * 32, {"packages": ["a==2"]}),
        cache_name(replace(variant, recipe={"bits": 4, "group": 32}), "5e" * 32, {"packages": ["a==1"]}),
    }
    assert len(names) == 4
    assert all(re.fullmatch(r"[0-9a-f]{32}-int4-g64-[0-9a-f]{12}", name) for name in names)


def test_memory_is_counted_for_every_variant(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = checkpoint.spec.num_parameters()
    wanted = variants("openvino", checkpoint)
    monkeypatch.setattr(run, "free_memory", lambda: 10 * weights)
    run._check_memory(checkpoint, 1, wanted)
    monkeypatch.setattr(run, "free_memory", lambda: 10 * weights - 1)
    with pytest.raises(ResourceError, match="3 contenders side by side"):
        run._check_memory(checkpoint, 1, wanted)
    monkeypatch.setattr(run, "free_memory", lambda: 12 * weights - 1)
    with pytest.raises(ResourceError, match="4 contenders side by side"):
        run._check_memory(checkpoint, 2, wanted)
