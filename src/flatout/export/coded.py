"""A model folder with entropy-coded weights for transfer, and the ordinary folder back (core/coded.py).

Everything else in the folder is copied as it is. flatout runs the coded folder directly, decoding each weight
when it is loaded; other programs need it decoded first. The folder is put in place by a rename at the end,
and every file was read back and compared before.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from flatout.core.artifact import MANIFEST, check_output, is_artifact
from flatout.core.coded import KEY, decoded, write_coded
from flatout.core.files import corrupt, read_json_object, sha256_of, write_bytes
from flatout.core.safetensors import open_safetensors, write_safetensors
from flatout.errors import ConfigError, ResourceError


def code_folder(folder: Path, out: Path) -> tuple[int, int]:
    """Write `folder` as `out` with its weights coded; returns bytes of its weight files before and after.

    An artifact's flatout.json gets the new hashes. Raises ConfigError for a folder without safetensors or
    coded already, and for an `out` that holds anything else.
    """
    return _convert(folder, out, to_coded=True)


def decode_folder(folder: Path, out: Path) -> tuple[int, int]:
    """The inverse of `code_folder`: a folder that any program reads."""
    return _convert(folder, out, to_coded=False)


def _convert(folder: Path, out: Path, to_coded: bool) -> tuple[int, int]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError("coding needs a folder with safetensors", str(folder), "such a folder")
    if any((KEY in open_safetensors(file).metadata) == to_coded for file in files):
        word = "already" if to_coded else "not"
        raise ConfigError(
            "a folder is coded once and decoded once", f"{folder} is {word} coded", "it as it is"
        )
    out = out.absolute()
    check_output(out)
    if out.exists() and out.samefile(folder):
        raise ConfigError("the output is another folder", str(out), "another name")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
            made = Path(temporary) / "model"
            shutil.copytree(folder, made, ignore=shutil.ignore_patterns("*.safetensors"))
            for file in files:
                if to_coded:
                    write_coded(made / file.name, open_safetensors(file))
                else:
                    _write_decoded(made / file.name, file)
            if is_artifact(made):
                _renew_hashes(made, [file.name for file in files])
            after = sum((made / file.name).stat().st_size for file in files)
            if out.exists():
                out.rename(Path(temporary) / "old")
            made.rename(out)
    except OSError as error:
        raise ResourceError("the output must be writable", f"{out}: {error}", "another folder") from error
    return sum(file.stat().st_size for file in files), after


def _write_decoded(path: Path, coded: Path) -> None:
    file = decoded(open_safetensors(coded))
    write_safetensors(path, {n: (file.array(n), file.dtype(n)) for n in file.names}, file.metadata)
    again = open_safetensors(path)
    for name in file.names:
        if again.array(name).tobytes() != file.array(name).tobytes():
            raise corrupt(path, "a decoded file must read back as it was written", name)


def _renew_hashes(folder: Path, names: list[str]) -> None:
    manifest = read_json_object(folder / MANIFEST)
    manifest["files"] = manifest["files"] | {name: sha256_of([folder / name]) for name in names}
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(folder / MANIFEST, text.encode())
