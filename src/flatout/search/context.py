"""What every step of the search shares: the bench it measures on, the request, the texts, the trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flatout.core.formats import Recipe
from flatout.core.fuse import Source
from flatout.core.types import Hardware, Workload
from flatout.perf.profile import Profile
from flatout.perf.tables import Table
from flatout.search.request import Request
from flatout.search.stages import Stages
from flatout.search.texts import Texts, tokens_of
from flatout.search.traffic import Trace
from flatout.search.trials import Run, TrialStore
from flatout.verify.ledger import next_k
from flatout.verify.quality import Cluster, Divergence, Encoder, tokens_sha256
from flatout.verify.speed import SpeedResult

Step = Callable[[str, int, int], None]
"""step(what, done, total)."""

Losses = Mapping[tuple[str, str], float]
"""(place, format) -> expected nats a token (search/expected.py)."""

_CHUNK = 8  # clusters scored and stored at a time, about 3,500 tokens


class Bench(Protocol):
    """A model on a machine: everything that costs time goes through here, so that tests can replace it."""

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> str: ...

    @property
    def source(self) -> Source: ...

    @property
    def tokenizer(self) -> Encoder: ...

    @property
    def sha256(self) -> str:
        """Of the original's weight files."""
        ...

    @property
    def tokenizer_sha256(self) -> str: ...

    @property
    def code(self) -> str:
        """Hash of the code, the kernels and the instruction set: scores hold only for the same."""
        ...

    @property
    def threads(self) -> int: ...

    @property
    def versions(self) -> Mapping[str, str]: ...

    def hardware(self, step: Step) -> Hardware:
        """This machine with its ceilings."""
        ...

    def score_original(self, clusters: Sequence[Cluster], step: Step) -> list[np.ndarray]:
        """Log-probabilities by the original in float32, by the reference runner or an engine that agrees with
        it."""
        ...

    def score_baseline(self, clusters: Sequence[Cluster], step: Step) -> list[np.ndarray]:
        """Log-probabilities by transformers in bf16."""
        ...

    def table(self, recipes: Sequence[Recipe], hardware: Hardware, workload: Workload, step: Step) -> Table:
        """Times of every op of `recipes`, measured on stand-ins."""
        ...

    def expected_losses(
        self,
        choices: Mapping[str, Sequence[str]],
        calibration: Sequence[Cluster],
        step: Step,
        rotated: bool = False,
    ) -> tuple[Losses, Losses] | None:
        """Expected loss of every (place, format) by compress/library.py and rounded to nearest, of the model
        turned if `rotated`; None for a model too large for that here."""
        ...

    def build(self, recipe: Recipe, calibration: Sequence[Cluster], step: Step) -> None:
        """Compress and load, unless the recipe is loaded already."""
        ...

    def score(self, recipe: Recipe, clusters: Sequence[Cluster], step: Step) -> list[np.ndarray]:
        """Log-probabilities by the runner that serves. The recipe must have been built."""
        ...

    def profile(self, recipe: Recipe, hardware: Hardware, workload: Workload, max_seconds: float) -> Profile:
        """Where the time of the built recipe goes; the original is measured again if others were busy
        meanwhile."""
        ...

    def race(
        self,
        first: Recipe | None,
        second: Recipe,
        workload: Workload,
        max_seconds: float,
        min_pairs: int,
        step: Step,
    ) -> dict[str, SpeedResult]:
        """Interleaved A/B of "prefill" and "decode"; `first` None is transformers in bf16."""
        ...

    def turns(
        self, first: Recipe, second: Recipe, workload: Workload, max_seconds: float
    ) -> dict[str, float]:
        """Seconds of `first` over those of `second`, "prefill" and "decode", timed in turns a few times."""
        ...

    def rehearse(self, recipe: Recipe, near: Path) -> None:
        """Take a small part of the model under `recipe` through rounding, saving, loading and running; `near`
        is a folder whose disk it may use meanwhile. Raises what goes wrong on the way."""
        ...

    def open_meter(self) -> None:
        """Find the energy counters of what runs candidates, for `race_energy`. Raises BackendError that names
        what is missing."""
        ...

    def race_energy(
        self,
        first: Recipe | None,
        second: Recipe,
        workload: Workload,
        max_seconds: float,
        min_pairs: int,
        step: Step,
    ) -> SpeedResult:
        """Like `race`, of the whole workload, in joules above idle instead of seconds."""
        ...

    def runner_name(self, recipe: Recipe | None) -> str:
        """What runs a built recipe, for people; None is the baseline."""
        ...

    def divergence(self, recipe: Recipe, clusters: Sequence[Cluster]) -> Divergence:
        """How the predictions of the built recipe differ from the original's."""
        ...

    def weights_sha256(self, recipe: Recipe, near: Path) -> str:
        """Of the weight file that `save` would write; `near` is a folder whose disk it may use meanwhile."""
        ...

    def save(self, recipe: Recipe, out: Path, manifest: Mapping[str, Any], witness: Cluster) -> None:
        """Write the artifact, load it again and refuse it unless it scores `witness` as the built recipe
        does.
        """
        ...


@dataclass(slots=True, kw_only=True)
class Context:
    """One search under way."""

    bench: Bench
    request: Request
    texts: Texts
    store: TrialStore
    run: Run
    stages: Stages
    hardware: Hardware
    note: Callable[[str], None]
    requests: Trace | None = None
    opened: int = 0
    """Candidates that this process has judged on the hold-out."""

    def build(self, recipe: Recipe) -> None:
        """Build a recipe on the bench, with the calibration text if its method asks for it."""
        self.bench.build(recipe, self.texts.calibration, self.stages.step)

    def original_scores(self, clusters: Sequence[Cluster]) -> list[np.ndarray]:
        """Scores of the original, computed once for each text and kept."""
        return self._scores("original", {}, clusters, self.bench.score_original)

    def baseline_scores(self, clusters: Sequence[Cluster]) -> list[np.ndarray]:
        """Scores of the baseline, for the report."""
        return self._scores("transformers", {"baseline": "bf16"}, clusters, self.bench.score_baseline)

    def scores(self, recipe: Recipe, clusters: Sequence[Cluster]) -> list[np.ndarray]:
        """Scores of a recipe, computed once for each text and kept."""

        def compute(missing: Sequence[Cluster], step: Step) -> list[np.ndarray]:
            self.build(recipe)
            return self.bench.score(recipe, missing, step)

        return self._scores(recipe.name, self.inputs(recipe), clusters, compute)

    def divergence(self, recipe: Recipe, clusters: Sequence[Cluster]) -> float:
        """KL(original || recipe) in nats a token on these clusters, computed once and kept."""

        def compute() -> dict[str, Any]:
            self.build(recipe)
            return {"kl": self.bench.divergence(recipe, clusters).mean_kl}

        key = {"model": self.bench.sha256, "code": self.bench.code, "clusters": tokens_sha256(clusters)}
        found = self.store.result("divergence", recipe.name, key | self.inputs(recipe), compute)
        return float(found["kl"])

    def inputs(self, recipe: Recipe) -> dict[str, Any]:
        """What the weights of a recipe depend on besides the model."""
        inputs: dict[str, Any] = {"recipe": recipe}
        if recipe.needs_calibration:
            inputs["calibration"] = tokens_sha256(self.texts.calibration)
        return inputs

    def next_opening(self) -> int:
        """Number of the next opening of the hold-out as this run counts them, which plans alike when it is
        resumed behind one."""
        holdout, original = self.texts.holdout.sha256, self.bench.sha256
        first = self.timed("opening", "first", {"holdout": holdout}, lambda: {"k": next_k(holdout, original)})
        return int(first["k"]) + self.opened

    def _scores(
        self,
        name: str,
        inputs: Mapping[str, Any],
        clusters: Sequence[Cluster],
        compute: Callable[[Sequence[Cluster], Step], list[np.ndarray]],
    ) -> list[np.ndarray]:
        """In chunks of a fixed size: a longer look reuses the shorter one, and a kill loses one chunk."""
        found: list[np.ndarray] = []
        total = tokens_of(clusters)
        for start in range(0, len(clusters), _CHUNK):
            part = clusters[start : start + _CHUNK]
            base = tokens_of(clusters[:start])

            def compute_part(part: Sequence[Cluster] = part, base: int = base) -> list[np.ndarray]:
                def step(what: str, done: int, count: int) -> None:
                    self.stages.step(f"{name}: {what}", base + tokens_of(part[:done]), total)

                return compute(part, step)

            key = {
                "model": self.bench.sha256,
                "code": self.bench.code,
                "clusters": tokens_sha256(part),
                **inputs,
            }
            found += self.store.scores("scores", name, key, compute_part)
        return found

    def timed(
        self, stage: str, name: str, inputs: Mapping[str, Any], compute: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """A timing, kept for this run alone."""
        key = {"run": self.run.identity, "threads": self.bench.threads, **inputs}
        return self.store.result(stage, name, key, compute)
