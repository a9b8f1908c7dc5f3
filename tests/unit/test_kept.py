"""compress/kept.py and layers.py: work survives kill -9 at any layer, and belongs to what made it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.tiny import TinySource, tiny_source, tiny_spec

from flatout.compress.apply import compress
from flatout.core.formats import Recipe
from flatout.core.model import Model
from flatout.core.quantized import QuantizedTensor

SPEC = tiny_spec("llama", num_layers=4)
W4 = Recipe(name="r", layers="w4a16-g32-asym", overrides=(("layers.2.o", "bf16"),), method="gptq")
DOCUMENTS = [np.random.default_rng(i).integers(0, SPEC.vocab_size, 64).tolist() for i in range(3)]

KILLED = """
import os, signal, sys
from pathlib import Path
from tests.unit.test_kept import DOCUMENTS, SPEC, W4
from tests.tiny import tiny_source
from flatout.compress.apply import compress

def progress(what, done, total):
    if what.startswith(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

compress(tiny_source(SPEC), W4, DOCUMENTS, progress, keep=Path(sys.argv[1]))
"""


def arrays(model: Model) -> dict[str, np.ndarray]:
    return {
        f"{name}.{part}": array
        for name, weight in model.weights.items()
        if isinstance(weight, QuantizedTensor)
        for part in ("codes", "scales", "zeros")
        if (array := getattr(weight, part)) is not None
    }


def same(a: Model, b: Model) -> bool:
    one, other = arrays(a), arrays(b)
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def whole() -> Model:
    return compress(tiny_source(SPEC), W4, DOCUMENTS)


@pytest.mark.parametrize("place", ["layers.0.down", "layers.2.gate_up"])
def test_killed_at_a_layer(tmp_path: Path, whole: Model, place: str) -> None:
    """The next run begins with the layer that was not finished and ends with the same bits."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", KILLED, str(tmp_path), place]
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL
    steps: list[str] = []
    model = compress(
        tiny_source(SPEC), W4, DOCUMENTS, lambda what, done, total: steps.append(what), keep=tmp_path
    )
    layer = place.split(".")[1]
    assert steps[0].startswith(f"layers.{layer}.qkv"), "earlier layers are not made again"
    assert same(model, whole)
    assert list(tmp_path.glob("*")) == [], "nothing is left behind"


class Stopped(Exception):
    pass


def half_done(folder: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("layers.2.qkv"):
            raise Stopped

    with pytest.raises(Stopped):
        compress(tiny_source(SPEC), W4, DOCUMENTS, stop, keep=folder)


def first_step(source: TinySource, recipe: Recipe, documents: list[list[int]], folder: Path) -> str:
    steps: list[str] = []

    def stop(what: str, done: int, total: int) -> None:
        steps.append(what)
        raise Stopped

    with pytest.raises(Stopped):
        compress(source, recipe, documents, stop, keep=folder)
    return steps[0].split(",")[0]


def test_work_belongs_to_model_text_and_recipe(tmp_path: Path) -> None:
    half_done(tmp_path)
    assert first_step(tiny_source(SPEC), W4, DOCUMENTS, tmp_path) == "layers.2.qkv"
    assert first_step(tiny_source(SPEC), W4, DOCUMENTS[:2], tmp_path) == "layers.0.qkv"
    other = Recipe(name="r", layers="w4a16-g64-asym", method="gptq")
    assert first_step(tiny_source(SPEC), other, DOCUMENTS, tmp_path) == "layers.0.qkv"
    assert first_step(tiny_source(SPEC, seed=1), W4, DOCUMENTS, tmp_path) == "layers.0.qkv"


@pytest.mark.parametrize("damage", ["layer-1.npz", "state.npz"])
def test_damaged_work_is_made_again(tmp_path: Path, whole: Model, damage: str) -> None:
    half_done(tmp_path)
    (file,) = tmp_path.glob(f"*/{damage}")
    file.write_bytes(file.read_bytes()[:100])
    assert same(compress(tiny_source(SPEC), W4, DOCUMENTS, keep=tmp_path), whole)
