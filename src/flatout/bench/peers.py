"""The engines that flatout is measured against: where they live, which formats they run, how they start.

llama.cpp gets a virtual environment in the cache and is built there from source for this machine's
instructions, once: prebuilt wheels hold the least common ones, which would be unfair to it. transformers runs
in flatout's own environment. A GGUF file runs in llama.cpp as it is, and rounded by llama.cpp's own tool to
the formats for which it has its fastest kernels.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import venv
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import flatout
from flatout.bench.worker import LOAD_S, Worker
from flatout.core.checkpoint import Checkpoint
from flatout.core.files import read_json_object, sha256_of, shown, write_bytes
from flatout.core.gguf import open_gguf
from flatout.core.sources import cache_dir, lock
from flatout.errors import BackendError, ConfigError, FlatoutError, ResourceError
from flatout.hardware.detect import available_cores, detect

PEERS = ("llama.cpp", "transformers")
PLANNED = ("openvino", "onnxruntime")

LLAMA = "llama-cpp-python==0.3.36"
LLAMA_BUILD = (
    "-DGGML_NATIVE=ON",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAVA_BUILD=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_TOOLS=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
)
_LLAMA_DISK = 1 << 30  # bytes: sources, objects and the environment
_SCRIPTS = Path(__file__).parent / "workers"
_PRELUDE = _SCRIPTS / "tile_config.h"

Listener = Callable[[str, int, int], None]
"""listener(stage, done, total)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A peer in one format. ftype: what llama.cpp rounds the file to, "" to run it as it is; pure: the
    embedding too."""

    engine: str
    format: str
    ftype: str = ""
    pure: bool = False

    @property
    def name(self) -> str:
        return f"{self.engine} {self.format}"


def parse_peers(text: str) -> tuple[str, ...]:
    """ "llama.cpp,transformers" as names. Raises ConfigError for one that this version does not measure."""
    names = tuple(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
    wrong = [name for name in names if name not in PEERS]
    if wrong or not names:
        planned = [name for name in wrong if name in PLANNED]
        known = f"this version measures {' and '.join(PEERS)}"
        raise ConfigError(
            f"{known}{', not yet ' + ' and '.join(planned) if planned else ''}",
            ", ".join(map(shown, wrong)) or "no peer",
            f"--against {','.join(name for name in names if name in PEERS) or ','.join(PEERS)}",
        )
    return names


def variants(peer: str, original: Checkpoint) -> list[Variant]:
    """The formats `peer` runs this checkpoint in. Raises BackendError when it cannot read the file."""
    if peer == "transformers":
        return [Variant(engine=peer, format="bf16")]
    if original.path.suffix != ".gguf":
        raise BackendError(
            "llama.cpp reads GGUF files", shown(str(original.path), 300), "leave llama.cpp out of --against"
        )
    sizes: Counter[str] = Counter()
    for tensor in open_gguf(original.path).tensors.values():
        sizes[tensor.type] += tensor.nbytes
    stored = sizes.most_common(1)[0][0]
    made = [
        Variant(engine=peer, format="Q4_0", ftype="Q4_0"),
        Variant(engine=peer, format="Q4_0 pure", ftype="Q4_0", pure=True),
        Variant(engine=peer, format="Q8_0", ftype="Q8_0"),
    ]
    as_it_is = Variant(engine=peer, format=f"{stored} as stored")
    return [as_it_is, *(variant for variant in made if variant.format != stored)]


def install(peer: str, listen: Listener) -> Path:
    """The Python interpreter that runs `peer`, after installing what it needs. Raises BackendError,
    ResourceError."""
    if peer == "transformers":
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise BackendError(
                "the peer transformers must be installed", "not there", "pip install 'flatout[baselines]'"
            ) from error
        return Path(sys.executable)
    folder = cache_dir() / "peers" / peer
    folder.parent.mkdir(parents=True, exist_ok=True)
    machine = detect()
    built = {
        "package": LLAMA,
        "build": [*LLAMA_BUILD, sha256_of([_PRELUDE])],
        "processor": [machine.name, *machine.features],
    }
    python, proof = folder / "bin" / "python", folder / "installed.json"
    with lock(folder.parent / f"{peer}.lock"):
        if not (python.exists() and _holds(proof, built)):
            _check_build(folder.parent)
            shutil.rmtree(folder, ignore_errors=True)
            listen("making an environment for llama.cpp", 0, 1)
            _make_environment(folder)
            _build_llama(python, folder / "install.log", listen)
            write_bytes(proof, json.dumps(built, indent=1).encode())
    return python


def launch(variant: Variant, python: Path) -> Worker:
    """A worker process of `variant`, nothing loaded yet; `load` it from `model_file`."""
    script = "huggingface" if variant.engine == "transformers" else "llama"
    return Worker(
        variant.name, [str(python), str(_SCRIPTS / "serve.py"), script], environment(variant.engine)
    )


def model_file(variant: Variant, python: Path, original: Checkpoint, threads: int, listen: Listener) -> Path:
    """The file that `variant` loads: the original, or a rounded copy of it, made once and kept in the
    cache."""
    if not variant.ftype:
        return original.path
    folder = cache_dir() / "peers" / "llama.cpp-models"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{original.sha256[:32]}-{variant.format.replace(' ', '-')}.gguf"
    if path.exists():
        return path
    needed, free = original.path.stat().st_size * 2, shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            "the cache must have room for a rounded copy of the model",
            f"{free >> 20} MiB free, {needed >> 20} MiB needed",
            "free some, or set FLATOUT_CACHE to a folder on another disk",
        )
    listen(f"rounding to {variant.format}", 0, 1)
    with ExitStack() as stack:
        worker = stack.enter_context(launch(variant, python))
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix=".round-")))
        arguments = {"ftype": variant.ftype, "pure": variant.pure, "threads": threads}
        target = temporary / path.name
        worker.request("quantize", LOAD_S, source=str(original.path), target=str(target), **arguments)
        target.replace(path)
    return path


def environment(peer: str) -> dict[str, str]:
    """Variables for a worker: ours without those that change how its interpreter or its threads behave.

    How threads wait is left to the libraries' default: they spin for some milliseconds, which a step needs,
    and then sleep, so that an engine that waits for its turn takes no time from the others.
    """
    dropped = ("PYTHON", "OMP_", "GOMP_", "KMP_", "VIRTUAL_ENV")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    if peer == "transformers":
        places = [str(Path(flatout.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        kept["PYTHONPATH"] = os.pathsep.join(place for place in places if place)
    return kept


def _holds(proof: Path, built: Mapping[str, object]) -> bool:
    try:
        return read_json_object(proof) == built
    except FlatoutError:
        return False


def _make_environment(folder: Path) -> None:
    try:
        venv.create(folder, with_pip=True)
    except subprocess.CalledProcessError as error:  # Debian splits ensurepip off
        raise BackendError(
            "llama.cpp needs a virtual environment with pip",
            shown(str(error), 200),
            "apt-get install python3-venv",
        ) from error


def _check_build(folder: Path) -> None:
    """Raise unless a build can succeed."""
    if shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise BackendError(
            "llama.cpp is built from source, which needs a C++ compiler", "none", "apt-get install g++"
        )
    free = shutil.disk_usage(folder).free
    if free < _LLAMA_DISK:
        raise ResourceError(
            "building llama.cpp needs about 1 GiB in the cache folder", f"{free >> 20} MiB free", "free some"
        )


def _build_llama(python: Path, log: Path, listen: Listener) -> None:
    """pip install from source. The cache is not used: a wheel in it may have been built for less."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--verbose", "--no-binary=llama-cpp-python", LLAMA]
    env = environment("llama.cpp") | {
        "CMAKE_ARGS": " ".join(LLAMA_BUILD),
        "CXXFLAGS": f'-include "{_PRELUDE}"',
        "CMAKE_BUILD_PARALLEL_LEVEL": str(available_cores()),
    }
    run_build(command, env, log, lambda done, total: listen("building llama.cpp, once", done, total))


def run_build(
    command: list[str], env: dict[str, str], log: Path, progress: Callable[[int, int], None]
) -> None:
    """Run a build in a session of its own, killed as a whole on Ctrl-C; its output goes to `log`.

    progress: of the "[12/140]" that ninja prints. Raises BackendError quoting the last error line.
    """
    lines: list[str] = []
    with log.open("w", encoding="utf-8") as file:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise BackendError("the peer's installer must start", shown(str(error), 200)) from error
        try:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                lines = [*lines[-200:], line.strip()]
                step = re.match(r"\s*\[(\d+)/(\d+)\]", line)
                if step:
                    progress(int(step[1]), int(step[2]))
            code = process.wait()
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
    if code != 0:
        errors = [line for line in lines if "error" in line.lower()] or lines or [f"exit code {code}"]
        raise BackendError("the peer must install", shown(errors[-1], 200), f"read {log}")
