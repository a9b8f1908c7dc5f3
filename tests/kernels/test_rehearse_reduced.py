"""search/rehearsal.py: recipes that take weights away go the whole way in little, without calibration
text."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny import tiny_source, tiny_spec, write_tokenizer

from flatout.core.tokenizer import Tokenizer
from flatout.errors import FlatoutError
from flatout.search.recipes import recipe_from_name
from flatout.search.rehearsal import rehearse


@pytest.mark.parametrize(
    "name",
    [
        "w8a8-g32",
        "bf16,sparsity=sparsegpt-2:4",
        "w4a8-g32/gptq,sparsity=wanda-50%",
        "w8a8-g32,depth=3,ffn=64",
        "bf16,groups=1,layers.2.down=w8a8",
        "w8a8,kv-heads=1,depth=1",
    ],
)
def test_recipes_that_reduce_are_rehearsed(tmp_path: Path, name: str) -> None:
    source = tiny_source(tiny_spec(num_layers=4))
    write_tokenizer(tmp_path, 320)
    tokenizer = Tokenizer.from_folder(tmp_path)
    rehearse(source, recipe_from_name(name, source), tokenizer, 1, tmp_path)


def test_a_structure_that_does_not_fit_its_formats_is_found_out(tmp_path: Path) -> None:
    source = tiny_source(tiny_spec())
    with pytest.raises(FlatoutError, match=r"w8a8-g32 on width 72"):
        recipe_from_name("w8a8-g32,ffn=72", source)
