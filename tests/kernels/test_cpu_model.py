"""The forward step on every instruction set: same bits where the arithmetic is exact, bounded elsewhere."""

from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from tests.files import write_gguf_model
from tests.tiny import tiny_model, tiny_spec, tiny_tensors

from flatout import _cpu
from flatout.core.checkpoint import open_checkpoint
from flatout.core.formats import Recipe, uniform
from flatout.core.fuse import assemble, float_recipe, native_recipe
from flatout.core.gguf_blocks import BlockTensor
from flatout.core.gguf_config import gguf_name
from flatout.core.quantized import QuantizedTensor
from flatout.engine.cpu import CpuRunner
from flatout.engine.reference import ReferenceRunner
from flatout.engine.runner import StepInput

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma"]
ISAS = _cpu.isas()
PAGES = 6


def step(tokens, start=0, first_page=0):
    pages = (np.arange(PAGES, dtype=np.int32) + first_page) % PAGES
    return StepInput(
        np.asarray(tokens, np.int32),
        np.array([start], np.int32),
        np.array([len(tokens)], np.int32),
        np.ascontiguousarray(pages[None]),
    )


def prompt(spec, length=150):
    return np.random.default_rng(11).integers(3, spec.vocab_size, length).tolist()


@pytest.mark.parametrize("kv_cache", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_integer_formats_give_the_same_bits_on_every_instruction_set(family, kv_cache):
    spec = tiny_spec(family)
    recipe = Recipe(
        name="mixed",
        layers="w8a8",
        embedding="q8_0",
        head="w8a16",
        kv_cache=kv_cache,
        overrides=(("layers.0.down", "w4a8-g32-asym"), ("layers.1.qkv", "w8a8-g64")),
    )
    model = tiny_model(spec, recipe, seed=1)
    tokens = prompt(spec)
    expected = CpuRunner(model, 1, "portable", PAGES).forward(step(tokens), "all")
    assert np.isfinite(expected).all()
    for isa in ISAS:
        runner = CpuRunner(model, 2, isa, PAGES)
        np.testing.assert_array_equal(runner.forward(step(tokens), "all"), expected, err_msg=isa)
        # One token at a time from the middle of a page, over the next page's edge.
        for position in range(100, 135):
            one = runner.forward(step(tokens[position : position + 1], position), "last")
            np.testing.assert_array_equal(one[0], expected[position], err_msg=f"{isa} at {position}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_cache", ["int8", "bf16", "fp32"])
def test_what_an_earlier_sequence_left_in_its_pages_changes_nothing(isa, kv_cache):
    spec = tiny_spec("llama")
    model = tiny_model(spec, uniform("w8a8", kv_cache=kv_cache), seed=2)
    tokens = prompt(spec, 70)
    fresh = CpuRunner(model, 1, isa, PAGES).forward(step(tokens), "all")
    used = CpuRunner(model, 1, isa, PAGES)
    used.forward(step(prompt(spec, 300), first_page=3), "last")
    np.testing.assert_array_equal(used.forward(step(tokens), "all"), fresh)


# Greatest difference of a logit over the greatest logit. fp32 weights: sums of at most 256 products in
# another order, through 2 layers; with a bf16 cache, whose roundings may flip. bf16: activations rounded to 8
# bits of mantissa at every linear. Integers: the cache's and the attention weights' 8 bits, which the
# reference rounds per page or not at all.
BOUNDS = {"fp32": 1e-5, "fp32, bf16 cache": 2e-3, "bf16": 3e-2} | dict.fromkeys(
    ["w8a8", "w4a8-g32", "w3a16-g32", "w8a16", "q4_1", "q8_0", "q4_1-s8"], 5e-2
)


@pytest.mark.parametrize("name", list(BOUNDS))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_within_the_stated_distance_of_the_reference(family, name):
    spec = tiny_spec(family)
    floats = {"fp32": ("fp32", "fp32"), "fp32, bf16 cache": ("fp32", "bf16"), "bf16": ("bf16", "bf16")}
    recipe = float_recipe(*floats[name]) if name in floats else uniform(name)
    model = tiny_model(spec, recipe, seed=3)
    tokens = prompt(spec, 90)
    expected = ReferenceRunner(model, PAGES).forward(step(tokens), "all")
    for isa in ISAS:
        got = CpuRunner(model, 1, isa, PAGES).forward(step(tokens), "all")
        error = np.abs(got - expected).max() / np.abs(expected).max()
        assert error <= BOUNDS[name], (isa, error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [5, 999]}, "outside the vocabulary"),
        ({"tokens": [-1]}, "outside the vocabulary"),
        ({"start": 6 * 64}, "beyond the page table, the cache or the model"),
        ({"start": -1}, "starts at least 0"),
    ],
)
def test_impossible_steps_are_refused_and_leave_the_model_usable(change, message):
    spec = tiny_spec("llama")
    runner = CpuRunner(tiny_model(spec, uniform("w8a8"), seed=4), 2, None, PAGES)
    before = runner.forward(step([3, 4]), "last")
    with pytest.raises(ValueError, match=message):
        runner.forward(step(**({"tokens": [3, 4]} | change)), "last")
    bad_page = StepInput(*(np.array(x, np.int32) for x in ([3], [0], [1], [[77]])))
    with pytest.raises(ValueError, match="page 77 does not exist"):
        runner.forward(bad_page, "last")
    np.testing.assert_array_equal(runner.forward(step([3, 4]), "last"), before)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_splitting_a_long_step_by_tokens_changes_no_bit(threads):
    """From 64 tokens a thread on, threads own tokens; below, they own rows of the weights."""
    spec = tiny_spec("qwen2", max_positions=1024)
    model = tiny_model(spec, uniform("w8a8-g32"), seed=5)
    rng = np.random.default_rng(6)
    lengths = [300, 7, 129, 60]
    starts = np.array([0, 65, 0, 3], np.int32)
    pages = np.arange(4 * PAGES, dtype=np.int32).reshape(4, PAGES)
    tokens = rng.integers(3, spec.vocab_size, sum(lengths)).astype(np.int32)
    batch = StepInput(tokens, starts, np.array(lengths, np.int32), pages)
    expected = CpuRunner(model, 1, None, pages.size).forward(batch, "all")
    runner = CpuRunner(model, threads, None, pages.size)
    for _ in range(3):
        np.testing.assert_array_equal(runner.forward(batch, "all"), expected)


@pytest.mark.parametrize("kv_cache", ["int8", "bf16"])
@pytest.mark.parametrize("family", ["llama", "mistral"])  # mistral's window hides the first chunks
def test_threads_that_share_a_long_context_change_no_bit(family, kv_cache):
    spec = tiny_spec(family, max_positions=1024)
    model = tiny_model(spec, uniform("w8a8", kv_cache=kv_cache), seed=4)
    tokens = prompt(spec, 600)
    pages = np.arange(10, dtype=np.int32)[None]

    def forward(runner, start, stop, rows):
        starts, lengths = np.array([start], np.int32), np.array([stop - start], np.int32)
        return runner.forward(
            StepInput(np.asarray(tokens[start:stop], np.int32), starts, lengths, pages), rows
        )

    alone = CpuRunner(model, 1, None, 10)
    first = forward(alone, 0, 500, "all")
    expected = np.concatenate([first, forward(alone, 500, 600, "all")])
    for threads in (2, 5):
        runner = CpuRunner(model, threads, None, 10)
        forward(runner, 0, 500, "last")
        forward(runner, 500, 600, "last")
        # The edges of chunks of 256 positions, and in the middle of one.
        for position in (0, 254, 255, 256, 257, 400, 511, 512, 513, 599):
            one = forward(runner, position, position + 1, "last")
            np.testing.assert_array_equal(
                one[0], expected[position], err_msg=f"{threads} threads at {position}"
            )


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_of_a_file_give_the_bits_of_their_codes_and_scales(tmp_path, kind, threads):
    spec = tiny_spec("llama", tie_embeddings=True)
    tensors = tiny_tensors(spec)
    types = {gguf_name(n): GGMLQuantizationType[kind] for n, t in tensors.items() if t.ndim == 2}
    checkpoint = open_checkpoint(write_gguf_model(tmp_path / "m.gguf", spec, tensors, types))
    blocks = assemble(checkpoint, native_recipe(checkpoint))
    assert isinstance(blocks.weights["layers.1.qkv"], BlockTensor)
    taken_out = {
        name: QuantizedTensor(format=w.format, codes=w.codes, scales=w.scales, minima=w.minima)
        if isinstance(w, QuantizedTensor)
        else w
        for name, w in blocks.weights.items()
    }
    tokens = prompt(spec)
    expected = CpuRunner(replace(blocks, weights=taken_out), threads=2).forward(step(tokens), "all")
    found = CpuRunner(blocks, threads=threads).forward(step(tokens), "all")
    np.testing.assert_array_equal(found, expected)
