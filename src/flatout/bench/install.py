"""Environments of the peers: each is made once, in the cache, with the versions named here.

llama.cpp is built from source for this machine's instructions: prebuilt wheels hold the least common ones,
which would be unfair to it. The wheels of OpenVINO, ONNX Runtime and CTranslate2 choose their kernels at run
time.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import venv
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from flatout.bench.peers import CTRANSLATE2, LLAMA, OPENVINO, TRANSFORMERS, Listener, environment
from flatout.core.files import read_json_object, sha256_of, shown, write_bytes
from flatout.core.sources import cache_dir, lock
from flatout.errors import BackendError, FlatoutError, ResourceError
from flatout.hardware.detect import available_cores, detect

LLAMA_PACKAGE = "llama-cpp-python==0.3.36"
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
OPENVINO_PACKAGES = (
    "openvino==2026.4.1",
    "nncf==3.4.0",
    "transformers==5.5.4",
    "huggingface-hub==1.21.0",
    "requests==2.34.2",
    "torch==2.13.0",
    "numpy==2.4.6",
)
OPTIMUM = ("optimum-intel==2.2.0", "optimum==2.3.0")
"""Installed without what they ask for: an export needs no torchvision, whose wheel may not fit torch's."""

ONNXRUNTIME_PACKAGES = (
    "onnxruntime==1.31.1",
    "onnxruntime-genai==0.18.0",
    "onnx==1.23.2",
    "onnx-ir==1.1.0",
    "transformers==5.23.0",
    "torch==2.13.0",
    "numpy==2.4.6",
)
CTRANSLATE2_PACKAGES = (
    "ctranslate2==4.8.5",
    "transformers==5.5.4",
    "torch==2.13.0",
    "numpy==2.4.6",
)
_PRELUDE = Path(__file__).parent / "workers" / "tile_config.h"


def install(peer: str, listen: Listener) -> Path:
    """The Python interpreter that runs `peer`, after installing what it needs. Raises BackendError,
    ResourceError."""
    if peer == TRANSFORMERS:
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise BackendError(
                "the peer transformers must be installed", "not there", "pip install 'flatout[baselines]'"
            ) from error
        return Path(sys.executable)
    folder = cache_dir() / "peers" / peer
    folder.parent.mkdir(parents=True, exist_ok=True)
    made_of = contents(peer)
    python, proof = folder / "bin" / "python", folder / "installed.json"
    with lock(folder.parent / f"{peer}.lock"):
        if not (python.exists() and _holds(proof, made_of)):
            _check(peer, folder.parent)
            shutil.rmtree(folder, ignore_errors=True)
            listen(f"making an environment for {peer}", 0, 1)
            _make_environment(peer, folder)
            _fill(peer, python, folder / "install.log", listen)
            write_bytes(proof, json.dumps(made_of, indent=1).encode())
    return python


def contents(peer: str) -> dict[str, object]:
    """What an environment of `peer` is made of; it is made again when this changes."""
    if peer == LLAMA:
        machine = detect()
        return {
            "package": LLAMA_PACKAGE,
            "build": [*LLAMA_BUILD, sha256_of([_PRELUDE])],
            "processor": [machine.name, *machine.features],
        }
    packages = [package for call in pip_arguments(peer) for package in call if not package.startswith("--")]
    return {"packages": packages, "python": platform.python_version()}


def pip_arguments(peer: str) -> list[list[str]]:
    """What `pip install` is called with, one call after the other."""
    if peer == LLAMA:  # a cached wheel may have been built for less
        return [["--no-cache-dir", "--verbose", "--no-binary=llama-cpp-python", LLAMA_PACKAGE]]
    if peer == OPENVINO:
        return [[*OPENVINO_PACKAGES], ["--no-deps", *OPTIMUM]]
    return [[*(CTRANSLATE2_PACKAGES if peer == CTRANSLATE2 else ONNXRUNTIME_PACKAGES)]]


def _holds(proof: Path, made_of: dict[str, object]) -> bool:
    try:
        return read_json_object(proof) == made_of
    except FlatoutError:
        return False


def _make_environment(peer: str, folder: Path) -> None:
    try:
        venv.create(folder, with_pip=True)
    except subprocess.CalledProcessError as error:  # Debian splits ensurepip off
        raise BackendError(
            f"{peer} needs a virtual environment with pip",
            shown(str(error), 200),
            "apt-get install python3-venv",
        ) from error


def _check(peer: str, folder: Path) -> None:
    """Raise unless an installation can succeed."""
    compilers = ("c++", "g++", "clang++")
    if peer == LLAMA and not any(shutil.which(compiler) for compiler in compilers):
        raise BackendError(
            "llama.cpp is built from source, which needs a C++ compiler", "none", "apt-get install g++"
        )
    needed, free = 1 if peer == LLAMA else 3, shutil.disk_usage(folder).free
    if free < needed << 30:
        raise ResourceError(
            f"installing {peer} needs about {needed} GiB in the cache folder",
            f"{free >> 20} MiB free",
            "free some, or set FLATOUT_CACHE to a folder on another disk",
        )


def _fill(peer: str, python: Path, log: Path, listen: Listener) -> None:
    """Install the packages of `peer` into its environment."""
    stage = "building llama.cpp, once" if peer == LLAMA else f"installing {peer}, once"
    env = environment(peer)
    if peer == LLAMA:
        env |= {
            "CMAKE_ARGS": " ".join(LLAMA_BUILD),
            "CXXFLAGS": f'-include "{_PRELUDE}"',
            "CMAKE_BUILD_PARALLEL_LEVEL": str(available_cores()),
        }
    calls = pip_arguments(peer)
    for done, arguments in enumerate(calls):
        listen(stage, done, len(calls))
        command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
        run_build(command, env, log, lambda *progress: listen(stage, *progress))


def run_build(
    command: list[str], env: dict[str, str], log: Path, progress: Callable[[int, int], None]
) -> None:
    """Run a build in a session of its own, killed as a whole on Ctrl-C; its output is added to `log`.

    progress: of the "[12/140]" that ninja prints. Raises BackendError quoting the last error line.
    """
    lines: list[str] = []
    with log.open("a", encoding="utf-8") as file:
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
