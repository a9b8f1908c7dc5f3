"""A whole model under a recipe: every fused weight taken, rounded or calibrated as its format and the
method say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from flatout.compress.rtn import round_to_nearest
from flatout.core.formats import Format, Recipe
from flatout.core.fuse import Source, assemble, float_weight, native_format, native_weight
from flatout.core.model import Model, Weight, expected_weights
from flatout.errors import ConfigError

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total) with total the number of weights."""


def compress(
    source: Source,
    recipe: Recipe,
    calibration: Sequence[Sequence[int]] | None = None,
    progress: Progress | None = None,
) -> Model:
    """The Model of `source` (a Checkpoint) under `recipe`.

    fp32 and bf16 weights stay float32 arrays. q4_0, q4_1 and q8_0 take the file's blocks whatever the
    method, and so does any weight that the file already holds in the format asked for. The rest is rounded
    by `recipe.method`: rtn searches each 4-bit group's range; gptq needs `calibration`, token lists whose
    activations decide how errors are spread, and rounds embedding and head to nearest; smooth first
    rescales, by the same text, what feeds linears with one activation scale a token; smooth-gptq does both
    (compress/library.py); native rounds nothing.

    Raises ConfigError for a recipe that does not fit before any work, and UnsupportedModelError where
    blocks are missing.
    """
    recipe.check(source.spec)
    if recipe.method == "native":
        return assemble(source, recipe)
    documents = [np.asarray(document, dtype=np.int64) for document in calibration or () if len(document)]
    if recipe.needs_calibration and not documents:
        raise ConfigError(
            f"method {recipe.method} needs calibration text", "none", "method rtn, or give token lists"
        )
    spec = source.spec
    if recipe.method == "smooth-gptq":
        from flatout.compress.library import Library  # loads PyTorch

        return Library(source, documents, progress).model(recipe, progress)
    if recipe.method == "smooth":
        from flatout.compress.smooth import smooth  # loads PyTorch

        source = smooth(source, recipe, documents, progress)
    calibrated: Mapping[str, Weight] = {}
    if recipe.method == "gptq":
        from flatout.compress.gptq import gptq_layers  # loads PyTorch

        calibrated = gptq_layers(source, recipe, documents, progress)
    expected = list(expected_weights(spec, recipe))
    weights: dict[str, Weight] = {}
    for done, (name, _, fmt) in enumerate(expected):
        if progress is not None:
            progress(name, done, len(expected))
        weights[name] = calibrated[name] if name in calibrated else to_nearest(source, name, fmt)
    if progress is not None:
        progress("done", len(expected), len(expected))
    return Model(spec=spec, recipe=recipe, weights=weights)


def to_nearest(source: Source, name: str, fmt: Format) -> Weight:
    """The fused weight in `fmt` without calibration: float, the file's own blocks, or rounded to nearest."""
    if not fmt.is_integer:
        return float_weight(source, name)
    if fmt.is_native or native_format(source, name) == fmt.name:
        return native_weight(source, name, fmt)
    return round_to_nearest(float_weight(source, name), fmt, search_clip=fmt.bits < 8)
