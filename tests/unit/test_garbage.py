"""A pause of the garbage collector ends with what it was for, however that ends."""

from __future__ import annotations

import gc

import pytest

from flatout.core.garbage import without_garbage_collection


@without_garbage_collection()
def _paused(inner: bool = False) -> bool:
    if inner:
        _paused()
    return not gc.isenabled()


def test_a_pause_is_over_after_the_call_and_may_lie_within_another() -> None:
    assert gc.isenabled()
    assert _paused()
    assert gc.isenabled()
    assert _paused(inner=True)
    assert gc.isenabled()


def test_a_pause_ends_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), without_garbage_collection():
        1 / 0  # noqa: B018
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        assert _paused()
        assert not gc.isenabled()
    finally:
        gc.enable()
