"""core/coded.py and core/sparse.py: the same bytes back, bounded work for hostile files, folders that
load."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tests.files import only_flatout_errors
from tests.tiny import tiny_checkpoint_folder, tiny_model, tiny_spec, write_tokenizer

from flatout.core import coded
from flatout.core.artifact import load_artifact, save_artifact
from flatout.core.checkpoint import open_checkpoint
from flatout.core.coded import KEY, decode, encode, open_weights, write_coded
from flatout.core.formats import uniform
from flatout.core.model import dense
from flatout.core.safetensors import DTYPES, open_safetensors, to_bfloat16, write_safetensors
from flatout.core.sparse import is_two_of_four, pack_two_of_four, packed_tensors, unpack_two_of_four
from flatout.core.tokenizer import Tokenizer
from flatout.errors import ConfigError, FlatoutError, ModelFileError
from flatout.export.coded import code_folder, decode_folder


def gaussian(n: int, k: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n, k)) / np.sqrt(k)).astype(np.float32)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_bytes_come_back(dtype: str, data: st.DataObject) -> None:
    """Any bit pattern: NaN payloads, negative zeros and denormals included."""
    shape = data.draw(hnp.array_shapes(max_dims=3, max_side=9, min_side=0))
    held = np.dtype(DTYPES[dtype])
    raw = data.draw(st.binary(min_size=held.itemsize * int(np.prod(shape)), max_size=held.itemsize * 729))
    array = np.frombuffer(raw, held, count=int(np.prod(shape))).reshape(shape)
    stored, coding = encode(array, dtype)
    back = decode(stored, coding)
    assert back.shape == shape
    assert back.tobytes() == array.tobytes()


def test_pieces_decode_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded, "_PIECE", 1000)
    array = to_bfloat16(gaussian(37, 111))
    stored, coding = encode(array, "BF16")
    assert [len(pieces) for pieces in coding.planes] == [0, 5]
    assert decode(stored, coding).tobytes() == array.tobytes()


def test_trained_like_weights_shrink_and_noise_does_not_grow() -> None:
    bits = to_bfloat16(gaussian(256, 512))
    stored, coding = encode(bits, "BF16")
    assert 0.64 < len(stored) / bits.nbytes < 0.70  # 8 bits of sign and mantissa, about 2.6 of exponent
    pruned = np.where(np.arange(512) % 4 < 2, bits, 0).astype(np.uint16)
    assert len(encode(pruned, "BF16")[0]) < 0.5 * bits.nbytes
    noise = np.frombuffer(np.random.default_rng(0).bytes(1 << 16), np.uint8)
    stored, coding = encode(noise, "U8")
    assert (len(stored), coding.planes) == (noise.nbytes, ((),))


def coded_file(folder: Path) -> Path:
    tensors = {
        "a": (to_bfloat16(gaussian(64, 32)), "BF16"),
        "b": np.arange(-60, 60, dtype=np.int8).reshape(5, 24) // 20,
        "c": gaussian(3, 7),
        "empty": np.zeros((0, 4), np.float32),
    }
    write_safetensors(folder / "plain", tensors, {"format": "pt"})
    write_coded(folder / "coded", open_safetensors(folder / "plain"))
    return folder / "coded"


def test_a_file_reads_as_the_one_it_was_made_of(tmp_path: Path) -> None:
    file, plain = open_weights(coded_file(tmp_path)), open_safetensors(tmp_path / "plain")
    assert file.names == plain.names
    assert file.metadata == {"format": "pt"}
    for name in plain.names:
        assert (file.shape(name), file.dtype(name)) == (plain.shape(name), plain.dtype(name))
        assert file.array(name).tobytes() == plain.array(name).tobytes()
    np.testing.assert_array_equal(file.float32("a"), plain.float32("a"))
    with pytest.raises(ModelFileError, match="every weight must be in the file"):
        file.array("d")


def test_a_damaged_stream_is_found_out(tmp_path: Path) -> None:
    """Every single damaged byte of the data gives an error that names the tensor, or the same tensor."""
    path = coded_file(tmp_path)
    sound = path.read_bytes()
    plain = open_safetensors(tmp_path / "plain")
    start = len(sound) - sum(e.stop - e.start for e in open_safetensors(path).entries.values())
    caught = 0
    for at in range(start, len(sound), 7):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 0x55]) + sound[at + 1 :])
        file = open_weights(path)
        for name in file.names:
            try:
                assert file.array(name).tobytes() == plain.array(name).tobytes()
            except ModelFileError as error:
                assert name in str(error)  # noqa: PT017
                caught += 1
    assert caught >= len(range(start, len(sound), 7)) - 2  # padding bits at a stream's end say nothing


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = coded_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelFileError, match="truncated"):
        open_weights(path)


def listing_of(path: Path) -> dict[str, object]:
    listing: dict[str, object] = json.loads(open_safetensors(path).metadata[KEY])
    return listing


def with_listing(path: Path, value: object) -> None:
    file = open_safetensors(path)
    arrays = {name: file.array(name).copy() for name in file.names}
    write_safetensors(path, arrays, {KEY: value if isinstance(value, str) else json.dumps(value)})


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.sampled_from(["BF16", "a", "F32"]),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_metadata_that_are_anything(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = coded_file(tmp_path_factory.mktemp("f"))
    for listing in (value, {"version": 1, "tensors": value}, {"version": 1, "tensors": {"a": value}}):
        with_listing(path, listing)
        with only_flatout_errors():
            file = open_weights(path)
            for name in file.names:
                file.array(name)


def test_a_tensor_that_claims_to_be_huge_is_refused_unread(tmp_path: Path) -> None:
    """A few coded bytes cannot stand for gigabytes, and a stream that goes on after its end is cut off."""
    path = coded_file(tmp_path)
    bomb = np.frombuffer(zlib.compress(b"\0" * (1 << 20), 9, -15), np.uint8)
    for count, planes in ((1 << 40, [[len(bomb)] * (1 << 18)]), (1 << 30, [[len(bomb)]]), (5, [[len(bomb)]])):
        listing = {"version": 1, "tensors": {"a": ["U8", [count], planes, 0]}}
        write_safetensors(path, {"a": bomb}, {KEY: json.dumps(listing)})
        with pytest.raises(ModelFileError):
            open_weights(path).array("a")


def test_what_does_not_read_back_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = coded_file(tmp_path).parent / "plain"
    monkeypatch.setattr(coded, "encode", lambda array, dtype: encode(np.zeros_like(array), dtype))
    with pytest.raises(ModelFileError, match="must decode to the same bytes"):
        write_coded(tmp_path / "again", open_safetensors(plain))
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", ["bf16", "w8a8", "w4a16-g32"])
def test_a_coded_artifact_is_the_same_model(tmp_path: Path, name: str) -> None:
    model = tiny_model(tiny_spec(), uniform(name))
    write_tokenizer(tmp_path, model.spec.vocab_size)
    out = save_artifact(model, Tokenizer.from_folder(tmp_path), tmp_path / "out", {})
    code_folder(out, tmp_path / "small")
    again, _, manifest = load_artifact(tmp_path / "small")
    for fused, weight in load_artifact(out)[0].weights.items():
        np.testing.assert_array_equal(dense(again.weights[fused]), dense(weight))
    assert manifest["recipe"]["name"] == name
    small = (tmp_path / "small" / "model.safetensors").stat().st_size
    if name == "bf16":  # packed codes are dense already, and the listing takes a little
        assert small < (out / "model.safetensors").stat().st_size
    data = bytearray((tmp_path / "small" / "model.safetensors").read_bytes())
    data[-40] ^= 1
    (tmp_path / "small" / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelFileError, match="has changed"):
        load_artifact(tmp_path / "small")


def test_a_coded_folder_is_the_same_checkpoint_and_decodes_to_the_same_file(tmp_path: Path) -> None:
    folder = tiny_checkpoint_folder(tmp_path / "m", tiny_spec("qwen2"))
    code_folder(folder, tmp_path / "small")
    decode_folder(tmp_path / "small", tmp_path / "again")
    original = open_checkpoint(folder)
    for path in (tmp_path / "small", tmp_path / "again"):
        other = open_checkpoint(path)
        for name in original.names:
            np.testing.assert_array_equal(other.array(name), original.array(name))
    from safetensors.numpy import load_file

    theirs = load_file(tmp_path / "again" / "model.safetensors")
    assert set(theirs) == set(load_file(folder / "model.safetensors"))
    with pytest.raises(ConfigError, match="is already coded"):
        code_folder(tmp_path / "small", tmp_path / "twice")
    with pytest.raises(ConfigError, match="is not coded"):
        decode_folder(folder, tmp_path / "twice")
    with pytest.raises(ConfigError, match="only an artifact is overwritten"):
        code_folder(folder, folder)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 10_000))
def test_two_of_four_come_back(n: int, fours: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    array = rng.integers(0, 1 << 16, (n, fours, 4)).astype(np.uint16)
    order = rng.random(array.shape).argsort(axis=2)
    kept = rng.integers(0, 3, (n, fours, 1))  # at most two, sometimes fewer
    array = np.where(order < kept, array, 0).astype(np.uint16).reshape(n, -1)
    values, mask = pack_two_of_four(array)
    assert values.shape == (n, 2 * fours)
    assert mask.shape == (n, -(-4 * fours // 8))
    np.testing.assert_array_equal(unpack_two_of_four(values, mask, (n, 4 * fours)), array)


def test_three_of_four_are_no_two_of_four() -> None:
    array = np.array([[1, 1, 0, 1]], np.float32)
    assert not is_two_of_four(array)
    assert not is_two_of_four(np.zeros((2, 6), np.float32))
    with pytest.raises(ConfigError, match="at most two of four"):
        pack_two_of_four(array)


def packed_file(path: Path, **changes: np.ndarray) -> Path:
    weight = gaussian(6, 24) * (np.arange(24) % 4 < 2)
    write_safetensors(path, {**packed_tensors("m", weight.astype(np.float32)), **changes})
    return path


def test_a_packed_module_reads_as_its_weight(tmp_path: Path) -> None:
    file = open_weights(packed_file(tmp_path / "f"))
    assert file.names == ("m.weight",)
    assert (file.shape("m.weight"), file.dtype("m.weight")) == ((6, 24), "F32")
    np.testing.assert_array_equal(file.float32("m.weight"), gaussian(6, 24) * (np.arange(24) % 4 < 2))
    write_coded(tmp_path / "c", open_safetensors(tmp_path / "f"))
    np.testing.assert_array_equal(open_weights(tmp_path / "c").array("m.weight"), file.array("m.weight"))


@pytest.mark.parametrize(
    "changes",
    [
        {"m.shape": np.array([[6], [20]], np.int64)},
        {"m.shape": np.array([[1 << 40], [24]], np.int64)},
        {"m.shape": np.array([6, 24, 1], np.int64)},
        {"m.bitmask": np.zeros((6, 3), np.int16)},
        {"m.bitmask": np.zeros((6, 2), np.uint8)},
        {"m.bitmask": np.full((6, 3), 0xFF, np.uint8)},
        {"m.compressed": np.zeros((6, 11), np.float32)},
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, np.ndarray]) -> None:
    with pytest.raises(FlatoutError, match=r"bit mask"):
        open_weights(packed_file(tmp_path / "f", **changes)).array("m.weight")


def test_replace_keeps_the_entry_type() -> None:
    """Entries of coded files are those of plain ones."""
    stored, coding = encode(gaussian(2, 3), "F32")
    assert replace(coding, crc=0) != coding
    with pytest.raises(ValueError, match="checksum"):
        decode(stored, replace(coding, crc=coding.crc ^ 1))
