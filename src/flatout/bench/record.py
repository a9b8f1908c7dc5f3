"""The result of a benchmark, with what a reader needs to measure it again."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import flatout
from flatout.bench.peers import PEERS
from flatout.bench.phases import MARGIN, PHASES, Contender, Phase, Ratio, Row, ratios
from flatout.core.types import Hardware


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """What the perplexities were measured on: shipped passages, each a context of its own."""

    split: str
    sha256: str
    passages: int
    tokens: int
    original_perplexity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """Everything measured.

    models: ours, as they were named. text: None when nothing was scored. ratio_to_best_peer: by phase, how
    many times better the best of ours is than the best peer; ratio_at_equal_quality: the same among those
    within 1 % loss. None where nothing was measured that could stand there.
    """

    command: str
    commit: str | None
    taken: str
    models: tuple[str, ...]
    original: str
    original_sha256: str
    threads: int
    rounds: int
    machine: Hardware
    versions: Mapping[str, str]
    text: Text | None
    contenders: tuple[Contender, ...]
    rows: tuple[Row, ...]
    ratio_to_best_peer: Mapping[str, float | None]
    best_peer: Mapping[str, str | None]
    ratio_at_equal_quality: Mapping[str, float | None]
    best_peer_at_equal_quality: Mapping[str, str | None]
    not_measured: tuple[str, ...]


def record(
    *,
    command: str,
    models: Sequence[str],
    original: Path,
    original_sha256: str,
    threads: int,
    rounds: int,
    machine: Hardware,
    text: Text | None,
    contenders: Sequence[Contender],
    rows: Sequence[Row],
    ours: str,
) -> BenchResult:
    """The result with its ratios; `ours` is the engine that is compared with the others."""
    any_loss, equal = ratios(rows, ours), ratios(rows, ours, MARGIN)
    return BenchResult(
        command=command,
        commit=source_commit(),
        taken=datetime.now(UTC).isoformat(timespec="seconds"),
        models=tuple(models),
        original=str(original),
        original_sha256=original_sha256,
        threads=threads,
        rounds=rounds,
        machine=machine,
        versions=_versions(),
        text=text,
        contenders=tuple(contenders),
        rows=tuple(rows),
        ratio_to_best_peer=_values(any_loss),
        best_peer=_names(any_loss),
        ratio_at_equal_quality=_values(equal),
        best_peer_at_equal_quality=_names(equal),
        not_measured=_not_measured(contenders, rows),
    )


def source_commit(folder: Path | None = None) -> str | None:
    """The commit of flatout's sources, "-dirty" behind it when they were changed since; None outside a
    checkout."""
    folder = folder or Path(flatout.__file__).parent
    git = ["git", "-C", str(folder)]
    try:
        # An installed package may lie inside somebody else's repository, which does not track it.
        tracked = subprocess.run(
            [*git, "ls-files", "__init__.py"], capture_output=True, text=True, check=False
        )
        if tracked.returncode != 0 or not tracked.stdout.strip():
            return None
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "."], capture_output=True, text=True, check=False
        )
    except OSError:  # no git
        return None
    return commit.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def _versions() -> dict[str, str]:
    return {
        "flatout": flatout.__version__,
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
        "system": f"{platform.system()} {platform.release()}",
    }


def _values(found: Mapping[str, Ratio | None]) -> dict[str, float | None]:
    return {phase: None if ratio is None else ratio.value for phase, ratio in found.items()}


def _names(found: Mapping[str, Ratio | None]) -> dict[str, str | None]:
    return {phase: None if ratio is None else ratio.peer for phase, ratio in found.items()}


def _not_measured(contenders: Sequence[Contender], rows: Sequence[Row]) -> tuple[str, ...]:
    engines = {contender.engine for contender in contenders}
    peers = [peer for peer in PEERS if peer not in engines]
    scored = any(contender.loss is not None for contender in contenders)
    found = [f"peers: {', '.join(peers)}"] if peers else []
    found += [_why(phase) for phase in PHASES if phase.name not in {row.phase for row in rows}]
    return (
        *found,
        "quality other than perplexity on the passages named here" if scored else "quality: not scored",
        "the peers' fraction of their floor, energy, and latency under load",
    )


def _why(phase: Phase) -> str:
    reason = "not counted on this system" if phase.kind == "memory" else "longer than the model's positions"
    return f"{phase.name}: {reason}"
