"""Several GPUs as one, and layers streamed from the host's memory: on the processor, kernels interpreted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from test_cuda_runner import PAGES, SMALL, greedy, large_blocks, step
from tests.tiny import tiny_model, tiny_spec

from flatout.core.formats import Recipe
from flatout.core.model import Model, dense
from flatout.engine import cuda_stream
from flatout.engine.cuda import CudaRunner
from flatout.engine.cuda_host import Division, HostLayer, computable, divide, processor_rate
from flatout.engine.cuda_memory import layers_that_fit
from flatout.engine.cuda_parallel import ParallelRunner, head_of_rank, model_of_rank, share_of
from flatout.engine.cuda_ranks import Group, Rank
from flatout.engine.cuda_stream import StreamedLayers
from flatout.engine.cuda_weights import LayerWeights, load_weights
from flatout.engine.load import load
from flatout.engine.reference import ReferenceRunner
from flatout.errors import BackendError, ConfigError, ResourceError
from flatout.kernels import gpu, gpu_linear
from flatout.kernels.gpu import Exchange
from flatout.kernels.packed import pack_bf16
from flatout.kernels.triton import exchange

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


CAPACITY = 8192


def rooms_of_two() -> tuple[Tensor, Tensor, Tensor]:
    """What two ranks have been sent, (half, from, place), and where that lies."""
    first, second = (torch.zeros(2, 2, CAPACITY, dtype=torch.int64) for _ in range(2))
    return first, second, torch.tensor([first.data_ptr(), second.data_ptr()])


def sent(bits: Tensor, flag: int) -> Tensor:
    """Words of 8 bytes of the numbers' bits (n,) int32, as a rank writes them in that exchange."""
    return (torch.tensor(flag) << 32) | (bits.long() & 0xFFFFFFFF)


@pytest.mark.parametrize("size", [6, 300])
def test_ranks_add_up(size: int) -> None:
    """The second of two ranks, when the first has written: what it sends, and what it makes of both; twice,
    for the two halves of the rooms, across the largest int32."""
    theirs, ours, rooms = rooms_of_two()
    state = torch.tensor([2**31 - 1, 0], dtype=torch.int32)
    for index, flag in ((0, 2**31 - 1), (1, -(2**31))):
        half = flag & 1
        part, more, x = (torch.randn(size) for _ in range(3))
        wanted = x + (more + part)
        ours[half, 0, :size] = sent(more.view(torch.int32), flag)
        x_bf16 = torch.empty(size, dtype=torch.bfloat16)
        gpu.start(
            gpu.card(CPU), exchange.add, (-(-size // 128),), part, x, x_bf16, rooms, state, index,
            size, RANK=1, RANKS=2, CAPACITY=CAPACITY, BLOCK=128, TWICE=True, PDL=False,
        )  # fmt: skip
        torch.testing.assert_close(x, wanted, rtol=0, atol=0)
        torch.testing.assert_close(x_bf16, x.bfloat16())
        assert torch.equal(theirs[half, 1, :size], sent(part.view(torch.int32), flag))
        assert state.tolist() == [2**31 - 1, 0]


def test_ranks_take_the_greatest() -> None:
    ours, theirs, rooms = rooms_of_two()
    state, stalled = torch.tensor([7, 0], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    keys = torch.tensor([5, -(1 << 62), 7 << 40, -1])
    other = torch.tensor([4, 3, 8 << 40, -2])
    ours[1, 1, :8] = sent(other.view(torch.int32), 9)
    gpu.start(
        gpu.card(CPU), exchange.greatest, (1,), keys, rooms, state, stalled, 2, 4, RANK=0, RANKS=2,
        CAPACITY=CAPACITY, BLOCK=32, PDL=False,
    )  # fmt: skip
    assert keys.tolist() == [5, 3, 8 << 40, -1]
    before = torch.tensor([5, -(1 << 62), 7 << 40, -1])
    assert torch.equal(theirs[1, 0, :8], sent(before.view(torch.int32), 9))
    assert state.tolist() == [10, 0]
    assert stalled.tolist() == [0]


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that hears nothing goes on, and the host is told."""
    monkeypatch.setattr(exchange, "SPINS", 3)
    *_kept, rooms = rooms_of_two()  # addresses of tensors that must stay
    state, stalled = torch.tensor([1, 0], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    x, keys = torch.zeros(4), torch.arange(4)
    gpu.start(
        gpu.card(CPU), exchange.add, (1,), torch.ones(4), x, None, rooms, state, 0, 4, RANK=0, RANKS=2,
        CAPACITY=CAPACITY, BLOCK=128, TWICE=False, PDL=False,
    )  # fmt: skip
    assert state.tolist() == [1, 1]
    gpu.start(
        gpu.card(CPU), exchange.greatest, (1,), keys, rooms, state, stalled, 1, 4, RANK=0, RANKS=2,
        CAPACITY=CAPACITY, BLOCK=32, PDL=False,
    )  # fmt: skip
    assert state.tolist() == [3, 1]
    assert stalled.tolist() == [1]
    rank = Rank(Group([CPU], 8), 0)
    rank.check()
    rank._stalled[0] = 1
    with pytest.raises(BackendError, match="must answer each other within seconds"):
        rank.check()


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_product_adds_up_with_the_other_ranks(tokens: int) -> None:
    """The matrix-vector kernel with the exchange in it."""
    n, k = 24, 64
    theirs, ours, rooms = rooms_of_two()
    weight, values = torch.randn(n, k).bfloat16(), torch.randn(tokens, k).bfloat16()
    own, more, x = values.float() @ weight.float().T, torch.randn(tokens, n), torch.randn(tokens, n)
    wanted = x + more + own
    ours[1, 0, : tokens * n] = sent(more.flatten().view(torch.int32), 5)
    ticket = Exchange(rooms, torch.tensor([3, 0], dtype=torch.int32), 1, 2, CAPACITY, index=2)
    x_bf16 = torch.empty(tokens, n, dtype=torch.bfloat16)
    gpu_linear.multiply_few(
        gpu.card(CPU), values, pack_bf16(weight), x, residual=x, out_bf16=x_bf16, exchange=ticket
    )
    torch.testing.assert_close(x, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_bf16, x.bfloat16())
    numbers = (theirs[1, 1, : tokens * n] & 0xFFFFFFFF).int().view(torch.float32).view(tokens, n)
    torch.testing.assert_close(numbers, own, rtol=1e-5, atol=1e-5)
    assert (theirs[1, 1, : tokens * n] >> 32).eq(5).all()


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


@pytest.mark.parametrize(("family", "computed"), [("llama", 1), ("gemma", 2), ("llama", 3)])
def test_layers_that_the_processor_computes(family: str, computed: int) -> None:
    """Against the reference, with a chunk between single tokens. Three layers do not fit; prompts stream them
    all."""
    model = tiny_model(tiny_spec(family, **(SMALL | {"num_layers": 4})), Recipe(name="t"))
    weights = load_weights(model, CPU, 1)
    assert isinstance(weights.layers, StreamedLayers)
    assert weights.layers.divide() is None, "without a GPU nothing is measured"
    division = Division(3, computed, 1.0, 1.0, 1.0, 2.0)
    assert sum(map(division.takes, range(3))) == computed
    weights.layers.divide(division)
    fast = CudaRunner(model.spec, weights, 4, 16, max_batch=2)
    reference = ReferenceRunner(model, 4, 16, as_served=False)
    for batch in (
        step([5, 9, 7], [0, 0], [2, 1], PAGES),
        step([12, 3], [2, 1], [1, 1], PAGES),
        step([6, 4, 11], [2, 3], [2, 1], PAGES[::-1]),
        step([8], [4], [1], PAGES[:1]),
    ):
        logits = reference.forward(batch, "last")
        chosen = fast.sample(batch, *greedy(len(batch.lengths)))
        for row, token in zip(logits, chosen, strict=True):
            assert row.max() - row[token] < 0.1 * row.std()
    assert [i for i, layer in enumerate(weights.few_layers()) if isinstance(layer, HostLayer)] == [
        1 + i for i in range(3) if division.takes(i)
    ]


def test_layers_are_divided_by_what_is_faster() -> None:
    even = divide(10, 1e9, 50e9, 50e9, 50e9)
    assert (even.computed, even.predicted, even.streamed_only) == (5, 0.1, 0.2)
    slow = divide(10, 1e9, 50e9, 48e9, 4e9)
    assert slow.computed == 0, "a tenth at most is not worth it"
    assert not any(map(slow.takes, range(10)))
    contended = divide(32, 0.436e9, 53e9, 51e9, 30e9)
    assert contended.computed == 12
    assert contended.predicted == pytest.approx(12 * 0.436 / 30)
    assert "computes 12 of 32 layers that do not fit: predicted 174 ms" in str(contended)
    assert [i for i in range(32) if contended.takes(i)][:4] == [2, 5, 7, 10], "spread evenly"
    fast = divide(10, 1e9, 5e9, 4e9, 500e9)
    assert fast.computed == 10


def test_rates_of_the_processor_are_of_its_products() -> None:
    model = tiny_model(tiny_spec("llama", **SMALL), Recipe(name="t"))
    layer = load_weights(model, CPU).layers[0]
    assert computable(layer)
    again = iter([True, True, False])
    assert processor_rate([layer], lambda: next(again)) > 0
    assert next(again, None) is None
    quantized = tiny_model(tiny_spec("llama", **SMALL), Recipe(name="t", layers="w8a16"))
    assert not computable(load_weights(quantized, CPU).layers[0])


@pytest.mark.parametrize(("slower", "best"), [(4, 3), (3, 4)])
def test_rates_are_measured_with_as_many_threads_as_are_faster(
    slower: int, best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card that is not there: copies of a step take 5 ms the first time, 2 alone and, beside products
    by all of four threads or by three, 4 or 2.5."""
    model = tiny_model(tiny_spec("llama", **(SMALL | {"num_layers": 2})), Recipe(name="t"))
    layers = load_weights(model, CPU, 0).layers
    assert isinstance(layers, StreamedLayers)
    lasting = iter([5.0, 2.0, 4.0 if slower == 4 else 2.5, 2.5 if slower == 4 else 4.0])
    threads = [4]
    computed: list[tuple[int, int]] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

        def query(self) -> bool:
            return True

        def elapsed_time(self, end: Event) -> float:
            return next(lasting)

    def rate(given: list[LayerWeights], busy: Callable[[], bool]) -> float:
        assert not busy()
        computed.append((threads[0], len(given)))
        return 1e9 if threads[0] == slower else 3e9

    monkeypatch.setattr(layers, "_copies", None, raising=False)
    monkeypatch.setattr(cuda_stream, "processor_rate", rate)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: threads.__setitem__(0, count))
    alone, bus, processor = layers._rates()
    assert alone == pytest.approx(layers.streamed_bytes / 2e-3)
    assert bus == pytest.approx(layers.streamed_bytes / 2.5e-3)
    assert (processor, threads) == (3e9, [best])
    assert computed == [(4, 2), (4, 2), (3, 2), (3, 2)], "threads start before anything is timed"


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
        rank._add(torch.zeros(9), torch.zeros(9), None, rank._ticket())
