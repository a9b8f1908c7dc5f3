"""benchmarks/make_offgrid.py: weights move inside their cells, and only there."""

from __future__ import annotations

import numpy as np
import pytest
from benchmarks.make_offgrid import dithered
from tests.tiny import tiny_source, tiny_spec


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q8_0"])
def test_dither_fills_the_cell(name: str) -> None:
    source = tiny_source(tiny_spec("llama"), layers=name)
    place = "model.layers.0.mlp.up_proj.weight"
    moved = dithered(source, place, seed=0)
    blocks = source.native(place)
    assert blocks is not None
    steps = np.repeat(blocks.scales.astype(np.float32), 32, axis=1)
    part = (moved - source.array(place)) / steps
    assert moved.dtype == np.float32
    assert np.abs(part).max() <= 0.5001
    # Uniform on [-1/2, 1/2): deviation 1 / sqrt(12), mean within four standard errors of zero.
    assert part.std() * 12**0.5 == pytest.approx(1, abs=0.03)
    assert abs(part.mean()) < 4 / (12 * part.size) ** 0.5
    np.testing.assert_array_equal(dithered(source, place, seed=0), moved)
    assert (dithered(source, place, seed=1) != moved).mean() > 0.99


def test_floats_stay() -> None:
    source = tiny_source(tiny_spec("llama"), layers="q4_1")
    np.testing.assert_array_equal(dithered(source, "model.norm.weight", 0), source.array("model.norm.weight"))
