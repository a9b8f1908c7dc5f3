"""perf/roofline.py against hand counts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatout.core.costs import step_costs
from flatout.core.formats import Recipe, uniform
from flatout.core.spec import ModelSpec
from flatout.core.types import Ceiling, Hardware
from flatout.errors import ConfigError
from flatout.perf.roofline import (
    Floor,
    Part,
    arithmetic_of,
    combine,
    op_ceiling,
    op_floors,
    read_ceiling,
    step_floor,
    step_parts,
)

MB = 1 << 20
SPEC = ModelSpec(
    family="llama",
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=192,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_positions=2048,
)


def hardware(*ceilings: Ceiling) -> Hardware:
    return Hardware(
        name="made up",
        kind="cpu",
        cores=4,
        features=(),
        l1d_bytes=0,
        l2_bytes=0,
        l3_bytes=0,
        memory_bytes=0,
        ceilings=ceilings,
    )


def read(size: int, rate: float, threads: int = 4) -> Ceiling:
    name = f"read_{size}"
    return Ceiling(name=name, value=rate, unit="byte/s", threads=threads, working_set_bytes=size)


def op(name: str, rate: float, threads: int = 4) -> Ceiling:
    return Ceiling(name=name, value=rate, unit="op/s", threads=threads)


FLAT = hardware(read(MB, 1e9), op("int8", 8e9), op("bf16", 4e9), op("fp32", 2e9))
"""1 GB/s whatever the working set; 8, 4 and 2 Gop/s."""


def total(parts: tuple[Part, ...], field: str) -> float:
    return sum(float(getattr(p.floor, field)) for p in parts)


def test_read_rate_is_interpolated_between_working_sets() -> None:
    machine = hardware(read(4 * MB, 200e9), read(16 * MB, 50e9), read(256 * MB, 20e9))
    assert read_ceiling(machine, 4 * MB, 4) == 200e9
    assert read_ceiling(machine, 16 * MB, 4) == pytest.approx(50e9)
    assert read_ceiling(machine, 8 * MB, 4) == pytest.approx(100e9)  # the geometric middle
    assert read_ceiling(machine, 1, 4) == 200e9
    assert read_ceiling(machine, 1e15, 4) == 20e9


def test_read_rate_takes_the_nearest_thread_count_from_below() -> None:
    machine = hardware(
        read(MB, 10e9, 1), read(64 * MB, 5e9, 1), read(2 * MB, 40e9, 4), read(64 * MB, 16e9, 4)
    )
    assert read_ceiling(machine, MB, 1) == 10e9
    assert read_ceiling(machine, MB, 3) == 10e9
    assert read_ceiling(machine, MB, 4) == 40e9  # not 1 thread's point at the same working set
    assert read_ceiling(machine, 64 * MB, 8) == 16e9


def test_missing_ceilings_are_an_error() -> None:
    with pytest.raises(ConfigError, match="read ceiling"):
        read_ceiling(hardware(op("int8", 1.0)), MB, 4)
    with pytest.raises(ConfigError, match="'int8'"):
        op_ceiling(hardware(op("int8", 1.0, threads=4)), "int8", 2)


@given(st.floats(1, 1e12), st.floats(1, 1e12))
@settings(derandomize=True, deadline=None)
def test_a_larger_working_set_is_never_read_faster(a: float, b: float) -> None:
    machine = hardware(read(MB, 300e9), read(16 * MB, 60e9), read(96 * MB, 55e9), read(256 * MB, 30e9))
    small, large = sorted((a, b))
    assert read_ceiling(machine, small, 4) >= read_ceiling(machine, large, 4) >= 30e9


def test_tiles_raise_the_arithmetic_ceiling() -> None:
    machine = hardware(
        op("int8", 8e9), op("int8_amx", 60e9), op("bf16", 4e9), op("int8_amx", 15e9, threads=1)
    )
    assert op_ceiling(machine, "int8", 4) == 60e9
    assert op_ceiling(machine, "bf16", 4) == 4e9
    slow_tiles = hardware(op("int8", 8e9), op("int8_amx", 1e9))
    assert op_ceiling(slow_tiles, "int8", 4) == 8e9


@pytest.mark.parametrize(
    ("name", "arithmetic"),
    [
        ("fp32", "fp32"),
        ("bf16", "bf16"),
        ("w8a8", "int8"),
        ("w4a8-g32-asym", "int8"),
        ("w4a16-g64", "int16"),
        ("q4_1", "int8"),
        ("int8", "int8"),
    ],
)
def test_arithmetic_of_a_format(name: str, arithmetic: str) -> None:
    assert arithmetic_of(name) == arithmetic


def test_a_decode_step_counted_by_hand() -> None:
    recipe = uniform("w8a8", kv_cache="bf16")
    parts = step_parts(SPEC, recipe, FLAT, batch=2, tokens=1, context=9)
    floors = op_floors(parts)
    # down: 3 layers of 64 x 192 codes and 64 float16 scales; 2 tokens.
    assert floors["down"].bytes == 3 * (64 * 192 + 2 * 64)
    assert floors["down"].flops == 3 * 2 * 64 * 192 * 2
    assert floors["down"].memory_s == pytest.approx(floors["down"].bytes / 1e9)
    assert floors["down"].compute_s == pytest.approx(floors["down"].flops / 8e9)
    assert floors["down"].bound == "memory"
    # attention: 10 keys and values of 2 x 16 bf16 each for 2 sequences and 3 layers, plus one written.
    assert floors["attention"].bytes == 3 * 2 * (10 + 1) * 2 * 2 * 16 * 2
    assert floors["attention"].flops == 3 * 2 * 4 * 4 * 16 * 10
    assert floors["attention"].compute_s == pytest.approx(floors["attention"].flops / 4e9)
    # head: 1000 x 64, two positions.
    assert floors["head"].flops == 2 * 1000 * 64 * 2
    assert floors["embedding"].compute_s == 0
    assert list(floors) == ["embedding", "qkv", "attention", "o", "gate_up", "down", "head"]


def test_a_prefill_is_compute_bound_and_a_decode_memory_bound() -> None:
    recipe = uniform("w8a8")
    assert step_floor(step_parts(SPEC, recipe, FLAT, batch=1, tokens=256, context=0)).bound == "compute"
    assert step_floor(step_parts(SPEC, recipe, FLAT, batch=1, tokens=1, context=0)).bound == "memory"


def test_formats_of_one_op_are_split_by_layers() -> None:
    recipe = Recipe(
        name="mixed", layers="w8a8", overrides=(("layers.0.down", "bf16"), ("layers.2", "w4a16-g32"))
    )
    parts = step_parts(SPEC, recipe, FLAT, batch=1, tokens=1, context=0)
    down = {p.format: p for p in parts if p.op == "down"}
    assert set(down) == {"bf16", "w8a8", "w4a16-g32"}
    assert down["bf16"].floor.bytes == pytest.approx(64 * 192 * 2)
    assert down["w4a16-g32"].floor.bytes == pytest.approx(64 * 192 / 2 + 64 * 6 * 2)
    assert down["w4a16-g32"].arithmetic == "int16"
    # One layer each; 15-bit activations take two products of int8.
    assert down["w4a16-g32"].floor.compute_s == pytest.approx(2 * down["w8a8"].floor.compute_s)


FORMATS = st.sampled_from(["fp32", "bf16", "w8a8", "w8a8-g64", "w4a8-g32", "w4a16-g64-asym", "q4_1", "q8_0"])
PLACES = st.sampled_from(
    [f"layers.{i}{suffix}" for i in ("*", 0, 1, 2) for suffix in ("", ".qkv", ".o", ".gate_up", ".down")]
)


@given(
    formats=st.tuples(FORMATS, FORMATS, FORMATS),
    overrides=st.lists(st.tuples(PLACES, FORMATS), max_size=5),
    kv_cache=st.sampled_from(["int8", "bf16"]),
    sizes=st.fixed_dictionaries(
        {
            "batch": st.integers(1, 9),
            "tokens": st.integers(1, 77),
            "context": st.integers(0, 999),
            "logits": st.none() | st.integers(1, 99),
        }
    ),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_parts_lose_and_invent_no_work(
    formats: tuple[str, str, str],
    overrides: list[tuple[str, str]],
    kv_cache: str,
    sizes: dict[str, Any],
) -> None:
    layers, embedding, head = formats
    recipe = Recipe(
        name="any",
        layers=layers,
        embedding=embedding,
        head=head,
        kv_cache=kv_cache,
        overrides=tuple(overrides),
    )
    parts = step_parts(SPEC, recipe, FLAT, **sizes)
    floors = op_floors(parts)
    costs = step_costs(SPEC, recipe, **sizes)
    assert floors.keys() == costs.keys()
    for name, cost in costs.items():
        assert floors[name].bytes == pytest.approx(cost.bytes)
        assert floors[name].flops == pytest.approx(cost.flops)
    whole = step_floor(parts)
    assert whole.floor_s <= total(parts, "floor_s") * (1 + 1e-12)
    assert whole.floor_s >= max(f.floor_s for f in floors.values())
    assert whole.floor_s == max(whole.memory_s, whole.compute_s)
    # Every rate lies between the slowest and the fastest ceiling.
    assert whole.flops / 8e9 <= whole.compute_s * (1 + 1e-12)
    assert whole.compute_s <= whole.flops / 2e9 * (1 + 1e-12)


def test_combining_overlaps_one_ops_reads_with_anothers_arithmetic() -> None:
    reads = Floor(floor_s=3.0, memory_s=3.0, compute_s=1.0, bound="memory", bytes=30.0, flops=1.0)
    computes = Floor(floor_s=4.0, memory_s=0.5, compute_s=4.0, bound="compute", bytes=5.0, flops=4.0)
    both = combine([reads, computes])
    assert (both.floor_s, both.bound) == (5.0, "compute")
    assert (both.bytes, both.flops) == (35.0, 5.0)


def test_the_working_set_of_the_whole_step_sets_the_read_rate() -> None:
    """A small op of a large step is not read from cache: the rest of the step evicted it."""
    whole = step_floor(step_parts(SPEC, uniform("bf16"), FLAT, batch=1, tokens=1, context=0)).bytes
    machine = hardware(read(1, 100e9), read(int(whole), 1e9), op("bf16", 1e30))
    floors = op_floors(
        step_parts(SPEC, uniform("bf16", kv_cache="bf16"), machine, batch=1, tokens=1, context=0)
    )
    assert floors["o"].floor_s == pytest.approx(floors["o"].bytes / 1e9, rel=1e-3)
