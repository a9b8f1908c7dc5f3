"""The trial store: what was finished is found again, what was cut off is not, and nothing else matches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatout.core.types import Trial, Workload
from flatout.errors import ResourceError
from flatout.search.trials import Run, TrialStore, key_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def unexpected() -> Any:
    raise AssertionError("the result is stored: nothing has to be computed")


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.dictionaries(st.text(min_size=1), JSON, max_size=4), st.randoms(use_true_random=False))
def test_a_key_does_not_depend_on_the_order_of_its_inputs(inputs: dict[str, Any], random: Any) -> None:
    shuffled = list(inputs.items())
    random.shuffle(shuffled)
    assert key_of(inputs) == key_of(dict(shuffled))


def test_keys_differ_where_inputs_do() -> None:
    base = {"recipe": "w8a8", "tokens": [1, 2], "workload": Workload()}
    others = [
        {**base, "recipe": "w8a8-g64"},
        {**base, "tokens": [12]},
        {**base, "tokens": [2, 1]},
        {**base, "workload": Workload(prompt=511)},
        {**base, "more": None},
    ]
    assert len({key_of(inputs) for inputs in (base, *others)}) == 6


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.lists(st.lists(st.floats(-30, 0, width=32), max_size=5), min_size=1, max_size=4))
def test_scores_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[float]]
) -> None:
    folder = tmp_path_factory.mktemp("store")
    documents = [np.array(row, dtype=np.float32) for row in rows]
    first = TrialStore(folder).scores("scores", "r", {"x": 1}, lambda: documents)
    again = TrialStore(folder).scores("scores", "r", {"x": 1}, unexpected)
    assert len(first) == len(again) == len(documents)
    for expected, found in zip(documents, again, strict=True):
        assert found.dtype == np.float32
        assert np.array_equal(expected, found)


def test_a_result_is_computed_once(tmp_path: Path) -> None:
    store = TrialStore(tmp_path / "a" / "b")
    assert store.result("time", "r", {"x": 1}, lambda: {"s": 0.5}) == {"s": 0.5}
    assert store.result("time", "r", {"x": 1}, unexpected) == {"s": 0.5}
    assert store.hits == 1
    assert store.result("other", "r", {"x": 1}, lambda: {"s": 0.7}) == {"s": 0.7}
    assert TrialStore(tmp_path / "a" / "b").result("time", "r", {"x": 1}, unexpected) == {"s": 0.5}


def test_fresh_ignores_what_is_there_but_not_what_it_wrote(tmp_path: Path) -> None:
    TrialStore(tmp_path).result("time", "r", {"x": 1}, lambda: {"s": 0.5})
    fresh = TrialStore(tmp_path, fresh=True)
    assert fresh.result("time", "r", {"x": 1}, lambda: {"s": 0.7}) == {"s": 0.7}
    assert fresh.result("time", "r", {"x": 1}, unexpected) == {"s": 0.7}


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b'{"key": "another", "result": {}}',
        b'{"key": 1}',
        b"\xff\xfe",
        b'{"key": "KEY", "result": 3}',
    ],
)
def test_a_damaged_trial_counts_as_absent(tmp_path: Path, damage: bytes) -> None:
    store = TrialStore(tmp_path)
    store.result("time", "r", {"x": 1}, lambda: {"s": 0.5})
    (file,) = tmp_path.glob("*.json")
    file.write_bytes(damage.replace(b"KEY", file.stem.encode()))
    assert TrialStore(tmp_path).result("time", "r", {"x": 1}, lambda: {"s": 0.9}) == {"s": 0.9}


@pytest.mark.parametrize("size", [0, 1, 30, 200])
def test_truncated_arrays_count_as_absent(tmp_path: Path, size: int) -> None:
    documents = [np.arange(100, dtype=np.float32)]
    TrialStore(tmp_path).scores("scores", "r", {"x": 1}, lambda: documents)
    (file,) = tmp_path.glob("*.npz")
    file.write_bytes(file.read_bytes()[:size])
    again = TrialStore(tmp_path).scores("scores", "r", {"x": 1}, lambda: documents)
    assert np.array_equal(again[0], documents[0])


def test_arrays_that_would_run_code_are_not_read(tmp_path: Path) -> None:
    store = TrialStore(tmp_path)
    store.put(Trial(key="k", recipe="r", stage="s"))
    np.savez(tmp_path / "k.npz", values=np.array([{"a": 1}], dtype=object))
    assert store.arrays("k") is None


def test_a_failed_computation_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TrialStore(tmp_path).result("time", "r", {"x": 1}, interrupted)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"the trial store needs a folder it can write.*FLATOUT_CACHE"):
        TrialStore(tmp_path / "file" / "store")


def test_a_run_keeps_its_identity_until_it_is_finished(tmp_path: Path) -> None:
    store = TrialStore(tmp_path)
    first = Run(store, {"model": "m"})
    assert not first.resumed
    resumed = Run(store, {"model": "m"})
    assert resumed.resumed
    assert resumed.identity == first.identity
    assert Run(store, {"model": "other"}).identity != first.identity
    resumed.finish()
    after = Run(store, {"model": "m"})
    assert not after.resumed
    assert after.identity != first.identity


def test_fresh_begins_a_new_run(tmp_path: Path) -> None:
    first = Run(TrialStore(tmp_path), {"model": "m"})
    fresh = Run(TrialStore(tmp_path, fresh=True), {"model": "m"})
    assert not fresh.resumed
    assert fresh.identity != first.identity


def test_a_kill_while_writing_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(source: object, target: object) -> None:
        raise KeyboardInterrupt

    store = TrialStore(tmp_path)
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store.result("time", "r", {"x": 1}, lambda: {"s": 0.5})
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
