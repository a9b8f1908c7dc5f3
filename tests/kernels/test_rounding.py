"""The inner loops of rounding: every instruction set and the references against their formulas in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from flatout import _cpu
from flatout.kernels import grids
from flatout.kernels.grids import nearest_grids
from flatout.kernels.rounding import Base, GroupLevels, reference, round_block

SHAPES = [(1, 1), (7, 17), (33, 200), (64, 64), (128, 65)]
GROUPS = 3


def problem(columns: int, rows: int, based: bool) -> dict[str, Any]:
    draw = np.random.default_rng([columns, rows])
    zeros = draw.integers(0, 16, (GROUPS, rows)).astype(np.float32)
    arrays = {
        "values": draw.standard_normal((columns, rows)),
        "factor": draw.standard_normal((columns, columns)) * 0.2,
        "steps": draw.uniform(0.1, 0.4, (GROUPS, rows)),
        "low": -zeros,
        "high": 15 - zeros,
        "base": draw.standard_normal((columns, rows)) if based else None,
    }
    tensors = {name: None if a is None else torch.from_numpy(np.float32(a)) for name, a in arrays.items()}
    gains = draw.uniform(0.2, 1.0, columns).astype(np.float32).tolist()
    base = Base(tensors["base"], gains) if based else None
    return {
        "values": tensors["values"], "factor": tensors["factor"],
        "groups": draw.integers(0, GROUPS, columns).tolist(),
        "levels": GroupLevels(tensors["steps"], tensors["low"], tensors["high"]), "base": base,
    }  # fmt: skip


def choose(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Extension:
        max_block_columns = _cpu.max_block_columns
        round_block = staticmethod(_cpu.round_block)
        nearest_grids = staticmethod(_cpu.nearest_grids)
        isas = staticmethod(lambda: [isa])

    for module in ("rounding", "grids"):
        monkeypatch.setattr(f"flatout.kernels.{module}.extension", lambda: Extension)


def by_isa(isa: str, monkeypatch: pytest.MonkeyPatch, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    choose(isa, monkeypatch)
    return round_block(**given)


@pytest.mark.parametrize("based", [False, True], ids=["sweep", "descent"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("isa", [*_cpu.isas(), "pytorch"])
def test_each_column_is_the_nearest_level_to_what_is_left(
    isa: str, shape: tuple[int, int], based: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = problem(*shape, based)
    c, e = reference(**given) if isa == "pytorch" else by_isa(isa, monkeypatch, **given)
    codes, errors, values, factor = (x.double().numpy() for x in (c, e, given["values"], given["factor"]))
    steps, low, high = (
        getattr(given["levels"], part).double().numpy()[given["groups"]] for part in ("steps", "low", "high")
    )
    left = values - np.triu(factor, 1).T @ errors
    origin = wanted = left
    if based:
        origin = given["base"].columns.double().numpy()
        wanted = origin - np.array(given["base"].gains)[:, None] * left
    real = np.clip(wanted / steps, low, high)
    assert (codes == np.rint(codes)).all()
    assert np.abs(codes - real).max() < 0.5 + 1e-4  # float32 sums of up to 128 products
    np.testing.assert_allclose(errors, origin - codes * steps, atol=1e-5)


@pytest.mark.parametrize("based", [False, True], ids=["sweep", "descent"])
def test_instruction_sets_agree_to_the_bit_and_with_pytorch_but_for_ties(
    based: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = problem(96, 300, based)
    found = [by_isa(isa, monkeypatch, **given) for isa in _cpu.isas()]
    for c, e in found[1:]:
        assert torch.equal(c, found[0][0])
        assert torch.equal(e, found[0][1])
    # A value that went to its other neighbour changes what follows in its row, so whole rows are counted.
    same = (reference(**given)[0] == found[0][0]).all(dim=0)
    assert float(same.float().mean()) > 0.95


def test_arrays_that_do_not_fit_are_refused() -> None:
    given = problem(8, 16, False)
    arrays = [given["factor"].numpy(), np.zeros(8, np.float32), np.zeros(8, np.int32)]
    bounds = [getattr(given["levels"], part).numpy() for part in ("steps", "low", "high")]
    room = np.empty((8, 16), np.float32), np.empty((8, 16), np.float32)
    values = given["values"].numpy()
    wrong = [arrays[0], arrays[1], np.full(8, GROUPS, np.int32)]
    with pytest.raises(ValueError, match="groups are rows of steps"):
        _cpu.round_block(_cpu.isas()[0], values, None, *wrong, *bounds, *room)
    narrow = [bound[:, :15].copy() for bound in bounds]
    with pytest.raises(ValueError, match="a value for each of its rows"):
        _cpu.round_block(_cpu.isas()[0], values, None, *arrays, *narrow, *room)
    with pytest.raises(ValueError, match="one shape"):
        _cpu.round_block(_cpu.isas()[0], values, values[:7], *arrays, *bounds, *room)


@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "weighed"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 24), (40, 4, 64)], ids=str)
@pytest.mark.parametrize("isa", [*_cpu.isas(), "numpy"])
def test_the_grid_that_loses_least(
    isa: str, shape: tuple[int, int, int], weighed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(list(shape))
    weights = draw.standard_normal(shape).astype(np.float32)
    steps = draw.uniform(0.05, 0.6, (9, *shape[:2])).astype(np.float32)
    zeros = draw.integers(0, 16, steps.shape).astype(np.float32)
    importance = draw.uniform(0, 4, shape[1:]).astype(np.float32) if weighed else None
    if isa == "numpy":
        found = grids.reference(weights, steps, zeros, 0, 15, importance)
    else:
        choose(isa, monkeypatch)
        found = nearest_grids(weights, steps, zeros, 0, 15, importance)
    errors = np.empty(steps.shape)
    for c, n, g in np.ndindex(steps.shape):
        s, z, w = float(steps[c, n, g]), float(zeros[c, n, g]), weights[n, g].astype(np.float64)
        lost = s * np.clip(np.rint(w / s), -z, 15 - z) - w
        errors[c, n, g] = (lost**2 * (1 if importance is None else importance[g])).sum()
    taken = np.take_along_axis(errors, found[None].astype(np.int64), axis=0)[0]
    np.testing.assert_allclose(taken, errors.min(axis=0), rtol=1e-5)


def test_of_equal_grids_the_first() -> None:
    weights = np.ones((1, 1, 32), np.float32)
    assert nearest_grids(weights, np.ones((3, 1, 1)), np.zeros((3, 1, 1)), 0, 15) == 0
