"""Several GPUs as one, and layers streamed from the host's memory: on the processor, kernels interpreted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from test_cuda_runner import PAGES, SMALL, greedy, large_blocks, step
from tests.tiny import tiny_model, tiny_spec

from flatout.core.formats import Recipe
from flatout.core.model import Model, dense
from flatout.engine.cuda import CudaRunner
from flatout.engine.cuda_memory import layers_that_fit
from flatout.engine.cuda_parallel import ParallelRunner, head_of_rank, model_of_rank, share_of
from flatout.engine.cuda_ranks import Group, Rank
from flatout.engine.cuda_stream import StreamedLayers
from flatout.engine.cuda_weights import load_weights
from flatout.engine.load import load
from flatout.engine.reference import ReferenceRunner
from flatout.errors import BackendError, ConfigError, ResourceError
from flatout.kernels import gpu
from flatout.kernels.triton.exchange import PROGRAMS, exchange

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, inside the interpreter
CPU = torch.device("cpu")
SHARED = SMALL | {"num_heads": 4, "num_kv_heads": 2, "intermediate_size": 64}

__all__ = ["large_blocks"]


def parallel(model: Model, ranks: int) -> ParallelRunner:
    def make(rank: int, group: Group) -> CudaRunner:
        whole = load_weights(model_of_rank(model, rank, ranks), CPU)
        weights = head_of_rank(whole, rank, ranks)
        return CudaRunner(share_of(model.spec, ranks), weights, 4, 16, max_batch=2, rank=Rank(group, rank))

    return ParallelRunner(model.spec, [CPU] * ranks, make, max_batch=2)


@pytest.mark.parametrize("layers", ["bf16", "w4a16-g32"])
def test_two_ranks_are_one_model(layers: str) -> None:
    """Logits, scores and greedy tokens of a prompt, a chunk beside a token, and single tokens."""
    spec = tiny_spec("llama", **SHARED)
    model = tiny_model(spec, Recipe(name="t", layers=layers))
    both, reference = parallel(model, 2), ReferenceRunner(model, 4, 16, as_served=False)
    batches: list[tuple[Any, Any]] = [
        (step([5, 9, 7, 8, 6, 4, 11], [0, 0], [4, 3], PAGES), "all"),
        (step([12, 3, 40], [4, 3], [1, 2], PAGES), "last"),
    ]
    for batch, rows in batches if layers == "bf16" else batches[:1]:
        found, wanted = both.forward(batch, rows), reference.forward(batch, rows)
        assert np.linalg.norm(found - wanted) < 4e-2 * np.linalg.norm(wanted)
    single = step([31, 32], [5, 5], [1, 1], PAGES)
    if layers != "bf16":
        return
    logits = reference.forward(single, "last")
    targets = np.array([2, spec.vocab_size - 1], dtype=np.int32)  # one of each rank
    np.testing.assert_allclose(both.score(single, targets), reference.score(single, targets), atol=0.4)
    for tokens in (both.sample(single, *greedy(2)), both.sample(batches[1][0], *greedy(2))):
        assert tokens.shape == (2,)
    tokens = both.sample(single, *greedy(2))
    for row, token in zip(logits, tokens, strict=True):
        assert row.max() - row[token] < 0.1 * row.std()
    warm = both.sample(single, np.full(2, 0.7, np.float32), *greedy(2)[1:])
    assert ((warm >= 0) & (warm < spec.vocab_size)).all()


@pytest.mark.parametrize("layers", ["bf16", "w8a8", "w4a16-g32-asym", "q4_1"])
def test_shares_add_up(layers: str) -> None:
    """What the ranks' shares of a feed-forward give, summed, is what the whole one gives."""
    model = tiny_model(tiny_spec("llama"), Recipe(name="t", layers=layers))
    x = np.random.default_rng(0).standard_normal(model.spec.hidden_size)

    def fed_forward(part: Model) -> np.ndarray:
        gate, up = np.split(dense(part.weights["layers.1.gate_up"]) @ x, 2)
        product: np.ndarray = dense(part.weights["layers.1.down"]) @ (gate * np.tanh(up))
        return product

    shares = [model_of_rank(model, rank, 2) for rank in range(2)]
    np.testing.assert_allclose(sum(fed_forward(share) for share in shares), fed_forward(model), rtol=1e-9)
    heads = [dense(share.weights["layers.0.qkv"]) for share in shares]
    spec = model.spec
    whole = dense(model.weights["layers.0.qkv"])
    for part, at, size in ((0, 0, spec.q_size), (1, spec.q_size, spec.kv_size)):
        begin, half = (0, spec.q_size // 2)[part], size // 2
        found = np.concatenate([head[begin : begin + half] for head in heads])
        np.testing.assert_array_equal(found, whole[at : at + size])


def test_who_cannot_share_is_told() -> None:
    with pytest.raises(ConfigError, match=r"3 GPUs, key/value heads 2"):
        share_of(tiny_spec("llama"), 3)
    model = tiny_model(tiny_spec("llama"), Recipe(name="t", layers="w4a16-g64"))
    with pytest.raises(ConfigError, match="whole groups of 64 columns"):
        model_of_rank(model, 0, 2).weights["layers.0.o"]
    with pytest.raises(ConfigError, match="under the cuda runner"):
        load("no-such-model", runner="cpu", gpus=2)


def test_a_rank_that_fails_stops_the_others() -> None:
    model = tiny_model(tiny_spec("llama", **SHARED), Recipe(name="t"))
    both = parallel(model, 2)
    original = both._ranks[1].fed_forward

    def fail(*_: Any) -> None:
        raise ResourceError("a test asked for it", "", "")

    both._ranks[1].fed_forward = fail  # type: ignore[method-assign,assignment]
    batch = step([5, 9], [0], [2], PAGES[:1])
    for _ in range(2):
        with pytest.raises(ResourceError, match="a test asked for it"):
            both.forward(batch, "last")
    both._ranks[1].fed_forward = original  # type: ignore[method-assign]
    assert both.forward(batch, "last").shape == (1, SHARED["vocab_size"])


@pytest.mark.parametrize("size", [6, 128 * PROGRAMS + 5])
def test_exchange(size: int) -> None:
    """One rank of two, when the other has already written: what it sends, and what it makes of both; twice,
    for the two halves of the rooms."""
    capacity = 8192
    ours, theirs = (torch.full((2 * 2 * capacity,), torch.nan) for _ in range(2))
    flags = [torch.zeros(2 * PROGRAMS, dtype=torch.int32) for _ in range(2)]
    rooms = torch.tensor([theirs.data_ptr(), ours.data_ptr()])
    places = torch.tensor([f.data_ptr() for f in flags])
    counts = torch.zeros(PROGRAMS, dtype=torch.int32)
    few = size <= 128 * PROGRAMS
    for count in (1, 2):
        half = count % 2
        part, more, x = (torch.randn(size) for _ in range(3))
        wanted = x + (more + part)
        ours.view(2, 2, capacity)[half, 0, :size] = more
        flags[1].view(2, PROGRAMS)[0] = count
        x_bf16 = torch.empty(size, dtype=torch.bfloat16)
        gpu.start(
            gpu.card(CPU), exchange, (PROGRAMS,), part, x, x_bf16, rooms, places, counts, size, RANK=1,
            RANKS=2, CAPACITY=capacity, BLOCK=128 if few else 1024, GREATEST=False, TWICE=True, PDL=False,
        )  # fmt: skip
        torch.testing.assert_close(x, wanted)
        torch.testing.assert_close(x_bf16, x.bfloat16())
        torch.testing.assert_close(theirs.view(2, 2, capacity)[half, 1, :size], part)
        assert flags[0].view(2, PROGRAMS)[1].tolist() == [count] * PROGRAMS
        assert counts.tolist() == [count] * PROGRAMS


def test_exchange_of_keys() -> None:
    ours, theirs = (torch.zeros(2 * 2 * 64) for _ in range(2))
    flags = [torch.zeros(2 * PROGRAMS, dtype=torch.int32) for _ in range(2)]
    keys = torch.tensor([5, -(1 << 62), 7 << 40])
    ours.view(torch.int64).view(2, 2, 32)[1, 1, :3] = torch.tensor([4, 3, 8 << 40])
    flags[0].view(2, PROGRAMS)[1] = 1
    gpu.start(
        gpu.card(CPU), exchange, (PROGRAMS,), keys, keys, None,
        torch.tensor([ours.data_ptr(), theirs.data_ptr()]), torch.tensor([f.data_ptr() for f in flags]),
        torch.zeros(PROGRAMS, dtype=torch.int32), 3, RANK=0, RANKS=2, CAPACITY=64, BLOCK=128, GREATEST=True,
        TWICE=False, PDL=False,
    )  # fmt: skip
    assert keys.tolist() == [5, 3, 8 << 40]
    assert theirs.view(torch.int64).view(2, 2, 32)[1, 0, :3].tolist() == [5, -(1 << 62), 7 << 40]


@pytest.mark.parametrize("resident", [0, 1, 2])
def test_streamed_layers_are_the_layers(resident: int) -> None:
    """Three layers through two places, for several steps; whatever a place held before is overwritten."""
    model = tiny_model(tiny_spec("llama", **(SMALL | {"num_layers": 3})), Recipe(name="t"))
    weights = load_weights(model, CPU, resident)
    assert isinstance(weights.layers, StreamedLayers)
    assert len(weights.layers) == 3
    for place in weights.layers._places:
        place.fill_(255)
    streamed = CudaRunner(model.spec, weights, 4, 16, max_batch=2)
    plain = CudaRunner(model.spec, load_weights(model, CPU), 4, 16, max_batch=2)
    for batch in (
        step([5, 9, 7], [0, 0], [2, 1], PAGES),
        step([12, 3], [2, 1], [1, 1], PAGES),
        step([8, 1], [3, 2], [1, 1], PAGES),
    ):
        np.testing.assert_array_equal(streamed.forward(batch, "last"), plain.forward(batch, "last"))
    assert streamed.sample(batch, *greedy(2)).tolist() == plain.sample(batch, *greedy(2)).tolist()


def test_layers_that_do_not_fit_are_streamed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(tiny_spec("llama"), num_layers=40, hidden_size=1024, intermediate_size=4096, vocab_size=32)
    recipe = Recipe(name="t")
    layer = sum(2.0 * n * k for n, k in spec.linears().values())
    args = spec, recipe, 40 * layer, 64, 64
    assert layers_that_fit(*args, 16e9) == (None, 1)
    resident, pages = layers_that_fit(*args, 1.6e9)
    assert resident is not None
    assert 0 < resident < 38
    assert pages == 1
    assert f"{40 - resident} of 40 layers do not fit on the GPU" in capsys.readouterr().err
    with pytest.raises(ResourceError, match="the GPU must hold about"):
        layers_that_fit(*args, 0.5e9)
    monkeypatch.setattr("flatout.engine.cuda_memory.free_memory", lambda: 1 << 20)
    with pytest.raises(ResourceError, match="the GPU must hold about"):
        layers_that_fit(*args, 1.6e9)


def test_too_much_to_exchange_is_refused() -> None:
    rank = Rank(Group([CPU], 8), 0)
    with pytest.raises(BackendError, match="exchange at most 8 numbers"):
        rank._launch(torch.zeros(9), torch.zeros(9), None, greatest=False)
