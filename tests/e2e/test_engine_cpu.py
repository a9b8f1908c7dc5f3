"""The engine on the C++ runner: tiny models of every kind for exactness, the built-in model for real text."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.tiny import tiny_checkpoint_folder, tiny_model, tiny_spec
from tests.toy import ByteTokenizer

import flatout
from flatout.core.artifact import save_artifact
from flatout.core.checkpoint import Checkpoint, open_checkpoint
from flatout.core.formats import Recipe, uniform
from flatout.core.fuse import assemble, float_recipe, native_recipe
from flatout.core.model import Model
from flatout.engine import load
from flatout.engine.cpu import CpuRunner
from flatout.engine.draft import DraftProposer
from flatout.engine.engine import Engine
from flatout.engine.reference import ReferenceRunner
from flatout.engine.request import Result, SamplingParams
from flatout.engine.runner import StepInput
from flatout.engine.sampler import sample
from flatout.engine.score import score_documents
from flatout.errors import BackendError, ConfigError, ResourceError, UnsupportedModelError

NAME = "smollm2-135m"
FLOAT = float_recipe("fp32", kv_cache="bf16")
INTEGER = [uniform("w8a8"), uniform("q4_1"), uniform("w4a8-g32-asym"), uniform("q8_0", kv_cache="bf16")]


def requests(vocabulary: int, longest: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts with common beginnings, short and long, greedy and sampled."""
    rng = np.random.default_rng(4)
    common = rng.integers(3, vocabulary, 130).tolist()
    prompts = [
        common,
        [*common, 7],
        rng.integers(3, vocabulary, longest).tolist(),
        common[:65],
        [5],
        common[:64],
    ]
    params = [
        SamplingParams(max_tokens=70, temperature=t, top_p=p, seed=i, ignore_eos=True)
        for i, (t, p) in enumerate([(0, 1), (1.0, 0.9), (0.7, 1), (0, 1), (1.5, 1), (0, 1)])
    ]
    return prompts, params


def answers(
    model: Model, threads: int = 1, num_pages: int = 40, **options: int
) -> tuple[Engine, list[list[int]]]:
    engine = Engine(CpuRunner(model, threads, num_pages=num_pages), ByteTokenizer(), **options)
    prompts, params = requests(model.spec.vocab_size, 200)
    return engine, [result.token_ids for result in engine.generate(prompts, params)]


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        *(("llama", recipe) for recipe in INTEGER),
        *((family, INTEGER[0]) for family in ("mistral", "qwen2", "qwen3", "gemma")),
    ],
    ids=lambda v: f"{v.name}-{v.kv_cache}" if isinstance(v, Recipe) else v,
)
def test_integer_formats_give_the_same_tokens_however_they_are_computed(family: str, recipe: Recipe) -> None:
    model = tiny_model(tiny_spec(family), recipe)
    _, alone = answers(model, max_batch=1, max_step_tokens=1)
    for threads, options in (
        (1, {}),
        (2, {"max_step_tokens": 37}),
        (3, {"num_pages": 11, "max_step_tokens": 100}),
    ):
        engine, together = answers(model, threads, **options)
        assert together == alone
        assert (engine.stats().preemptions > 0) == ("num_pages" in options)
        prompts, params = requests(model.spec.vocab_size, 200)
        cached = engine.generate(prompts, params)
        assert [result.token_ids for result in cached] == alone
        assert engine.stats().tokens_reused > 0


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_float_weights_give_the_reference_answer(family: str) -> None:
    model = tiny_model(tiny_spec(family), FLOAT)
    _, ours = answers(model, 2)
    prompts, params = requests(model.spec.vocab_size, 200)
    reference = Engine(ReferenceRunner(model, 40), ByteTokenizer()).generate(prompts, params)
    same = sum(a == b.token_ids for a, b in zip(ours, reference, strict=True))
    # Sums in another order may tip one close call in some answer; then that answer goes its own way.
    assert same >= len(ours) - 1


@pytest.mark.parametrize("seed", range(5))
def test_sampling_is_the_numpy_specification(seed: int) -> None:
    model = tiny_model(tiny_spec(), INTEGER[0])
    rng = np.random.default_rng(seed)
    count = 24
    lengths = rng.integers(1, 20, count).astype(np.int32)
    batch = StepInput(
        rng.integers(0, 320, lengths.sum()).astype(np.int32),
        np.zeros(count, dtype=np.int32),
        lengths,
        np.arange(count, dtype=np.int32)[:, None],
    )
    temperature = rng.choice([0.0, 0.3, 1.0, 4.0], count).astype(np.float32)
    top_k = rng.choice([0, 1, 5, 400], count).astype(np.int32)
    top_p = rng.choice([1.0, 0.9, 0.2], count).astype(np.float32)
    seeds = rng.integers(0, 2**64 - 1, count, dtype=np.uint64)
    runner = CpuRunner(model, 1, num_pages=count)
    drawn = runner.sample(batch, temperature, top_k, top_p, seeds)
    expected = sample(runner.forward(batch, "last"), lengths, temperature, top_k, top_p, seeds)
    np.testing.assert_array_equal(drawn, expected)


def test_scores_depend_on_the_document_alone() -> None:
    model = tiny_model(tiny_spec(), INTEGER[0])
    docs = [
        np.random.default_rng(i).integers(0, 320, n).tolist() for i, n in enumerate((300, 1, 70, 64, 65, 2))
    ]
    runner = CpuRunner(model, 2, num_pages=12)
    once = score_documents(runner, docs)
    for other in (score_documents(runner, docs, 61), [score_documents(runner, [doc], 1)[0] for doc in docs]):
        for a, b in zip(once, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_what_is_asked_for_by_name_and_not_there_is_an_error() -> None:
    model = tiny_model(tiny_spec(), FLOAT)
    with pytest.raises(BackendError, match=r"one this machine has: .*portable.* found: 'sse9'"):
        CpuRunner(model, isa="sse9")
    with pytest.raises(ConfigError, match="threads lie between 1 and 1024; found: 0"):
        CpuRunner(model, threads=0)
    with pytest.raises(UnsupportedModelError, match="head_dim must be at most 256"):
        CpuRunner(tiny_model(tiny_spec(head_dim=288), FLOAT))
    assert "portable" in CpuRunner(model, 1, isa="portable", num_pages=1).name


def test_load_refuses_before_it_reads(tmp_path: Path) -> None:
    folder = tiny_checkpoint_folder(tmp_path / "model", tiny_spec())
    with pytest.raises(ConfigError, match="one of auto, cpu, cuda, reference; found: 'gpu'"):
        flatout.load(folder, runner="gpu")
    with pytest.raises(ConfigError, match="at least one token; found: 0"):
        flatout.load(folder, max_tokens=0)
    with pytest.raises(ResourceError, match=r"of which the KV cache \d+\.\d GB; found: \d+\.\d GB free"):
        flatout.load(folder, max_tokens=1 << 40)


def test_load_runs_a_folder_on_either_runner(tmp_path: Path) -> None:
    folder = tiny_checkpoint_folder(tmp_path / "model", tiny_spec("qwen3"))
    params = SamplingParams(max_tokens=20)
    texts = []
    for runner in ("cpu", "reference"):
        engine = flatout.load(folder, runner=runner, threads=1, max_tokens=500, recipe=FLOAT)
        assert engine.runner.num_pages == 8
        texts.append(engine.generate(["in the end"], params)[0].text)
    assert texts[0] == texts[1]


def test_speculation_is_on_where_it_is_exact(tmp_path: Path) -> None:
    folder = tiny_checkpoint_folder(tmp_path / "model", tiny_spec())
    artifact = save_artifact(
        tiny_model(tiny_spec(), INTEGER[0]), open_checkpoint(folder).tokenizer, tmp_path / "artifact", {}
    )
    for path, options, on in (
        (artifact, {}, True),
        (artifact, {"speculate": "off"}, False),
        (artifact, {"runner": "reference"}, False),
        (folder, {}, False),
        (folder, {"speculate": "ngram"}, True),
    ):
        assert (flatout.load(path, threads=1, **options).speculator is not None) == on  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="one of auto, ngram, draft, off; found: 'medusa'"):
        flatout.load(folder, speculate="medusa")


def test_a_draft_is_any_model_of_the_same_vocabulary(tmp_path: Path) -> None:
    folder = tiny_checkpoint_folder(tmp_path / "model", tiny_spec())
    tokenizer = open_checkpoint(folder).tokenizer
    artifact = save_artifact(tiny_model(tiny_spec(), INTEGER[0]), tokenizer, tmp_path / "artifact", {})
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    plain = flatout.load(artifact, threads=1, speculate="off").generate(["in the end"], params)[0]
    for model, options in (
        (folder, {}),
        (artifact, {"speculate": "draft"}),
        (tiny_checkpoint_folder(tmp_path / "short", tiny_spec("qwen2", max_positions=24), 1), {}),
    ):
        engine = flatout.load(artifact, threads=1, max_tokens=999, draft=model, **options)  # type: ignore[arg-type]
        assert engine.speculator is not None
        assert isinstance(engine.speculator.draft, DraftProposer)
        assert engine.speculator.draft.pool.num_pages == engine.runner.num_pages
        assert engine.generate(["in the end"], params)[0].token_ids == plain.token_ids
    assert flatout.load(folder, draft=artifact, speculate="draft").speculator is not None

    larger = tiny_checkpoint_folder(tmp_path / "larger", tiny_spec(vocab_size=352))
    other = tiny_checkpoint_folder(tmp_path / "other", tiny_spec())
    words = json.loads((other / "tokenizer.json").read_text())
    ids = words["model"]["vocab"]
    ids["th"], ids["er"] = ids["er"], ids["th"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    for draft, options, message in (
        (larger, {}, "has the model's vocabulary; found: 352 tokens, not 320"),
        (other, {}, "has the model's vocabulary; found: token 259 is er, not th"),
        (folder, {"speculate": "off"}, "guesses under draft or auto; found: 'off'"),
        (None, {"speculate": "draft"}, "must be given; found: none"),
    ):
        with pytest.raises(ConfigError, match=message):
            flatout.load(artifact, draft=draft, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="integer formats on the cpu runner only; found: recipe"):
        flatout.load(folder, draft=artifact)


def test_memory_counts_both_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint_folder(tmp_path / "model", tiny_spec())
    one = load._resident(tiny_spec(), native_recipe(open_checkpoint(folder), kv_cache="bf16"), 999)
    free = 2.0 * one
    monkeypatch.setattr(load, "free_memory", lambda: free)
    with pytest.raises(ResourceError):
        flatout.load(folder, max_tokens=999, draft=folder, speculate="draft")
    free = 10.0 * one
    flatout.load(folder, max_tokens=999, draft=folder, speculate="draft")


def test_without_the_extension_auto_says_so_and_cpu_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint_folder(tmp_path / "model", tiny_spec())
    monkeypatch.setitem(sys.modules, "flatout._cpu", None)
    monkeypatch.delattr(flatout, "_cpu", raising=False)
    assert flatout.load(folder).runner.name == "reference (as served)"
    err = capsys.readouterr().err
    assert err.startswith("flatout: the reference runner (slow) is used: the cpu runner needs")
    assert err.count("\n") == 1
    with pytest.raises(BackendError, match="needs flatout's compiled extension"):
        flatout.load(folder, runner="cpu")


def test_load_runs_an_artifact_as_its_recipe_says(tmp_path: Path) -> None:
    model = tiny_model(tiny_spec(), INTEGER[0])
    tokenizer = open_checkpoint(tiny_checkpoint_folder(tmp_path / "model", tiny_spec())).tokenizer
    folder = save_artifact(model, tokenizer, tmp_path / "artifact", {})
    engine = flatout.load(folder, runner="cpu", threads=1)
    direct = Engine(CpuRunner(model, 1), tokenizer)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    assert engine.generate(["in the end"], params)[0].text == direct.generate(["in the end"], params)[0].text
    with pytest.raises(ConfigError, match="an artifact runs under its own recipe; found: fp32"):
        flatout.load(folder, recipe=FLOAT)
    with pytest.raises(ResourceError, match="of which the KV cache"):
        flatout.load(folder, max_tokens=1 << 40)


# The built-in model


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(NAME)


@pytest.fixture(scope="module")
def native(checkpoint: Checkpoint) -> Model:
    """The file's own Q4_1 and Q8_0 blocks."""
    return assemble(checkpoint, native_recipe(checkpoint))


TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of "
    "foolishness, it was the epoch of belief, it was the epoch of incredulity. "
)
QUESTIONS = ["What is the capital of France?", "Count from 1 to 10.", "Write a haiku about the sea."]


def ask(engine: Engine, **params: float) -> list[Result]:
    prompts = [engine.chat_prompt([{"role": "user", "content": question}]) for question in QUESTIONS]
    return engine.generate(prompts, SamplingParams(max_tokens=40, **params))  # type: ignore[arg-type]


def test_real_answers_do_not_depend_on_batch_chunks_threads_or_pages(
    checkpoint: Checkpoint, native: Model
) -> None:
    engine = Engine(CpuRunner(native, 1, num_pages=64), checkpoint.tokenizer)
    expected = ask(engine)
    text = expected[1].text
    assert all(str(n) in text for n in range(1, 8)), text
    assert "".join(engine.stream(engine.chat_prompt([{"role": "user", "content": QUESTIONS[1]}]),
                                 SamplingParams(max_tokens=40))) == text  # fmt: skip
    other = Engine(CpuRunner(native, 2, num_pages=4), checkpoint.tokenizer, max_batch=3, max_step_tokens=11)
    assert [r.token_ids for r in ask(other)] == [r.token_ids for r in expected]
    assert [r.token_ids for r in ask(other)] == [r.token_ids for r in expected]
    assert other.stats().tokens_reused == 0, "these prompts are shorter than a page"


def test_conversation_reuses_the_cache_and_changes_nothing(checkpoint: Checkpoint, native: Model) -> None:
    engine = Engine(CpuRunner(native, 2, num_pages=64), checkpoint.tokenizer)
    messages = [{"role": "user", "content": f"What is this text about? {TEXT * 3}"}]
    first = engine.generate([engine.chat_prompt(messages)], SamplingParams(max_tokens=30))[0]
    messages += [
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Who wrote it?"},
    ]
    prompt = engine.chat_prompt(messages)
    second = engine.generate([prompt], SamplingParams(max_tokens=20))[0]
    assert second.reused_tokens >= 128
    fresh = Engine(CpuRunner(native, 2, num_pages=64), checkpoint.tokenizer)
    assert fresh.generate([prompt], SamplingParams(max_tokens=20))[0].token_ids == second.token_ids


def test_scores_of_real_text_are_near_the_exact_ones(checkpoint: Checkpoint, native: Model) -> None:
    doc = checkpoint.tokenizer.encode(TEXT)
    served = score_documents(CpuRunner(native, 2, num_pages=4), [doc])[0]
    exact = score_documents(ReferenceRunner(checkpoint, 4), [doc])[0]
    assert served.shape == (len(doc) - 1,)
    # The weights are the same; int8 activations and cache differ. 0.05 nats are 5 % of perplexity.
    assert abs(float(served.mean() - exact.mean())) < 0.05
    assert np.abs(served - exact).max() < 1.5


PROGRAM = "import sys; from flatout.cli.main import main; sys.exit(main(sys.argv[1:]))"


def test_run_prints_an_answer_without_pytorch() -> None:
    program = PROGRAM.replace(
        "sys.exit(main(sys.argv[1:]))",
        "code = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)",
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "run", NAME, "Count from 1 to 10.", "--max-tokens", "40"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "1, 2, 3" in done.stdout or "1. " in done.stdout or "1\n" in done.stdout, done.stdout
    assert re.search(r"\d+ tokens, \d+ tokens/s", done.stderr)


class Terminal:
    """The program on a pseudo-terminal of its own."""

    def __init__(self, *args: str, **variables: str) -> None:
        self.fd, child = pty.openpty()
        self.program = subprocess.Popen(
            [sys.executable, "-c", f"import os; os.login_tty(0); {PROGRAM}", *args],
            stdin=child,
            stdout=child,
            stderr=child,
            env={**os.environ, **variables},
        )
        os.close(child)
        self.seen = ""

    def until(self, ready: Callable[[str], bool], seconds: float = 120) -> None:
        """Read until what comes from now on satisfies `ready`."""
        start, end = len(self.seen), time.monotonic() + seconds
        while not ready(self.seen[start:]):
            assert time.monotonic() < end, self.seen
            if select.select([self.fd], [], [], 0.1)[0]:
                self.seen += os.read(self.fd, 4096).decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())


def test_conversation_at_a_terminal(checkpoint: Checkpoint, tmp_path: Path) -> None:
    terminal = Terminal("run", str(checkpoint.path), "--max-tokens", "2000", FLATOUT_CACHE=str(tmp_path))
    try:
        terminal.until(lambda s: s.endswith("> "))
        terminal.type("Write a very long story about a dragon.\n")
        terminal.until(lambda s: len(s) > 150)
        terminal.type("\x03")
        terminal.until(lambda s: "interrupted" in s and s.endswith("> "))
        terminal.type("/stats\n")
        terminal.until(lambda s: "messages     2" in s and s.endswith("> "))
        terminal.type("\x04")
        assert terminal.program.wait(60) == 0, terminal.seen
    finally:
        terminal.program.kill()
        terminal.program.wait()
        os.close(terminal.fd)
    history = tmp_path / "run_history"
    assert "Write a very long story" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600
