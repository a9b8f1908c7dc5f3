"""Library: the weights of one checkpoint in any format, each rounded once, for recipes that mix formats.

Method smooth-gptq: linears whose activations share one int8 scale a token are smoothed (compress/smooth.py),
and all linears are rounded by GPTQ (compress/gptq.py). rotate-smooth-gptq does so to the model turned
(compress/rotate.py). Factors and Hessians are those of the original's activations, so the codes of a linear
depend on its own format and on nothing else in the recipe; where it feeds a smoothed linear its rows are
divided, and that goes into their scales. That is what lets a search change one layer of a candidate and build
the rest from what it has.

The formulas and their sources are in those files. Trade-off: a linear is rounded once and not for what it
receives behind those already rounded, so a whole model of one format loses less by plain gptq.

Memory: half of 4 bytes x K^2 for every linear (core.costs.moment_bytes; 200 MB for SmolLM2-135M) and a byte a
weight for every format used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from flatout.compress.gptq import DAMPING, Factor, factorise, round_linear, triangle_of, upper_of
from flatout.compress.inputs import linear_inputs
from flatout.compress.method import Progress, check_rounded
from flatout.compress.rescale import Rescaled, owner_of, rescaled
from flatout.compress.rotate import turned
from flatout.compress.rtn import to_nearest, with_scales
from flatout.compress.smooth import factors_for, smoothable
from flatout.core.formats import Format, Recipe
from flatout.core.fuse import Source, float_weight, native_format, source_names
from flatout.core.model import Model, Weight, expected_weights
from flatout.core.quantized import QuantizedTensor
from flatout.errors import ConfigError

_PASSES = 1  # of refining: a search rounds hundreds of weights, and the first pass gains most


class Library:
    """documents: token ids of the calibration text, each a sequence of its own. rotated: of the model turned,
    which `source` then is. Raises ConfigError when there is no text."""

    def __init__(
        self,
        source: Source,
        documents: Sequence[Sequence[int] | np.ndarray],
        progress: Progress | None = None,
        rotated: bool = False,
    ) -> None:
        arrays = [np.asarray(document, dtype=np.int64) for document in documents if len(document)]
        if not arrays:
            raise ConfigError("a library needs calibration text", "none", "give token lists")
        self._spec, self.rotated = source.spec, rotated
        self.source = source = turned(source) if rotated else source
        self._moments: dict[str, np.ndarray] = {}  # upper triangles
        self._rounded: dict[tuple[str, str, bool], QuantizedTensor] = {}
        total = source.spec.num_layers * len(source.spec.linears()) + 1
        self._smoothing: dict[str, np.ndarray] = {}
        self._latest: tuple[str, bool, Factor] | None = None

        def see(name: str, inputs: Tensor, hidden: Tensor, weight: np.ndarray) -> None:
            if progress is not None:
                progress(f"calibrating {name}", len(self._smoothing), total)
            self._smoothing[name] = factors_for(source.spec, name, inputs, hidden, weight)
            if name != "head":
                self._moments[name] = triangle_of((inputs.T @ inputs / len(inputs)).numpy())

        linear_inputs(source, arrays, see)

    def smoothing(self, name: str) -> np.ndarray:
        """Factors float32 (K,) that divide the inputs of linear `name` where it is smoothed."""
        factors: np.ndarray = self._smoothing[name][owner_of(self.source.spec, name).numpy()]
        return factors

    def moments(self, name: str, smoothed: bool = False) -> np.ndarray:
        """The second moments (K, K) of the inputs of linear `name`, smoothed if asked for; made anew each
        time."""
        upper = upper_of(self._moments[name], self.source.spec.linears()[name.rpartition(".")[2]][1])
        moments: np.ndarray = upper + np.triu(upper, 1).T
        if smoothed:
            inverse = 1 / self.smoothing(name)
            moments *= np.outer(inverse, inverse)
        return moments

    def factor(self, name: str, smoothed: bool) -> Factor:
        """The Hessian of linear `name`, of its smoothed inputs if asked for, ready for rounding. The latest
        is kept: one of 1,536 columns takes as long to make as rounding its linear does, and there are
        hundreds."""
        if self._latest is None or self._latest[:2] != (name, smoothed):
            self._latest = (name, smoothed, factorise(self.moments(name, smoothed), DAMPING))
        return self._latest[2]

    def rounded(self, name: str, smoothed: bool, fmt: Format) -> QuantizedTensor:
        """Linear `name` spread and, where it is coarse, refined: what method gptq does to one linear, for the
        activations of the original; smoothed ones if asked for. Made once. Raises
        ConfigError, naming it, for a linear that rounding has ruined."""
        key = (name, fmt.name, smoothed)
        if key not in self._rounded:
            weight = float_weight(self.source, name)
            if smoothed:
                weight = weight * self.smoothing(name)
            factor = self.factor(name, smoothed)
            rounded = round_linear(weight, self.moments(name, smoothed), fmt, _PASSES, factor)
            check_rounded(name, rounded, lambda: weight)
            self._rounded[key] = rounded
        return self._rounded[key]

    def model(self, recipe: Recipe, progress: Progress | None = None) -> Model:
        """The model under `recipe`. Embedding and head are rounded to nearest; blocks stay as the file has
        them."""
        recipe.check(self._spec)
        names = [name for name in self._smoothing if smoothable(self.source, recipe, name)]
        source = rescaled(self.source, {name: self._smoothing[name] for name in names})
        expected = list(expected_weights(self._spec, recipe))
        weights: dict[str, Weight] = {}
        for done, (name, _, fmt) in enumerate(expected):
            if progress is not None:
                progress(name, done, len(expected))
            kept = fmt.is_native or native_format(source, name) == fmt.name
            if name not in self._moments or not fmt.is_integer or kept:
                weights[name] = to_nearest(source, name, fmt)
                continue
            weights[name] = _divided(self.rounded(name, name in names, fmt), source, name)
        return Model(spec=self._spec, recipe=recipe, weights=weights)


def _divided(rounded: QuantizedTensor, source: Rescaled, name: str) -> QuantizedTensor:
    """`rounded` with the rows of its last part (v of qkv, up of gate_up) divided as `source` has them."""
    divisor = source.rows.get(source_names(source.spec, name)[-1])
    if divisor is None:
        return rounded
    scales = rounded.scales.astype(np.float32)
    scales[-len(divisor) :] /= divisor[:, None]
    return with_scales(rounded, scales)
