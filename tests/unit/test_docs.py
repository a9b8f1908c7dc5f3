"""README and docs name what exists: paths, functions, commands, links, figures; and README's example runs."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest
from benchmarks import readme_table, record
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_imports import LEVEL
from tests.toy import ByteTokenizer, ToyRunner

import flatout
from flatout.cli.main import COMMANDS
from flatout.core.formats import METHODS
from flatout.engine.engine import Engine

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = ROOT / "src" / "flatout"
MADE = ("demo/", ".venv/", "build/")  # what make makes
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"(?P<path>[\w./-]+/[\w.-]*|[\w-]+\.(py|toml|txt|md))(:(?P<name>[A-Za-z_][\w.:]*))?")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def spans(page: Path) -> list[str]:
    """What stands in backquotes, line breaks inside a span joined."""
    return [" ".join(span.split()) for span in SPAN.findall(re.sub(r"(?<=[\w,])\n\s*", " ", prose(page)))]


def located(path: str) -> Path | None:
    """The file or folder that a page calls `path`: from the root, or from the package."""
    return next((base / path for base in (ROOT, SOURCES) if (base / path).exists()), None)


def python_names(path: Path) -> set[str]:
    """Functions, classes, Class.method and assigned names of a module."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def defines(path: Path, name: str) -> bool:
    if path.suffix == ".py":
        return name in python_names(path)
    definition = rf"^(?!\s*//)[\w:<>*&\s]*\b{re.escape(name)}\([^;]*?\)[\w\s]*{{"
    return re.search(definition, path.read_text(encoding="utf-8"), re.MULTILINE) is not None


def test_a_missing_name_is_noticed() -> None:
    """The checks below would be worth nothing if these passed."""
    assert located("core/nothing.py") is None
    assert not defines(SOURCES / "core" / "spec.py", "ModelSpec.nothing")
    assert not defines(SOURCES / "kernels" / "cpu" / "forward.cpp", "Model::nothing")
    assert not defines(SOURCES / "kernels" / "cpu" / "forward.cpp", "multiply_panels"), (
        "a call, no definition"
    )
    assert list(unknown_words("flatout optimise x", {"demo"}))
    assert list(unknown_words("flatout optimize x --no-such-flag", {"demo"}))
    assert list(unknown_words("make nothing", {"demo"}))


@pages
def test_paths_and_functions_exist(page: Path) -> None:
    wrong = []
    for span in spans(page):
        match = PATH.fullmatch(span)
        if match is None or span.startswith((*MADE, "/")) or "NAME" in span or "THEME" in span:
            continue
        if span.partition("/")[2] in METHODS:  # a recipe
            continue
        path = located(match["path"])
        if path is None or (match["name"] and not defines(path, match["name"])):
            wrong.append(span)
    assert wrong == [], "no such file or function"


def command_lines(page: Path) -> Iterator[str]:
    for language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "sh":
            yield from code.splitlines()
    yield from spans(page)


def options(command: str) -> set[str]:
    """Every option of a flatout command, from its annotations."""
    function = getattr(importlib.import_module(f"flatout.cli.{command}"), command)
    hints = get_type_hints(function, include_extras=True)
    found = {"--help"}
    for name in inspect.signature(function).parameters:
        (info,) = hints[name].__metadata__
        declared = [info.default, *(getattr(info, "param_decls", None) or ())]
        given = [part for d in declared if isinstance(d, str) for part in d.split("/") if part[:2] == "--"]
        found |= set(given or ["--" + name.replace("_", "-")])
    return found


def unknown_words(line: str, targets: set[str]) -> Iterator[str]:
    """What a command line names that does not exist; nothing for a line that is no command of ours."""
    words = shlex.split(line) if line.count('"') % 2 == 0 and line.count("'") % 2 == 0 else line.split()
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if not words:
        return
    first, rest = words[0], words[1:]
    if first == "make":
        yield from (word for word in rest if "=" not in word and word not in targets)
    elif first.endswith("python") and rest[:2] == ["-m", "flatout.cli.main"]:
        yield from unknown_words(shlex.join(["flatout", *rest[2:]]), targets)
    elif first.endswith("python") and rest and rest[0].endswith(".py") and not (ROOT / rest[0]).is_file():
        yield rest[0]
    elif Path(first).name == "flatout" and rest and rest[0] != "--version":
        if rest[0] not in COMMANDS:
            yield rest[0]
            return
        yield from {word for word in rest if word.startswith("--")} - options(rest[0])


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z0-9]+):(?!=)", text, re.MULTILINE))


@pages
def test_commands_exist(page: Path) -> None:
    targets = make_targets()
    wrong = {line: names for line in command_lines(page) if (names := list(unknown_words(line, targets)))}
    assert wrong == {}


def test_readme_has_its_two_commands_and_all_of_ours() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [code for language, code in FENCE.findall(text) if language == "sh"]
    assert blocks[0].split("\n")[:2] == ["make demo", "make test"]
    assert {"demo", "test"} <= make_targets()
    rows = re.findall(r"^\| `flatout (\w+)", text, re.MULTILINE)
    assert sorted(rows) == sorted(COMMANDS)


def anchors(page: Path) -> set[str]:
    """Fragments of a page's headings, as code hosts make them."""
    heads = re.findall(r"^#+ +(.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pages
def test_links_resolve(page: Path) -> None:
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue  # another site
        name, _, fragment = target.partition("#")
        path = (page.parent / name) if name else page
        if not path.exists() or (fragment and fragment not in anchors(path)):
            wrong.append(target)
    assert wrong == []


def test_every_page_is_reached_from_readme() -> None:
    seen, queue = set(), [ROOT / "README.md"]
    while queue:
        page = queue.pop()
        if page in seen or page.suffix != ".md" or not page.exists():
            continue
        seen.add(page)
        links = re.findall(r"\]\(([^)#\s]+)", prose(page))
        queue += [(page.parent / link).resolve() for link in links]
    assert set(PAGES) <= seen


def test_readme_says_what_its_results_file_says() -> None:
    file, block = readme_table.cited((ROOT / "README.md").read_text(encoding="utf-8"))
    assert block == readme_table.block(file), "run python benchmarks/readme_table.py"


def result() -> dict[str, object]:
    """A result with the fields that records and the table use."""
    column = {
        "prefill_tokens_per_s": 2918.0,
        "decode_tokens_per_s": 23.3,
        "floor_fraction": {"prefill": 0.1, "decode": 0.17},
        "memory_bytes": 339_000_000,
        "perplexity": None,
        "loss": None,
        "recipe": "bf16",
    }
    measured = column | {"perplexity": 37.158, "loss": 0.0036, "recipe": "w8a8-g64"}
    return {
        "command": "optimize",
        "date": "2026-01-02 03:04 UTC",
        "hardware": {"name": "Some(R) Chip(TM) 9000 Processor @ 3 GHz", "cores": 2, "kind": "cpu"},
        "versions": {"python": "3.11"},
        "model": {"name": "a-model", "path": "/home/someone/a-model.gguf"},
        "request": {"workload": {"prompt": 512, "output": 64, "batch": 1}},
        "baseline": column,
        "engine_original": measured | {"loss": 0.0001},
        "optimized": measured,
        "speedup": {"decode": 11.49, "prefill": 0.96},
        "speedup_interval": {"decode": [10.7, 12.2], "prefill": [0.94, 0.98]},
        "races": {"baseline": {"a": "transformers 5.0 bf16 (2 threads)"}},
        "quality": {
            "upper_bound": 0.0049,
            "margin": 0.01,
            "verdict": "cannot_decide",
            "alpha_k": 0.025,
            "tokens": 28652,
            "clusters": 64,
        },
    }


def test_a_result_becomes_a_record_and_a_table() -> None:
    kept = record.make_record(result(), "make demo", "a" * 40 + "-dirty")
    assert kept["date"] == "2026-01-02"
    assert "/home" not in json.dumps(kept)
    assert kept["result"]["model"]["path"] == "a-model.gguf"
    name = record.file_name("demo", result(), kept["date"])
    assert name == "demo_some-chip-9000-2c_2026-01-02.json"
    table = readme_table.render(name, kept)
    assert (
        "| decode, tokens/s | 23.3 (17 % of floor) | 23.3 (17 % of floor) | 23.3 (17 % of floor) |" in table
    )
    assert "| perplexity | - | 37.158 | 37.158 |" in table
    assert "| loss against the original in fp32 | - | +0.01 % | +0.36 % |" in table
    assert "decode 11.5× (10.7× to 12.2×)" in table
    assert "cannot decide; the loss is at most +0.49 % at a confidence of 97.5 %" in table
    assert "aaaaaaaaaa-dirty" in table


@pytest.mark.parametrize("change", [{"error": {}}, {"date": None}, {"hardware": None}])
def test_a_failed_run_is_no_record(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="a result has hardware and a date"):
        record.make_record(result() | change, "make demo", "a")


def test_a_record_needs_the_command_line() -> None:
    with pytest.raises(ValueError, match="which command made it"):
        record.make_record(result(), None, "a")
    whole = result() | {"command": "flatout bench x --against y"}
    assert record.make_record(whole, None, "a")["command"] == "flatout bench x --against y"
    far = record.make_record(result() | {"command": "flatout bench /home/someone/x --out a/b"}, None, "a")
    assert far["command"] == far["result"]["command"] == "flatout bench x --out a/b"


def test_results_files_say_how_they_were_made() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert {"command", "commit", "date", "versions"} <= set(content), path.name
        assert re.fullmatch(r"[a-z]+_[\w.-]+_\d{4}-\d{2}-\d{2}\.json", path.name)
        assert content["date"] == path.stem.rpartition("_")[2], path.name


def test_the_table_of_rooms_is_the_import_order() -> None:
    rows = re.findall(r"^\| (`[^|]*`) \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    named = [[name.removesuffix(".py").strip("/") for name in re.findall(r"`([^`]+)`", row)] for row in rows]
    rooms = {path.name for path in SOURCES.iterdir() if (path / "__init__.py").exists()} - {"data"}
    levels: dict[int, list[str]] = {}
    for room in sorted(rooms | {"errors"}, key=lambda room: LEVEL[room]):
        levels.setdefault(LEVEL[room], []).append(room)
    assert [sorted(row) for row in named] == list(map(sorted, levels.values()))


def test_the_readme_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def load(model: str) -> Engine:
        asked.append(model)
        return Engine(ToyRunner(num_pages=256), ByteTokenizer())

    monkeypatch.setattr("flatout.compress.encoder.load", load)
    (code,) = [
        code for language, code in FENCE.findall((ROOT / "README.md").read_text()) if language == "python"
    ]
    assert len(code.strip().splitlines()) <= 8
    exec(compile(code, "README.md", "exec"), {})
    assert asked == ["demo/artifact"]
    assert capsys.readouterr().out


def test_what_readme_calls_is_public() -> None:
    named = set(re.findall(r"`?flatout\.(\w+)\(", (ROOT / "README.md").read_text()))
    assert named
    assert named <= set(flatout.__all__)


def test_pins_cover_what_is_asked_for() -> None:
    """Every requirement of pyproject.toml is pinned, at a version that meets it."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    asked = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    asked += [line for extra in project["project"]["optional-dependencies"].values() for line in extra]
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        assert pins[name] in requirement.specifier, f"{name} {pins[name]} does not meet {requirement}"
