"""Recipes that are found instead of listed: a format for every linear of every layer, the head and the cache.

    times       a latency table of this machine (perf/tables.py), corrected by whole steps of real candidates
    losses      sensitivities of this model (search/expected.py), scaled by what real candidates lose
    choice      the fastest recipe inside the budget (search/solve.py), and the whole trade-off

A proposal is built and compared with the original's predictions; one that diverges by more than the budget
makes room for another before it costs more. What is left is timed and scored like any other candidate. What
it really takes and loses corrects both (search/scale.py), and the choice is made again, until the best
proposal is one that was measured.

Validation text is small, so one candidate's loss moves the scale only as far as its own error allows. What a
recipe loses on some text also differs from its divergence (`_SPREAD`), since the text was not drawn from the
model; listed recipes are made by other methods, which miss their expectations by more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from flatout.core.costs import kv_bytes_per_token
from flatout.core.formats import Recipe, compact, parse_format, with_short_scales
from flatout.core.fuse import Source, native_format
from flatout.core.spec import ModelSpec
from flatout.core.types import Hardware, Workload
from flatout.perf.predict import Calibration, marginal_seconds
from flatout.search.context import Losses
from flatout.search.scale import Observation, by_width, loss_scale, width_of
from flatout.search.solve import Choice, Conflict, Solution, frontier, solve

_METHOD = "smooth-gptq"
_SPREAD = {"divergence": 0.08, "loss": 0.15, "listed": 0.25}
"""Of a candidate's expected loss, besides the scale and the error of measuring: standard deviation of its
divergence, of its loss, and of the loss of a recipe made by another method."""

_CARE = 0.5
"""Standard deviations of its expected loss by which a proposal stays inside the budget: one on the edge of it
would fail half of its certificates, and the last tenth of a budget buys a per cent or two of time."""

_TIGHTER = 5  # solutions, each with the budget that the doubt of the one before leaves
_NEAR = 1.01  # of the budget is inside

_LAYERS = ("w8a8", "w8a16", "w6a8", "w6a16", "w5a8", "w5a16", "w4a8-g32")
_GROUPED = ("w8a8-g64", "w6a8-g64", "w5a8-g64", "w4a8-g64")
"""Where a file has blocks of its own, these are longer than they and lose more."""

_HEADS = ("w8a16", "w8a8-g64", "w8a8-g32")
_CACHES = ("int8", "bf16")
_FED_BY = {"o": "qkv", "down": "gate_up"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The formats that each kind of linear, the head and the cache may take."""

    spec: ModelSpec
    linears: Mapping[str, tuple[str, ...]]
    heads: tuple[str, ...]
    caches: tuple[str, ...]

    @property
    def rotated(self) -> bool:
        """Whether the model is turned before its recipes are made: where it has no blocks of its own to
        lose. Without outliers 6 bits in groups lose half of what they did (docs/log.md)."""
        names = {*self.heads, *(name for formats in self.linears.values() for name in formats)}
        return not any(parse_format(name).is_native for name in names)

    @property
    def method(self) -> str:
        """How its recipes are made."""
        return f"rotate-{_METHOD}" if self.rotated else _METHOD

    def choices(self) -> dict[str, tuple[str, ...]]:
        """Place -> formats."""
        layers = {
            f"layers.{i}.{linear}": formats
            for i in range(self.spec.num_layers)
            for linear, formats in self.linears.items()
        }
        return {**layers, "head": self.heads, "kv_cache": self.caches}


def space_of(source: Source) -> Space:
    """What fits the model: groups that divide the widths, and the file's own blocks where all layers have
    them."""
    spec = source.spec

    def fits(name: str, width: int) -> bool:
        group = parse_format(name).group
        return not group or width % group == 0

    linears = {}
    for linear, (_, width) in spec.linears().items():
        stored = {native_format(source, f"layers.{i}.{linear}") for i in range(spec.num_layers)}
        own = stored.pop() if len(stored) == 1 else None
        own = with_short_scales(own) if own else None  # the same loss, as far as can be told, in less time
        linears[linear] = tuple(f for f in (*_LAYERS, *([own] if own else _GROUPED)) if fits(f, width))
    own = native_format(source, "head") if native_format(source, "embedding") == "q8_0" else None
    heads = (own,) if own == "q8_0" else tuple(f for f in _HEADS if fits(f, spec.hidden_size))
    return Space(spec=spec, linears=linears, heads=heads, caches=_CACHES)


def stand_ins(space: Space) -> list[Recipe]:
    """Recipes that together time every format of the space, each op in as few of them as possible."""
    formats = list(dict.fromkeys(name for names in space.linears.values() for name in names))
    found = []
    for i in range(max(len(formats), len(space.heads), len(space.caches))):
        layers, head = formats[i % len(formats)], space.heads[i % len(space.heads)]
        cache = space.caches[1] if i == len(formats) - 1 and len(space.caches) > 1 else space.caches[0]
        name = f"stand-in {layers} {head} {cache}"
        found.append(Recipe(name=name, layers=layers, head=head, embedding=head, kv_cache=cache))
    return found


def recipe_of(formats: Mapping[str, str], spec: ModelSpec, name: str, method: str) -> Recipe:
    """The recipe by `method` that gives each place its format."""
    kinds = {kind: [formats[f"layers.{i}.{kind}"] for i in range(spec.num_layers)] for kind in spec.linears()}
    layers, overrides = compact(kinds)
    return Recipe(
        name=name,
        layers=layers,
        head=formats["head"],
        embedding=formats["head"],
        kv_cache=formats["kv_cache"],
        method=method,
        overrides=overrides,
    )


def formats_of(recipe: Recipe, spec: ModelSpec) -> dict[str, str]:
    """Place -> format of any recipe."""
    layers = {
        f"layers.{i}.{kind}": recipe.format_of(i, kind).name
        for i in range(spec.num_layers)
        for kind in spec.linears()
    }
    return {**layers, "head": recipe.head, "kv_cache": recipe.kv_cache}


def conflicts(space: Space) -> list[Conflict]:
    """A linear cannot be smoothed where its factors would go into blocks that are taken as the file has
    them."""
    found: list[Conflict] = []
    for linear, before in _FED_BY.items():
        own = [name for name in space.linears[before] if parse_format(name).is_native]
        smoothed = [name for name in space.linears[linear] if parse_format(name).scales_tokens]
        found += [
            ((f"layers.{i}.{linear}", s), (f"layers.{i}.{before}", name))
            for i in range(space.spec.num_layers)
            for s in smoothed
            for name in own
        ]
    return found


def place_bytes(spec: ModelSpec, workload: Workload, place: str, name: str) -> float:
    """Resident bytes of a choice; the head's embedding included."""
    if place == "kv_cache":
        tokens = workload.batch * (workload.prompt + workload.output)
        return tokens * spec.num_layers * kv_bytes_per_token(spec, name)
    if place == "head":
        return 2.0 * parse_format(name).weight_bytes(spec.vocab_size, spec.hidden_size)
    return float(parse_format(name).weight_bytes(*spec.linears()[place.rpartition(".")[2]]))


class Joint:
    """The choice of one search. losses, nearest: expected nats a token of every choice of the space, under
    its method and rounded to nearest."""

    def __init__(
        self,
        space: Space,
        losses: Losses,
        nearest: Losses,
        hardware: Hardware,
        workload: Workload,
        threads: int,
        memory_bytes: float = math.inf,
    ) -> None:
        self.space, self.losses, self._nearest = space, losses, nearest
        self._hardware, self._workload, self._threads = hardware, workload, threads
        self._memory_bytes = memory_bytes
        self._seen: list[Observation] = []
        self.proposed = 0

    def expected(self, recipe: Recipe) -> tuple[float, ...] | None:
        """Expected loss of a recipe by width, unscaled; None for one that this space does not know: of other
        formats, or not turned like its own."""
        formats = formats_of(recipe, self.space.spec)
        smoothed = any(parse_format(f).scales_tokens for p, f in formats.items() if p.startswith("layers."))
        if recipe.rotates != self.space.rotated:
            return None
        method = recipe.method.removeprefix("rotate").removeprefix("-")
        losses = self.losses if method in ("gptq", _METHOD) else self._nearest
        if (smoothed and method not in ("smooth", _METHOD)) or not formats.items() <= losses.keys():
            return None
        return by_width({choice: losses[choice] for choice in formats.items()})

    def observe(self, recipe: Recipe, measured: float, error: float | None = None) -> None:
        """Let what a recipe loses, with its standard error, correct what is expected; nats a token. Without
        an error it is a divergence from the original's predictions, which is known well."""
        expected = self.expected(recipe)
        if expected is None:
            return
        kind = ("divergence" if error is None else "loss") if recipe.by_library else "listed"
        doubt = math.hypot(error or 0.0, _SPREAD[kind] * sum(expected))
        self._seen.append(Observation(expected=expected, measured=measured, error=doubt))

    def interval(self, recipe: Recipe) -> tuple[float, float, float] | None:
        """90 % interval and middle of what a recipe loses, nats a token; None for one that this space does
        not know."""
        expected = self.expected(recipe)
        if expected is None:
            return None
        mean, deviation = loss_scale(self._seen).of(expected)
        low, mid, high = (max(mean + z * deviation, 0.0) for z in (-1.645, 0.0, 1.645))
        return low, mid, high

    def _places(self, calibration: Calibration | None, reference: Recipe) -> list[list[Choice]]:
        spec, scale = self.space.spec, loss_scale(self._seen).mean
        kinds = {**self.space.linears, "head": self.space.heads, "kv_cache": self.space.caches}
        seconds = {
            (kind, name): marginal_seconds(
                spec,
                reference,
                "attention" if kind == "kv_cache" else kind,
                name,
                self._hardware,
                self._workload,
                calibration or Calibration(fractions={}, interactions={}),
                self._threads,
            )
            for kind, names in kinds.items()
            for name in names
        }
        return [
            [
                Choice(
                    place=place,
                    format=name,
                    seconds=seconds[place.rpartition(".")[2], name],
                    loss=float(scale[width_of(place, name)]) * self.losses[place, name],
                    bytes=place_bytes(spec, self._workload, place, name),
                )
                for name in names
            ]
            for place, names in self.space.choices().items()
        ]

    def trade_off(self, calibration: Calibration | None, reference: Recipe) -> list[Solution]:
        """The predicted frontier, least loss first."""
        objective = "bytes" if self._workload.objective == "memory" else "seconds"
        places = self._places(calibration, reference)
        limits = {"memory_bytes": self._memory_bytes, "conflicts": conflicts(self.space)}
        return frontier(places, objective=objective, **limits)  # type: ignore[arg-type]

    def propose(self, budget: float, calibration: Calibration | None, reference: Recipe) -> Recipe | None:
        """The best recipe whose expected loss, scaled, is within `budget` nats a token with some certainty;
        None if there is none."""
        objective = "bytes" if self._workload.objective == "memory" else "seconds"
        places = self._places(calibration, reference)
        limits = {"memory_bytes": self._memory_bytes, "conflicts": conflicts(self.space)}
        scale, careful = loss_scale(self._seen), budget
        for _ in range(_TIGHTER):
            found = solve(places, careful, objective=objective, **limits)  # type: ignore[arg-type]
            if found is None:
                return None
            chosen = found.formats()
            mean, deviation = scale.of(by_width({c: self.losses[c] for c in chosen.items()}))
            at_most = mean + _CARE * math.hypot(deviation, _SPREAD["divergence"] * mean)
            if at_most <= _NEAR * budget:
                break
            careful = min(careful, mean) * budget / at_most
        self.proposed += 1
        return recipe_of(chosen, self.space.spec, f"joint-{self.proposed}", self.space.method)
