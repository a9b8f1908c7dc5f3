"""The real microbenchmarks answer with sane numbers and refuse nonsense. Nothing here depends on speed."""

from __future__ import annotations

import math

import pytest

from flatout.hardware.detect import detect

_cpu = pytest.importorskip("flatout._cpu", reason="the C++ extension is not built")


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [4096 * 3, 123_457, 5 << 20, (16 << 20) + 4096])
def test_every_read_loop_gives_a_rate(size: int, threads: int) -> None:
    rates = _cpu.read_rates(size, threads, 1e-3)
    assert len({name for name, _ in rates}) == len(rates) >= 4
    assert all(math.isfinite(rate) and 1e7 < rate < 1e14 for _, rate in rates)


@pytest.mark.parametrize(("size", "threads"), [(0, 1), (4095, 1), (4096, 2), (1 << 20, 0), (1 << 20, -1)])
def test_a_working_set_without_a_page_a_thread_is_refused(size: int, threads: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        _cpu.read_rates(size, threads, 1e-3)


def test_every_listed_op_runs() -> None:
    kernels = _cpu.op_kernels()
    assert {"int8", "fp32"} <= {form for form, _ in kernels}
    for form, instruction in kernels:
        assert 1e8 < _cpu.op_rate(form, instruction, 1, 1e-3) < 1e15


def test_the_clock_is_a_clock() -> None:
    if ("clock", "imul") not in _cpu.op_kernels():
        pytest.skip("no instruction of known latency on this processor")
    assert 2e8 < _cpu.op_rate("clock", "imul", 1, 5e-3) < 1e10


def test_an_unknown_op_is_refused() -> None:
    with pytest.raises(ValueError, match="no loop for int8 by magic"):
        _cpu.op_rate("int8", "magic", 1, 1e-3)
    with pytest.raises(ValueError, match="threads"):
        _cpu.op_rate("fp32", "portable", 0, 1e-3)


def test_tile_instructions_are_offered_where_the_processor_has_them() -> None:
    offered = ("int8", "amx") in _cpu.op_kernels()
    assert not offered or "amx_int8" in detect().features
