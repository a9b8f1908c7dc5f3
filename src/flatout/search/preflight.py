"""Before the work: is the output folder usable, will memory and disk suffice, how long will it take?

The estimates are arithmetic over the model's sizes. They are meant to be too large rather than too small,
since running out of memory after minutes of work is the failure they are there to prevent.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from flatout.core import artifact
from flatout.core.costs import kv_bytes_per_token, moment_bytes
from flatout.core.spec import ModelSpec
from flatout.core.types import Workload
from flatout.errors import ConfigError, ResourceError
from flatout.hardware.detect import free_memory
from flatout.search.units import megabytes, seconds

_RUNTIME_BYTES = 700 << 20  # interpreter, torch, transformers and their thread stacks, resident
_STORE_BYTES = 64 << 20  # tokenizer files, report and trials
_SCORED_TOKENS = 512  # logits of one scoring step are held in float32
_GIB = 1 << 30

MOST_MOMENTS = _GIB
"""Bytes of calibration moments that may be kept; recipes that mix formats are looked for in models that have
no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """Predicted needs beside what there is: bytes, and seconds of the whole search."""

    memory_bytes: int
    memory_available_bytes: int
    disk_bytes: int
    disk_free_bytes: int
    seconds: float = 0.0

    def __str__(self) -> str:
        """One line for people."""
        parts = [f"about {seconds(self.seconds)}", f"at most {megabytes(self.memory_bytes)} of memory"]
        return f"needs {', '.join(parts)} and {megabytes(self.disk_bytes)} of disk"


def check_output(out: Path, model: Path | None = None) -> None:
    """Raise ConfigError unless `out` can become an artifact folder: new, empty, or an artifact to be
    replaced.

    `model` is the input, which must not be overwritten. Leaves no trace.
    """
    if model is not None and model.exists() and _inside(model, out):
        raise ConfigError("the output must not replace its own input", str(out), "--out another-folder")
    artifact.check_output(out)
    parent = _existing_parent(out)
    if not parent.is_dir():
        raise ConfigError("the output's parent must be a folder", str(parent), "--out another-folder")
    try:
        with tempfile.NamedTemporaryFile(dir=parent, prefix=".flatout-"):
            pass
    except OSError as error:
        raise ConfigError(
            "the output must be writable", f"{parent}: {error.strerror}", "--out elsewhere"
        ) from error


def _inside(path: Path, folder: Path) -> bool:
    resolved = path.resolve()
    return resolved == folder.resolve() or folder.resolve() in resolved.parents


def _existing_parent(out: Path) -> Path:
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


def peak_memory_bytes(spec: ModelSpec, workload: Workload) -> int:
    """Upper estimate of the search's resident memory.

    Alive together at the worst moment: the bf16 baseline, the engine at original precision, one candidate
    (integer codes take a byte each before the runner packs them), and a float32 copy that one of them is
    being made from, and what mixed recipes are made from.
    """
    weights = spec.num_parameters() + (spec.vocab_size * spec.hidden_size if spec.tie_embeddings else 0)
    models = weights * (2 + 2 + 2 + 4)
    moments = moment_bytes(spec)
    mixed = 2 * moments + 2 * weights if moments <= MOST_MOMENTS else 0  # one layer's factors, and kept codes
    logits = 4 * 2 * _SCORED_TOKENS * spec.vocab_size
    tokens = max(workload.batch * (workload.prompt + workload.output), 2 * _SCORED_TOKENS)
    caches = 3 * int(tokens * spec.num_layers * kv_bytes_per_token(spec, "bf16"))
    return _RUNTIME_BYTES + models + mixed + logits + caches


def artifact_bytes(spec: ModelSpec) -> int:
    """Upper estimate of the output folder: 16-bit weights, embedding and head apart, and the small files."""
    weights = spec.num_parameters() + (spec.vocab_size * spec.hidden_size if spec.tie_embeddings else 0)
    return 2 * weights + _STORE_BYTES


def preflight(spec: ModelSpec, workload: Workload, out: Path) -> Preflight:
    """Predict what the search needs and raise ResourceError, with the remedy, if it is not there."""
    needs = Preflight(
        memory_bytes=peak_memory_bytes(spec, workload),
        memory_available_bytes=free_memory(),
        disk_bytes=artifact_bytes(spec),
        disk_free_bytes=shutil.disk_usage(_existing_parent(out)).free,
    )
    if 0 < needs.memory_available_bytes < needs.memory_bytes:  # 0: no meter
        raise ResourceError(
            f"optimising this model takes up to {needs.memory_bytes / _GIB:.1f} GiB of memory",
            f"{needs.memory_available_bytes / _GIB:.1f} GiB available",
            "a smaller model or workload, or free some memory",
        )
    if needs.disk_bytes > needs.disk_free_bytes:
        raise ResourceError(
            f"the artifact takes up to {needs.disk_bytes / _GIB:.1f} GiB of disk",
            f"{needs.disk_free_bytes / _GIB:.1f} GiB free at {out}",
            "--out on another disk, or free some space",
        )
    longest = workload.prompt + workload.output
    if longest > spec.max_positions:
        raise ConfigError(
            f"this model reads at most {spec.max_positions} tokens",
            f"a workload of {longest}",
            "a shorter one",
        )
    return needs
