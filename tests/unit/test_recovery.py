"""The recovery ladder on a tiny model and text of its own making."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny import tiny_checkpoint_folder, tiny_spec

import flatout
from flatout.core.artifact import load_artifact
from flatout.core.checkpoint import Checkpoint, open_checkpoint
from flatout.core.formats import Recipe
from flatout.core.model import Model, dense
from flatout.core.quantized import QuantizedTensor
from flatout.engine.reference import ReferenceRunner
from flatout.errors import ConfigError
from flatout.models.llama import Llama
from flatout.search.recovery import RUNGS, Recovery, climb, recover
from flatout.search.rungs import Rung
from flatout.search.texts import Texts
from flatout.train.config import TrainConfig
from flatout.train.data import Batch
from flatout.train.trainable import make_trainable, source_weights
from flatout.verify.certificate import recompute
from flatout.verify.examination import Holdout
from flatout.verify.ledger import next_k
from flatout.verify.quality import Cluster

SPEC = tiny_spec("llama")
RECIPE = Recipe(name="w4", layers="w4a16-g64", embedding="fp32", head="fp32")
CONFIG = TrainConfig(
    steps=60, rows=8, length=32, learning_rate=3e-4, precision="fp32", device="cpu", warmup=5, log_every=20,
    save_every=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint_folder(tmp_path_factory.mktemp("model"), SPEC))


@pytest.fixture(scope="module")
def texts(source: Checkpoint) -> Texts:
    return sampled(source)


def sampled(source: Checkpoint) -> Texts:
    """Sampled from the model itself: text that it knows, of which rounding makes it forget something."""
    model = make_trainable(SPEC, source_weights(source), frozen=True)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, SPEC.vocab_size, (360, 1), generator=draw)
    for _ in range(31):
        batch = Batch(tokens=tokens, targets=tokens, documents=torch.zeros_like(tokens), mixed=0)
        hidden, _ = model.hidden(batch)
        last = model.logits(hidden).reshape(*tokens.shape, -1)[:, -1]
        tokens = torch.cat([tokens, torch.multinomial(torch.softmax(last, 1), 1, generator=draw)], dim=1)
    rows = [
        Cluster(id=str(i), domain=str(i % 3), tokens=tuple(map(int, row))) for i, row in enumerate(tokens)
    ]
    holdout = Holdout(
        source="sampled", sha256="0" * 64, tokenizer_sha256="1" * 64, block=32, clusters=tuple(rows[300:])
    )
    return Texts(calibration=tuple(rows[:200]), validation=tuple(rows[200:300]), holdout=holdout)


def ascend(
    source: Checkpoint, texts: Texts, out: Path, margin: float, recipe: Recipe = RECIPE, **options: object
) -> Recovery:
    def serve(model: Model) -> ReferenceRunner:
        return ReferenceRunner(model, 4, as_served=False)  # quick

    told: list[Rung] = []
    found = climb(
        source, recipe, texts, out / "m", CONFIG, original=ReferenceRunner(source, 4), serve=serve,
        margin=margin, ledger=out / "ledger", tell=told.append, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    assert told == list(found.rungs)
    return found


def test_the_first_rung_that_is_certified_ends_the_climb(
    source: Checkpoint, texts: Texts, tmp_path: Path
) -> None:
    found = ascend(source, texts, tmp_path, margin=0.5)
    assert [rung.name for rung in found.rungs] == ["rtn"]
    assert found.rungs[0].verdict == "passed"
    assert found.rungs[0].gain_per_minute is None
    assert recompute(tmp_path / "m") == found.certificate
    model, _, manifest = load_artifact(tmp_path / "m")
    assert model.recipe.method == "rtn"
    assert manifest["derived_from"] == source.sha256
    assert found.certificate is not None
    assert found.certificate.optimised.derived_from == source.sha256


def test_without_a_chance_every_rung_is_climbed_and_nothing_is_opened(
    source: Checkpoint, texts: Texts, tmp_path: Path
) -> None:
    found = ascend(source, texts, tmp_path, margin=1e-6)
    assert tuple(rung.name for rung in found.rungs) == RUNGS
    assert found.certificate is None
    assert all(rung.verdict == "" for rung in found.rungs)
    assert next_k("0" * 64, source.sha256, tmp_path / "ledger") == 1
    losses = {rung.name: rung.loss.value for rung in found.rungs}
    assert losses["rtn"] > 0
    assert losses["full-kd"] < 0.85 * losses["rtn"]
    for i, rung in enumerate(found.rungs[1:], 1):
        best = min(other.loss.value for other in found.rungs[:i])
        assert rung.gain_per_minute == pytest.approx((best - rung.loss.value) / rung.minutes)
        assert "points a minute" in str(rung)
    # What was written is what was judged best, on the recipe's levels.
    model, _, _ = load_artifact(tmp_path / "m")
    stored = model.weights["layers.1.down"]
    assert isinstance(stored, QuantizedTensor)
    np.testing.assert_array_equal(stored.codes, found.model.weights["layers.1.down"].codes)  # type: ignore[union-attr]
    again = Llama(model).forward(texts.validation[0].tokens)
    assert torch.equal(again, Llama(found.model).forward(texts.validation[0].tokens))


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = [{root!r}, {unit!r}]
from test_recovery import ascend, sampled
from flatout.compress import kept
from flatout.core.checkpoint import open_checkpoint

def progress(what, done, total):
    if (what.partition(",")[0], done) == {at!r}:
        os.kill(os.getpid(), signal.SIGKILL)

kept.EVERY_S = 0
source = open_checkpoint({model!r})
out = Path({out!r})
ascend(source, sampled(source), out, 1e-6, rungs={rungs!r}, keep=out / "keep", progress=progress)
"""


@pytest.mark.parametrize(
    ("rungs", "at", "on"),
    [
        (("rtn", "gptq"), ("layers.1.qkv", 4), ("layers.1.qkv", 4)),
        (("rtn", "full-kd"), ("training", 33), ("training", 31)),
    ],
    ids=["gptq", "full-kd"],
)
def test_a_climb_that_is_killed_in_a_rung_goes_on_there(
    rungs: tuple[str, ...], at: tuple[str, int], on: tuple[str, int], source: Checkpoint, texts: Texts,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The same losses and codes as without the kill, and what was done before the last state stays."""
    steps: list[tuple[str, int]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the process that is killed: sums have one order
    try:
        whole = ascend(source, texts, tmp_path / "whole", 1e-6, rungs=rungs)
        script = SCRIPT.format(
            root=str(Path(__file__).parents[2]), unit=str(Path(__file__).parent), at=at,
            model=str(source.path), out=str(tmp_path / "killed"), rungs=rungs,
        )  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(Path(flatout.__file__).parents[1])}
        killed = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
        assert killed.returncode == -signal.SIGKILL
        found = ascend(
            source, texts, tmp_path / "killed", 1e-6, rungs=rungs, keep=tmp_path / "killed" / "keep",
            progress=lambda what, done, total: steps.append((what.partition(",")[0], done)),
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert [rung.name for rung in found.rungs] == list(rungs)
    assert [rung.loss for rung in found.rungs] == [rung.loss for rung in whole.rungs]
    for name, weight in whole.model.weights.items():
        np.testing.assert_array_equal(dense(weight), dense(found.model.weights[name]))
    assert not (tmp_path / "killed" / "keep").exists()
    assert steps[0] == on


def test_ctrl_c_ends_the_climb_not_the_rung(source: Checkpoint, texts: Texts, tmp_path: Path) -> None:
    done: list[int] = []

    def interrupt(what: str, step: int, total: int) -> None:
        if what.startswith("training"):
            done.append(step)
            if step == 5:
                os.kill(os.getpid(), signal.SIGINT)

    climbing = {"rungs": ("rtn", "full-kd"), "keep": tmp_path / "keep", "progress": interrupt}
    with pytest.raises(KeyboardInterrupt):
        ascend(source, texts, tmp_path, 1e-6, **climbing)
    assert len(ascend(source, texts, tmp_path, 1e-6, **climbing).rungs) == 2
    assert done == list(range(1, CONFIG.steps + 1))


def test_a_recipe_must_leave_the_method_open_and_lose_something(
    source: Checkpoint, texts: Texts, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="every rung has a method of its own; found: a recipe made by awq"):
        ascend(source, texts, tmp_path, margin=0.01, recipe=replace(RECIPE, method="awq"))
    with pytest.raises(ConfigError, match="found: w4 rounds no layer"):
        ascend(source, texts, tmp_path, margin=0.01, recipe=replace(RECIPE, layers="bf16"))


def test_encoders_have_no_ladder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="the recovery ladder is for decoders"):
        recover(tmp_path, tmp_path / "out", "w8a8")


def test_rungs_that_are_none_are_refused(source: Checkpoint, texts: Texts, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rungs are of rtn"):
        ascend(source, texts, tmp_path, margin=0.01, rungs=("rtn", "magic"))
    with pytest.raises(ConfigError, match="rungs are of rtn"):
        ascend(source, texts, tmp_path, margin=0.01, rungs=())
