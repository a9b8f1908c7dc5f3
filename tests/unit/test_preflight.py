"""Before the work: folders that must not be touched, memory and disk that will not do."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from fake_bench import SPEC

from flatout.core.costs import weight_bytes
from flatout.core.formats import uniform
from flatout.core.spec import ModelSpec
from flatout.core.types import Workload
from flatout.errors import ConfigError, ResourceError
from flatout.search import preflight as module
from flatout.search.preflight import artifact_bytes, check_output, peak_memory_bytes, preflight

SMOLLM2 = ModelSpec(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_positions=8192,
    tie_embeddings=True,
)


def test_new_empty_and_artifact_folders_are_fine(tmp_path: Path) -> None:
    check_output(tmp_path / "new")
    check_output(tmp_path / "deep" / "new")
    assert list(tmp_path.iterdir()) == []  # leaves no trace
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "flatout.json").write_text("{}")
    (tmp_path / "artifact" / "model.safetensors").write_text("")
    check_output(tmp_path / "artifact")


def test_foreign_content_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="only an artifact is overwritten"):
        check_output(tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        check_output(tmp_path / "thesis.tex")
    with pytest.raises(ConfigError, match="must be a folder"):
        check_output(tmp_path / "thesis.tex" / "out")


def test_the_input_is_never_replaced(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "flatout.json").write_text("{}")  # even when it is an artifact
    for out in (model, tmp_path / "." / "model", model / ".." / "model"):
        with pytest.raises(ConfigError, match="the output must not replace its own input"):
            check_output(out, model)
    (model / "weights.gguf").write_text("")
    with pytest.raises(ConfigError, match="own input"):
        check_output(model, model / "weights.gguf")
    link = tmp_path / "link"
    link.symlink_to(model)
    with pytest.raises(ConfigError, match="own input"):
        check_output(link, model)
    check_output(tmp_path / "other", model)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.tempfile, "NamedTemporaryFile", refused)
    with pytest.raises(ConfigError, match=r"the output must be writable.*Permission denied.*--out"):
        check_output(tmp_path / "out")


def test_too_little_memory_is_found_out_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory", lambda: 1 << 30)
    with pytest.raises(
        ResourceError, match=r"takes up to \d\.\d GiB of memory; found: 1\.0 GiB available; try:"
    ):
        preflight(SMOLLM2, Workload(), tmp_path / "out")


def test_too_little_disk_is_found_out_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(1 << 30, 0, 10 << 20))
    with pytest.raises(ResourceError, match=r"takes up to \d\.\d GiB of disk; found: 0\.0 GiB free"):
        preflight(SMOLLM2, Workload(), tmp_path / "out")


def test_a_workload_longer_than_the_model_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reads at most 2048 tokens; found: a workload of 2049"):
        preflight(SPEC, Workload(prompt=2000, output=49), tmp_path / "out")


def test_unknown_memory_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory", lambda: 0)  # no meter
    assert preflight(SPEC, Workload(), tmp_path / "out").memory_available_bytes == 0


def test_estimates_cover_what_is_needed_without_being_absurd() -> None:
    """By hand for SmolLM2: 134.5 M weights, the tied head once more, at most twelve bytes each,
    moments of 3 times 576 and once 1,536 inputs in 30 layers three times, and the runtime."""
    stored = 134_515_008 + 49152 * 576
    assert SMOLLM2.num_parameters() == 134_515_008
    memory = peak_memory_bytes(SMOLLM2, Workload())
    moments = 3 * 30 * 4 * (3 * 576**2 + 1536**2)
    assert 12 * stored + moments < memory < 12 * stored + moments + (2 << 30)
    assert memory < 6 << 30  # the promise for the default model
    biggest = max(weight_bytes(SMOLLM2, uniform(name)) for name in ("bf16", "w8a8-g32", "w4a8-g32"))
    assert biggest < artifact_bytes(SMOLLM2) < biggest + (128 << 20)


def test_estimates_grow_with_the_model_and_the_workload() -> None:
    small = peak_memory_bytes(SMOLLM2, Workload())
    assert peak_memory_bytes(replace(SMOLLM2, num_layers=60), Workload()) > small
    assert peak_memory_bytes(SMOLLM2, Workload(batch=32, prompt=4096)) > small
