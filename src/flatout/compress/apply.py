"""A whole model under a recipe: every fused weight taken, rounded or calibrated as its format and the
method say."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from flatout.compress.rtn import check_roundable, round_to_nearest
from flatout.core.formats import Format, Recipe
from flatout.core.fuse import Source, float_weight, native_weight
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

    fp32 and bf16 weights stay float32 arrays; q4_0, q4_1, q8_0 take the file's blocks whatever the method;
    other formats are rounded by `recipe.method`: rtn searches each 4-bit group's range, gptq needs
    `calibration`, token lists whose activations decide how errors are spread. Embedding and head are always
    rounded to nearest. Raises ConfigError for a recipe that does not fit, before any work.
    """
    recipe.check(source.spec)
    expected = list(expected_weights(source.spec, recipe))
    _check_method(recipe, [fmt for _, _, fmt in expected], calibration)
    calibrated = _calibrated(source, recipe, calibration, progress) if recipe.method == "gptq" else {}
    weights: dict[str, Weight] = {}
    for done, (name, _, fmt) in enumerate(expected):
        if progress is not None:
            progress(name, done, len(expected))
        weights[name] = calibrated[name] if name in calibrated else _rounded(source, name, fmt)
    if progress is not None:
        progress("done", len(expected), len(expected))
    return Model(spec=source.spec, recipe=recipe, weights=weights)


def _check_method(recipe: Recipe, formats: list[Format], calibration: Sequence[Sequence[int]] | None) -> None:
    rounded = sorted({fmt.name for fmt in formats if fmt.is_integer and not fmt.is_native})
    if recipe.method == "native" and rounded:
        raise ConfigError(
            "method native takes weights as they are, so formats are fp32, bf16, q4_0, q4_1 or q8_0",
            ", ".join(rounded),
            "method rtn",
        )
    if recipe.method == "gptq" and not calibration:
        raise ConfigError("method gptq needs calibration text", "none", "method rtn, or give token lists")


def _rounded(source: Source, name: str, fmt: Format) -> Weight:
    if not fmt.is_integer:
        return float_weight(source, name)
    if fmt.is_native:
        return native_weight(source, name, fmt)
    check_roundable(fmt)
    return round_to_nearest(float_weight(source, name), fmt, search_clip=fmt.bits == 4)


def _calibrated(
    source: Source,
    recipe: Recipe,
    calibration: Sequence[Sequence[int]] | None,
    progress: Progress | None,
) -> dict[str, Weight]:
    from flatout.compress.gptq import gptq_layers

    tokens = [np.asarray(document, dtype=np.int64) for document in calibration or ()]
    return dict(gptq_layers(source, recipe, tokens, progress))
