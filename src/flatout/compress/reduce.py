"""What a recipe takes away before it rounds: a smaller structure first, then weights by its sparsity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flatout.compress.method import Progress
from flatout.compress.prune import prune
from flatout.compress.structure import restructured
from flatout.core.formats import Recipe
from flatout.core.fuse import Source
from flatout.core.sparsity import parse_sparsity
from flatout.core.structure import Structure


def reduced(
    source: Source, recipe: Recipe, documents: Sequence[np.ndarray], progress: Progress | None = None
) -> Source:
    """`source` under the recipe's structure and sparsity; errors as of `restructured` and `prune`."""
    if recipe.structure:
        source = restructured(source, Structure.of(recipe.structure), documents)
    if recipe.sparsity:
        source = prune(source, parse_sparsity(recipe.sparsity), documents, progress)
    return source
