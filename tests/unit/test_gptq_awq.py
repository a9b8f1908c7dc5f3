"""GPTQ and AWQ folders: packed here code by code with Python's integers, read back against plain floats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tests.tiny import tiny_checkpoint_folder, tiny_config, tiny_spec, tiny_tensors, write_tokenizer

from flatout.core.checkpoint import open_checkpoint
from flatout.core.fuse import assemble, native_recipe
from flatout.core.gptq_awq import packed_module, packed_tensor, packed_values, read_packing
from flatout.core.quantized import QuantizedTensor
from flatout.engine.load import load
from flatout.engine.request import SamplingParams
from flatout.errors import FlatoutError, ModelFileError, UnsupportedModelError

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


class Tensors:
    """A PackedFile of arrays in memory."""

    def __init__(self, owner: dict[str, np.ndarray]) -> None:
        self.owner: Mapping[str, np.ndarray] = owner

    def shape(self, name: str) -> tuple[int, ...]:
        return self.owner[name].shape

    def dtype(self, name: str) -> str:
        return {"float16": "F16", "float32": "F32", "int32": "I32", "int64": "I64"}[
            self.owner[name].dtype.name
        ]

    def array(self, name: str) -> np.ndarray:
        return self.owner[name]

    def float32(self, name: str) -> np.ndarray:
        return self.owner[name].astype(np.float32)


def words_of(codes: list[int], bits: int) -> list[int]:
    """A stream of codes as int32 words, by one long integer."""
    stream = sum(code << (bits * i) for i, code in enumerate(codes))
    count = len(codes) * bits // 32
    return [int(np.uint32(stream >> (32 * i) & 0xFFFFFFFF).astype(np.int32)) for i in range(count)]


def int32(rows: list[list[int]]) -> np.ndarray:
    return np.array(rows, dtype=np.int32)


def pack_gptq(codes: np.ndarray, zeros: np.ndarray, bits: int, less: int) -> tuple[np.ndarray, np.ndarray]:
    """codes (N, K), zeros (G, N) -> qweight (K bits / 32, N), qzeros (G, N bits / 32)."""
    columns = [words_of([int(c) for c in row], bits) for row in codes]
    stored = [words_of([(int(z) - less) % (1 << bits) for z in row], bits) for row in zeros]
    return np.ascontiguousarray(int32(columns).T), int32(stored)


def pack_awq(codes: np.ndarray, zeros: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """codes (N, K), zeros (G, N) -> qweight (K, N / 8), qzeros (G, N / 8)."""

    def pack(row: np.ndarray) -> list[int]:
        eights = [[int(row[i + AWQ_ORDER[j]]) for j in range(8)] for i in range(0, len(row), 8)]
        return [words_of(eight, 4)[0] for eight in eights]

    return int32([pack(row) for row in codes.T]), int32([pack(row) for row in zeros])


def make(
    method: str,
    n: int,
    k: int,
    bits: int = 4,
    group: int = 32,
    sym: bool = False,
    act_order: bool = False,
    v2: bool = False,
    seed: int = 0,
    dtype: type = np.float16,
) -> tuple[dict[str, np.ndarray], dict[str, Any], np.ndarray]:
    """(tensors of module "m", its quantization_config, the float32 weight they mean)."""
    rng = np.random.default_rng(seed)
    top, width = 1 << bits, k if group == -1 else group
    groups = -(-k // width)
    codes = rng.integers(0, top, (n, k))
    less = 1 if method == "gptq" and not v2 else 0
    zeros = np.full((groups, n), top // 2) if sym else rng.integers(less, top, (groups, n))
    scales = rng.uniform(0.001, 0.1, (groups, n)).astype(dtype)
    group_of = np.arange(k) // width
    if act_order:
        rng.shuffle(group_of)
    weight = np.empty((n, k), dtype=np.float32)
    for column in range(k):
        g = group_of[column]
        weight[:, column] = scales[g].astype(np.float32) * (codes[:, column] - zeros[g])
    if method == "awq":
        qweight, qzeros = pack_awq(codes, zeros)
        config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": not sym}
        return {"m.qweight": qweight, "m.qzeros": qzeros, "m.scales": scales}, config, weight
    qweight, qzeros = pack_gptq(codes, zeros, bits, less)
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": act_order}
    if v2:
        config["checkpoint_format"] = "gptq_v2"
    tensors = {"m.qweight": qweight, "m.qzeros": qzeros, "m.scales": scales}
    return tensors | {"m.g_idx": group_of.astype(np.int32)}, config, weight


def read(
    tensors: dict[str, np.ndarray], config: dict[str, Any], n: int, k: int
) -> tuple[QuantizedTensor | None, np.ndarray, str]:
    file = Tensors(tensors)
    module = packed_module(file, "m", read_packing(config), (n, k))
    return packed_tensor(file, module), packed_values(file, module), module.reason


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    method=st.sampled_from(["gptq", "awq"]),
    rows=st.integers(1, 3),
    columns=st.integers(1, 6),
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([-1, 16, 24, 32, 64, 96, 128, 256]),
    sym=st.booleans(),
    act_order=st.booleans(),
    v2=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_layout_gives_the_weight_it_means(
    method: str,
    rows: int,
    columns: int,
    bits: int,
    group: int,
    sym: bool,
    act_order: bool,
    v2: bool,
    seed: int,
) -> None:
    if method == "awq":
        bits, act_order, v2 = 4, False, False
    n, k = 32 * rows, 32 * columns
    tensors, config, weight = make(method, n, k, bits, group, sym, act_order, v2, seed)
    native, values, reason = read(tensors, config, n, k)
    np.testing.assert_array_equal(values, weight)
    ordered = method == "awq" or np.array_equal(
        tensors["m.g_idx"], np.arange(k) // (k if group == -1 else group)
    )
    divides = group == -1 or group >= k or group % 32 == 0
    assert (native is not None) == (ordered and divides) == (reason == "")
    if native is not None:
        np.testing.assert_array_equal(native.dequantize(), weight)
        assert native.format.activation == "int16"
        assert native.format.bits == (8 if bits == 8 else 4)
        assert (native.format.zero == "symmetric") == (sym and bits == 4)


@pytest.mark.parametrize(
    ("method", "options", "n", "k", "name"),
    [
        ("gptq", {"sym": True, "group": 128}, 32, 256, "w4a16-g128"),
        ("gptq", {"sym": True, "group": 256}, 32, 512, "w4a16-g128"),
        ("gptq", {"group": -1}, 32, 192, "w4a16-g64-asym"),
        ("gptq", {"group": 128}, 32, 192, "w4a16-g64-asym"),
        ("gptq", {"group": 128}, 32, 64, "w4a16-g64-asym"),
        ("gptq", {"bits": 8, "group": -1, "sym": True}, 32, 100, "w8a16-asym"),
        ("gptq", {"bits": 8, "group": 64, "dtype": np.float32}, 32, 128, "w8a16-g64-asym"),
        ("awq", {"group": 64}, 8, 192, "w4a16-g64-asym"),
        ("awq", {"group": 32, "sym": True}, 40, 96, "w4a16-g32"),
    ],
)
def test_the_format_it_runs_in(method: str, options: dict[str, Any], n: int, k: int, name: str) -> None:
    tensors, config, weight = make(method, n, k, **options)
    native, _, _ = read(tensors, config, n, k)
    assert native is not None
    assert native.format.name == name
    np.testing.assert_array_equal(native.dequantize(), weight)


def test_what_no_integer_format_holds_says_why() -> None:
    for options, why in (
        ({"group": 16}, "groups of 16 on a width of 64"),
        ({"act_order": True}, r"columns in the order of activations (desc_act)"),
    ):
        tensors, config, weight = make("gptq", 32, 64, **options)  # type: ignore[arg-type]
        native, values, reason = read(tensors, config, 32, 64)
        assert native is None
        assert reason == why
        np.testing.assert_array_equal(values, weight)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": 5}, UnsupportedModelError, "2 or 3 or 4 or 8 bits; found: bits 5"),
        ({"bits": True}, UnsupportedModelError, "found: bits True"),
        ({"bits": 4.0}, UnsupportedModelError, "found: bits 4.0"),
        ({"bits": None}, UnsupportedModelError, "found: bits None"),
        ({"bits": 8}, ModelFileError, r"m.qweight must be I32 of shape \(16, 32\), by config.json"),
        ({"bits": 3}, ModelFileError, r"m.qweight must be I32 of shape \(6, 32\)"),
        ({"group_size": 0}, ModelFileError, "group_size is -1"),
        ({"group_size": 10**30}, ModelFileError, "group_size is -1"),
        ({"group_size": "32"}, ModelFileError, "group_size is -1"),
        ({"group_size": 64}, ModelFileError, r"m.qzeros must be I32 of shape \(1, 4\)"),
        ({"sym": "yes"}, ModelFileError, "sym is true or false"),
        ({"checkpoint_format": "marlin"}, UnsupportedModelError, "checkpoint_format is gptq or gptq_v2"),
        ({"checkpoint_format": 2}, UnsupportedModelError, "checkpoint_format is gptq or gptq_v2"),
        ({"is_marlin_format": True}, UnsupportedModelError, "found: marlin"),
        ({"dynamic": {"+:.*down.*": {"bits": 8}}}, UnsupportedModelError, "must share bits and group"),
        ({"dynamic": [1]}, UnsupportedModelError, "must share bits and group"),
        ({"quant_method": "awq", "version": "gemv"}, UnsupportedModelError, "version is gemm: others lay"),
        ({"quant_method": "awq", "bits": 8}, UnsupportedModelError, "awq weights have 4 bits"),
        ({"quant_method": "awq"}, ModelFileError, r"m.qweight must be I32 of shape \(64, 4\)"),
    ],
)
def test_wrong_configurations_are_refused(
    change: dict[str, Any], error: type[FlatoutError], message: str
) -> None:
    tensors, config, _ = make("gptq", 32, 64)
    with pytest.raises(error, match=message):
        read(tensors, config | change, 32, 64)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("qweight", None, "needs all its tensors; found: no m.qweight"),
        ("qzeros", None, "needs all its tensors; found: no m.qzeros"),
        ("scales", None, "needs all its tensors; found: no m.scales"),
        ("g_idx", None, "with desc_act the group of each column must be stored"),
        ("qweight", np.zeros((8, 32), np.int64), "m.qweight must be I32"),
        ("qweight", np.zeros((8, 31), np.int32), r"found: I32 \(8, 31\)"),
        ("scales", np.zeros((32, 2), np.float16), r"m.scales must be F16 or BF16 or F32 of shape \(2, 32\)"),
        ("scales", np.zeros((2, 32), np.int32), "found: I32"),
        ("g_idx", np.zeros(63, np.int32), r"m.g_idx must be I32 of shape \(64,\)"),
        ("g_idx", np.zeros(64, np.int64), "m.g_idx must be I32"),
        ("g_idx", np.full(64, 2, np.int32), "must name groups 0 to 1; found: 2 to 2"),
        ("g_idx", np.full(64, -1, np.int32), "must name groups 0 to 1; found: -1 to -1"),
        ("qzeros", np.full((2, 4), -1, np.int32), "stored less one, so at most 14; found: 15 in m.qzeros"),
    ],
)
def test_hostile_tensors_are_refused(part: str, value: np.ndarray | None, message: str) -> None:
    tensors, config, _ = make("gptq", 32, 64, act_order=True)
    del tensors[f"m.{part}"]
    if value is not None:
        tensors[f"m.{part}"] = value
    with pytest.raises(ModelFileError, match=message):
        read(tensors, config, 32, 64)


def test_an_order_that_the_configuration_denies_is_refused() -> None:
    tensors, config, _ = make("gptq", 32, 64, act_order=True)
    with pytest.raises(ModelFileError, match="without desc_act column k belongs to group k // group_size"):
        read(tensors, config | {"desc_act": False}, 32, 64)
    del tensors["m.g_idx"]
    native, _, _ = read(tensors, config | {"desc_act": False}, 32, 64)
    assert native is not None, "without act order a file need not hold g_idx"


def test_widths_that_fill_no_words_are_refused() -> None:
    tensors, config, _ = make("gptq", 32, 64)
    for shape in ((31, 64), (32, 60)):
        with pytest.raises(UnsupportedModelError, match="must fill 32-bit words"):
            packed_module(Tensors(tensors), "m", read_packing(config), shape)


def test_the_whole_range_of_zeros_is_read_in_the_second_version() -> None:
    tensors, config, weight = make("gptq", 32, 64, v2=True)
    tensors["m.qzeros"] = np.full((2, 4), -1, np.int32)
    native, values, _ = read(tensors, config, 32, 64)
    assert native is not None
    assert native.zeros is not None
    assert (native.zeros == 15).all()
    np.testing.assert_array_equal(native.dequantize(), values)
    assert not np.array_equal(values, weight)


def write_folder(folder: Path, method: str, **options: Any) -> tuple[Path, Path]:
    """(a quantised folder, a float folder of the very same weights)."""
    spec = tiny_spec()
    packed, plain = {}, dict(tiny_tensors(spec, 0))
    config: dict[str, Any] = {}
    for i, (name, array) in enumerate(tiny_tensors(spec, 0).items()):
        if "_proj" not in name:
            packed[name] = array
            continue
        module = name.removesuffix(".weight")
        tensors, config, weight = make(method, *array.shape, seed=i, **options)
        packed |= {f"{module}.{key.removeprefix('m.')}": value for key, value in tensors.items()}
        plain[name] = weight
    folder.mkdir()
    float_folder = tiny_checkpoint_folder(folder / "float", spec)
    save_file(plain, float_folder / "model.safetensors")
    quantised = folder / "quantised"
    quantised.mkdir()
    (quantised / "config.json").write_text(json.dumps(tiny_config(spec) | {"quantization_config": config}))
    save_file(packed, quantised / "model.safetensors")
    write_tokenizer(quantised, spec.vocab_size)
    return quantised, float_folder


@pytest.mark.parametrize(
    ("method", "options", "layers", "note"),
    [
        ("gptq", {"sym": True}, "w4a16-g32", ""),
        ("gptq", {"bits": 8, "group": -1}, "w8a16-asym", ""),
        ("gptq", {"bits": 3, "v2": True}, "w4a16-g32-asym", ""),
        ("awq", {"group": 64}, "w4a16-g64-asym", ""),
        ("gptq", {"act_order": True}, "bf16", "14 of 14 quantised weights are dequantised and run in bf16"),
        ("awq", {"group": 16}, "bf16", "no integer format here holds groups of 16 on a width of 64"),
    ],
)
def test_a_folder_runs_as_it_is(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    method: str,
    options: dict[str, Any],
    layers: str,
    note: str,
) -> None:
    quantised, plain = write_folder(tmp_path / "m", method, **options)
    checkpoint, original = open_checkpoint(quantised), open_checkpoint(plain)
    for name in original.names:
        np.testing.assert_array_equal(checkpoint.array(name), original.array(name))
    recipe = native_recipe(checkpoint)
    assert recipe.layers == layers
    assert recipe.overrides == ()
    model = assemble(checkpoint, recipe)
    weight = model.weights["layers.1.qkv"]
    joined = np.concatenate([original.array(f"model.layers.1.self_attn.{p}_proj.weight") for p in "qkv"])
    values = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
    np.testing.assert_array_equal(values, joined)
    engine = load(quantised, threads=1, max_tokens=256)
    assert engine.generate(["over"], SamplingParams(max_tokens=3))[0].token_ids
    shown = capsys.readouterr().err
    assert note in shown if note else "dequantised" not in shown


def test_an_older_folder_has_its_configuration_beside(tmp_path: Path) -> None:
    quantised, plain = write_folder(tmp_path / "m", "gptq")
    config = json.loads((quantised / "config.json").read_text())
    quantization = config.pop("quantization_config")
    del quantization["quant_method"]
    (quantised / "config.json").write_text(json.dumps(config))
    (quantised / "quantize_config.json").write_text(json.dumps(quantization))
    name = "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_array_equal(open_checkpoint(quantised).array(name), open_checkpoint(plain).array(name))


def change_tensors(folder: Path, change: dict[str, np.ndarray | None]) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors") | change
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def test_a_bias_of_zeros_is_passed_over_and_any_other_refused(tmp_path: Path) -> None:
    quantised, _ = write_folder(tmp_path / "m", "gptq")
    bias = "model.layers.0.self_attn.o_proj.bias"
    change_tensors(quantised, {bias: np.zeros(64, np.float16)})
    open_checkpoint(quantised)
    change_tensors(quantised, {bias: np.full(64, 0.5, np.float16)})
    with pytest.raises(UnsupportedModelError, match="every tensor must be one that the architecture uses"):
        open_checkpoint(quantised)


def test_errors_name_the_folder(tmp_path: Path) -> None:
    quantised, _ = write_folder(tmp_path / "m", "awq")
    scales = "model.layers.0.self_attn.q_proj.scales"
    change_tensors(quantised, {scales: np.full((2, 64), np.nan, np.float16)})
    with pytest.raises(ModelFileError, match="weights must be finite; found: inf or nan"):
        open_checkpoint(quantised).native("model.layers.0.self_attn.q_proj.weight")
    change_tensors(quantised, {scales: None})
    with pytest.raises(ModelFileError, match=f"no model.layers.0.*q_proj.scales in .*{quantised.name}"):
        open_checkpoint(quantised)
    write_folder(tmp_path / "n", "awq")
    floats = tmp_path / "n" / "float"
    config = json.loads((floats / "config.json").read_text())
    marked = config | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}
    (floats / "config.json").write_text(json.dumps(marked))
    with pytest.raises(ModelFileError, match="a quantised folder must hold quantised weights; found: no"):
        open_checkpoint(floats)
