"""The rehearsal: the ends of a model go the whole way, and what cannot is found out there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.tiny import tiny_source, tiny_spec, write_tokenizer

from flatout.core.formats import Recipe
from flatout.core.tokenizer import Tokenizer
from flatout.errors import EvidenceError
from flatout.search import rehearsal
from flatout.search.rehearsal import Ends, rehearse

SPEC = tiny_spec(num_layers=5, tie_embeddings=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, SPEC.vocab_size)
    return Tokenizer.from_folder(folder)


def test_ends_are_the_first_and_the_last_block(monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_source(SPEC)
    monkeypatch.setattr(rehearsal, "_ROWS", 100)
    ends = Ends(source)
    assert (ends.spec.num_layers, ends.spec.vocab_size) == (2, 100)
    for name in ("model.layers.{}.mlp.up_proj.weight", "model.layers.{}.input_layernorm.weight"):
        for own, whole in ((0, 0), (1, 4)):
            assert np.array_equal(ends.array(name.format(own)), source.array(name.format(whole)))
    table = "model.embed_tokens.weight"
    assert np.array_equal(ends.array(table), source.array(table)[:100])
    asked = Recipe(name="x", layers="w8a8", overrides=(("layers.4.down", "w4a8-g32"),), method="gptq")
    recipe = ends.recipe(asked)
    assert recipe.format_of(1, "down").name == "w4a8-g32"
    assert recipe.format_of(0, "down").name == recipe.format_of(1, "o").name == "w8a8"
    assert recipe.method == "rtn"
    assert Ends(tiny_source(tiny_spec(num_layers=1))).spec.num_layers == 1


@pytest.mark.parametrize("layers", ["bf16", "w8a8", "w4a8-g32", "q4_1"])
def test_a_model_that_works_passes(layers: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    native = layers.startswith("q")
    source = tiny_source(SPEC, layers=layers if native else None, head="q8_0" if native else None)
    head = "q8_0" if native else "bf16"
    method = "native" if native else "rtn"
    recipe = Recipe(name=layers, layers=layers, head=head, embedding=head, method=method)
    rehearse(source, recipe, tokenizer, 1, tmp_path)


def test_logits_that_are_no_numbers_are_found(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "logits_of", lambda runner, tokens: np.full((8, 4), np.nan))
    with pytest.raises(EvidenceError, match="a saved block must compute what it did before"):
        rehearse(tiny_source(SPEC), Recipe(name="bf16"), tokenizer, 1, tmp_path)
