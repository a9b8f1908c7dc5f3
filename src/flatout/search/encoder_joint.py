"""A format for every linear of an encoder, found instead of listed.

    losses   1 - cosine of pieces of text with one linear in the quickest format and all others in the most
             careful one; what a kind of linear loses in the formats between says how its places do
    times    batches of the workload with one kind of linear in another format, in turns
    choice   search/solve.py: the quickest formats inside the budget, and those that lose least in a little
             more than their time

Errors of different linears are nearly independent, so squared distances of vectors add, and with them
1 - cosine: of minilm in w8a8 the parts come to 0.285 % where 0.304 % is measured (docs/log.md).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from flatout.compress.encoder_smooth import SMOOTHED
from flatout.compress.method import Progress
from flatout.core.encoder import EncoderFormats, EncoderModel, EncoderSpec
from flatout.core.formats import compact
from flatout.engine.encoder import Encoder
from flatout.search.solve import Choice, Solution, solve

SPACE = ("w8a8", "w8a8-g128", "w8a8-g64", "w8a8-g32")
"""The quickest first, which is smoothed, the most careful last."""

_BUDGET = 0.9  # of the margin: bounds lie above means
_SLOWER = (1.0, 1.02, 1.04, 1.07)
"""Times of the quickest recipe in which others may lose less: the task that an encoder has to keep follows no
formula, so several points of the trade-off are looked at."""
_ROUNDS = 60  # of timing
_PIECES = 288  # of text, at most, by which a mixture is judged

Key = TypeVar("Key", bound=Hashable)


class Mixtures:
    """An encoder in any mixture of formats, each weight of which is rounded once.

    uniform: the encoder in each format by its name. texts: pieces, with the original's vectors (n, D) of
    length 1. batch: int32 (B, T) token ids of the workload.
    """

    def __init__(
        self,
        uniform: Mapping[str, EncoderModel],
        make: Callable[[EncoderModel], Encoder],
        texts: Sequence[str],
        original: np.ndarray,
        batch: np.ndarray,
    ) -> None:
        self.spec: EncoderSpec = next(iter(uniform.values())).spec
        self._uniform, self._make = uniform, make
        every = -(-len(texts) // _PIECES)
        self._texts, self._original = texts[::every], original[::every].astype(np.float64)
        self._batch = batch

    def model(self, formats: EncoderFormats) -> EncoderModel:
        """The encoder in `formats`."""
        weights, factors = dict(self._uniform[formats.usual].weights), {}
        for i in range(self.spec.num_layers):
            for kind in self.spec.linears():
                name = f"layers.{i}.{kind}"
                own = self._uniform[formats.of(i, kind).name]
                weights[name] = own.weights[name]
                if name in own.factors:
                    factors[name] = own.factors[name]
        return EncoderModel(spec=self.spec, formats=formats, weights=weights, factors=factors)

    def distance(self, formats: EncoderFormats) -> float:
        """Mean 1 - cosine of some pieces' vectors, the most there is where they are no numbers."""
        vectors = self._make(self.model(formats)).encode(self._texts)
        found = float((1 - (self._original * vectors).sum(axis=1)).mean())
        return found if math.isfinite(found) else 2.0

    def timed(self, formats: EncoderFormats) -> Callable[[], float]:
        """What takes a batch of the workload and returns its seconds."""
        return batch_timer(self._make(self.model(formats)), self._batch)


def batch_timer(encoder: Encoder, batch: np.ndarray) -> Callable[[], float]:
    """What encodes `batch` (B, T) and returns the seconds."""
    tokens, starts = batch.reshape(-1), np.arange(len(batch)) * batch.shape[1]

    def run() -> float:
        begin = time.perf_counter()
        encoder.pooled(tokens, starts)
        return time.perf_counter() - begin

    return run


def timed_in_turns(
    runs: Mapping[Key, Callable[[], float]], rounds: int, step: Progress
) -> dict[Key, list[float]]:
    """Seconds of `rounds` calls of each, one after another, so that a busy moment meets all."""
    samples: dict[Key, list[float]] = {key: [] for key in runs}
    for i in range(rounds):
        step("times of formats", i, rounds)
        for key, run in runs.items():
            samples[key].append(run())
    return samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """Formats, the recipe that makes them (search/encoder_recipes.py), and what they are expected to lose
    (1 - cosine) and take (seconds a batch)."""

    formats: EncoderFormats
    recipe: str
    distance: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """places: the choices of every linear, each with what it adds to the most careful format's distance and
    its share of a batch's time. distance: of the most careful format."""

    places: tuple[tuple[Choice, ...], ...]
    distance: float

    def of(self, formats: EncoderFormats) -> tuple[float, float]:
        """(1 - cosine, seconds) that `formats` of the space are expected to have."""
        chosen = [next(c for c in own if c.format == formats.at(c.place).name) for own in self.places]
        return self.distance + sum(c.loss for c in chosen), sum(c.seconds for c in chosen)


def measure(bench: Mixtures, space: Sequence[str], step: Progress) -> Tables:
    """The losses and times of `space`, a part of SPACE with at least two formats."""
    spec, (quick, *_, careful) = bench.spec, space
    kinds = list(spec.linears())
    total = 1 + spec.num_layers * len(kinds) + len(kinds) * (len(space) - 2)
    done = 0

    def distance(*overrides: tuple[str, str]) -> float:
        nonlocal done
        step("sensitivity of " + (overrides[0][0] if overrides else "all"), done, total)
        done += 1
        return bench.distance(EncoderFormats(usual=careful, overrides=overrides))

    base = distance()
    losses = {
        (i, kind, quick): max(distance((f"layers.{i}.{kind}", quick)) - base, 0.0)
        for kind in kinds
        for i in range(spec.num_layers)
    }
    for kind in kinds:
        whole = sum(losses[i, kind, quick] for i in range(spec.num_layers))
        for name in space[1:-1]:
            part = max(distance((f"layers.*.{kind}", name)) - base, 0.0) / whole if whole else 0.0
            for i in range(spec.num_layers):
                losses[i, kind, name] = part * losses[i, kind, quick]
        losses |= {(i, kind, careful): 0.0 for i in range(spec.num_layers)}
    seconds = _seconds(bench, space, kinds, step)
    return Tables(
        places=tuple(
            tuple(
                Choice(
                    place=f"layers.{i}.{kind}",
                    format=name,
                    seconds=seconds[kind, name] / spec.num_layers,
                    loss=losses[i, kind, name],
                    bytes=0.0,
                )
                for name in space
            )
            for kind in kinds
            for i in range(spec.num_layers)
        ),
        distance=base,
    )


def _seconds(
    bench: Mixtures, space: Sequence[str], kinds: Sequence[str], step: Progress
) -> dict[tuple[str, str], float]:
    """(kind, format) -> seconds of a batch: a share of the quickest encoder's for every kind, and what the
    format adds to it."""
    quick = space[0]
    runs = {("", quick): bench.timed(EncoderFormats(usual=quick))} | {
        (kind, name): bench.timed(EncoderFormats(usual=quick, overrides=((f"layers.*.{kind}", name),)))
        for kind in kinds
        for name in space[1:]
    }
    samples = timed_in_turns(runs, _ROUNDS, step)
    # What disturbs a sample makes it longer, so the undisturbed ones are looked at.
    took = {key: statistics.quantiles(own, n=5)[0] for key, own in samples.items()}
    share = took["", quick] / len(kinds)
    found = {(kind, quick): share for kind in kinds}
    for kind, name in list(runs)[1:]:
        # A more careful format takes no less time than the quickest one: what is less is noise.
        found[kind, name] = share + max(took[kind, name] - took["", quick], 0.0)
    return found


def propose(tables: Tables, spec: EncoderSpec, margin: float) -> list[Proposal]:
    """Mixtures worth a look: the quickest inside `margin`, and what loses least in a little more than its
    time. None where the margin admits nothing, or a uniform format is as good."""
    quickest = solve(tables.places, _BUDGET * margin - tables.distance)
    if quickest is None:
        return []
    found: list[Proposal] = []
    for more in _SLOWER:
        solution = _least_loss(tables, more * quickest.seconds)
        if solution is None:
            continue
        formats = _formats(solution, spec)
        distance, seconds = tables.of(formats)
        better = all(distance < other.distance for other in found)
        if formats.overrides and better:
            recipe = _recipe(formats, spec)
            found.append(Proposal(formats=formats, recipe=recipe, distance=distance, seconds=seconds))
    return found


def _least_loss(tables: Tables, seconds: float) -> Solution | None:
    """The formats that lose least within `seconds`: the problem of search/solve.py with the two exchanged."""
    exchanged = [[replace(c, seconds=c.loss, loss=c.seconds) for c in own] for own in tables.places]
    return solve(exchanged, seconds * (1 + 1e-9))


def _formats(solution: Solution, spec: EncoderSpec) -> EncoderFormats:
    chosen = solution.formats()
    usual, overrides = compact(
        {kind: [chosen[f"layers.{i}.{kind}"] for i in range(spec.num_layers)] for kind in spec.linears()}
    )
    return EncoderFormats(usual=usual, overrides=overrides)


def _recipe(formats: EncoderFormats, spec: EncoderSpec) -> str:
    usual, *overrides = formats.name.split(",")
    smoothed = any(formats.of(i, kind).scales_tokens for kind in SMOOTHED for i in range(spec.num_layers))
    return ",".join((f"{usual}/smooth" if smoothed else usual, *overrides))
