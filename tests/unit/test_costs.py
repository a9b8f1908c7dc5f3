"""core/costs.py against counts written out by hand for one small and one real shape."""

from __future__ import annotations

import numpy as np
import pytest
from tests.tiny import tiny_model, tiny_spec

from flatout.core.costs import (
    attention_cost,
    kv_bytes_per_token,
    linear_cost,
    step_costs,
    total,
    weight_bytes,
)
from flatout.core.formats import Recipe, parse_format, uniform
from flatout.core.model import expected_weights
from flatout.core.spec import ModelSpec

SMOLLM2 = ModelSpec(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_positions=8192,
    tie_embeddings=True,
)


def test_parameters_of_the_real_model() -> None:
    # embedding 49152 * 576 = 28,311,552; a layer: qkv 960 * 576 = 552,960, o 576 * 576 = 331,776,
    # gate and up 3072 * 576 = 1,769,472, down 576 * 1536 = 884,736, norms 1,152: 3,540,096; last norm 576.
    assert SMOLLM2.num_parameters() == 28_311_552 + 30 * 3_540_096 + 576 == 134_515_008


def test_decode_step_of_the_real_model() -> None:
    """One token after 100 cached ones, bf16 weights, int8 cache."""
    costs = step_costs(SMOLLM2, uniform("bf16"), batch=1, tokens=1, context=100)
    assert costs["qkv"].bytes == 30 * 552_960 * 2
    assert costs["qkv"].flops == 30 * 552_960 * 2
    assert costs["o"].bytes == 30 * 331_776 * 2
    assert costs["gate_up"].bytes == 30 * 1_769_472 * 2
    assert costs["down"].flops == 30 * 884_736 * 2
    assert costs["head"].bytes == 28_311_552 * 2
    assert costs["head"].flops == 28_311_552 * 2
    assert costs["embedding"].bytes == 576 * 2
    assert costs["embedding"].flops == 0
    # A cached token holds 3 heads * 64 bytes + 3 * 4 bytes of scales, for keys and for values: 408 bytes a
    # layer.
    assert kv_bytes_per_token(SMOLLM2, "int8") == 408
    assert costs["attention"].bytes_read == 30 * 101 * 408
    assert costs["attention"].bytes_written == 30 * 408
    # 101 keys, 9 heads, 64 values: a multiplication and an addition for q.k and for p.v.
    assert costs["attention"].flops == 30 * 101 * 9 * 64 * 4
    assert total(costs).flops == sum(c.flops for c in costs.values())


def test_prefill_of_three_tokens() -> None:
    """Tokens see 1, 2 and 3 keys; weights are read once; the head runs for one token unless asked
    otherwise."""
    spec = tiny_spec("llama")  # D 64, F 128, 4 heads of 16, 2 key/value heads, V 320, 2 layers
    costs = step_costs(spec, uniform("w8a8", kv_cache="bf16"), batch=2, tokens=3, context=0)
    assert costs["attention"].flops == 2 * 2 * (1 + 2 + 3) * 4 * 16 * 4
    assert costs["attention"].bytes_read == 2 * 2 * 3 * (2 * 32 * 2)
    assert costs["qkv"].bytes == 2 * (128 * 64 + 2 * 128)  # codes and a float16 scale a row
    assert costs["qkv"].flops == 2 * 2 * 128 * 64 * 6
    assert costs["head"].flops == 2 * 320 * 64 * 2
    assert costs["embedding"].bytes == 6 * (64 + 2)
    scored = step_costs(spec, uniform("w8a8"), batch=2, tokens=3, context=0, logits=6)
    assert scored["head"].flops == 2 * 320 * 64 * 6
    assert scored["head"].bytes == costs["head"].bytes


def test_attention_is_the_sum_of_its_tokens() -> None:
    spec = tiny_spec("llama")
    together = attention_cost(spec, "bf16", tokens=7, context=5)
    alone = [attention_cost(spec, "bf16", tokens=1, context=5 + i) for i in range(7)]
    assert together.flops == sum(cost.flops for cost in alone)
    assert together.bytes_written == sum(cost.bytes_written for cost in alone)


def test_linear_reads_weights_once() -> None:
    fmt = parse_format("w4a8-g32")
    one, many = linear_cost(96, 64, fmt, 1), linear_cost(96, 64, fmt, 512)
    assert one.bytes_read == many.bytes_read == 96 * 32 + 96 * 2 * 2
    assert many.flops == 512 * one.flops == 512 * 2 * 96 * 64


def test_mixed_recipe_counts_each_layer() -> None:
    spec = tiny_spec("llama")
    recipe = Recipe(name="r", layers="w8a8", overrides=(("layers.1.down", "bf16"),))
    down = step_costs(spec, recipe, batch=1, tokens=1, context=0)["down"]
    assert down.bytes == (64 * 128 + 2 * 64) + 2 * 64 * 128


@pytest.mark.parametrize(
    "name", ["fp32", "bf16", "w8a8", "w8a8-g64", "w4a8-g32", "w5a8-g64", "w6a16", "w4a16-g32-asym", "q4_1"]
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_weight_bytes_against_the_arrays(name: str, family: str) -> None:
    """The bytes counted are those of the arrays, packed: 4-bit codes two a byte, bf16 at half of float32."""
    spec = tiny_spec(family)
    recipe = uniform(name, head=name)
    model = tiny_model(spec, recipe)
    expected = 0
    for weight, _, fmt in expected_weights(spec, recipe):
        array = model.weights[weight]
        if isinstance(array, np.ndarray):
            expected += array.size * (2 if fmt.name == "bf16" else 4)
        else:
            parts = [
                array.scales,
                array.minima,
                array.zeros if array.zeros is None else array.zeros.astype(np.uint16),
            ]
            expected += array.codes.size * fmt.bits // 8 + sum(p.nbytes for p in parts if p is not None)
    assert weight_bytes(spec, recipe) == expected
