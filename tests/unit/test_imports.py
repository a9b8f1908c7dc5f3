"""The house rule: imports point one way, and light entry points stay light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flatout

SOURCE = Path(flatout.__file__).parent

LEVEL = {
    "errors": 0,
    "_version": 0,
    "core": 1,
    "kernels": 2,
    "hardware": 3,
    "models": 4,
    "engine": 5,
    "perf": 6,
    "compress": 7,
    "train": 7,
    "verify": 7,
    "search": 8,
    "bench": 9,
    "report": 9,
    "export": 9,
    "fpga": 9,
    "serve": 9,
    "cli": 10,
}
DATA_USERS = {"verify", "search", "bench", "cli"}  # data is a leaf: it may use errors only
ANYONE = {"errors", "_version"}
LOWEST_USER_OF_EXTENSION = LEVEL["kernels"]


def imported_modules(path: Path) -> list[tuple[int, str]]:
    """(line, absolute module name) of every import in a file, wherever it stands in the file."""
    found = []
    package = ["flatout", *path.relative_to(SOURCE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            if module == "flatout":
                found += [(node.lineno, f"flatout.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, module))
    return found


def breaks_rule(room: str, target: str) -> str | None:
    """Why `room` may not import `target` (both first folders or top-level modules), or None."""
    if room == target or target in ANYONE:
        return None
    if target == "_cpu":
        allowed = room != "data" and LEVEL[room] >= LOWEST_USER_OF_EXTENSION
        return None if allowed else "only kernels and rooms above may call the extension"
    if target == "data":
        return None if room in DATA_USERS else "only verify, search, bench and cli read the packaged text"
    if room == "data":
        return "data is a leaf"
    if target not in LEVEL:
        return "no such room: a new room needs a level in this test and a sentence in the docs"
    if LEVEL[target] >= LEVEL[room]:
        return "imports point one way"
    return None


def violations() -> list[str]:
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).parts
        room = parts[0].removesuffix(".py")
        if room == "__init__":
            continue  # the public API names every room, lazily
        for line, module in imported_modules(path):
            names = module.split(".")
            if names[0] != "flatout" or len(names) == 1:
                continue
            reason = breaks_rule(room, names[1])
            if reason is not None:
                found.append(f"{'/'.join(parts)}:{line} imports {module}: {reason}")
    return found


def test_imports_point_one_way() -> None:
    assert violations() == []


def test_every_room_has_a_level() -> None:
    rooms = {p.parent.relative_to(SOURCE).parts[0] for p in SOURCE.rglob("*.py") if p.parent != SOURCE}
    assert rooms - {"data"} <= set(LEVEL)


@pytest.mark.parametrize(
    ("room", "target", "allowed"),
    [
        ("core", "errors", True),
        ("core", "kernels", False),
        ("engine", "models", True),
        ("models", "engine", False),
        ("compress", "verify", False),
        ("verify", "compress", False),
        ("train", "verify", False),
        ("verify", "data", True),
        ("compress", "data", False),
        ("data", "core", False),
        ("search", "report", False),
        ("report", "search", True),
        ("cli", "report", True),
        ("bench", "data", True),
        ("bench", "report", False),
        ("core", "_cpu", False),
        ("engine", "_cpu", True),
        ("core", "utils", False),
    ],
)
def test_the_rule_itself(room: str, target: str, allowed: bool) -> None:
    assert (breaks_rule(room, target) is None) == allowed


def test_relative_and_nested_imports_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    room = tmp_path / "core"
    room.mkdir()
    (room / "x.py").write_text(
        "from ..kernels import linear\nfrom flatout import engine\n\ndef f():\n    import flatout.cli.main\n"
    )
    seen = [module for _, module in imported_modules(room / "x.py")]
    assert seen == ["flatout.kernels", "flatout.engine", "flatout.cli.main"]
    assert len(violations()) == 3


def modules_after(code: str) -> set[str]:
    """Names of all modules a fresh interpreter holds after running `code`."""
    script = f"{code}\nimport sys\nprint('\\n'.join(sys.modules), file=sys.stderr)"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    return set(run.stderr.split())


HEAVY = {"torch", "scipy", "transformers", "typer", "rich", "numpy", "jinja2", "pydantic"}


def test_import_flatout_is_light() -> None:
    assert modules_after("import flatout; flatout.__version__") & HEAVY == set()


def test_version_is_light() -> None:
    code = "from flatout.cli.main import main\nassert main(['--version']) == 0"
    assert modules_after(code) & HEAVY == set()


def test_load_imports_no_torch() -> None:
    """The cpu runner's path: everything `flatout run` needs before weights are read."""
    assert modules_after("import flatout; flatout.load") & {"torch", "transformers", "scipy"} == set()


def test_public_names_are_pinned() -> None:
    assert flatout.__all__ == ["__version__", "load", "optimize", "profile", "train", "verify"]
    assert set(flatout.__all__) <= set(dir(flatout))


@pytest.mark.parametrize("name", [n for n in flatout.__all__ if n != "__version__"])
def test_public_names_resolve(name: str) -> None:
    assert callable(getattr(flatout, name))


@pytest.mark.parametrize(("room", "module"), [("verify", "statistics"), ("train", "config")])
def test_a_room_stays_callable_after_it_was_imported(room: str, module: str) -> None:
    modules_after(f"import flatout.{room}.{module}, flatout\nassert callable(flatout.{room})")


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        flatout.optimise  # noqa: B018
