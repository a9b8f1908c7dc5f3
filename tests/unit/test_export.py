"""export/export.py and `flatout export`: every form of a tiny model, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from tests.tiny import tiny_checkpoint_folder, tiny_model, tiny_spec, write_tokenizer

from flatout.cli.main import main
from flatout.core.artifact import load_artifact, save_artifact
from flatout.core.checkpoint import open_checkpoint
from flatout.core.formats import uniform
from flatout.core.gguf import open_gguf
from flatout.core.gguf_blocks import BLOCKS
from flatout.core.gguf_write import OutTensor, float_blocks, write_gguf
from flatout.core.tokenizer import Tokenizer
from flatout.errors import ConfigError, EvidenceError
from flatout.export import export as module
from flatout.export.export import export
from flatout.export.gguf import write_model
from flatout.models.llama import Llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint_folder(tmp_path / "model", tiny_spec())


@pytest.mark.parametrize("recipe", [None, "w8a8-g32", "w4a8-g32", "bf16,sparsity=magnitude-2:4"])
@pytest.mark.parametrize("to", ["gguf", "folder"])
def test_a_checkpoint(folder: Path, tmp_path: Path, to: str, recipe: str | None) -> None:
    out = tmp_path / ("m.gguf" if to == "gguf" else "out")
    result = export(folder, to, out, recipe=recipe)
    assert result["max_logit_error"] < 1e-5
    again = open_checkpoint(out)
    assert again.spec.num_layers == 2
    if recipe is not None and "sparsity" in recipe:
        assert (again.array("model.layers.0.mlp.up_proj.weight") == 0).mean() == 0.5


@pytest.fixture
def k_quants(tmp_path: Path) -> Path:
    """A GGUF file whose matrices are random Q4_K blocks, but for Q6_K in v and Q5_0 in the embedding."""
    spec = tiny_spec(hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=64, intermediate_size=256)
    write_tokenizer(tmp_path, 320)
    path, plain = tmp_path / "k.gguf", tmp_path / "plain.gguf"
    write_model(tiny_model(spec, uniform("fp32")), Tokenizer.from_folder(tmp_path), plain, "plain")
    rng, file = np.random.default_rng(7), open_gguf(plain)
    blocks = {block.name: block for block in BLOCKS.values()}

    def made(name: str) -> OutTensor:
        shape = file.tensors[name].shape
        if len(shape) == 1:
            values = file.float32(name)
            return OutTensor(name=name, shape=shape, kind="F32", make=lambda: float_blocks(values, "F32"))
        kind = "Q6_K" if "attn_v" in name else "Q5_0" if "embd" in name else "Q4_K"
        raw = rng.integers(0, 256, (int(np.prod(shape)) // blocks[kind].elements, blocks[kind].bytes))
        raw = raw.astype(np.uint8)
        scales = (208,) if kind == "Q6_K" else (0,) if kind == "Q5_0" else (0, 2)
        for at in scales:
            small = rng.uniform(0.5e-4, 2e-4, len(raw)).astype("<f2")
            raw[:, at : at + 2] = small.view(np.uint8).reshape(-1, 2)
        return OutTensor(name=name, shape=shape, kind=kind, make=lambda: raw.reshape(-1))

    write_gguf(path, file.metadata, [made(name) for name in file.tensors])
    return path


def test_k_quants_of_a_file_stay(k_quants: Path, tmp_path: Path) -> None:
    result = export(k_quants, "gguf", tmp_path / "again.gguf")
    assert result["max_logit_error"] == 0
    before, after = (
        {t.name: t for t in gguf.GGUFReader(path).tensors} for path in (k_quants, tmp_path / "again.gguf")
    )
    assert before.keys() == after.keys()
    assert {t.tensor_type.name for t in after.values()} == {"F32", "Q4_K", "Q5_0", "Q6_K"}
    for name, tensor in before.items():
        assert after[name].tensor_type == tensor.tensor_type
        np.testing.assert_array_equal(after[name].data, tensor.data)
    # What is exported is what the package reads out of the blocks, q and k rows in their own order.
    down = after["blk.1.ffn_down.weight"]
    theirs = gguf.quants.dequantize(down.data, down.tensor_type)
    ours = open_checkpoint(k_quants).array("model.layers.1.mlp.down_proj.weight")
    np.testing.assert_allclose(theirs, ours, rtol=1e-6, atol=1e-9)


def test_a_recipe_gives_k_quants_up(k_quants: Path, tmp_path: Path) -> None:
    export(k_quants, "gguf", tmp_path / "bf16.gguf", recipe="bf16")
    assert {t.type for t in open_gguf(tmp_path / "bf16.gguf").tensors.values()} == {"F32", "BF16"}


def test_an_artifact_keeps_its_recipe(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 320)
    model = tiny_model(tiny_spec(), uniform("w4a8-g64"))
    artifact = save_artifact(model, Tokenizer.from_folder(tmp_path), tmp_path / "a", {})
    result = export(artifact, "gguf", tmp_path / "m.gguf")
    assert result["recipe"] == "w4a8-g64"
    assert result["max_logit_error"] < 1e-5
    with pytest.raises(ConfigError, match="an artifact is exported as it is"):
        export(artifact, "gguf", tmp_path / "n.gguf", recipe="bf16")


def test_a_cut_model(folder: Path, tmp_path: Path) -> None:
    """Structure needs text: the shipped passages, read by the model's tokenizer."""
    export(folder, "folder", tmp_path / "out", recipe="bf16,ffn=64,depth=1,kv-heads=1")
    model, _, manifest = load_artifact(tmp_path / "out")
    assert (model.spec.intermediate_size, model.spec.num_layers, model.spec.num_kv_heads) == (64, 1, 1)
    assert manifest["recipe"]["structure"] == [["ffn", 64], ["depth", 1], ["kv-heads", 1]]
    assert open_checkpoint(tmp_path / "out").spec == model.spec


def test_a_smaller_vocabulary(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("then another thing")
    export(folder, "gguf", tmp_path / "m.gguf", vocabulary=tmp_path / "t.txt")
    before, after = open_checkpoint(folder), open_checkpoint(tmp_path / "m.gguf")
    assert after.spec.vocab_size < before.spec.vocab_size
    text = "then another thing"
    ids, fewer = before.tokenizer.encode(text), after.tokenizer.encode(text)
    assert [before.tokenizer.vocabulary()[i] for i in ids] == [after.tokenizer.vocabulary()[i] for i in fewer]
    old, new = Llama(before).forward(ids).numpy(), Llama(after).forward(fewer).numpy()
    np.testing.assert_allclose(new[:, fewer], old[:, ids], atol=2e-2 * np.abs(old).max())  # bf16 weights


def test_coded_and_back(folder: Path, tmp_path: Path) -> None:
    export(folder, "folder", tmp_path / "plain")
    coded = export(tmp_path / "plain", "coded", tmp_path / "coded")
    assert coded["bytes"] < 0.8 * coded["bytes_before"]
    export(tmp_path / "coded", "decoded", tmp_path / "again")
    names = [path.name for path in sorted((tmp_path / "plain").iterdir())]
    assert names == [path.name for path in sorted((tmp_path / "again").iterdir())]
    first, second = (load_artifact(tmp_path / name)[0] for name in ("plain", "again"))
    for name, weight in first.weights.items():
        np.testing.assert_array_equal(np.asarray(weight), np.asarray(second.weights[name]))


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a model is exported to gguf, folder, coded, decoded"):
        export(folder, "onnx", tmp_path / "o")
    with pytest.raises(ConfigError, match=r"a GGUF file is called \.gguf"):
        export(folder, "gguf", tmp_path / "o")
    with pytest.raises(ConfigError, match="only an artifact is overwritten"):
        export(folder, "folder", folder)
    with pytest.raises(ConfigError, match="a folder is coded as it is"):
        export(folder, "coded", tmp_path / "o", recipe="bf16")
    with pytest.raises(ConfigError, match="ffn lies between 1 and the model's 128"):
        export(folder, "folder", tmp_path / "o", recipe="bf16,ffn=256")
    with pytest.raises(ConfigError, match="depth is a whole number"):
        export(folder, "folder", tmp_path / "o", recipe="bf16,depth=half")
    with pytest.raises(ConfigError, match="a sparsity is"):
        export(folder, "folder", tmp_path / "o", recipe="bf16,sparsity=random-50%")
    assert not (tmp_path / "o").exists()


def test_what_computes_something_else_is_no_success(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_artifact", lambda path: (open_checkpoint(folder / ".." / "other"),))
    tiny_checkpoint_folder(tmp_path / "other", tiny_spec(), seed=1)
    with pytest.raises(EvidenceError, match="must compute the same"):
        export(folder, "folder", tmp_path / "out")


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(folder), "--to", "gguf", "--out", str(tmp_path / "m.gguf"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["path"] == str(tmp_path / "m.gguf")
    assert 0 <= result["max_logit_error"] < 1e-5
    assert main(["export", str(folder), "--to", "folder", "--out", str(tmp_path / "f")]) == 0
    assert main(["export", str(tmp_path / "f"), "--to", "coded", "--out", str(tmp_path / "c")]) == 0
    shown = capsys.readouterr().out
    assert "the same bits" in shown
    assert main(["export", str(folder), "--to", "gguf", "--out", str(tmp_path / "x")]) == 2
