"""The helpers every reader and writer shares."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from flatout.core.files import parse_json_object, read_text, sha256_of, shown, write_atomic, write_bytes
from flatout.errors import ConfigError, ModelFileError, ResourceError


def test_what_is_shown_is_one_short_printable_line() -> None:
    assert shown("blk.0.attn_q.weight") == "blk.0.attn_q.weight"
    assert shown("é\n\ud800\x1b[31m") == r"\xe9\n\ud800\x1b[31m"
    for value in (
        "x" * 10**6,
        "\U0001f642" * 1000,
        list(range(10**6)),
        {"a": [[[[[]]]]] * 9},
        10**4000,
        b"\xff" * 999,
    ):
        text = shown(value)
        assert len(text) <= 80
        assert text.isascii()
        assert text.isprintable()


def test_hash_of_one_file_and_of_several(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"one")
    b.write_bytes(b"two")
    one, two = hashlib.sha256(b"one"), hashlib.sha256(b"two")
    assert sha256_of([a]) == one.hexdigest()
    assert sha256_of([a, b]) == hashlib.sha256(one.digest() + two.digest()).hexdigest()
    assert sha256_of([b, a]) != sha256_of([a, b])


def test_a_written_file_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "a").read_bytes() == b"x"


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def stop(file: BinaryIO) -> None:
        file.write(b"new")
        raise KeyboardInterrupt

    def refuse(file: BinaryIO) -> None:
        raise ConfigError("rule", "value", "remedy")

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, stop)
    with pytest.raises(ConfigError):
        write_atomic(path, refuse)
    with pytest.raises(ResourceError, match=r"must be writable.*try: another folder"):
        write_bytes(path / "below-a-file", b"")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_texts_and_json_have_limits(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert parse_json_object(read_text(path), path) == {"a": 1}
    with pytest.raises(ModelFileError, match=r"at most 7 bytes; found: 8 in .*a\.json"):
        read_text(path, limit=7)
    many = "{" + ",".join(f'"k{i % 99999}":0' for i in range(100000)) + "}"
    with pytest.raises(ModelFileError, match="must not repeat a key; found: k0 in"):
        parse_json_object(many, path)
