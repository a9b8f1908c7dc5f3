"""core/artifact.py: what was saved comes back bit for bit, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from tests.tiny import llama3_scaling, tiny_model, tiny_spec, write_tokenizer

from flatout.core.artifact import (
    check_output,
    is_artifact,
    load_artifact,
    recipe_from_json,
    save_artifact,
    update_manifest,
)
from flatout.core.formats import Recipe, uniform
from flatout.core.model import Model
from flatout.core.quantized import QuantizedTensor
from flatout.core.safetensors import open_safetensors, to_bfloat16
from flatout.core.tokenizer import Tokenizer
from flatout.core.types import to_json
from flatout.errors import ConfigError, FlatoutError, ModelFileError, ResourceError

MIXED = Recipe(
    name="mixed",
    layers="w8a8-g64",
    embedding="w4a16-g32",
    head="w8a8",
    kv_cache="int8",
    overrides=(("layers.0.down", "w4a16-g64-asym"), ("layers.1.o", "bf16")),
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_tokenizer(folder, 320)
    return Tokenizer.from_folder(folder)


def assert_same_model(a: Model, b: Model) -> None:
    assert a.spec == b.spec
    assert a.recipe == b.recipe
    assert a.weights.keys() == b.weights.keys()
    for name, x in a.weights.items():
        y = b.weights[name]
        if isinstance(x, QuantizedTensor):
            assert isinstance(y, QuantizedTensor)
            for p, q in ((x.codes, y.codes), (x.scales, y.scales), (x.zeros, y.zeros), (x.minima, y.minima)):
                np.testing.assert_array_equal(p, q)
        else:
            # bf16 weights are rounded once, when they are stored; norms and biases are float32.
            exact = x.ndim == 1 or a.recipe.layers == "fp32"
            np.testing.assert_array_equal(x if exact else to_bfloat16(x), y if exact else to_bfloat16(y))


@pytest.mark.parametrize(
    "recipe",
    [
        uniform(name, head=name)
        for name in ("fp32", "bf16", "w8a8", "w4a8-g32", "w4a16-g32-asym", "q4_0", "q4_1", "q8_0", "q4_1-s8")
    ]
    + [MIXED],
    ids=lambda recipe: recipe.name,
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma"])
def test_round_trip(recipe: Recipe, family: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    spec = tiny_spec(family, rope_scaling=llama3_scaling() if family == "llama" else None)
    model = tiny_model(spec, recipe)
    out = save_artifact(model, tokenizer, tmp_path / "a" / "b", {"measurements": [1, 2]})
    loaded, loaded_tokenizer, manifest = load_artifact(out)
    assert_same_model(model, loaded)
    assert loaded_tokenizer.sha256 == tokenizer.sha256
    assert manifest["measurements"] == [1, 2]
    assert manifest["loads_in"]["transformers"].startswith("no" if recipe.name.startswith("q4_1") else "yes")
    assert [p.name for p in out.parent.iterdir()] == ["b"]


def test_tied_floats_are_stored_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    spec = tiny_spec("llama", tie_embeddings=True)
    for name, once in (("bf16", True), ("q4_1", True), ("w8a8", False)):
        out = save_artifact(tiny_model(spec, uniform(name, head=name)), tokenizer, tmp_path / name, {})
        stored = {n.split(".weight")[0] for n in open_safetensors(out / "model.safetensors").names}
        assert ("lm_head" in stored) != once
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == once


def test_bfloat16_equals_torch() -> None:
    import torch

    values = np.concatenate(
        [
            np.random.default_rng(0).standard_normal(1000) * np.exp2(np.arange(-500, 500) / 5),
            [0, -0.0, np.inf, np.nan, 1e-45],
        ]
    )
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    ours = (to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(ours, expected)


def test_update_and_overwrite(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = tiny_model(tiny_spec(), uniform("w8a8"))
    out = save_artifact(model, tokenizer, tmp_path / "a", {"note": "first"})
    (out / "report.html").write_text("page")
    assert update_manifest(out, {"certificate": {"passed": True}, "bound": float("nan")})["note"] == "first"
    assert load_artifact(out)[2]["certificate"] == {"passed": True}
    save_artifact(tiny_model(tiny_spec(), uniform("w4a8-g32")), tokenizer, out, {"note": "second"})
    assert load_artifact(out)[2]["note"] == "second"
    assert not (out / "report.html").exists()
    with pytest.raises(ConfigError, match=r"keeps .* for itself; found: recipe"):
        update_manifest(out, {"recipe": 1})
    with pytest.raises(ConfigError, match=r"keeps .* for itself; found: files"):
        save_artifact(model, tokenizer, out, {"files": {}})


def test_refuses_other_folders(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = tiny_model(tiny_spec(), uniform("w8a8"))
    other = tmp_path / "home"
    other.mkdir()
    save_artifact(model, tokenizer, other, {})  # empty, so it is used
    shutil.rmtree(other)
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="only an artifact is overwritten"):
        save_artifact(model, tokenizer, other, {})
    assert (other / "thesis.tex").read_text() == "years of work"
    with pytest.raises(ConfigError, match="the output is a folder"):
        check_output(other / "thesis.tex")


def test_full_disk(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    with pytest.raises(ResourceError, match=r"the folder needs .* MB free"):
        save_artifact(tiny_model(tiny_spec(), uniform("w8a8")), tokenizer, tmp_path / "a", {})
    assert not (tmp_path / "a").exists()


def test_failure_keeps_the_old_artifact(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tiny_spec(), uniform("w8a8"))
    out = save_artifact(model, tokenizer, tmp_path / "a", {"note": "old"})
    monkeypatch.setattr("flatout.core.scratch._exchange", lambda a, b: False)
    rename, calls = os.rename, []

    def interrupted(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_artifact(model, tokenizer, out, {"note": "new"})
    assert load_artifact(out)[2]["note"] == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "tokenizer"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_unwritable(tokenizer: Tokenizer, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(ResourceError, match="must be writable"):
        save_artifact(tiny_model(tiny_spec(), uniform("w8a8")), tokenizer, closed / "a", {})


def test_parent_is_a_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="must be writable"):
        save_artifact(tiny_model(tiny_spec(), uniform("w8a8")), tokenizer, tmp_path / "file" / "a", {})


def test_changed_files_are_noticed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = tiny_model(tiny_spec(), uniform("w8a8"))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        out = save_artifact(model, tokenizer, tmp_path / "a", {})
        data = bytearray((out / name).read_bytes())
        data[-3] ^= 1
        (out / name).write_bytes(data)
        with pytest.raises(ModelFileError, match=rf"{name} has changed"):
            load_artifact(out)
    with pytest.raises(ModelFileError, match=r"an artifact is a folder with flatout.json"):
        load_artifact(tmp_path)
    assert not is_artifact(tmp_path)


@pytest.mark.parametrize("key", ["artifact", "recipe", "tied", "head_is_embedding", "files"])
@pytest.mark.parametrize("value", [None, 7, "x", {}, {"../../etc/passwd": "0"}, []], ids=str)
def test_hostile_manifest(key: str, value: object, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = save_artifact(tiny_model(tiny_spec(), uniform("w8a8")), tokenizer, tmp_path / "a", {})
    manifest = json.loads((out / "flatout.json").read_text())
    (out / "flatout.json").write_text(json.dumps(manifest | {key: value}))
    with pytest.raises(FlatoutError):
        load_artifact(out)


def test_recipe_json() -> None:
    assert recipe_from_json(to_json(MIXED)) == MIXED
    good = to_json(MIXED)
    for bad in (
        None,
        [],
        {},
        good | {"more": 1},
        good | {"layers": "w9"},
        good | {"overrides": [["layers.0"]]},
    ):
        with pytest.raises(ModelFileError, match="a recipe"):
            recipe_from_json(bad)


def test_loading_needs_no_torch(tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = save_artifact(tiny_model(tiny_spec(), uniform("w8a8")), tokenizer, tmp_path / "a", {})
    code = (
        "import sys; from flatout.core.artifact import load_artifact; load_artifact(sys.argv[1]); "
        "sys.exit(', '.join({'torch', 'transformers', 'scipy'} & set(sys.modules)) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=False)
    assert run.stderr == ""
    assert run.returncode == 0
