"""Our own contenders: models as they were named, each loaded into this process, and the checkpoint that peers
run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flatout.bench.peers import OURS
from flatout.bench.phases import Phase
from flatout.core.artifact import is_artifact
from flatout.core.checkpoint import Checkpoint, open_checkpoint
from flatout.core.files import read_json_object, shown
from flatout.core.types import Hardware
from flatout.engine.cpu import CpuRunner
from flatout.engine.load import PAGE_TOKENS, load
from flatout.errors import ConfigError, EvidenceError
from flatout.perf.profile import phase_parts
from flatout.perf.roofline import step_floor
from flatout.verify.quality import fits


@dataclass(frozen=True, slots=True, eq=False)
class Own:
    """A model of ours. model: as it was named; format: its name in the tables."""

    model: str
    format: str
    runner: CpuRunner

    @property
    def name(self) -> str:
        return f"{OURS} {self.format}"


def find_original(model: str, named: str | None) -> Checkpoint:
    """The checkpoint that peers run: the one named, the one an artifact's certificate names, or `model`."""
    if named is not None or not is_artifact(model):
        return open_checkpoint(named or model)
    certificate = read_json_object(Path(model) / "flatout.json").get("certificate")
    side = certificate.get("original") if isinstance(certificate, dict) else None
    if not isinstance(side, dict) or not isinstance(side.get("source"), str):
        raise ConfigError(
            "peers run the original of an artifact", "the artifact does not name it", "--original MODEL"
        )
    checkpoint = open_checkpoint(side["source"])
    if checkpoint.sha256 != side.get("sha256"):
        raise EvidenceError(
            "the original must be the one that the artifact was made from",
            f"other weights in {checkpoint.path}",
            "--original MODEL",
        )
    return checkpoint


def check_models(models: Sequence[str]) -> None:
    """Raise ConfigError unless there are models, each named once."""
    twice = [model for model, count in Counter(models).items() if count > 1]
    if not models or twice:
        raise ConfigError(
            "a benchmark needs at least one model of ours, each named once",
            f"{shown(twice[0])} twice" if twice else "none",
            "flatout bench smollm2-135m --against llama.cpp",
        )


def load_own(
    models: Sequence[str], source: Checkpoint, threads: int, phases: Sequence[Phase]
) -> tuple[Own, ...]:
    """Our runners, with room for the largest phase and for scoring. Raises FlatoutErrors."""
    pages = max((p.workload.batch * (p.positions // PAGE_TOKENS + 1) for p in phases), default=1)
    tokens = max(pages * PAGE_TOKENS, fits(source.spec) + PAGE_TOKENS)
    runners = []
    for model in models:
        runner = load(model, runner="cpu", threads=threads, max_tokens=tokens).runner
        assert isinstance(runner, CpuRunner)
        if runner.spec.vocab_size != source.spec.vocab_size:
            raise EvidenceError(
                "all contenders must read the same tokens",
                f"vocabularies of {runner.spec.vocab_size} and {source.spec.vocab_size}, of {shown(model)}",
                "the model's own original",
            )
        runners.append(runner)
    formats = tell_apart(models, [runner.recipe.name for runner in runners])
    return tuple(Own(*parts) for parts in zip(models, formats, runners, strict=True))


def tell_apart(models: Sequence[str], recipes: Sequence[str]) -> list[str]:
    """Names of recipes, with the model behind those that two models share."""
    shared = Counter(recipes)
    return [
        f"{recipe} of {model}" if shared[recipe] > 1 else recipe
        for model, recipe in zip(models, recipes, strict=True)
    ]


def floor_s(runner: CpuRunner, hardware: Hardware, phase: Phase, threads: int) -> float:
    """Least seconds of a whole phase on our runner: all prompts, or all decode steps."""
    parts = phase_parts(runner.spec, runner.recipe, hardware, phase.workload, threads)
    floor = step_floor(parts[phase.kind])
    return floor.floor_s * (phase.workload.output if phase.kind == "decode" else 1)
