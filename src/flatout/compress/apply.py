"""A whole model under a recipe: every fused weight taken, rounded or calibrated as its format and the
method say.

A method's name is that of a change of the model, of a way to round, or of both with a hyphen between:

    smooth, awq, rotate     move outliers away: the model computes the same (compress/{smooth,awq,rotate}.py)
    rtn, gptq, tune         choose the codes (compress/{rtn,gptq,tune}.py); rtn where no other is named
    native                  rounds nothing
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from flatout.compress.method import Data, Progress, Report, check_rounded, check_text, data_of
from flatout.compress.rtn import to_nearest
from flatout.core.formats import Recipe
from flatout.core.fuse import Source, assemble, float_weight
from flatout.core.model import Model, Weight, expected_weights
from flatout.core.quantized import QuantizedTensor


def compress(
    source: Source,
    recipe: Recipe,
    calibration: Sequence[Sequence[int] | np.ndarray] | None = None,
    progress: Progress | None = None,
    keep: Path | None = None,
    device: str = "cpu",
) -> Model:
    """The Model of `source` (a Checkpoint) under `recipe`; see `apply`.

    calibration: token lists, each a sequence of its own. keep: a folder from which interrupted work goes on.
    device: where gptq and tune compute, "cpu" or "cuda".
    """
    return apply(source, data_of(calibration, progress, keep, device), recipe)[0]


def apply(source: Source, data: Data, recipe: Recipe) -> tuple[Model, Report]:
    """(model, report) of `source` under `recipe`.

    fp32 and bf16 weights stay float32 arrays. q4_0, q4_1 and q8_0 take the file's blocks whatever the
    method, and so does any weight that the file already holds in the format asked for. The rest is rounded
    by `recipe.method`; embedding and head always to nearest. smooth-gptq, also behind rotation, is made by
    compress/library.py. Before that the recipe's structure is cut and its sparsity made
    (compress/reduce.py).

    Raises ConfigError for a recipe or a text that does not fit before any work, and, naming the weight, for
    one that rounding has ruined; UnsupportedModelError where blocks are missing.
    """
    recipe.check(source.spec)
    if recipe.needs_calibration:
        from flatout.compress.inputs import check_understood  # loads PyTorch

        check_text(source, data, recipe)
        check_understood(source, data.documents)
    if recipe.reduces:
        from flatout.compress.reduce import reduced  # loads PyTorch

        smaller = reduced(source, recipe, list(data.documents), data.progress)
        model, report = apply(smaller, data, replace(recipe, sparsity="", structure=()))
        return replace(model, recipe=recipe), report
    if recipe.method == "native":
        return assemble(source, recipe), Report(method="native", seconds=0.0, tokens=0, errors={})
    if recipe.by_library:
        from flatout.compress.library import Library  # loads PyTorch

        start = time.perf_counter()
        model = Library(source, data.documents, data.progress, recipe.rotates).model(recipe, data.progress)
        seconds = time.perf_counter() - start
        return model, Report(method=recipe.method, seconds=seconds, tokens=data.tokens, errors={})
    change, _, rounding = recipe.method.rpartition("-")
    if rounding in ("smooth", "awq", "rotate"):
        change, rounding = rounding, "rtn"
    spec, changed = source.spec, None
    if change:
        source, changed = _change(change, source, data, recipe)
    calibrated: Mapping[str, QuantizedTensor] = {}
    report = changed or Report(method="rtn", seconds=0.0, tokens=0, errors={})
    if rounding != "rtn":
        calibrated, report = _round(rounding, source, data, recipe)
    expected = list(expected_weights(spec, recipe))
    weights: dict[str, Weight] = {}
    for done, (name, _, fmt) in enumerate(expected):
        if data.progress is not None:
            data.progress(name, done, len(expected))
        weight = calibrated[name] if name in calibrated else to_nearest(source, name, fmt)
        if isinstance(weight, QuantizedTensor) and not fmt.is_native:
            check_rounded(name, weight, partial(float_weight, source, name))
        weights[name] = weight
    if data.progress is not None:
        data.progress("rounded", len(expected), len(expected))
    seconds = report.seconds + (changed.seconds if changed is not None and report is not changed else 0.0)
    return Model(spec=spec, recipe=recipe, weights=weights), replace(
        report, method=recipe.method, seconds=seconds
    )


def _change(name: str, source: Source, data: Data, recipe: Recipe) -> tuple[Source, Report]:
    """`source` by a method that computes the same and rounds better. They load PyTorch."""
    if name == "smooth":
        from flatout.compress.smooth import smooth

        return smooth(source, data, recipe)
    if name == "awq":
        from flatout.compress.awq import awq

        return awq(source, data, recipe)
    from flatout.compress.rotate import rotate

    return rotate(source, data, recipe)


def _round(
    name: str, source: Source, data: Data, recipe: Recipe
) -> tuple[Mapping[str, QuantizedTensor], Report]:
    """Linears by a method that knows the text. They load PyTorch."""
    if name == "tune":
        from flatout.compress.tune import tune

        return tune(source, data, recipe)
    from flatout.compress.gptq import gptq_layers

    return gptq_layers(source, data, recipe)
