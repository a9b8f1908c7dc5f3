"""CpuBench: a checkpoint on this machine's cpu runner, beside the original in float32 and transformers.

Building a candidate compresses the checkpoint and loads the result. The last few stay loaded, because races
and scoring go back and forth between them; the original in float32 and the baseline are loaded when they are
needed and dropped when they are not.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np

import flatout
from flatout.compress.apply import compress
from flatout.core.artifact import save_artifact
from flatout.core.checkpoint import Checkpoint, open_checkpoint
from flatout.core.costs import moment_bytes
from flatout.core.files import sha256_of
from flatout.core.formats import Recipe
from flatout.core.fuse import float_recipe
from flatout.core.model import Model
from flatout.core.scratch import scratch_folder
from flatout.core.sources import cache_dir
from flatout.core.spec import ModelSpec
from flatout.core.tokenizer import Tokenizer
from flatout.core.types import Hardware, Workload
from flatout.engine.cpu import CpuRunner, extension
from flatout.engine.runner import Runner
from flatout.errors import BackendError, EvidenceError
from flatout.hardware.ceilings import measure_ceilings
from flatout.hardware.detect import available_cores, give_back_memory
from flatout.hardware.energy import EnergyMeter, open_meter
from flatout.perf.profile import Profile, profile_model
from flatout.perf.tables import Table, latency_table, profile_stand_in
from flatout.perf.timing import MIN_REPEATS
from flatout.search.context import Losses, Step
from flatout.search.deliver import SCRATCH, deliver
from flatout.search.preflight import MOST_MOMENTS
from flatout.search.recipes import ORIGINAL
from flatout.search.rehearsal import rehearse
from flatout.verify.baseline import TransformersBaseline
from flatout.verify.drivers import Driver, RunnerDriver
from flatout.verify.foreign_load import until_quiet
from flatout.verify.quality import (
    BLOCK,
    Cluster,
    Divergence,
    check_scores,
    divergence,
    refuse_different,
    score_model,
)
from flatout.verify.race import DECODE_SHARE, race_energy, race_workload, turns_workload
from flatout.verify.speed import SpeedResult

if TYPE_CHECKING:
    from flatout.compress.library import Library

_PAGE = 64
_PROFILE_STEPS = 16  # decode steps of a profile, from the middle of the output
_KEPT = 3  # built recipes that stay loaded
_CALIBRATION = 24  # passages that calibrate, about 11,000 tokens
_LIBRARY = 10  # passages that calibrate mixed recipes, about 4,500 tokens
_WITNESSES = 1  # passages on which the engine's float32 is compared with the reference


@dataclass(frozen=True, slots=True, eq=False)
class _Built:
    """A loaded candidate. model is None for the original, whose weights are quicker to make again than to
    keep."""

    runner: CpuRunner
    model: Model | None


class CpuBench:
    """See `context.Bench` for what each method promises."""

    def __init__(self, model: str, threads: int | None, workload: Workload) -> None:
        if find_spec("transformers") is None:  # found out now, not after minutes of work
            raise BackendError(
                "the comparison with transformers needs transformers",
                "not installed",
                "pip install 'flatout[baselines]'",
            )
        self._checkpoint: Checkpoint = open_checkpoint(model)
        self._threads = threads or available_cores()
        longest = -(-(workload.prompt + workload.output) // _PAGE)
        self._pages = max(workload.batch * longest, 2 * (BLOCK // _PAGE)) + 1
        self._built: dict[Recipe, _Built] = {}
        self._sound: WeakSet[Runner] = WeakSet()
        self._library: Library | None = None
        self._exact: Runner | None = None  # the original in float32
        self._compared = False  # with the reference
        self._baseline: TransformersBaseline | None = None
        self._meter: EnergyMeter | None = None

    @property
    def name(self) -> str:
        return self._checkpoint.name

    @property
    def path(self) -> str:
        return str(self._checkpoint.path)

    @property
    def source(self) -> Checkpoint:
        return self._checkpoint

    @property
    def tokenizer(self) -> Tokenizer:
        return self._checkpoint.tokenizer

    @property
    def sha256(self) -> str:
        return self._checkpoint.sha256

    @property
    def tokenizer_sha256(self) -> str:
        return self._checkpoint.tokenizer.sha256

    @property
    def threads(self) -> int:
        return self._threads

    @cached_property
    def code(self) -> str:
        """Every source file that a score depends on, the compiled kernels and the instruction set they
        choose."""
        cpu = extension()
        folder = Path(flatout.__file__).parent
        rooms = ("core", "kernels", "models", "engine", "compress", "verify")
        files = sorted(path for room in rooms for path in (folder / room).rglob("*.py"))
        kernels = Path(str(cpu.__file__))
        digest = hashlib.sha256(f"{flatout.__version__} {cpu.isas()[0]}".encode())
        digest.update(sha256_of([*files, kernels]).encode())
        return digest.hexdigest()

    @property
    def versions(self) -> Mapping[str, str]:
        found = {"python": platform.python_version()}
        for package in ("numpy", "torch", "transformers", "compressed-tensors"):
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        return found

    def hardware(self, step: Step) -> Hardware:
        return measure_ceilings(step)

    def score_original(self, clusters: Sequence[Cluster], step: Step) -> list[np.ndarray]:
        return self._score(self._original(clusters), "scoring the original", clusters, step)

    def _score(self, runner: Runner, what: str, clusters: Sequence[Cluster], step: Step) -> list[np.ndarray]:
        """Scores of any runner, whose logits are checked the first time it is used."""
        scores = score_model(
            runner, clusters, lambda done, total: step(what, done, total), sound=runner in self._sound
        )
        self._sound.add(runner)
        return scores

    def _original(self, clusters: Sequence[Cluster]) -> Runner:
        """The checkpoint in float32 on the engine, which scores twice as fast as the reference and must agree
        with it, once, on the first of these clusters."""
        if self._exact is None:
            exact = self._serve(compress(self._checkpoint, float_recipe("fp32", "fp32")))
            if not self._compared:
                self._compare(exact, clusters[:_WITNESSES])
                self._compared = True
            give_back_memory()
            self._sound.add(exact)
            self._exact = exact
        return self._exact

    def _compare(self, exact: Runner, witnesses: Sequence[Cluster]) -> None:
        """Raise EvidenceError unless `exact` scores these as the reference does and the text means something
        to the model, and ConfigError that names the linear where its own activations are not finite."""
        from flatout.compress.inputs import linear_inputs, refuse_nonsense  # loads PyTorch
        from flatout.engine.reference import ReferenceRunner

        reference = ReferenceRunner(self._checkpoint, self._pages, _PAGE)
        try:
            scores = score_model(reference, witnesses)
            refuse_different(scores, score_model(exact, witnesses))
        except EvidenceError:
            tokens = np.asarray(witnesses[0].tokens, dtype=np.int64)
            linear_inputs(self._checkpoint, [tokens], lambda *_: None)
            raise
        refuse_nonsense(-float(np.concatenate(scores).mean()), self._checkpoint.spec.vocab_size)

    def _serve(self, model: Model) -> CpuRunner:
        return CpuRunner(model, threads=self._threads, num_pages=self._pages)

    def _transformers(self) -> TransformersBaseline:
        if self._baseline is None:
            self._exact = self._library = None  # the baseline takes their place in memory
            self._baseline = TransformersBaseline(self._checkpoint, self._threads)
        return self._baseline

    def score_baseline(self, clusters: Sequence[Cluster], step: Step) -> list[np.ndarray]:
        scores = []
        for done, cluster in enumerate(clusters):
            step("scoring transformers", done, len(clusters))
            scores.append(np.array(self._transformers().score(cluster.tokens), dtype=np.float32))
        check_scores(clusters, scores)
        return scores

    def build(self, recipe: Recipe, calibration: Sequence[Cluster], step: Step) -> None:
        if recipe in self._built:
            self._built[recipe] = self._built.pop(recipe)  # most recently used last
            return
        while len(self._built) >= _KEPT:
            oldest = next(r for r in self._built if r != ORIGINAL)
            del self._built[oldest]

        def progress(what: str, done: int, of: int) -> None:
            step(f"{recipe.name}: {what}", done, of)

        if recipe.by_library and not recipe.reduces:
            model = self._calibrated(recipe.rotates, calibration, progress).model(recipe, progress)
        else:
            used = calibration[:_CALIBRATION] if recipe.needs_calibration else ()
            keep = cache_dir() / "compress" / self.sha256[:32]
            model = compress(self._checkpoint, recipe, [cluster.tokens for cluster in used], progress, keep)
        self._built[recipe] = _Built(self._serve(model), None if recipe == ORIGINAL else model)
        del model
        give_back_memory()

    def _calibrated(self, rotated: bool, calibration: Sequence[Cluster], step: Step) -> Library:
        """What mixed recipes are made from, calibrated once as long as all of them are turned or none is."""
        from flatout.compress.library import Library  # loads PyTorch

        if self._library is None or self._library.rotated != rotated:
            used = [cluster.tokens for cluster in calibration[:_LIBRARY]]
            self._library = Library(self._checkpoint, used, step, rotated)
        return self._library

    def table(self, recipes: Sequence[Recipe], hardware: Hardware, workload: Workload, step: Step) -> Table:
        def quiet(
            spec: ModelSpec, recipe: Recipe, workload: Workload, hardware: Hardware, threads: int
        ) -> Profile:
            profiles = until_quiet(lambda: profile_stand_in(spec, recipe, workload, hardware, threads))
            return min(profiles, key=lambda profile: workload.seconds(*profile.seconds))

        return latency_table(
            self.source.spec, recipes, workload, hardware, self._threads, progress=step, measure=quiet
        )

    def expected_losses(
        self,
        choices: Mapping[str, Sequence[str]],
        calibration: Sequence[Cluster],
        step: Step,
        rotated: bool = False,
    ) -> tuple[Losses, Losses] | None:
        from flatout.search.expected import expected_losses  # loads PyTorch

        if moment_bytes(self.source.spec) > MOST_MOMENTS:
            return None
        self._exact = None  # sensitivities hold the same weights; it is made again in seconds
        library = self._calibrated(rotated, calibration, step)
        give_back_memory()
        rest = [cluster.tokens for cluster in calibration[_LIBRARY:]]
        found = expected_losses(library, rest, choices, step)
        give_back_memory()
        return found

    def _runner(self, recipe: Recipe) -> CpuRunner:
        return self._built[recipe].runner

    def _model(self, recipe: Recipe) -> Model:
        return self._built[recipe].model or compress(self._checkpoint, recipe)

    def score(self, recipe: Recipe, clusters: Sequence[Cluster], step: Step) -> list[np.ndarray]:
        return self._score(self._runner(recipe), "scoring", clusters, step)

    def divergence(self, recipe: Recipe, clusters: Sequence[Cluster]) -> Divergence:
        return divergence(self._original(clusters), self._runner(recipe), clusters)

    def profile(self, recipe: Recipe, hardware: Hardware, workload: Workload, max_seconds: float) -> Profile:
        def measure() -> Profile:
            return profile_model(
                self._runner(recipe),
                recipe,
                hardware,
                workload,
                threads=self._threads,
                max_seconds=max_seconds,
                steps=_PROFILE_STEPS,
                min_repeats=MIN_REPEATS if recipe == ORIGINAL else 1,
                shares=recipe != ORIGINAL,
            )

        if recipe != ORIGINAL:
            return measure()  # once, for the shares of ops: how long it takes is found in turns
        # All times are measured in units of this one, and what disturbs a measurement adds to it.
        return min(until_quiet(measure), key=lambda profile: workload.seconds(*profile.seconds))

    def race(
        self,
        first: Recipe | None,
        second: Recipe,
        workload: Workload,
        max_seconds: float,
        min_pairs: int,
        step: Step,
    ) -> dict[str, SpeedResult]:
        return race_workload(
            self._driver(first),
            self._driver(second),
            self.tokenizer,
            workload,
            prefill_s=(1 - DECODE_SHARE) * max_seconds,
            decode_s=DECODE_SHARE * max_seconds,
            min_pairs=min_pairs,
            progress=lambda phase, done, total: step(f"{phase}: {done} clean pairs", min(done, total), total),
        )

    def turns(
        self, first: Recipe, second: Recipe, workload: Workload, max_seconds: float
    ) -> dict[str, float]:
        return turns_workload(
            self._driver(first), self._driver(second), self.tokenizer, workload, max_seconds=max_seconds
        )

    def open_meter(self) -> None:
        busy = np.ones((256, 256), dtype=np.float32)
        self._meter = open_meter("cpu", lambda: busy @ busy)

    def race_energy(
        self,
        first: Recipe | None,
        second: Recipe,
        workload: Workload,
        max_seconds: float,
        min_pairs: int,
        step: Step,
    ) -> SpeedResult:
        if self._meter is None:
            self.open_meter()
        assert self._meter is not None
        return race_energy(
            self._driver(first),
            self._driver(second),
            self.tokenizer,
            workload,
            self._meter,
            max_seconds=max_seconds,
            min_pairs=min_pairs,
            progress=lambda done, total: step(f"energy: {done} clean pairs", min(done, total), total),
        )

    def _driver(self, recipe: Recipe | None) -> Driver:
        return self._transformers() if recipe is None else RunnerDriver(self._runner(recipe))

    def rehearse(self, recipe: Recipe, near: Path) -> None:
        near.mkdir(parents=True, exist_ok=True)
        with scratch_folder(near, SCRATCH) as folder:
            rehearse(self._checkpoint, recipe, self.tokenizer, self._threads, folder)

    def runner_name(self, recipe: Recipe | None) -> str:
        return self._transformers().name if recipe is None else self._runner(recipe).name

    def weights_sha256(self, recipe: Recipe, near: Path) -> str:
        near.mkdir(parents=True, exist_ok=True)
        with scratch_folder(near, SCRATCH) as folder:
            out = save_artifact(self._model(recipe), self.tokenizer, folder / "candidate", {})
            return sha256_of([out / "model.safetensors"])

    def save(self, recipe: Recipe, out: Path, manifest: Mapping[str, Any], witness: Cluster) -> None:
        self._exact = self._baseline = None
        deliver(
            self._model(recipe), self.tokenizer, out, manifest, self._runner(recipe), self._serve, witness
        )
