"""GGUF in: block types against the package gguf, every kind of damage, fuzzing."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.files import gguf_bytes, info, only_flatout_errors, pair, string

from flatout.core.gguf import open_gguf
from flatout.core.gguf_blocks import BLOCKS, dequantize, native_blocks
from flatout.errors import ModelFileError, UnsupportedModelError

ARCHITECTURE = pair("general.architecture", 8, string("llama"))
HUGE = 1 << 62


@pytest.mark.parametrize("number", BLOCKS, ids=lambda n: BLOCKS[n].name)
@settings(deadline=None, derandomize=True, max_examples=25)
@given(data=st.data())
def test_dequantisation_equals_the_package_gguf_bit_by_bit(number: int, data: st.DataObject) -> None:
    block = BLOCKS[number]
    count = data.draw(st.integers(1, 3)) * (4 if block.elements == 1 else 1)
    size = count * block.bytes
    raw = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(number)).reshape(-1)
        got = dequantize(block.name, raw)
    assert got.dtype == np.float32
    assert got.shape == (count * block.elements,)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
def test_native_codes_are_the_same_numbers(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    values = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    raw = gguf.quants.quantize(values, kind)
    tensor = native_blocks(name, raw.reshape(-1), 5)
    assert tensor is not None
    assert tensor.format.name == name.lower()
    assert tensor.shape == (5, 96)
    assert tensor.scales.dtype == np.float16
    np.testing.assert_array_equal(tensor.dequantize(), gguf.quants.dequantize(raw, kind))


def test_what_has_no_native_form_gives_none() -> None:
    assert native_blocks("Q4_K", np.zeros(144, np.uint8), 1) is None
    assert native_blocks("F32", np.zeros(128, np.uint8), 1) is None
    eight = np.zeros(34, np.uint8)
    assert native_blocks("Q8_0", eight, 1) is not None
    eight[7] = 0x80  # the code -128
    assert native_blocks("Q8_0", eight, 1) is None


def test_reads_what_the_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values: dict[str, Any] = {
        "u8": 200, "i8": -3, "u16": 60000, "i16": -300, "u32": 1 << 31, "i32": -5, "u64": 1 << 63,
        "i64": -(1 << 40),
        "f32": 0.5, "f64": 1e-300, "b": True, "s": "é\n",
    }  # fmt: skip
    adders = {
        "u8": writer.add_uint8, "i8": writer.add_int8, "u16": writer.add_uint16, "i16": writer.add_int16,
        "u32": writer.add_uint32, "i32": writer.add_int32, "u64": writer.add_uint64, "i64": writer.add_int64,
        "f32": writer.add_float32, "f64": writer.add_float64, "b": writer.add_bool, "s": writer.add_string,
    }  # fmt: skip
    for key, value in values.items():
        adders[key](key, value)
    writer.add_array("words", ["a", "", "ü"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("flags", [True, False])
    matrix = np.arange(21, dtype=np.float32).reshape(3, 7)
    half = np.arange(5, dtype=np.float16)
    cube = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    for name, array in (("m", matrix), ("h", half), ("c", cube)):
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = open_gguf(path)
    for key, value in values.items():
        assert file.metadata[key] == value
        assert type(file.metadata[key]) is type(value)
    words = file.metadata["words"]
    assert (list(words), len(words), words[-1], words[:2]) == (["a", "", "ü"], 3, "ü", ["a", ""])
    with pytest.raises(IndexError):
        words[3]
    assert file.metadata["numbers"].tolist() == [1, -2, 3]
    assert file.metadata["flags"] == [True, False]
    assert {n: (t.type, t.shape) for n, t in file.tensors.items()} == {
        "m": ("F32", (3, 7)),
        "h": ("F16", (5,)),
        "c": ("F32", (2, 3, 4)),
    }
    np.testing.assert_array_equal(file.float32("m"), matrix)
    np.testing.assert_array_equal(file.float32("h"), half.astype(np.float32))
    np.testing.assert_array_equal(file.float32("c"), cube)
    assert file.native("m") is None
    with pytest.raises(ModelFileError, match=r"every weight must be in the file.*no tensor nothing"):
        file.float32("nothing")


def array_pair(key: str, kind: int, count: int, payload: bytes = b"") -> bytes:
    return pair(key, 9, struct.pack("<IQ", kind, count) + payload)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "must not be empty", id="empty"),
        pytest.param(b"GG", "header must end inside", id="two-bytes"),
        pytest.param(gguf_bytes(magic=b"GGML"), "starts with", id="bad-magic"),
        pytest.param(gguf_bytes(version=1), "versions 2 and 3", id="version-1"),
        pytest.param(gguf_bytes(version=3 << 24), "little-endian", id="big-endian"),
        pytest.param(gguf_bytes(tensors=HUGE), "number of tensors must be at most", id="absurd-tensor-count"),
        pytest.param(gguf_bytes(metadata=HUGE), "number of metadata pairs", id="absurd-pair-count"),
        pytest.param(gguf_bytes([ARCHITECTURE], metadata=2), "header must end inside", id="pair-missing"),
        pytest.param(
            gguf_bytes([struct.pack("<Q", HUGE) + b"abc" * 9]), "length of metadata key", id="huge-key"
        ),
        pytest.param(
            gguf_bytes([pair("k", 8, struct.pack("<Q", HUGE))]), "length of metadata k", id="huge-string"
        ),
        pytest.param(gguf_bytes([pair("k", 8, string(b"\xff"))]), "must be UTF-8", id="not-utf8"),
        pytest.param(gguf_bytes([pair("k", 13, b"\0" * 8)]), "metadata type", id="unknown-kind"),
        pytest.param(gguf_bytes([pair("k", 7, b"\2")]), "boolean is 0 or 1", id="boolean-two"),
        pytest.param(gguf_bytes([array_pair("k", 4, HUGE)]), "length of metadata k", id="huge-array"),
        pytest.param(gguf_bytes([array_pair("k", 8, 3, string("a"))]), "metadata k", id="strings-missing"),
        pytest.param(
            gguf_bytes([array_pair("k", 8, 1, struct.pack("<Q", HUGE))]),
            "must end inside",
            id="huge-string-in-array",
        ),
        pytest.param(gguf_bytes([array_pair("k", 9, 1, b"\0" * 16)]), "an array holds", id="nested-array"),
        pytest.param(gguf_bytes([ARCHITECTURE, ARCHITECTURE]), "keys must differ", id="duplicate-key"),
        pytest.param(
            gguf_bytes([pair("general.alignment", 4, struct.pack("<I", 24))]),
            "power of two",
            id="alignment-24",
        ),
        pytest.param(
            gguf_bytes([pair("general.alignment", 4, struct.pack("<I", 0))]), "power of two", id="alignment-0"
        ),
        pytest.param(
            gguf_bytes([pair("general.alignment", 8, string("32"))]), "power of two", id="alignment-text"
        ),
        pytest.param(
            gguf_bytes(infos=[info("t", [])], data=b"\0" * 32), "1 to 4 dimensions", id="no-dimension"
        ),
        pytest.param(gguf_bytes(infos=[info("t", [1] * 5)]), "1 to 4 dimensions", id="five-dimensions"),
        pytest.param(
            gguf_bytes(infos=[info("t", [0])], data=b"\0" * 32), "must hold data", id="empty-tensor"
        ),
        pytest.param(
            gguf_bytes(infos=[info("t", [1 << 32, 1 << 32, 1 << 32])]),
            "fit in the file",
            id="product-overflows",
        ),
        pytest.param(
            gguf_bytes(infos=[info("t", [31], 2)], data=b"\0" * 32), "multiple of 32", id="part-of-a-block"
        ),
        pytest.param(gguf_bytes(infos=[info("t", [256], 10)]), "tensor types.*Q2_K for tensor t", id="q2-k"),
        pytest.param(gguf_bytes(infos=[info("t", [256], 99)]), "tensor types.*type 99", id="unknown-type"),
        pytest.param(
            gguf_bytes(infos=[info("t", [8], 0, 4)], data=b"\0" * 64), "multiples of 32", id="misaligned"
        ),
        pytest.param(
            gguf_bytes(infos=[info("t", [9])], data=b"\0" * 32), "must end inside the file", id="truncated"
        ),
        pytest.param(
            gguf_bytes(infos=[info("t", [8], 0, 1 << 63)], data=b"\0" * 32),
            "end inside the file",
            id="far-offset",
        ),
        pytest.param(
            gguf_bytes(infos=[info("a", [16]), info("b", [8], 0, 32)], data=b"\0" * 64),
            "must not overlap",
            id="overlap",
        ),
        pytest.param(
            gguf_bytes(infos=[info("a", [8]), info("a", [8], 0, 32)], data=b"\0" * 64),
            "names must differ",
            id="twice",
        ),
    ],
)
def test_damage_gives_one_error_that_names_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with pytest.raises((ModelFileError, UnsupportedModelError), match=rf"(?s){message}.*") as caught:
        open_gguf(path)
    assert str(path) in str(caught.value)
    assert caught.value.remedy
    assert len(str(caught.value)) < 700


def test_bytes_that_are_no_text_are_told_when_they_are_reached(tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(gguf_bytes([array_pair("k", 8, 2, string("a") + string(b"\xff"))]))
    words = open_gguf(path).metadata["k"]
    assert words[0] == "a"
    for read in (lambda: words[1], lambda: list(words)):
        with pytest.raises(ModelFileError, match="metadata k must be UTF-8") as caught:
            read()
        assert str(path) in str(caught.value)


def sound_file() -> bytes:
    q4 = np.random.default_rng(3).integers(0, 256, 2 * 18, dtype=np.uint8).tobytes()
    return gguf_bytes(
        [
            ARCHITECTURE,
            array_pair("tokenizer.ggml.tokens", 8, 2, string("a") + string("b")),
            array_pair("tokenizer.ggml.token_type", 5, 2, struct.pack("<2i", 1, 3)),
            pair("llama.rope.freq_base", 6, struct.pack("<f", 1e4)),
        ],
        [info("f", [2, 3]), info("q", [32, 2], 2, 32)],
        np.arange(8, dtype=np.float32).tobytes() + q4,
    )


def test_the_sound_file_of_the_fuzzer_is_sound(tmp_path: Path) -> None:
    (tmp_path / "s.gguf").write_bytes(sound_file())
    file = open_gguf(tmp_path / "s.gguf")
    assert file.float32("f").tolist() == [[0, 1], [2, 3], [4, 5]]
    assert file.float32("q").shape == (2, 32)


@settings(deadline=None, derandomize=True, max_examples=500)
@given(data=st.data())
def test_fuzz_only_flatout_errors_escape(tmp_path_factory: Any, data: st.DataObject) -> None:
    """Random bytes, cut files, and a sound file with some 8-, 32- or 64-bit numbers replaced."""
    sound = sound_file()
    numbers = st.sampled_from([0, 1, 2, 7, 31, 255, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, (1 << 64) - 1])
    change = st.tuples(
        st.integers(0, len(sound) - 8), st.sampled_from("BIQ"), numbers | st.integers(0, 1 << 20)
    )
    content = data.draw(
        st.binary(max_size=120).map(lambda tail: b"GGUF\3\0\0\0" + tail)
        | st.integers(0, len(sound) - 1).map(lambda cut: sound[:cut])
        | st.lists(change, min_size=1, max_size=4).map(lambda changes: changed(sound, changes))
    )
    path = tmp_path_factory.mktemp("fuzz", numbered=True) / "f.gguf"
    path.write_bytes(content)
    with only_flatout_errors():
        file = open_gguf(path)
        for name, tensor in file.tensors.items():
            assert file.float32(name).shape == tensor.shape
            file.native(name)
    path.unlink()


def changed(content: bytes, changes: list[tuple[int, str, int]]) -> bytes:
    out = bytearray(content)
    for place, kind, value in changes:
        size = struct.calcsize(kind)
        struct.pack_into(f"<{kind}", out, place, value % (1 << (8 * size)))
    return bytes(out)
