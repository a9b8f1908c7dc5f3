"""Weights that are packed while Python goes on: what is wrong is told, what is lent is given back."""

import contextlib
import dataclasses
import gc
import weakref

import numpy as np
import pytest
from tests.tiny import tiny_model, tiny_spec

from flatout import _cpu
from flatout.core.formats import uniform
from flatout.engine.cpu import set_weights


class Lent(np.ndarray):
    """An array that can be watched."""


def lent(values):
    return np.ascontiguousarray(values, np.float32).view(Lent)


def new_model(spec, threads=2):
    return _cpu.Model(dataclasses.asdict(spec) | {"kv_cache": "bf16"}, threads, "portable", 4)


def test_arrays_live_until_they_are_packed_and_no_longer():
    model = new_model(tiny_spec())
    watched = []
    for name in ("layers.0.down", "layers.1.down"):
        values = lent(np.zeros((64, 96)))
        watched.append(weakref.ref(values))
        model.set_float(name, values, "bf16")
        del values
    with pytest.raises(ValueError, match=r"layers\.0\.qkv"):  # which is missing
        model.finalize()
    gc.collect()
    assert [one() for one in watched] == [None, None]


def test_what_a_weight_has_wrong_is_told_when_all_are_there():
    spec = tiny_spec()
    model = new_model(spec)
    model.set_float("layers.0.sideways", np.zeros((64, 96), np.float32), "bf16")
    with contextlib.suppress(ValueError):  # sooner, or when all have been handed over
        set_weights(model, tiny_model(spec, uniform("w8a8")))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"unknown weight layers\.0\.sideways"):
            model.finalize()


def test_a_model_may_go_before_its_weights_are_packed():
    values = lent(np.zeros((1024, 960)))  # 3.75 MiB: two wait
    watched = weakref.ref(values)
    for _ in range(8):
        model = new_model(tiny_spec())
        for i in range(2):
            model.set_float(f"layers.{i}.gate_up", values, "bf16")
        del model
    del values
    gc.collect()
    assert watched() is None


def test_a_weight_of_more_than_the_queue_holds_is_packed_at_once():
    model = new_model(tiny_spec())
    values = lent(np.zeros((1024, 2304)))  # 9 MiB
    watched = weakref.ref(values)
    model.set_float("head", values, "bf16")
    del values
    gc.collect()
    assert watched() is None
