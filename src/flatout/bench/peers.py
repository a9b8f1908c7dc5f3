"""The engines that flatout is measured against: their names, the formats they run, how their workers start.

Every peer but transformers, which runs in flatout's own environment, has a virtual environment in the cache
(`install`) and loads files that its own tools made of the original weights (`models`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import flatout
from flatout.bench.worker import Worker
from flatout.core.checkpoint import Checkpoint
from flatout.core.files import shown
from flatout.core.gguf import open_gguf
from flatout.errors import BackendError, ConfigError

LLAMA, OPENVINO, ONNXRUNTIME, TRANSFORMERS = "llama.cpp", "openvino", "onnxruntime", "transformers"
CTRANSLATE2 = "ctranslate2"
PEERS = (LLAMA, OPENVINO, ONNXRUNTIME, CTRANSLATE2, TRANSFORMERS)
OURS = "flatout"
"""Our own engine, whose starts are measured in processes like the peers'."""

_SCRIPTS = Path(__file__).parent / "workers"

Listener = Callable[[str, int, int], None]
"""listener(stage, done, total)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A peer in one format. recipe: how its worker's `convert` makes the file; empty to run the original."""

    engine: str
    format: str
    recipe: Mapping[str, str | int | bool] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.engine} {self.format}"


def parse_peers(text: str) -> tuple[str, ...]:
    """ "llama.cpp,transformers" as names. Raises ConfigError for one that this version does not measure."""
    names = tuple(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
    wrong = [name for name in names if name not in PEERS]
    if wrong or not names:
        raise ConfigError(
            f"this version measures {', '.join(PEERS[:-1])} and {PEERS[-1]}",
            ", ".join(map(shown, wrong)) or "no peer",
            f"--against {','.join(name for name in names if name in PEERS) or ','.join(PEERS)}",
        )
    return names


def variants(peer: str, original: Checkpoint) -> list[Variant]:
    """The formats `peer` runs this checkpoint in. Raises BackendError when it cannot read the file."""
    if peer == TRANSFORMERS:
        return [Variant(engine=peer, format="bf16")]
    if peer == CTRANSLATE2:
        return [Variant(engine=peer, format="int8", recipe={"quantization": "int8"})]
    if peer == OPENVINO:
        return [
            Variant(engine=peer, format="int8", recipe={"bits": 8, "group": 0}),
            Variant(engine=peer, format="int4 g64 all layers", recipe={"bits": 4, "group": 64}),
        ]
    if peer == ONNXRUNTIME:
        block = 32
        return [
            Variant(
                engine=peer, format=f"int4 g{block} {word}", recipe={"block": block, "symmetric": symmetric}
            )
            for word, symmetric in (("symmetric", True), ("asymmetric", False))
        ]
    return _llama_variants(original)


def _llama_variants(original: Checkpoint) -> list[Variant]:
    """The file as it is, and rounded to the formats for which llama.cpp has its fastest kernels."""
    if original.path.suffix != ".gguf":
        raise BackendError(
            "llama.cpp reads GGUF files", shown(str(original.path), 300), "leave llama.cpp out of --against"
        )
    sizes: Counter[str] = Counter()
    for tensor in open_gguf(original.path).tensors.values():
        sizes[tensor.type] += tensor.nbytes
    stored = sizes.most_common(1)[0][0]
    made = [
        Variant(engine=LLAMA, format=name, recipe={"ftype": ftype, "pure": pure})
        for name, ftype, pure in (
            ("Q4_0", "Q4_0", False),
            ("Q4_0 pure", "Q4_0", True),
            ("Q8_0", "Q8_0", False),
        )
    ]
    as_it_is = Variant(engine=LLAMA, format=f"{stored} as stored")
    return [as_it_is, *(variant for variant in made if variant.format != stored)]


def launch(variant: Variant, python: Path) -> Worker:
    """A worker process of `variant`, nothing loaded yet; `load` it from `model_file`."""
    command = [str(python), str(_SCRIPTS / "serve.py"), f"workers.{_script(variant.engine)}"]
    return Worker(variant.name, command, environment(variant.engine))


def _script(engine: str) -> str:
    """The module of `workers` that runs `engine`."""
    if engine == LLAMA:
        return "llama"
    if engine == OPENVINO:
        return "openvino_runtime"
    if engine == ONNXRUNTIME:
        return "onnx_runtime"
    if engine == CTRANSLATE2:
        return "ctranslate"
    return "shipped" if engine == OURS else "huggingface"


def environment(peer: str) -> dict[str, str]:
    """Variables for a worker: ours without those that change how its interpreter or its threads behave.

    How threads wait is left to the libraries' default: they spin for some milliseconds, which a step needs,
    and then sleep, so that an engine that waits for its turn takes no time from the others.
    """
    dropped = ("PYTHON", "OMP_", "GOMP_", "KMP_", "VIRTUAL_ENV")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    kept["HF_HUB_OFFLINE"] = "1"  # models come from the disk
    if peer in (TRANSFORMERS, OURS):
        places = [str(Path(flatout.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        kept["PYTHONPATH"] = os.pathsep.join(place for place in places if place)
    return kept
