"""Safetensors in and out, against the library itself; every kind of damage gives one ModelFileError."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tests.files import only_flatout_errors

from flatout.core.safetensors import open_safetensors, write_safetensors
from flatout.errors import ModelFileError, ResourceError, UnsupportedModelError

DTYPES = ["u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8", "?"]
NUMPY_NAMES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "I8": "|i1"}


def header_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def tensors() -> st.SearchStrategy[dict[str, np.ndarray]]:
    shapes = npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
    arrays = st.sampled_from(DTYPES).flatmap(lambda d: npst.arrays(np.dtype(d), shapes))
    names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
    return st.dictionaries(names.filter(lambda n: n != "__metadata__"), arrays, max_size=4)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(tensors())
def test_reads_what_the_library_writes(tmp_path_factory: Any, arrays: dict[str, np.ndarray]) -> None:
    path = tmp_path_factory.mktemp("s") / "a.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    file = open_safetensors(path)
    assert set(file.names) == set(arrays)
    assert file.metadata == {"format": "pt"}
    for name, array in arrays.items():
        assert file.shape(name) == array.shape
        np.testing.assert_array_equal(file.array(name), array)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(tensors())
def test_the_library_reads_what_is_written(tmp_path_factory: Any, arrays: dict[str, np.ndarray]) -> None:
    path = tmp_path_factory.mktemp("s") / "a.safetensors"
    write_safetensors(path, arrays, {"note": "é"})
    loaded = safetensors.numpy.load_file(path)
    assert set(loaded) == set(arrays)
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"note": "é"}
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert (8 + length) % 64 == 0


def test_float_types_become_float32(tmp_path: Path) -> None:
    values = np.array([0.0, -0.0, 1.0, -2.5, 3.140625, 65504.0, np.inf, -np.inf], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)  # all but 65504 are bfloat16 numbers
    path = tmp_path / "a.safetensors"
    write_safetensors(
        path,
        {
            "f32": values,
            "f16": values.astype(np.float16),
            "f64": values.astype(np.float64),
            "bf16": (bits, "BF16"),
            "i32": np.arange(3, dtype=np.int32),
        },
    )
    file = open_safetensors(path)
    assert [file.dtype(n) for n in file.names] == ["F32", "F16", "F64", "BF16", "I32"]
    for name in ("f32", "f16", "f64"):
        assert file.float32(name).dtype == np.float32
        np.testing.assert_array_equal(file.float32(name), values)
    np.testing.assert_array_equal(np.delete(file.float32("bf16"), 5), np.delete(values, 5))
    assert file.array("bf16").dtype == np.uint16
    loaded = dict(safetensors.deserialize(path.read_bytes()))
    assert loaded["bf16"]["dtype"] == "BF16"
    with pytest.raises(
        UnsupportedModelError, match=r"plain weights are F32.*I32 for i32 in .*a\.safetensors"
    ):
        file.float32("i32")
    with pytest.raises(ModelFileError, match=r"every weight must be in the file.*no tensor missing"):
        file.array("missing")


def test_non_contiguous_and_big_endian_arrays_are_written_right(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"t": array.T, "b": array.astype(">f4"), "s": array[:, 1:3]})
    loaded = safetensors.numpy.load_file(path)
    np.testing.assert_array_equal(loaded["t"], array.T)
    np.testing.assert_array_equal(loaded["b"], array)
    np.testing.assert_array_equal(loaded["s"], array[:, 1:3])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "must not be empty", id="empty"),
        pytest.param(b"1234567", "8-byte header length", id="seven-bytes"),
        pytest.param(struct.pack("<Q", 1 << 63) + b"{}", "header's length", id="absurd-header-length"),
        pytest.param(header_bytes({}, length=3), "header's length", id="header-past-the-end"),
        pytest.param(header_bytes(b"\xff\xfe{}"), "valid JSON", id="not-utf8"),
        pytest.param(header_bytes(b"{" * 40000), "valid JSON", id="not-json"),
        pytest.param(header_bytes(b"[" * 40000), "valid JSON", id="deep-json"),
        pytest.param(header_bytes(b"1" * 5000), "valid JSON", id="endless-number"),
        pytest.param(header_bytes([1]), "JSON object", id="list"),
        pytest.param(header_bytes(b'{"a":1,"a":2}'), "repeat a key.*found: a in", id="duplicate-name"),
        pytest.param(header_bytes({"__metadata__": {"a": 1}}), "map names to strings", id="metadata"),
        pytest.param(header_bytes({"a": 1}), "dtype, shape and data_offsets", id="entry-not-an-object"),
        pytest.param(
            header_bytes({"a": {"dtype": "F32"}}), "dtype, shape and data_offsets", id="keys-missing"
        ),
        pytest.param(header_bytes({"a": entry("F4")}, b"x" * 8), "tensor types", id="unknown-type"),
        pytest.param(header_bytes({"a": entry(["F32"])}, b"x" * 8), "tensor types", id="type-not-a-string"),
        pytest.param(
            header_bytes({"a": entry(shape=[-2])}, b"x" * 8), "a shape is a list", id="negative-size"
        ),
        pytest.param(
            header_bytes({"a": entry(shape=[True])}, b"x" * 8), "a shape is a list", id="boolean-size"
        ),
        pytest.param(
            header_bytes({"a": entry(shape=[1] * 65)}, b"x" * 4), "a shape is a list", id="65-dimensions"
        ),
        pytest.param(
            header_bytes({"a": entry(shape=[1 << 32, 1 << 32])}, b"x" * 8),
            "must span dtype x shape",
            id="overflow",
        ),
        pytest.param(
            header_bytes({"a": entry(offsets=[8, 0])}, b"x" * 8), "must span", id="reversed-offsets"
        ),
        pytest.param(
            header_bytes({"a": entry(offsets=[0, 8, 9])}, b"x" * 8), "two positions", id="three-offsets"
        ),
        pytest.param(
            header_bytes({"a": entry(offsets=[0, 1 << 70])}, b"x" * 8), "two positions", id="huge-offset"
        ),
        pytest.param(header_bytes({"a": entry()}, b"x" * 7), "is it truncated", id="truncated"),
        pytest.param(header_bytes({"a": entry()}, b"x" * 9), "is it truncated", id="trailing-bytes"),
        pytest.param(
            header_bytes({"a": entry(), "b": entry(offsets=[4, 12])}, b"x" * 12),
            "gap or overlap",
            id="overlap",
        ),
        pytest.param(header_bytes({"a": entry(offsets=[4, 12])}, b"x" * 12), "gap or overlap", id="gap"),
    ],
)
def test_damage_gives_one_error_that_names_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises((ModelFileError, UnsupportedModelError), match=rf"(?s){message}.*") as caught:
        open_safetensors(path)
    assert str(path) in str(caught.value)
    assert caught.value.remedy
    assert len(str(caught.value)) < 700


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, rule in ((tmp_path / "none", "exist"), (tmp_path, "regular"), (tmp_path / "pipe", "regular")):
        with pytest.raises(ModelFileError, match=rule):
            open_safetensors(path)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(data=st.data())
def test_fuzz_only_flatout_errors_escape(tmp_path_factory: Any, data: st.DataObject) -> None:
    """Random bytes, cut files, files with bytes changed, and JSON headers of any shape."""
    sound = header_bytes({"a": entry(), "b": entry("BF16", (2, 3), (8, 20))}, b"y" * 20)
    junk = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    )
    fields = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "I8"]) | junk,
            "shape": st.lists(st.integers(-1, 4) | junk, max_size=3) | junk,
            "data_offsets": st.lists(st.integers(-1, 40) | junk, max_size=3) | junk,
        }
    )
    changes = st.lists(st.tuples(st.integers(0, len(sound) - 1), st.integers(0, 255)), min_size=1, max_size=4)
    content = data.draw(
        st.binary(max_size=200)
        | st.integers(0, len(sound) - 1).map(lambda cut: sound[:cut])
        | changes.map(lambda c: mutated(sound, c))
        | st.dictionaries(st.text(max_size=3), fields | junk, max_size=3).map(
            lambda h: header_bytes(h, b"z" * 24)
        )
    )
    path = tmp_path_factory.mktemp("fuzz", numbered=True) / "f.safetensors"
    path.write_bytes(content)
    with only_flatout_errors():
        file = open_safetensors(path)
        for name in file.names:
            assert file.array(name).shape == file.shape(name)
            if file.dtype(name) in ("F16", "BF16", "F32"):
                file.float32(name)
    path.unlink()


def mutated(content: bytes, changes: list[tuple[int, int]]) -> bytes:
    out = bytearray(content)
    for place, value in changes:
        out[place] = value
    return bytes(out)


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": np.ones(3, np.float32)})
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"output must be writable.*No space left"):
        write_safetensors(path, {"x": np.zeros(3, np.float32)})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_unwritable_folder_and_unknown_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="output must be writable"):
        write_safetensors(tmp_path / "none" / "a.safetensors", {"x": np.ones(1)})
    with pytest.raises(ModelFileError, match=r"x must have a type that safetensors holds.*complex128"):
        write_safetensors(tmp_path / "a.safetensors", {"x": np.ones(1, complex)})
    with pytest.raises(ModelFileError, match="x must have a type"):
        write_safetensors(tmp_path / "a.safetensors", {"x": (np.ones(1, np.float32), "BF16")})
    assert list(tmp_path.iterdir()) == []
