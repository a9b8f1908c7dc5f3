"""Latency tables: what each op takes in each format on this machine, before any candidate is built.

A stand-in for the model is loaded for every format: random weights in the model's own shapes, packed and run
by the engine that will serve. Its step is timed op by op (perf/profile.py) with the workload's batch, chunks
and contexts. Weights are cold: the stand-in has as many layers as it takes to stream `TARGET` of what the
model streams in 8 bits, and every step goes through all of them, so whatever a larger model would have lost
from the caches is lost here too.

What is stored is seconds a layer beside its floor. A format that was not measured takes the median fraction
of floor of ops with the same arithmetic (`perf.predict`), and how far that rule is off is known from the
formats that were: each is predicted from the others, and the 90 % split-conformal quantile of those residuals
is the width of the interval (Romano et al. 2019).

Files: tables-<fingerprint>-<key>.json in the cache folder, one for each machine, model shape, workload,
thread count and build of the engine; kept for a boot and a day. residuals-<fingerprint>.json collects
log(measured / predicted) of whole candidates.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from flatout.core.costs import step_costs, total
from flatout.core.files import sha256_of, write_bytes
from flatout.core.formats import Format, Recipe
from flatout.core.model import Model, Weight, expected_weights
from flatout.core.quantized import QuantizedTensor
from flatout.core.sources import cache_dir
from flatout.core.spec import ModelSpec
from flatout.core.types import Hardware, Workload, to_json
from flatout.engine.cpu import CpuRunner, extension
from flatout.hardware import kept
from flatout.perf.predict import Calibration, calibrate, transfer_residuals
from flatout.perf.profile import Profile, profile_model

Progress = Callable[[str, int, int], None]

_VERSION = 3
_MAX_AGE_S = 86400.0
_SECONDS = 0.4  # a stand-in is timed for about this long, in each round
_ROUNDS = 2
"""Times all formats are gone through. A shared machine's bandwidth moves by a quarter within minutes; formats
timed once, one after the other, would differ by that, and the solver would choose the luckiest."""
_STEPS = 16  # decode steps of a timing, from the middle of the output
_MOST_RESIDUALS = 400
_PAGE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One op in one format: seconds a layer (of the whole step for the head), and its fraction of floor."""

    phase: str
    op: str
    format: str
    arithmetic: str
    seconds: float
    fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Entries of one model shape and workload, and phase -> whole step over the sum of its ops."""

    entries: tuple[Entry, ...]
    interactions: dict[str, float]

    def calibration(self) -> Calibration:
        """The table as predictions use it."""
        fractions = {(e.phase, e.op, e.format, e.arithmetic): e.fraction for e in self.entries}
        return Calibration(
            fractions=fractions, interactions=self.interactions, transfer=transfer_residuals(fractions)
        )


def latency_table(
    spec: ModelSpec,
    recipes: Sequence[Recipe],
    workload: Workload,
    hardware: Hardware,
    threads: int,
    *,
    progress: Progress | None = None,
    fresh: bool = False,
    directory: Path | None = None,
    measure: Callable[[ModelSpec, Recipe, Workload, Hardware, int], Profile] | None = None,
) -> Table:
    """Every op of `recipes`, which differ in the formats of layers, head and cache: read from the cache file,
    or measured in about three seconds a recipe.

    measure: takes the place of `profile_stand_in` in tests and where foreign load must be waited out.
    """
    folder = directory or cache_dir()
    path = folder / f"tables-{hardware.fingerprint}-{_key(spec, recipes, workload, threads)}.json"
    if not fresh and (found := _load(path)) is not None:
        return found
    profiles = []
    for done, recipe in enumerate([*recipes] * _ROUNDS):
        if progress is not None:
            progress(f"timing {recipe.layers}", done, _ROUNDS * len(recipes))
        profiles.append((measure or profile_stand_in)(spec, recipe, workload, hardware, threads))
    table = table_of(profiles)
    _store(path, table)
    return table


def table_of(profiles: Iterable[Profile]) -> Table:
    """The table that stand-ins' profiles make: of each op in a format the best one, for what disturbs a
    measurement adds to it."""
    profiles = list(profiles)
    seconds: dict[tuple[str, str, str, str], float] = {}
    best: dict[tuple[str, str, str, str], float] = {}
    for profile in profiles:
        times = {(o.phase, o.op): o.seconds for o in profile.ops}
        fraction = {(o.phase, o.op): o.fraction for o in profile.ops}
        for phase in profile.phases:
            for part in phase.parts:
                layers = 1 if part.op in ("head", "embedding") else profile.spec.num_layers
                key = (phase.phase, part.op, part.format, part.arithmetic)
                spent = times.get((phase.phase, part.op), 0.0) / layers
                seconds[key] = min(seconds.get(key, math.inf), spent)
                if fraction.get((phase.phase, part.op)):
                    best[key] = max(best.get(key, 0.0), fraction[phase.phase, part.op] or 0.0)
    return Table(
        entries=tuple(
            Entry(phase=p, op=op, format=f, arithmetic=a, seconds=seconds[p, op, f, a], fraction=value)
            for (p, op, f, a), value in best.items()
        ),
        interactions=calibrate(profiles).interactions,
    )


def profile_stand_in(
    spec: ModelSpec, recipe: Recipe, workload: Workload, hardware: Hardware, threads: int
) -> Profile:
    """A stand-in's profile. Raises the errors of CpuRunner for a format that no kernel takes."""
    stand_in = replace(spec, num_layers=stand_in_layers(spec, recipe))
    runner = random_runner(stand_in, replace(recipe, overrides=()), workload, threads)
    return profile_model(
        runner,
        recipe,
        hardware,
        workload,
        threads=threads,
        max_seconds=_SECONDS,
        steps=_STEPS,
        min_repeats=1,  # in every round
        shares=True,
    )


def random_runner(spec: ModelSpec, recipe: Recipe, workload: Workload, threads: int) -> CpuRunner:
    """Random weights of `recipe` with room for the workload."""
    pages = workload.batch * (-(-(workload.prompt + workload.output) // _PAGE)) + 1
    return CpuRunner(random_model(spec, recipe), threads=threads, num_pages=pages)


def stand_in_layers(spec: ModelSpec, recipe: Recipe) -> int:
    """Layers that stream as many bytes in a decode step as the model does in 8 bits, 2 to 4 times its own."""

    def streamed(layers: int, recipe: Recipe) -> float:
        costs = step_costs(replace(spec, num_layers=layers), recipe, batch=1, tokens=1, context=0)
        return total(costs).bytes

    target = streamed(spec.num_layers, Recipe(name="8 bits", layers="w8a8", head="w8a8", kv_cache="int8"))
    one = streamed(1, recipe)
    layer = streamed(2, recipe) - one
    return min(max(2, round(1 + (target - one) / layer)), 4 * spec.num_layers)


def random_model(spec: ModelSpec, recipe: Recipe) -> Model:
    """A Model of random weights of about the size that keeps activations near 1. Layers share their arrays;
    runners copy them."""
    recipe = replace(recipe, method="native")
    rng = np.random.default_rng(0)
    made: dict[tuple[str, tuple[int, ...]], Weight] = {}
    weights: dict[str, Weight] = {}
    for name, shape, fmt in expected_weights(spec, recipe):
        key = (fmt.name, shape)
        if key not in made:
            made[key] = _random(rng, shape, fmt) if len(shape) == 2 else np.ones(shape, np.float32)
        weights[name] = made[key]
    return Model(spec=spec, recipe=recipe, weights=weights)


def _random(rng: np.random.Generator, shape: tuple[int, ...], fmt: Format) -> Weight:
    n, k = shape
    if not fmt.is_integer:
        return rng.standard_normal(shape, dtype=np.float32) / np.float32(math.sqrt(k))
    levels = 1 << fmt.bits
    codes = np.frombuffer(rng.bytes(n * k), np.uint8).reshape(shape) & np.uint8(levels - 1)
    if fmt.bits == 8 and fmt.zero == "symmetric":
        codes = np.maximum(codes.view(np.int8), -127)
    groups = (n, fmt.groups(k))
    # A power of two, which scales of 8 bits can be as well.
    scales = np.full(groups, 2.0 ** round(math.log2(4 / (levels * math.sqrt(k)))), np.float16)
    return QuantizedTensor(
        format=fmt,
        codes=codes,
        scales=scales,
        zeros=np.full(groups, levels // 2, np.uint8) if fmt.zero == "asymmetric" else None,
        minima=-scales * np.float16(levels // 2) if fmt.zero == "minimum" else None,
    )


def _key(spec: ModelSpec, recipes: Sequence[Recipe], workload: Workload, threads: int) -> str:
    inputs = {
        "spec": to_json(spec),
        "recipes": [(r.layers, r.head, r.embedding, r.kv_cache) for r in recipes],
        "workload": to_json(workload),
        "threads": threads,
        "engine": sha256_of([Path(str(extension().__file__))]),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def _store(path: Path, table: Table) -> None:
    entries = [asdict(entry) for entry in table.entries]
    kept.store(path, _VERSION, {"interactions": table.interactions, "entries": entries})


def _load(path: Path) -> Table | None:
    """The table on file; None (so measure again) if there is none that holds."""
    record = kept.read(path, _VERSION, _MAX_AGE_S)
    if record is None:
        return None
    try:
        entries = tuple(Entry(**fields) for fields in record["entries"])
        interactions = {str(k): float(v) for k, v in record["interactions"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return Table(entries=entries, interactions=interactions)


def residuals(hardware: Hardware, directory: Path | None = None) -> list[float]:
    """log(measured / predicted) of earlier candidates here, oldest first; none when unreadable."""
    try:
        found = json.loads(_residual_path(hardware, directory).read_text(encoding="utf-8"))
        return [float(value) for value in found if math.isfinite(float(value))]
    except (OSError, ValueError, TypeError):
        return []


def add_residuals(hardware: Hardware, new: Sequence[float], directory: Path | None = None) -> None:
    """Append to the file, which keeps the latest."""
    path = _residual_path(hardware, directory)
    path.parent.mkdir(parents=True, exist_ok=True)
    latest = [*residuals(hardware, directory), *new][-_MOST_RESIDUALS:]
    write_bytes(path, json.dumps(latest, indent=1).encode())


def _residual_path(hardware: Hardware, directory: Path | None) -> Path:
    return (directory or cache_dir()) / f"residuals-{hardware.fingerprint}.json"
