"""The screened head: the token of greedy decoding is exactly the one of the greatest logit."""

import dataclasses

import numpy as np
import pytest
from tests.tiny import tiny_model, tiny_spec

from flatout import _cpu
from flatout.core.formats import Recipe
from flatout.core.model import Model
from flatout.engine.cpu import CpuRunner
from flatout.engine.runner import StepInput

ISAS = _cpu.isas()
PAGES = 4


def one(token, position):
    return StepInput(
        np.array([token], np.int32),
        np.array([position], np.int32),
        np.array([1], np.int32),
        np.arange(PAGES, dtype=np.int32)[None].copy(),
    )


def greedy(runner, batch):
    zeros, ones = np.zeros(1, np.float32), np.ones(1, np.float32)
    sampled = runner.sample(batch, zeros, np.zeros(1, np.int32), ones, np.zeros(1, np.uint64))
    return int(sampled[0]), runner._model.screened


def tied(head="q8_0", seed=3, change=None, **spec):
    """A model whose head is its embedding, after `change` of its codes and scales."""
    recipe = Recipe(name=head, layers="w8a8", embedding=head, head=head, kv_cache="int8")
    model = tiny_model(tiny_spec("llama", tie_embeddings=True, vocab_size=4096, **spec), recipe, seed=seed)
    weights = dict(model.weights)
    if change is not None:
        codes, scales = weights["head"].codes.copy(), weights["head"].scales.copy()
        change(codes, scales)
        weights["head"] = weights["embedding"] = dataclasses.replace(
            weights["head"], codes=codes, scales=scales
        )
    return Model(spec=model.spec, recipe=model.recipe, weights=weights)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("head", ["q8_0", "w8a8-g64", "w8a8-g32"])
@pytest.mark.parametrize("isa", ISAS)
def test_it_finds_the_greatest_logit(isa, head, threads):
    runner = CpuRunner(tied(head), threads, isa, PAGES)
    multiplied = []
    for position, token in enumerate(np.random.default_rng(5).integers(3, 4096, 60)):
        logits = runner.forward(one(token, position), "last")[0]
        found, screened = greedy(runner, one(token, position))
        assert found == int(logits.argmax())
        multiplied.append(screened)
    assert min(multiplied) >= 1
    assert np.median(multiplied) < 4096 / 8, "bounds that exclude next to nothing save nothing"


@pytest.mark.parametrize("isa", ISAS)
def test_rows_that_differ_in_their_lower_bits_only_are_told_apart(isa):
    def alike(codes, scales):
        """All rows are one, up to the three bits that the screen leaves out."""
        low = np.random.default_rng(8).integers(0, 8, codes.shape).astype(np.int16)
        codes[:] = ((codes[:1].astype(np.int16) & ~7) | low).astype(np.int8)
        scales[:] = scales[:1]

    runner = CpuRunner(tied(change=alike), 2, isa, PAGES)
    for position, token in enumerate([7, 100, 4000, 9]):
        logits = runner.forward(one(token, position), "last")[0]
        assert greedy(runner, one(token, position))[0] == int(logits.argmax())


@pytest.mark.parametrize("isa", ISAS)
def test_of_equal_logits_the_first_wins_also_across_threads(isa):
    def doubled(codes, scales):
        codes[2048:], scales[2048:] = codes[:2048], scales[:2048]

    runner = CpuRunner(tied(change=doubled), 2, isa, PAGES)
    for position, token in enumerate([7, 100, 2000, 9]):
        found, screened = greedy(runner, one(token, position))
        assert screened >= 2
        assert found == int(runner.forward(one(token, position), "last")[0].argmax()) < 2048


def test_flat_logits_are_read_whole_for_a_while():
    def flat(codes, scales):
        codes[:], scales[:] = codes[:1], scales[:1]

    runner = CpuRunner(tied(change=flat), 2, None, PAGES)
    found = [greedy(runner, one(5, position)) for position in range(40)]
    assert [token for token, _ in found] == [0] * 40
    screened = [rows for _, rows in found]
    assert screened[:34] == [4096, *[-1] * 32, 4096]


def test_a_head_of_its_own_or_with_one_scale_a_row_is_read_whole():
    own = tied()
    own = Model(
        spec=own.spec,
        recipe=own.recipe,
        weights=dict(own.weights) | {"embedding": tied(seed=4).weights["head"]},
    )
    for model in (own, tied("w8a8", hidden_size=128)):
        runner = CpuRunner(model, 2, None, PAGES)
        found, screened = greedy(runner, one(5, 0))
        assert screened == -1
        assert found == int(runner.forward(one(5, 0), "last")[0].argmax())


@pytest.mark.parametrize("isa", ISAS)
def test_a_logit_that_is_not_a_number_is_an_error(isa):
    def damaged(codes, scales):
        scales[3000, 1] = np.nan

    with pytest.raises(RuntimeError, match="not numbers"):
        greedy(CpuRunner(tied(change=damaged), 2, isa, PAGES), one(5, 0))
