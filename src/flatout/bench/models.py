"""The files that peers load: the original, or what a peer's own tools made of it, once, kept in the cache.

llama.cpp rounds the GGUF file itself. OpenVINO, ONNX Runtime and CTranslate2 convert a transformers folder,
which is written here with the original's weights in float32, so that nothing is rounded twice.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from flatout.bench.install import contents
from flatout.bench.peers import LLAMA, Listener, Variant, launch
from flatout.bench.worker import LOAD_S
from flatout.core.checkpoint import Checkpoint
from flatout.core.folder import write_folder
from flatout.core.sources import cache_dir, lock
from flatout.errors import ResourceError
from flatout.hardware.detect import free_memory


def model_file(variant: Variant, python: Path, original: Checkpoint, threads: int, listen: Listener) -> Path:
    """The file or folder that `variant` loads. Raises BackendError, ResourceError."""
    if not variant.recipe:
        return original.path
    folder = cache_dir() / "peers" / f"{variant.engine}-models"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / cache_name(variant, original.sha256, contents(variant.engine))
    with lock(folder / "lock"), ExitStack() as stack:
        if path.exists():
            return path
        _check_room(variant, original, folder)
        listen(f"making {variant.name}, once", 0, 1)
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix=".made-")))
        source, target = original.path, temporary / path.name
        if variant.engine != LLAMA:
            source = temporary / "original"
            source.mkdir()
            weights = {name: original.array(name) for name in original.names}
            write_folder(source, original.spec, original.tokenizer, weights)
            del weights
        worker = stack.enter_context(launch(variant, python))
        arguments = {"source": str(source), "target": str(target), "threads": threads}
        worker.request("convert", LOAD_S, **arguments, **variant.recipe)
        target.replace(path)
    return path


def cache_name(variant: Variant, sha256: str, made_by: Mapping[str, object]) -> str:
    """Other weights, another recipe or other versions of the tools make another name."""
    made = json.dumps([variant.recipe, made_by], sort_keys=True)
    words = "".join(letter if letter.isalnum() else "-" for letter in variant.format)
    return f"{sha256[:32]}-{words}-{hashlib.sha256(made.encode()).hexdigest()[:12]}"


def _check_room(variant: Variant, original: Checkpoint, folder: Path) -> None:
    """Raise ResourceError unless disk and memory suffice for a conversion."""
    copies = 4 * original.spec.num_parameters()  # one copy in float32
    disk = original.path.stat().st_size * 2 if variant.engine == LLAMA else 3 * copies
    memory = 0 if variant.engine == LLAMA else 4 * copies
    free_disk, free = shutil.disk_usage(folder).free, free_memory()
    if disk > free_disk:
        raise ResourceError(
            f"the cache must have room to make {variant.name}",
            f"{free_disk >> 20} MiB free, {disk >> 20} MiB needed",
            "free some, or set FLATOUT_CACHE to a folder on another disk",
        )
    if 0 < free < memory:
        raise ResourceError(
            f"making {variant.name} needs about {memory / 1e9:.1f} GB of memory",
            f"{free / 1e9:.1f} GB free",
            f"leave {variant.engine} out of --against",
        )
