"""A bench without weights: losses and speeds of every recipe are given, everything else is the real
search."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flatout.core.formats import Recipe, parse_format
from flatout.core.fuse import source_names
from flatout.core.model import expected_weights
from flatout.core.quantized import QuantizedTensor
from flatout.core.spec import ModelSpec
from flatout.core.types import Ceiling, Hardware, Workload, measurement, to_json
from flatout.errors import BackendError
from flatout.perf.profile import OpTime, PhaseTime, Profile, phase_parts
from flatout.perf.roofline import op_floors, step_floor
from flatout.perf.tables import Table
from flatout.verify.quality import Cluster, Divergence
from flatout.verify.speed import SpeedResult

SPEC = ModelSpec(
    family="llama",
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=2048,
    tie_embeddings=True,
)

HARDWARE = Hardware(
    name="a machine",
    kind="cpu",
    cores=2,
    features=("avx2",),
    l1d_bytes=32 << 10,
    l2_bytes=1 << 20,
    l3_bytes=8 << 20,
    memory_bytes=8 << 30,
    ceilings=tuple(
        Ceiling(name=name, value=value * threads, unit=unit, threads=threads, working_set_bytes=size)
        for threads in (1, 2)
        for name, value, unit, size in (
            ("read_dram", 2e10, "byte/s", 256 << 20),
            ("int8", 1e12, "op/s", 0),
            ("bf16", 5e11, "op/s", 0),
            ("fp32", 2.5e11, "op/s", 0),
        )
    ),
)


class FakeSource:
    """Weights that nobody reads, stored as q4_1 layers with a q8_0 embedding if `native`."""

    def __init__(self, native: bool = True, spec: ModelSpec = SPEC) -> None:
        self.spec = spec
        self._native: dict[str, QuantizedTensor] = {}
        if native:
            recipe = Recipe(name="native", layers="q4_1", embedding="q8_0", head="q8_0")
            for fused, shape, fmt in expected_weights(spec, recipe):
                if fmt.is_native:
                    for name in source_names(spec, fused):
                        self._native[name] = _blocks(fmt.name, shape)

    def array(self, name: str) -> np.ndarray:
        raise AssertionError("a search on a fake bench reads no weights")

    def native(self, name: str) -> QuantizedTensor | None:
        return self._native.get(name)


def _blocks(name: str, shape: tuple[int, ...]) -> QuantizedTensor:
    fmt = parse_format(name)
    groups = (shape[0], shape[1] // 32)
    return QuantizedTensor(
        format=fmt,
        codes=np.zeros(shape, np.int8 if fmt.bits == 8 else np.uint8),
        scales=np.ones(groups, np.float16),
        minima=np.zeros(groups, np.float16) if fmt.zero == "minimum" else None,
    )


def _result(a: float, b: float) -> SpeedResult:
    return SpeedResult(
        ratio=a / b,
        low=a / b - 0.01,
        high=a / b + 0.01,
        coverage=0.96,
        seconds_a=measurement("A", "s", [a]),
        seconds_b=measurement("B", "s", [b]),
        samples_a=(a,),
        samples_b=(b,),
        pairs=9,
        thrown_away=0,
        kept_noisy=0,
        foreign_load=0.0,
        stopped_because="the interval is within 2%",
    )


class FakeTokenizer:
    adds_bos = False

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """A token for every tenth character: about 190 a passage."""
        return [ord(c) % SPEC.vocab_size for c in text[::10]]


class FakeBench:
    """losses: nats a token by recipe name. speeds: factor over the original's speed by recipe name.

    sealed: losses on the hold-out (the clusters in `holdout`) where they differ from validation. baseline:
    speed of transformers. joules: of a workload by recipe name and "baseline", if there is
    a meter. Every expensive call is written to `calls` and given to `on_call`, which may raise.
    """

    name, path, sha256, tokenizer_sha256 = "tiny", "/nowhere/tiny.gguf", "5e" * 32, "70" * 32
    code, threads = "c0de", 2
    versions: Mapping[str, str] = {"python": "3"}

    def __init__(
        self,
        losses: Mapping[str, float],
        speeds: Mapping[str, float],
        *,
        sealed: Mapping[str, float] | None = None,
        baseline: float = 0.1,
        native: bool = True,
        on_call: Callable[[str], None] | None = None,
        joules: Mapping[str, float] | None = None,
    ) -> None:
        self.losses, self.speeds, self.sealed, self.baseline = losses, speeds, sealed or {}, baseline
        self.joules = joules or {}
        self.source, self.tokenizer = FakeSource(native), FakeTokenizer()
        self.calls: list[str] = []
        self.scored: dict[str, int] = {}
        self.holdout: set[tuple[int, ...]] = set()
        self.built: set[Recipe] = set()
        self._on_call = on_call or (lambda call: None)

    def _call(self, call: str) -> None:
        self.calls.append(call)
        self._on_call(call)

    def hardware(self, step: Any) -> Hardware:
        self._call("hardware")
        return HARDWARE

    def _scores(self, name: str, clusters: Sequence[Cluster]) -> list[np.ndarray]:
        found = []
        for cluster in clusters:
            seed = int.from_bytes(hashlib.sha256(repr(cluster.tokens).encode()).digest()[:4], "little")
            draw = np.random.default_rng(seed)
            original = -draw.uniform(2.0, 4.0, len(cluster.tokens) - 1)
            loss = 0.0
            if name != "original":
                losses = (
                    self.sealed if cluster.tokens in self.holdout and name in self.sealed else self.losses
                )
                loss = losses.get(name, 0.0003) * (1 + 0.3 * draw.standard_normal())
            found.append((original - loss).astype(np.float32))
        self.scored[name] = self.scored.get(name, 0) + len(clusters)
        return found

    def score_original(self, clusters: Sequence[Cluster], step: Any) -> list[np.ndarray]:
        self._call(f"score original {len(clusters)}")
        return self._scores("original", clusters)

    def score_baseline(self, clusters: Sequence[Cluster], step: Any) -> list[np.ndarray]:
        self._call(f"score transformers {len(clusters)}")
        return self._scores("transformers", clusters)

    def table(self, recipes: Any, hardware: Hardware, workload: Workload, step: Any) -> Table:
        self._call("table")
        return Table(entries=(), interactions={})

    def expected_losses(self, choices: Any, calibration: Any, step: Any, rotated: bool) -> Any:
        self._call("sensitivity")
        return None

    def build(self, recipe: Recipe, calibration: Sequence[Cluster], step: Any) -> None:
        if recipe not in self.built:
            self._call(f"build {recipe.name}")
            self.built.add(recipe)

    def score(self, recipe: Recipe, clusters: Sequence[Cluster], step: Any) -> list[np.ndarray]:
        assert recipe in self.built
        self._call(f"score {recipe.name} {len(clusters)}")
        return self._scores(recipe.name, clusters)

    def divergence(self, recipe: Recipe, clusters: Sequence[Cluster]) -> Divergence:
        assert recipe in self.built
        return Divergence(mean_kl=0.001, p99_kl=0.02, flip_rate=0.01, tokens=1024)

    def _seconds(self, name: str) -> dict[str, float]:
        return {"prefill": 0.1 / self.speeds[name], "decode": 0.003 / self.speeds[name]}

    def profile(self, recipe: Recipe, hardware: Hardware, workload: Workload, max_seconds: float) -> Profile:
        assert recipe in self.built
        self._call(f"profile {recipe.name}")
        phases, ops = [], []
        for phase, parts in phase_parts(SPEC, recipe, hardware, workload, 2).items():
            seconds, floor = self._seconds(recipe.name)[phase], step_floor(parts)
            phases.append(
                PhaseTime(
                    phase=phase,
                    measured=measurement(phase, "s", [seconds]),
                    floor=floor,
                    fraction=floor.floor_s / seconds,
                    tokens_per_s=1 / seconds,
                    read_bytes_per_s=floor.bytes / seconds,
                    parts=parts,
                )
            )
            floors = op_floors(parts)
            for op, its in floors.items():
                share = its.floor_s / sum(f.floor_s for f in floors.values())
                own = share * seconds
                fraction = its.floor_s / own if own else None
                ops.append(OpTime(phase=phase, op=op, seconds=own, share=share, floor=its, fraction=fraction))
        return Profile(
            runner="fake",
            spec=SPEC,
            recipe=recipe,
            workload=workload,
            threads=2,
            hardware=hardware,
            phases=tuple(phases),
            ops=tuple(ops),
            weight_bytes=1,
            kv_bytes_per_token=1.0,
            peak_resident_bytes=1,
            warnings=(),
        )

    def race(
        self,
        first: Recipe | None,
        second: Recipe,
        workload: Workload,
        max_seconds: float,
        min_pairs: int,
        step: Any,
    ) -> dict[str, SpeedResult]:
        assert second in self.built
        self._call(f"race {'baseline' if first is None else first.name} {second.name}")
        found = {}
        for phase in ("prefill", "decode"):
            times = workload.output if phase == "decode" else 1
            b = self._seconds(second.name)[phase] * times
            if first is None:
                a = b * self.speeds[second.name] / self.baseline
            else:
                a = self._seconds(first.name)[phase] * times
            found[phase] = _result(a, b)
        return found

    def turns(
        self, first: Recipe, second: Recipe, workload: Workload, max_seconds: float
    ) -> dict[str, float]:
        assert {first, second} <= self.built
        self._call(f"turns {first.name} {second.name}")
        a, b = self._seconds(first.name), self._seconds(second.name)
        return {phase: a[phase] / b[phase] for phase in a}

    def rehearse(self, recipe: Recipe, near: Path) -> None:
        self._call(f"rehearse {recipe.name}")

    def open_meter(self) -> None:
        if not self.joules:
            raise BackendError("energy needs a counter", "none", "--objective latency")

    def race_energy(
        self,
        first: Recipe | None,
        second: Recipe,
        workload: Workload,
        max_seconds: float,
        min_pairs: int,
        step: Any,
    ) -> SpeedResult:
        assert second in self.built
        self._call(f"energy {'baseline' if first is None else first.name} {second.name}")
        return _result(self.joules["baseline" if first is None else first.name], self.joules[second.name])

    def runner_name(self, recipe: Recipe | None) -> str:
        return "transformers" if recipe is None else "fake"

    def weights_sha256(self, recipe: Recipe, near: Path) -> str:
        return hashlib.sha256(recipe.name.encode()).hexdigest()

    def save(self, recipe: Recipe, out: Path, manifest: Mapping[str, Any], witness: Cluster) -> None:
        assert recipe in self.built
        self._call(f"save {recipe.name}")
        out.mkdir(parents=True, exist_ok=True)
        (out / "flatout.json").write_text(json.dumps({"recipe": to_json(recipe), **to_json(dict(manifest))}))
