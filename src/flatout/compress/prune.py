"""Pruning a whole model: every linear of every layer by one method, layer by layer.

As with GPTQ, a linear is pruned for what it receives from layers that are pruned already, and then used
pruned, so that everything after it sees its error. Linears that run fused share their inputs, not their
choices: q, k, v, gate and up are pruned apart, as published results are. Embedding, head and norms stay.

In memory at a time: one layer's float weights, one second-moment matrix, the activations of the calibration
text (4 bytes x tokens x (3 x intermediate size + hidden size)), and what the caller keeps of each layer.
`compress/prune_folder.py` keeps nothing.

The formulas and their sources are in compress/{magnitude,wanda,sparsegpt}.py. Trade-off: nothing multiplies
faster for the zeros; pruned weights save bytes in files (core/sparse.py, core/coded.py) and are where
recovery by training starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flatout.compress.gptq import Factor, factorise
from flatout.compress.inputs import Text, check_activations, check_understood
from flatout.compress.magnitude import magnitude
from flatout.compress.method import Progress, check_weight
from flatout.compress.sparsegpt import sparsegpt
from flatout.compress.wanda import wanda
from flatout.core.fuse import Source, source_names
from flatout.core.quantized import QuantizedTensor
from flatout.core.sparsity import Sparsity
from flatout.core.spec import ModelSpec, weight_names
from flatout.errors import ConfigError, EvidenceError
from flatout.kernels.linear import as_tensor

Stored = Callable[[np.ndarray], np.ndarray]

FEWEST_TOKENS = 128  # of calibration text
_MEASURED_TOKENS = 256  # that a linear's error is measured on


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearReport:
    """One pruned weight by Hugging Face name: the part of it that is zero, and the squared error of its
    outputs over their squared size on calibration tokens (0 where no text was given)."""

    name: str
    zeros: float
    output_error: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layer:
    """A pruned layer: float32 (N, K) by Hugging Face name, and what pruning did to each."""

    index: int
    weights: Mapping[str, np.ndarray]
    reports: tuple[LinearReport, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pruned:
    """A Source whose linears are pruned."""

    spec: ModelSpec
    original: Source
    tensors: Mapping[str, np.ndarray] = field(repr=False)
    reports: tuple[LinearReport, ...]

    def array(self, name: str) -> np.ndarray:
        return self.tensors[name] if name in self.tensors else self.original.array(name)

    def native(self, name: str) -> QuantizedTensor | None:
        return None if name in self.tensors else self.original.native(name)


def prune(
    source: Source,
    sparsity: Sparsity,
    documents: Sequence[np.ndarray] = (),
    progress: Progress | None = None,
) -> Pruned:
    """`source` with every linear pruned, all in memory. documents: calibration text as token ids, each a
    sequence of its own; magnitude pruning needs none. Errors as of `pruned_layers`."""
    tensors: dict[str, np.ndarray] = {}
    reports: list[LinearReport] = []
    for layer in pruned_layers(source, sparsity, documents, progress):
        tensors |= layer.weights
        reports += layer.reports
    return Pruned(spec=source.spec, original=source, tensors=tensors, reports=tuple(reports))


def pruned_layers(
    source: Source,
    sparsity: Sparsity,
    documents: Sequence[np.ndarray] = (),
    progress: Progress | None = None,
    finished: Callable[[int], Layer | None] = lambda layer: None,
    stored: Stored = lambda weight: weight,
) -> Iterator[Layer]:
    """The layers one after another. finished: a layer that an earlier run pruned, or None; it is passed
    through, not pruned again. stored: a weight as it will be read back, which is what later layers are pruned
    for. progress(what, done, total) counts linears.

    Raises ConfigError before any work for a pattern that does not divide a width and for calibration text
    that is missing or too short; EvidenceError for text that the model cannot have been made for; and,
    naming the linear, for weights or activations that are not finite and for a weight of which nothing is
    left.
    """
    check_widths(source.spec, sparsity)
    linears = list(source.spec.linears())
    total = source.spec.num_layers * len(linears)

    def tell(name: str) -> None:
        if progress is not None:
            _, layer, what = name.split(".")
            progress(f"pruning {name}", int(layer) * len(linears) + linears.index(what), total)

    if not sparsity.needs_calibration:
        for index in range(source.spec.num_layers):
            yield finished(index) or _without_text(source, sparsity, index, tell, stored)
    else:
        documents = [document for document in documents if len(document)]
        check_text(source, documents)
        yield from _with_text(source, sparsity, documents, tell, finished, stored)
    if progress is not None:
        progress("pruned", total, total)


def check_widths(spec: ModelSpec, sparsity: Sparsity) -> None:
    """Raise ConfigError unless the pattern fits every linear."""
    for linear, (_, k) in spec.linears().items():
        sparsity.check(linear, k)


def check_text(source: Source, documents: Sequence[np.ndarray]) -> None:
    """Raise ConfigError for too little calibration text and for ids outside the vocabulary; EvidenceError
    where the model finds its beginning less likely than random tokens."""
    tokens = sum(len(document) for document in documents)
    if tokens < FEWEST_TOKENS:
        raise ConfigError(
            f"calibration needs at least {FEWEST_TOKENS} tokens", str(tokens), "a longer text, or magnitude"
        )
    check_understood(source, documents)


def _without_text(
    source: Source, sparsity: Sparsity, index: int, tell: Callable[[str], None], stored: Stored
) -> Layer:
    weights: dict[str, np.ndarray] = {}
    reports: list[LinearReport] = []
    for linear in source.spec.linears():
        fused = f"layers.{index}.{linear}"
        tell(fused)
        for name in source_names(source.spec, fused):
            weight = source.array(name)
            check_weight(name, weight)
            weights[name] = stored(np.where(magnitude(weight, sparsity), weight, np.float32(0)))
            reports.append(_report(name, weight, weights[name], None))
    return Layer(index=index, weights=weights, reports=tuple(reports))


@torch.no_grad()
def _with_text(
    source: Source,
    sparsity: Sparsity,
    documents: Sequence[np.ndarray],
    tell: Callable[[str], None],
    finished: Callable[[int], Layer | None],
    stored: Stored,
) -> Iterator[Layer]:
    text = Text(source, documents)
    x = text.embed()
    for index in range(source.spec.num_layers):
        known = finished(index)
        work = _Work(source, sparsity, tell, stored)
        if known is not None:
            work.weights |= known.weights
            work.reports += known.reports
        x = text.layer(index, x, work.linear)
        yield Layer(index=index, weights=work.weights, reports=tuple(work.reports))


class _Work:
    """One layer while its linears are met in the order of execution."""

    def __init__(
        self, source: Source, sparsity: Sparsity, tell: Callable[[str], None], stored: Stored
    ) -> None:
        self.weights: dict[str, np.ndarray] = {}
        self.reports: list[LinearReport] = []
        self._source, self._sparsity, self._tell, self._stored = source, sparsity, tell, stored

    def linear(self, name: str, inputs: Tensor) -> Tensor:
        self._tell(name)
        parts = source_names(self._source.spec, name)
        check_activations(name, inputs)
        if not all(part in self.weights for part in parts):
            statistics = Statistics.of(inputs, self._sparsity, name)
            for part in parts:
                weight = self._source.array(part)
                check_weight(part, weight)
                self.weights[part] = self._stored(prune_weight(weight, statistics, self._sparsity))
                self.reports.append(_report(part, weight, self.weights[part], inputs))
        return torch.cat([inputs @ as_tensor(self.weights[part]).T for part in parts], dim=1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Statistics:
    """What a method needs to know of a linear's inputs: mean squares float32 (K,), and for SparseGPT the
    factor of the second moments."""

    energy: np.ndarray
    factor: Factor | None = None

    @classmethod
    def of(cls, inputs: Tensor, sparsity: Sparsity, name: str) -> Statistics:
        """inputs: (T, K). Raises ConfigError naming the linear for second moments that no damping helps."""
        if sparsity.method != "sparsegpt":
            return cls(energy=inputs.square().mean(dim=0).numpy())
        return cls.of_moments((inputs.T @ inputs / len(inputs)).numpy(), sparsity, name)

    @classmethod
    def of_moments(cls, moments: np.ndarray, sparsity: Sparsity, name: str) -> Statistics:
        """moments: float32 (K, K), mean over tokens of x x^T."""
        energy = np.ascontiguousarray(np.diag(moments))
        if sparsity.method != "sparsegpt":
            return cls(energy=energy)
        try:
            return cls(energy=energy, factor=factorise(moments, order=False))
        except ConfigError as error:
            raise ConfigError(error.rule, f"{error.value} before {name}", error.remedy) from error


def prune_weight(weight: np.ndarray, statistics: Statistics, sparsity: Sparsity) -> np.ndarray:
    """float32 (N, K) with zeros by `sparsity` for inputs of these statistics."""
    if statistics.factor is not None:
        return sparsegpt(weight, statistics.factor, sparsity)
    is_wanda = sparsity.method == "wanda"
    kept = wanda(weight, statistics.energy, sparsity) if is_wanda else magnitude(weight, sparsity)
    return np.where(kept, weight, np.float32(0))


def _report(name: str, before: np.ndarray, after: np.ndarray, inputs: Tensor | None) -> LinearReport:
    """Raises EvidenceError where pruning left nothing, or nothing finite, of a weight that was not zero."""
    if before.any() and not (after.any() and np.isfinite(after).all()):
        raise EvidenceError(
            "a pruned weight must keep something", f"{name} is zero or not finite", "a lower sparsity"
        )
    error = 0.0
    if inputs is not None:
        some = inputs[:: max(1, len(inputs) // _MEASURED_TOKENS)]
        outputs = some @ as_tensor(before).T
        lost = some @ as_tensor(before - after).T
        error = float(lost.square().sum() / outputs.square().sum().clamp(min=1e-30))
    return LinearReport(name=name, zeros=float((after == 0).mean()), output_error=error)


def expected_names(spec: ModelSpec, layer: int) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of the linears of one layer."""
    shapes = weight_names(spec)
    names = [n for linear in spec.linears() for n in source_names(spec, f"layers.{layer}.{linear}")]
    return {name: shapes[name] for name in names}
