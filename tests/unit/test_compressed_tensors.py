"""core/compressed_tensors.py and quantization_config.py against the compressed-tensors library and
themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import native_blocks, tiny_spec

from flatout.compress.rtn import round_to_nearest
from flatout.core.compressed_tensors import from_tensors, pack, to_tensors, unpack
from flatout.core.formats import Recipe, parse_format, uniform
from flatout.core.quantization_config import Scheme, is_packed, read_schemes, to_config
from flatout.core.quantized import QuantizedTensor
from flatout.core.spec import weight_names
from flatout.errors import ModelFileError, UnsupportedModelError

ROUNDED = [
    "w8a8",
    "w8a8-g32",
    "w8a8-g64-asym",
    "w8a16",
    "w8a16-asym",
    "w4a8-g32",
    "w4a16-g64",
    "w4a16-g32-asym",
    "w3a8-g32",
    "w3a16-g64-asym",
]
NATIVE = ["q4_0", "q4_1", "q8_0"]


class Tensors:
    """A TensorFile of arrays in memory."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.arrays)

    def dtype(self, name: str) -> str:
        return {"float16": "F16", "float32": "F32"}.get(self.arrays[name].dtype.name, "I8")

    def array(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def float32(self, name: str) -> np.ndarray:
        return self.arrays[name].astype(np.float32)


def make(name: str, n: int = 12, k: int = 192) -> QuantizedTensor:
    fmt = parse_format(name)
    if fmt.is_native:
        return native_blocks(name, n, k, 0)
    weight = np.random.default_rng(0).standard_normal((n, k)).astype(np.float32)
    return round_to_nearest(weight, fmt)


def assert_same(a: QuantizedTensor, b: QuantizedTensor) -> None:
    assert a.format == b.format
    for x, y in ((a.codes, b.codes), (a.scales, b.scales), (a.zeros, b.zeros), (a.minima, b.minima)):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def library_args(name: str) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    config = to_config(tiny_spec(), Recipe(name="r", layers=name))
    assert config is not None
    group = config["config_groups"]["group_0"]
    weights = QuantizationArgs(**group["weights"])
    activations = group["input_activations"]
    return QuantizationScheme(
        targets=["Linear"],
        weights=weights,
        input_activations=None if activations is None else QuantizationArgs(**activations),
        format=group["format"],
    )


@pytest.mark.parametrize("name", ROUNDED + NATIVE)
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("rows", [1, 12])
def test_round_trip(name: str, table: bool, rows: int) -> None:
    weight = make(name, n=rows)
    tensors = to_tensors("m", weight, is_table=table)
    assert_same(from_tensors(Tensors(tensors), "m", weight.format, weight.shape), weight)


@pytest.mark.parametrize(
    "name",
    [
        "w8a8",
        "w8a8-g32",
        "w8a8-g64-asym",
        "w8a16",
        "w8a16-asym",
        "w6a8",
        "w5a16-g64",
        "w4a8-g32",
        "w4a16-g32-asym",
    ],
)
def test_library_decompresses_to_our_numbers(name: str) -> None:
    from compressed_tensors.compressors import BaseCompressor

    weight, scheme = make(name), library_args(name)
    state = {key.removeprefix("m."): torch.from_numpy(a.copy()) for key, a in to_tensors("m", weight).items()}
    state["weight_scale"] = state["weight_scale"].float()
    back = BaseCompressor.get_value_from_registry(scheme.format).decompress(state, scheme)["weight"]
    np.testing.assert_allclose(back.numpy(), weight.dequantize(), rtol=1e-6)


@pytest.mark.parametrize("name", ["w8a8", "w8a16-g64", "w4a16-g64", "w4a16-g32-asym", "w8a16-asym"])
@pytest.mark.parametrize("stored", ["int-quantized", "pack-quantized"])
def test_reads_what_the_library_writes(name: str, stored: str) -> None:
    """Both forms of the same scheme, with codes down to -128 and packed zero points."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme, fmt = library_args(name), parse_format(name)
    weight = torch.randn(13, 128, generator=torch.Generator().manual_seed(1))
    grouped = weight.reshape(13, fmt.groups(128), -1)
    scale, zero = calculate_qparams(grouped.amin(dim=2), grouped.amax(dim=2), scheme.weights)
    compressor = BaseCompressor.get_value_from_registry(stored)
    state = compressor.compress(
        {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}, scheme
    )
    expected = compressor.decompress(state, scheme)["weight"].numpy()
    tensors = Tensors({f"m.{key}": value.numpy() for key, value in state.items()})
    read = from_tensors(tensors, "m", fmt, (13, 128))
    np.testing.assert_allclose(read.dequantize(), expected, rtol=1e-6)
    if fmt.bits == 8 and fmt.zero == "symmetric":
        assert read.format.zero == "asymmetric"  # amax / 127.5 makes the code -128


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 6), st.sampled_from([4, 5, 6, 8]), st.integers(0, 2**32 - 1))
def test_packing_equals_the_library(k: int, n: int, bits: int, seed: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = np.random.default_rng(seed).integers(0, 1 << bits, (n, k)).astype(np.uint8)
    signed = torch.from_numpy(codes.astype(np.int16) - (1 << (bits - 1))).to(torch.int8)
    np.testing.assert_array_equal(pack(codes, bits), pack_to_int32(signed, bits).numpy())
    np.testing.assert_array_equal(unpack(pack(codes, bits), bits, k), codes)


MIXED = Recipe(
    name="mixed",
    layers="w8a8-g64",
    embedding="w4a16-g32",
    head="w8a8",
    overrides=(("layers.0.down", "w4a16-g64-asym"), ("layers.1.o", "bf16"), ("layers.1.qkv", "q4_0")),
)


@pytest.mark.parametrize(
    "recipe",
    [uniform(name, head=name) for name in (*ROUNDED, "q4_0", "q8_0", "bf16")]
    + [MIXED, Recipe(name="head only", head="w8a8"), Recipe(name="no head", layers="w8a8")],
    ids=lambda recipe: recipe.name,
)
def test_config_says_the_recipe(recipe: Recipe) -> None:
    """Read back, the configuration gives every module the scheme of its format and no other module any."""
    spec = tiny_spec()
    config = to_config(spec, recipe)
    modules = [name.removesuffix(".weight") for name, shape in weight_names(spec).items() if len(shape) == 2]
    schemes = read_schemes(config, modules) if config is not None else {}
    for module in modules:
        if module.startswith("model.layers"):
            layer, part = module.split(".")[2], module.split(".")[-1]
            linear = {
                "q": "qkv",
                "k": "qkv",
                "v": "qkv",
                "o": "o",
                "g": "gate_up",
                "u": "gate_up",
                "d": "down",
            }[part[0]]
            fmt = recipe.format_of(int(layer), linear)
        else:
            fmt = parse_format(recipe.embedding if "embed" in module else recipe.head)
        assert (module in schemes) == fmt.is_integer
        if fmt.is_integer:
            scheme = schemes[module]
            assert (scheme.bits, scheme.group, scheme.symmetric) == (
                fmt.bits,
                fmt.group,
                fmt.zero == "symmetric",
            )
            multiplied_as_bytes = fmt.activation == "int8" and "embed" not in module
            assert scheme.activation == ("int8" if multiplied_as_bytes else "float")


@pytest.mark.parametrize(
    "recipe", [uniform("w8a8"), uniform("w4a16-g32-asym"), MIXED], ids=lambda recipe: recipe.name
)
def test_library_accepts_the_config(recipe: Recipe) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    config = to_config(tiny_spec(), recipe)
    parsed = QuantizationConfig.model_validate(config)
    assert len(parsed.config_groups) == len(config["config_groups"]) if config else False


def test_a_float_minimum_is_refused_by_others() -> None:
    """transformers would run a folder of an unknown method on random weights; an unknown argument stops
    it."""
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    config = to_config(tiny_spec(), uniform("q4_1"))
    assert config is not None
    with pytest.raises(ValidationError, match="flatout_minimum"):
        QuantizationConfig.model_validate(config)
    with pytest.raises(UnsupportedModelError, match="read from the model they were taken from"):
        read_schemes(config, ["lm_head"])
    assert is_packed(parse_format("q4_1"), is_table=True)


def third_party(**changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights | changes, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
        "ignore": ["re:.*lm_head"],
    }


def test_third_party_targets_and_ignore() -> None:
    config = third_party()
    config["config_groups"]["group_1"] = {
        "targets": ["re:.*down_proj$"],
        "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": False},
        "input_activations": {"num_bits": 8, "dynamic": True, "strategy": "token"},
    }
    modules = ["model.embed_tokens", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "lm_head"]
    assert read_schemes(config, modules) == {
        "model.layers.0.mlp.up_proj": Scheme(bits=8, group=0, symmetric=True),
        "model.layers.0.mlp.down_proj": Scheme(bits=4, group=128, symmetric=False, activation="int8"),
    }


@pytest.mark.parametrize(
    "changes",
    [{"type": "float"}, {"num_bits": 2}, {"strategy": "tensor"}, {"actorder": "group"}, {"dynamic": True}],
    ids=str,
)
def test_unknown_schemes_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="integers of 3, 4, 5, 6 or 8 bits by channel or group"):
        read_schemes(third_party(**changes), ["model.layers.0.mlp.up_proj"])


def test_bad_configs() -> None:
    with pytest.raises(UnsupportedModelError, match=r"quant_method 'gptq'"):
        read_schemes({"quant_method": "gptq"}, [])
    with pytest.raises(ModelFileError, match="every config group is an object with targets"):
        read_schemes({"quant_method": "compressed-tensors", "config_groups": {"g": 3}}, [])
    config = third_party()
    config["config_groups"]["group_0"]["targets"] = ["re:("]
    with pytest.raises(ModelFileError, match="targets are names or regular expressions"):
        read_schemes(config, ["model.layers.0.mlp.up_proj"])


def test_bad_tensors() -> None:
    weight = make("w4a16-g64")
    good = to_tensors("m", weight)
    for change, message in (
        ({"m.weight_scale": None}, "no m.weight_scale"),
        ({"m.weight_packed": good["m.weight_packed"][:, :-1]}, "192 codes of 4 bits fill 24 int32 words"),
        ({"m.weight_packed": good["m.weight_packed"][:-1]}, "m.weight must fit config.json"),
        ({"m.weight_scale": good["m.weight_scale"][:, :-1]}, "m.weight_scale must fit config.json"),
        ({"m.weight_shape": np.array([12, 184])}, "m.weight_shape must fit config.json"),
    ):
        broken = {key: value for key, value in (good | change).items() if value is not None}
        with pytest.raises(ModelFileError, match=message):
            from_tensors(Tensors(broken), "m", weight.format, weight.shape)
