"""The cuda runner's own logic on the processor: its kernels interpreted, its steps launched one by one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests.guess import Always
from tests.tiny import tiny_checkpoint_folder, tiny_model, tiny_spec
from tests.toy import ByteTokenizer

from flatout.core.formats import Recipe
from flatout.core.model import Model
from flatout.engine import cuda, cuda_decode, draft
from flatout.engine.cuda import CudaRunner, check_formats
from flatout.engine.cuda_memory import Claim, claim, memory_is_free, pages_that_fit
from flatout.engine.cuda_weights import check_shapes, load_weights
from flatout.engine.draft import DraftProposer
from flatout.engine.engine import Engine
from flatout.engine.load import PAGE_TOKENS, load
from flatout.engine.reference import ReferenceRunner
from flatout.engine.request import SamplingParams
from flatout.engine.runner import StepInput
from flatout.engine.sampler import sample
from flatout.errors import BackendError, ConfigError, ResourceError, UnsupportedModelError
from flatout.kernels import gpu_linear
from flatout.kernels.gpu import Card

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, inside the interpreter
SMALL = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 32, "num_layers": 1, "num_heads": 2,
         "num_kv_heads": 1}  # fmt: skip
PAGES = [[3, 1], [0, 2]]


@pytest.fixture(autouse=True)
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time for each program, however small."""
    monkeypatch.setattr(gpu_linear, "gemv_route", lambda name, fmt, n, k, m: (4, 64, 4, 0))


def step(tokens: Any, starts: Any, lengths: Any, pages: Any) -> StepInput:
    parts = (tokens, starts, lengths, pages)
    return StepInput(*(np.ascontiguousarray(np.asarray(part, dtype=np.int32)) for part in parts))


def greedy(count: int) -> tuple[np.ndarray, ...]:
    zeros = np.zeros(count, np.float32)
    return zeros, np.zeros(count, np.int32), np.ones(count, np.float32), np.zeros(count, np.uint64)


def runners(model: Model, kv_cache: str = "bf16") -> tuple[CudaRunner, ReferenceRunner]:
    weights = load_weights(model, torch.device("cpu"))
    fast = CudaRunner(model.spec, weights, 4, 16, kv_cache, max_batch=2)
    return fast, ReferenceRunner(model, num_pages=4, page_size=16, as_served=False)


@pytest.mark.parametrize(
    ("family", "layers", "head"),
    [("llama", "bf16", "bf16"), ("qwen3", "bf16", "fp8"), ("qwen2", "w4a16-g32-asym", "bf16")],
)
def test_prompts_chunks_and_single_tokens(family: str, layers: str, head: str) -> None:
    """Against the reference on the same weights. bf16 is cut, not rounded, before seven products: 4e-2."""
    recipe = Recipe(name="t", layers=layers, embedding="bf16", head=head)
    fast, reference = runners(tiny_model(tiny_spec(family, **SMALL), recipe))
    batches = [
        (step([5, 9, 7, 8, 6, 4, 11], [0, 0], [4, 3], PAGES), "all"),
        (step([12, 3, 40], [4, 3], [1, 2], PAGES), "last"),
        (step([31, 32], [5, 5], [1, 1], PAGES), "last"),
    ]
    bound = 1.5e-1 if head == "fp8" else 4e-2  # the head's own three bits of mantissa
    few = batches if layers == "bf16" else batches[:1]  # unpacking takes the interpreter seconds
    for batch, rows in few:
        found = fast.forward(batch, rows)  # type: ignore[arg-type]
        wanted = reference.forward(batch, rows)  # type: ignore[arg-type]
        assert np.linalg.norm(found - wanted) < bound * np.linalg.norm(wanted)
    if layers != "bf16":
        return
    targets = np.array([1, 2], dtype=np.int32)
    np.testing.assert_allclose(
        fast.score(batches[2][0], targets), reference.score(batches[2][0], targets), atol=0.4
    )


def test_going_ahead_changes_no_token() -> None:
    """A step started ahead is taken when it was the right one, and leaves no trace when it was not."""
    model = tiny_model(tiny_spec("llama", **SMALL), Recipe(name="t"))
    fast, _ = runners(model)
    plain, _ = runners(model)
    launched = []
    original = fast._decoder._launch
    fast._decoder._launch = lambda size, hot: launched.append(size) or original(size, hot)  # type: ignore[method-assign,func-returns-value]
    for runner in (fast, plain):
        runner.forward(step([5, 9, 7, 8, 6], [0, 0], [3, 2], PAGES), "last")
    tokens, starts, used = np.array([4, 11]), np.array([3, 2]), []
    script = ["same"] * 3 + ["swap"] + ["same"] * 2 + ["one"]
    pages = [list(row) for row in PAGES]
    for what in script:
        if what == "swap":
            tokens, starts, pages = tokens[::-1], starts[::-1], pages[::-1]
        if what == "one":
            tokens, starts, pages = tokens[:1], starts[:1], pages[:1]
        batch = step(tokens, starts, [1] * len(tokens), pages)
        found = fast.sample(batch, *greedy(len(tokens)))
        plain._decoder.forget()  # never goes ahead
        assert found.tolist() == plain.sample(batch, *greedy(len(tokens))).tolist(), what
        used.append(len(launched))
        tokens, starts = found, starts + 1
    assert np.diff(used).max() == 2  # what was started ahead was thrown away
    assert len(launched) == len(script) + 2  # once for each break


def test_drafts_are_judged_in_one_step() -> None:
    """Tokens after each of several new ones are those that come when they are given one by one; what a wrong
    draft wrote is overwritten."""
    model = tiny_model(tiny_spec("llama", **SMALL), Recipe(name="t"))
    fast, _ = runners(model)
    plain, _ = runners(model)
    for runner in (fast, plain):
        runner.forward(step([5, 9, 7, 8, 6], [0, 0], [3, 2], PAGES), "last")
    one_by_one, current, starts = [], np.array([4, 11]), np.array([3, 2])
    for _ in range(4):
        one_by_one.append(current)
        current = plain.sample(step(current, starts, [1, 1], PAGES), *greedy(2))
        starts = starts + 1
    first, second = np.array(one_by_one).T.tolist()
    wrong = step([first[0], 1, 2, 3, second[0], 9], [3, 2], [4, 2], PAGES)
    found = fast.sample(wrong, *greedy(2), rows="all")
    assert [found[0], found[4]] == [first[1], second[1]]
    right = step([*first[:4], *second[:3]], [3, 2], [4, 3], PAGES)
    found = fast.sample(right, *greedy(2), rows="all")
    assert found.tolist() == [*first[1:], current[0], *second[1:4]]


def test_a_short_prompt_is_a_step_of_rows() -> None:
    """Beside a single token; against the greedy choice from all logits, launched kernel by kernel."""
    model = tiny_model(tiny_spec("llama", **SMALL), Recipe(name="t"))
    fast, plain = (runners(model)[0] for _ in range(2))
    for runner in (fast, plain):
        runner.forward(step([5, 9, 7], [0], [3], PAGES[:1]), "last")
    batch = step([4, 8, 6, 11, 13], [3, 0], [1, 4], PAGES)
    logits = plain.forward(batch, "last")
    assert fast.sample(batch, *greedy(2)).tolist() == logits.argmax(axis=1).tolist()
    warm = (np.full(2, 0.8, np.float32), *greedy(2)[1:3], np.array([3, 4], np.uint64))
    wanted = sample(logits, batch.starts + batch.lengths, *warm)
    assert fast.sample(batch, *warm).tolist() == wanted.tolist()


@pytest.mark.parametrize("right", [True, False])
def test_a_draft_model_changes_no_token(right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that guesses for itself is believed to the end; another one hardly ever."""
    monkeypatch.setattr(draft, "_REHEARSALS", 1)
    spec = tiny_spec("llama", **SMALL)
    model = tiny_model(spec, Recipe(name="t"))
    other = model if right else tiny_model(spec, Recipe(name="t"), seed=1)
    params = [SamplingParams(max_tokens=6, ignore_eos=True),
              SamplingParams(max_tokens=4, temperature=0.9, seed=7, ignore_eos=True)]  # fmt: skip
    prompts = [[5, 9, 7, 8], [6, 4]]
    plain = Engine(runners(model)[0], ByteTokenizer(), max_batch=2).generate(prompts, params)
    drafting = DraftProposer(runners(other)[0])
    engine = Engine(runners(model)[0], ByteTokenizer(), max_batch=2, speculator=Always(drafting))
    drafted = engine.generate(prompts, params)
    assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]
    stats = engine.stats()
    assert stats.tokens_drafted > 0
    assert (stats.tokens_accepted == stats.tokens_drafted) == right
    drafting.pool.check()


def test_a_draft_model_is_loaded_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint_folder(tmp_path / "model", tiny_spec())
    asked: list[tuple[int | None, Claim | None]] = []

    def opened(
        model: Model, size: float, tokens: int | None, page: int, batch: int, beside: Claim | None = None
    ) -> CudaRunner:
        asked.append((tokens, beside))
        return CudaRunner(model.spec, load_weights(model, torch.device("cpu")), 3, page, max_batch=batch)

    monkeypatch.setattr(cuda, "open_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(cuda, "open_runner", opened)
    monkeypatch.setattr(draft, "_REHEARSALS", 0)
    monkeypatch.setattr(cuda_decode, "UNSETTLED", 0)
    engine = load(folder, runner="cuda", draft=folder, speculate="draft", max_batch=2, max_tokens=150)
    assert engine.speculator is not None
    assert isinstance(engine.speculator.draft, DraftProposer)
    (first, beside), second = asked
    assert first == 150
    assert beside is not None
    assert second == (3 * PAGE_TOKENS, None), "as many pages as the model got"
    with pytest.raises(ConfigError, match=r"cpu runner only; found: the cuda runner; try: speculate='draft'"):
        load(folder, runner="cuda", draft=folder)
    with pytest.raises(ConfigError, match="for a model on one GPU; found: 2 GPUs"):
        load(folder, runner="cuda", draft=folder, speculate="draft", gpus=2)
    larger = tiny_checkpoint_folder(tmp_path / "larger", tiny_spec(vocab_size=352))
    with pytest.raises(ConfigError, match="found: 352 tokens, not 320"):
        load(folder, runner="cuda", draft=larger, speculate="draft")


def test_a_page_that_is_missing_is_waited_for() -> None:
    fast, reference = runners(tiny_model(tiny_spec("llama", **SMALL), Recipe(name="t")))
    tokens = list(range(3, 17))
    for runner in (fast, reference):
        runner.forward(step(tokens, [0], [14], [[3, -1]]), "last")
    current, pages = np.array([7]), [[3, -1]]
    for start in range(14, 18):
        if start == 16:
            pages = [[3, 1]]
        batch = step(current, [start], [1], pages)
        logits = reference.forward(batch, "last")[0]
        current = fast.sample(batch, *greedy(1))
        assert logits.max() - logits[current[0]] < 0.1 * logits.std()


def test_bad_logits_are_reported() -> None:
    model = tiny_model(tiny_spec("llama", **SMALL), Recipe(name="t"))
    fast, _ = runners(model)
    fast.weights.norm.fill_(torch.nan)
    with pytest.raises(BackendError, match="without NaN"):
        fast.sample(step([5], [0], [1], [[0]]), *greedy(1))


def test_a_prompt_too_long_is_refused() -> None:
    fast, _ = runners(tiny_model(tiny_spec("llama", **SMALL), Recipe(name="t")))
    with pytest.raises(ConfigError, match="positions must lie below"):
        fast.forward(step([5], [40], [1], [[0, 1]]), "last")


def test_memory_is_predicted() -> None:
    spec, recipe = tiny_spec("llama"), Recipe(name="t")
    with pytest.raises(ResourceError, match=r"the GPU must hold about 2\d\.\d GB: weights 20\.0"):
        pages_that_fit(spec, recipe, 20e9, None, 64, 16e9)
    assert pages_that_fit(spec, recipe, 1e9, 1000, 64, 16e9) == 16
    with pytest.raises(ResourceError, match="fewer max_tokens"):
        pages_that_fit(spec, recipe, 1e9, 1 << 40, 64, 16e9)
    beside = claim(spec, recipe, 8e9, 64)
    page = beside.page
    alone = pages_that_fit(spec, recipe, 1e9, None, 64, 16e9)
    tight = (beside.total(0) + claim(spec, recipe, 1e9, 64).total(0) + 2 * 100 * page) / 0.95 + 1
    assert pages_that_fit(spec, recipe, 1e9, None, 64, tight, beside) == 100 < alone
    with pytest.raises(ResourceError, match=r"weights 1\.0.*, the draft model 8\.\d; found: 9\.0 GB free"):
        pages_that_fit(spec, recipe, 1e9, None, 64, 9e9, beside)


def test_memory_that_is_gone_after_it_was_counted() -> None:
    said = "CUDA error: out of memory\nCUDA kernel errors might be reported later"
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried 2.00 GiB"), RuntimeError(said)):
        expected = pytest.raises(ResourceError, match=r"stay free .*; found: CUDA .*; try: end what else")
        with expected as found, memory_is_free():
            raise error
        assert "\n" not in str(found.value)
    with pytest.raises(RuntimeError, match="another"), memory_is_free():
        raise RuntimeError("another")


def test_what_a_card_cannot_do() -> None:
    old = Card("Old", units=1, asm=False, pdl=False, fp8=False)
    with pytest.raises(UnsupportedModelError, match="fp8 needs a GPU with e4m3"):
        check_formats(Recipe(name="t", head="fp8"), old)
    check_formats(Recipe(name="t"), old)
    with pytest.raises(UnsupportedModelError, match="heads of 48"):
        check_shapes(tiny_spec("llama", head_dim=48), Recipe(name="t"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_before_anything_is_read() -> None:
    with pytest.raises(BackendError, match="needs a GPU, its driver and a PyTorch built for it"):
        load("no-such-model", runner="cuda")


def test_the_runner_starts_without_pytorchs_compiler() -> None:
    """Its import takes longer than that of everything else. Nor may it come with the steps that are taken on
    no device, to compile kernels while weights are read."""
    run = subprocess.run([sys.executable, "-c", DRY_START], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = set(run.stdout.split())
    assert "flatout.engine.cuda_compile" in found
    assert {"torch._dynamo", "torch._inductor", "sympy", "transformers"} & found == set()


DRY_START = """
import sys
import numpy, torch
import flatout.engine.cuda_compile, flatout.engine.load
from flatout.core.formats import Recipe
from flatout.core.spec import ModelSpec
from flatout.engine.cuda import CudaRunner
from flatout.engine.cuda_weights import random_weights
from flatout.engine.runner import StepInput
from flatout.kernels import gpu, gpu_attention, gpu_linear

for module in (gpu, gpu_attention, gpu_linear):
    module.start = lambda *_, **__: None  # the compiler itself wants a driver
spec = ModelSpec(family="llama", vocab_size=320, hidden_size=64, intermediate_size=128, num_layers=2,
                 num_heads=4, num_kv_heads=2, head_dim=16, max_positions=512)
card = gpu.Card("a dry one", units=8, asm=True, pdl=True, fp8=True, tiles=True, dry=True)
arrays = numpy.zeros(257), numpy.zeros(1), numpy.array([257]), numpy.arange(5)[None, :]
with torch.no_grad():
    for name in ("bf16", "fp8", "w4a16-g32"):
        recipe = Recipe(name="t", layers=name, head="fp8" if name == "fp8" else "bf16")
        weights = random_weights(spec, recipe, torch.device("meta"))
        runner = CudaRunner(spec, weights, 5, 64, max_batch=1, card=card)
        runner.dry_run(StepInput(*(array.astype(numpy.int32) for array in arrays)))
print(*sys.modules)
"""
