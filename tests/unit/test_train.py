"""The training loop: packing, the forward pass against the reference, exact resume, and what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import tiny_source, tiny_spec

import flatout
from flatout.core.checkpoint import open_checkpoint
from flatout.core.costs import step_costs, total
from flatout.core.fuse import float_recipe
from flatout.errors import BackendError, ConfigError
from flatout.models.llama import Llama
from flatout.train.config import TrainConfig
from flatout.train.data import IGNORED, Packed, pack
from flatout.train.distill import text_loss
from flatout.train.recipe import Training, _operations, run
from flatout.train.state import read_log
from flatout.train.tokenizer import END, train_tokenizer
from flatout.train.trainable import (
    Trainable,
    initial_weights,
    make_trainable,
    source_weights,
    to_source,
)
from flatout.train.trainer import mean_loss, open_device, train

SPEC = tiny_spec("llama", tie_embeddings=True)
CONFIG = TrainConfig(
    steps=12, rows=4, length=24, together=2, learning_rate=3e-3, warmup=3, precision="fp32", device="cpu",
    save_every=4,
)  # fmt: skip


def documents(count: int = 9, seed: int = 0) -> list[np.ndarray]:
    """Random documents of awkward lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, SPEC.vocab_size, length) for length in rng.integers(2, 70, count)]


def fresh(seed: int = 0) -> Trainable:
    return make_trainable(SPEC, initial_weights(SPEC, seed))


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_log(folder)]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8), length=st.integers(1, 17))
def test_every_token_is_predicted_once_and_from_its_own_document(lengths: list[int], length: int) -> None:
    # Tokens count through all documents, so that a pair (token, next) says where it is from.
    ends = np.cumsum(lengths)
    texts = [np.arange(end - size, end) for end, size in zip(ends, lengths, strict=True)]
    if max(lengths) < 2:
        with pytest.raises(ConfigError, match="a document of at least two"):
            pack(texts, length)
        return
    packed = pack(texts, length)
    batch = packed.take(np.arange(len(packed)))
    found = Counter(
        (int(token), int(target))
        for token, target in zip(batch.tokens.flatten(), batch.targets.flatten(), strict=True)
        if target != IGNORED
    )
    assert found == Counter((int(a), int(a) + 1) for text in texts for a in text[:-1])
    assert batch.count == sum(found.values())


def test_an_epoch_holds_every_row_once_and_steps_depend_on_their_number_alone() -> None:
    packed = pack([np.arange(7 * 5 + 1)], 5)
    assert len(packed) == 7
    firsts = [int(packed.step(step, 3, seed=1).tokens[row, 0]) for step in range(14) for row in range(3)]
    epochs = [firsts[at : at + 7] for at in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(0, 35, 5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert torch.equal(packed.step(9, 3, 1).tokens, packed.step(9, 3, 1).tokens)
    assert not torch.equal(packed.step(9, 3, 1).tokens, packed.step(9, 3, 2).tokens)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma"])
def test_packed_documents_do_not_see_each_other(family: str) -> None:
    """Logits of packed rows are those of the reference, each piece of a document by itself."""
    spec = tiny_spec(family)
    source = tiny_source(spec)
    model = make_trainable(spec, source_weights(source), frozen=True)
    texts = documents()
    packed = pack(texts, 23)
    batch = packed.take(np.arange(len(packed)))
    assert 0 < batch.mixed < len(packed)
    hidden, _ = model.hidden(batch)
    logits = model.logits(hidden).reshape(*batch.tokens.shape, -1)
    reference = Llama(source)
    checked = 0
    for row in range(len(packed)):
        owners = batch.documents[row].numpy()
        for owner in np.unique(owners[owners >= 0]):
            own = owners == owner
            expected = reference.forward(batch.tokens[row].numpy()[own])
            # float32 sums in another order; logits are of the size of 1
            torch.testing.assert_close(logits[row][own], expected, rtol=1e-4, atol=1e-4)
            checked += int(own.sum())
    assert checked >= sum(map(len, texts)) - 1  # the last token may be no input


def test_parts_of_a_batch_know_their_mixed_rows() -> None:
    batch = pack(documents(), 24).take(np.arange(8))
    assert 2 < batch.mixed < 8
    for rows in (1, 2, 3, 8):
        for part in batch.split(rows, torch.device("cpu")):
            several = (part.documents != part.documents[:, :1]).any(dim=1)
            assert several.tolist() == sorted(several.tolist(), reverse=True)
            assert int(several.sum()) == part.mixed


def test_rows_of_one_document_need_no_mask_and_agree() -> None:
    packed = pack([np.arange(100) % SPEC.vocab_size], 24)
    batch = packed.take(np.arange(4))
    model = fresh()
    assert batch.mixed == 0
    plain, _ = model.hidden(batch)
    masked, _ = model.hidden(replace(batch, mixed=3))
    torch.testing.assert_close(plain, masked, rtol=1e-5, atol=1e-5)


def test_parts_of_a_step_add_up_to_its_gradient(tmp_path: Path) -> None:
    packed = pack(documents(), 24)
    found = []
    for together in (0, 1, 2):
        config = replace(CONFIG, steps=1, warmup=0, together=together, weight_decay=0.0)
        model = fresh()
        outcome = train(model, text_loss, packed, config, tmp_path / str(together))
        found.append((outcome.loss, read_log(tmp_path / str(together))[0]["norm"]))
    # Sums in another order.
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_a_batch_is_learned_by_heart(tmp_path: Path) -> None:
    packed = pack(documents(3), 24)
    config = replace(CONFIG, steps=120, rows=len(packed), together=0, learning_rate=1e-2, warmup=10)
    model = fresh()
    assert train(model, text_loss, packed, config, tmp_path).loss < 0.05
    assert losses(tmp_path)[0] > 5  # log(320) = 5.8
    assert mean_loss(model, text_loss, packed) < 0.05


SCRIPT = """
import os, signal, sys
import torch
torch.set_num_threads(1)
sys.path[:0] = [{root!r}, {unit!r}]
from test_train import CONFIG, documents, fresh
from flatout.train.data import pack
from flatout.train.distill import text_loss
from flatout.train.trainer import train

def progress(what, done, total):
    if done == 7:
        os.kill(os.getpid(), signal.SIGKILL)

train(fresh(), text_loss, pack(documents(), 24), CONFIG, {folder!r}, progress=progress)
"""


def test_a_killed_run_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    packed = pack(documents(), 24)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the process that is killed: sums have one order
    try:
        train(fresh(), text_loss, packed, CONFIG, tmp_path / "whole")
        root = str(Path(__file__).parents[2])
        script = SCRIPT.format(root=root, unit=str(Path(__file__).parent), folder=str(tmp_path / "killed"))
        environment = {**os.environ, "PYTHONPATH": str(Path(flatout.__file__).parents[1])}
        killed = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
        assert killed.returncode == -signal.SIGKILL
        assert len(losses(tmp_path / "killed")) == 7
        with (tmp_path / "killed" / "train.jsonl").open("a") as log:
            log.write('{"step": 8, "lo')  # killed while writing
        other = fresh(seed=1)  # whatever it starts from, the state counts
        outcome = train(other, text_loss, packed, CONFIG, tmp_path / "killed")
    finally:
        torch.set_num_threads(threads)
    assert outcome.finished
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert [record["step"] for record in read_log(tmp_path / "killed")] == list(range(1, 13))


def test_ctrl_c_ends_after_the_step_and_saves(tmp_path: Path) -> None:
    packed = pack(documents(), 24)
    handler = signal.getsignal(signal.SIGINT)

    def interrupt(what: str, done: int, total: int) -> None:
        if done == 5:
            os.kill(os.getpid(), signal.SIGINT)

    outcome = train(fresh(), text_loss, packed, CONFIG, tmp_path / "a", progress=interrupt)
    assert not outcome.finished
    assert signal.getsignal(signal.SIGINT) is handler
    steps: list[int] = []
    resumed = train(
        fresh(), text_loss, packed, CONFIG, tmp_path / "a", progress=lambda _, done, __: steps.append(done)
    )
    assert steps[0] == outcome.steps + 1 == 7
    assert resumed.finished
    train(fresh(), text_loss, packed, CONFIG, tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.parametrize(
    "change",
    [
        lambda packed: (packed, replace(CONFIG, learning_rate=1e-3), ""),
        lambda packed: (pack(documents(seed=1), 24), CONFIG, ""),
        lambda packed: (packed, CONFIG, "another objective"),
    ],
    ids=["settings", "data", "objective"],
)
def test_the_state_of_another_run_is_refused(
    change: Callable[[Packed], tuple[Packed, TrainConfig, str]], tmp_path: Path
) -> None:
    packed = pack(documents(), 24)
    train(fresh(), text_loss, packed, replace(CONFIG, steps=4), tmp_path / "other")
    train(fresh(), text_loss, packed, CONFIG, tmp_path)
    data, config, purpose = change(packed)
    with pytest.raises(ConfigError, match="goes on with the model, data and settings"):
        train(fresh(), text_loss, data, config, tmp_path, purpose=purpose)


def test_ids_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token ids are below 320"):
        train(fresh(), text_loss, pack([np.array([1, 2, 320, 3])], 2), CONFIG, tmp_path)
    assert not (tmp_path / "state.safetensors").exists()


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(fresh(), text_loss, pack(documents(), 24), replace(CONFIG, steps=5), tmp_path)
    events = reading.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(tmp_path))


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    model = fresh()
    with torch.no_grad():
        model.parameters["norm"][0] = torch.nan
    with pytest.raises(ConfigError, match="the loss must stay finite"):
        train(model, text_loss, pack(documents(), 24), CONFIG, tmp_path)


def test_the_rate_climbs_and_falls() -> None:
    config = replace(CONFIG, steps=100, warmup=10, learning_rate=1.0, final=0.1)
    rates = [config.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[10:] == sorted(set(rates[10:]), reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"together": 3}, {"learning_rate": float("nan")}, {"warmup": 99}, {"clip": 0.0},
        {"precision": "fp8"}, {"device": "tpu"},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(CONFIG, **wrong)


def test_a_gpu_that_is_not_there_is_named() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="needs a GPU"):
            open_device("cuda")


WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "quick", "lazy", "and", "then"]


def texts(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 60)) for _ in range(count)]


def training(**changes: Any) -> Training:
    spec = replace(SPEC, vocab_size=280, max_positions=64)
    given = {"documents": texts(12, 0), "heldout": texts(2, 1), "spec": spec, "config": CONFIG}
    return Training(**(given | changes))


def test_a_folder_comes_out_that_runs_and_goes_on(tmp_path: Path) -> None:
    result = run(training(config=replace(CONFIG, steps=40)), tmp_path / "m")
    assert result["finished"]
    assert result["heldout_loss"] < 4.5  # log(280) = 5.6 before training
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.tokenizer.decode([checkpoint.spec.eos_token_ids[0]]) == END
    text = texts(1, 2)[0]
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer.encode(text)) == text
    tokens = checkpoint.tokenizer.encode(text)[:40]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(Llama(checkpoint).forward(tokens), expected, rtol=1e-3, atol=1e-3)

    again = run(training(config=replace(CONFIG, steps=40)), tmp_path / "m")
    assert again["steps"] == 40
    assert again["loss"] == result["loss"]
    assert again["heldout_loss"] == result["heldout_loss"]


def test_a_student_learns_from_a_teacher_of_its_tokenizer(tmp_path: Path) -> None:
    run(training(config=replace(CONFIG, steps=40)), tmp_path / "teacher")
    student = replace(SPEC, vocab_size=280, max_positions=64, num_layers=1)
    result = run(
        training(
            spec=student,
            teacher=str(tmp_path / "teacher"),
            config=replace(CONFIG, steps=30, learning_rate=1e-2),
        ),
        tmp_path / "student",
    )
    first = read_log(tmp_path / "student" / "run")[0]["loss"]
    assert result["loss"] < first / 2
    assert open_checkpoint(tmp_path / "student").spec.num_layers == 1
    other = training(teacher=str(tmp_path / "teacher"), spec=replace(SPEC, vocab_size=281))
    with pytest.raises(ConfigError, match="share one tokenizer"):
        run(other, tmp_path / "x")


def test_wrong_trainings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="starts from a shape or from a model"):
        training(model="smollm2-135m")
    with pytest.raises(ConfigError, match="training needs text"):
        training(documents=[""])
    with pytest.raises(ConfigError, match="as long as the model's positions"):
        run(training(config=replace(CONFIG, length=65)), tmp_path / "m")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="a new folder or that of a training"):
        run(training(), tmp_path / "full")
    with pytest.raises(ConfigError, match="at least 257 ids"):
        train_tokenizer(["text"], 100)
    with pytest.raises(ConfigError, match="must have enough words for 5000 ids"):
        train_tokenizer(texts(3, 0), 5000)


def test_weights_become_arrays_of_their_names_again() -> None:
    spec = tiny_spec("qwen3")
    source = tiny_source(spec)
    arrays = to_source(make_trainable(spec, source_weights(source))).arrays
    assert list(arrays) == list(source.names)
    for name in source.names:
        np.testing.assert_array_equal(arrays[name], source.array(name))


def test_operations_are_six_a_parameter_and_token() -> None:
    """The usual estimate of training without attention, 6 N; look-up of the embedding costs nothing."""
    config = replace(CONFIG, length=8)
    spec = tiny_spec("llama")
    matrices = spec.num_parameters() - spec.vocab_size * spec.hidden_size
    recipe = float_recipe("bf16")
    attention = step_costs(spec, recipe, batch=1, tokens=8, context=0, logits=8)["attention"].flops / 8
    assert 3 * (_operations(spec, config) - attention) == pytest.approx(6 * matrices, rel=0.01)
    assert total({"a": step_costs(spec, recipe, batch=1, tokens=8, context=0)["o"]}).flops > 0


def test_the_command_runs_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flatout.cli.main import main

    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(Path(__file__).parents[2])!r}, {str(Path(__file__).parent)!r}]\n"
        "from test_train import training\n"
    )
    assert main(["train", str(recipe), "--out", str(tmp_path / "m"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {"loss", "tokens_per_s", "mfu"} <= set(printed)
    assert 0 < printed["mfu"] < 1
    assert main(["train", str(recipe), "--out", str(tmp_path / "m")]) == 0
    assert "next: flatout run" in capsys.readouterr().out
    recipe.write_text("training = 1\n")
    assert main(["train", str(recipe), "--out", str(tmp_path / "n")]) == 2
    assert main(["train", str(tmp_path / "none.py"), "--out", str(tmp_path / "n")]) == 2
    assert not (tmp_path / "n").exists()
