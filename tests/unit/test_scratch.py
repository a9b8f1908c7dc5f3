"""Temporary files and folders: what a killed process left goes, what a living one writes stays."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flatout.core import scratch
from flatout.core.scratch import remove_leftovers, replace_folder, scratch_folder, temporary_file


def test_leftovers_of_ended_processes_go(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from flatout.core.scratch import *\n"
        "with scratch_folder(Path(sys.argv[1]), '.work-') as folder, "
        "temporary_file(Path(sys.argv[1]) / 'x') as (name, file):\n"
        "    (folder / 'half').write_text('half')\n"
        "    os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    remove_leftovers(tmp_path)
    assert [path.name[:6] for path in tmp_path.iterdir()] == [".work-"]
    with scratch_folder(tmp_path, ".work-") as folder:
        assert list(tmp_path.iterdir()) == [folder]
    assert list(tmp_path.iterdir()) == []


def test_what_is_being_written_stays(tmp_path: Path) -> None:
    with temporary_file(tmp_path / "x") as (name, file), scratch_folder(tmp_path, ".work-") as folder:
        file.write(b"1")
        remove_leftovers(tmp_path)
        remove_leftovers(tmp_path, ".work-*")
        assert name.exists()
        assert folder.exists()
    assert list(tmp_path.iterdir()) == []


def test_other_files_stay_and_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept.tmp").write_text("")
    (tmp_path / ".kept").write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".link.tmp").symlink_to(tmp_path / "elsewhere")
    remove_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_file_system_without_locks_keeps_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(95, "Operation not supported")

    (tmp_path / ".old.tmp").write_text("")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    remove_leftovers(tmp_path)
    assert (tmp_path / ".old.tmp").exists()
    with temporary_file(tmp_path / "x") as (name, _):
        assert name.exists()


@pytest.mark.parametrize("can_exchange", [True, False])
def test_folders_change_places(tmp_path: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_exchange:
        monkeypatch.setattr(scratch, "_exchange", lambda a, b: False)
    new, old = tmp_path / "new", tmp_path / "old"
    new.mkdir()
    (new / "a").write_text("1")
    replace_folder(new, old)
    assert os.listdir(tmp_path) == ["old"]
    new.mkdir()
    (new / "b").write_text("2")
    replace_folder(new, old)
    assert [path.name for path in old.iterdir()] == ["b"]
    assert [path.name for path in new.iterdir()] == ["a"]
    assert sorted(os.listdir(tmp_path)) == ["new", "old"]
