"""hardware/ceilings.py with made-up microbenchmarks: what is kept, what is cached, what is refused."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from flatout.core.types import Ceiling, Hardware
from flatout.errors import BackendError, ResourceError
from flatout.hardware import ceilings as module
from flatout.hardware.ceilings import measure_ceilings
from flatout.hardware.detect import detect


class FakeMachine:
    """Rates that start low (a busy neighbour), peak in the second sample and fall again."""

    wobble = (0.5, 1.0, 0.8)

    def __init__(self, kernels: list[tuple[str, str]]) -> None:
        self.kernels = kernels
        self.calls: Counter[tuple[object, ...]] = Counter()

    def _factor(self, key: tuple[object, ...]) -> float:
        self.calls[key] += 1
        return self.wobble[(self.calls[key] - 1) % len(self.wobble)]

    def read_rates(self, bytes: int, threads: int, seconds: float) -> list[tuple[str, float]]:
        rate = 1e18 / bytes * threads * self._factor(("read", bytes, threads))
        return [("1 stream", 0.7 * rate), ("4 streams", rate), ("8 streams", 0.9 * rate)]

    def op_kernels(self) -> list[tuple[str, str]]:
        return self.kernels

    def op_rate(self, format: str, instruction: str, threads: int, seconds: float) -> float:
        speed = {
            "amx": 64.0,
            "avx512_vnni": 8.0,
            "avx512": 2.0,
            "avx512_bf16": 1.0,
            "imul": 3e-3,
            "portable": 0.1,
        }
        return 1e12 * speed[instruction] * threads * self._factor((format, instruction, threads))


MODERN = [
    ("int8", "amx"),
    ("bf16", "amx"),
    ("int8", "avx512_vnni"),
    ("int8", "portable"),
    ("bf16", "avx512_bf16"),
    ("fp32", "avx512"),
    ("clock", "imul"),
]


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> Hardware:
    hardware = replace(detect(), cores=4, l2_bytes=1 << 20, l3_bytes=480 << 20)
    monkeypatch.setattr(module, "detect", lambda: hardware)
    monkeypatch.setattr(module, "free_memory", lambda: 8 << 30)
    return hardware


def by_name(hardware: Hardware) -> dict[tuple[str, int], Ceiling]:
    return {(c.name, c.threads): c for c in hardware.ceilings}


def test_the_best_sample_of_the_best_loop_counts(tmp_path: Path) -> None:
    found = by_name(measure_ceilings(native=FakeMachine(MODERN), directory=tmp_path))
    assert {name for name, _ in found} == {
        "read_cache", "read_16mb", "read_48mb", "read_96mb", "read_256mb", "read_dram",
        "int8", "bf16", "fp32", "int8_amx", "bf16_amx", "clock",
    }  # fmt: skip
    assert {threads for _, threads in found} == {1, 4}
    dram = found["read_dram", 4]
    assert dram.working_set_bytes == 600 << 20  # more than the level 3 cache
    assert dram.value == pytest.approx(4e18 / dram.working_set_bytes)
    assert (dram.unit, dram.tier) == ("byte/s", "measured")
    assert found["read_cache", 1].working_set_bytes == 1 << 19  # half of the level 2 cache
    assert found["read_cache", 4].working_set_bytes == 4 << 19
    assert found["int8", 4].value == pytest.approx(32e12)  # vnni, not the portable loop
    assert found["int8_amx", 1].value == pytest.approx(64e12)
    assert found["clock", 4].value == pytest.approx(3e9)  # of one core, not of all
    assert found["clock", 4].unit == "Hz"


def test_bf16_is_never_slower_than_fp32(tmp_path: Path) -> None:
    found = by_name(measure_ceilings(native=FakeMachine(MODERN), directory=tmp_path / "a"))
    assert found["bf16", 1].value == found["fp32", 1].value == pytest.approx(2e12)
    old = FakeMachine([("int8", "portable"), ("fp32", "portable")])
    found = by_name(measure_ceilings(native=old, directory=tmp_path / "b"))
    assert found["bf16", 4].value == found["fp32", 4].value
    assert ("bf16_amx", 1) not in found


def test_results_are_kept_by_fingerprint(tmp_path: Path, four_cores: Hardware) -> None:
    machine = FakeMachine(MODERN)
    first = measure_ceilings(native=machine, directory=tmp_path / "new" / "folder")
    calls = machine.calls.total()
    assert measure_ceilings(native=machine, directory=tmp_path / "new" / "folder") == first
    assert machine.calls.total() == calls
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == [
        f"hardware-{four_cores.fingerprint}.json"
    ]
    measure_ceilings(native=machine, directory=tmp_path / "new" / "folder", fresh=True)
    assert machine.calls.total() > calls


@pytest.mark.parametrize(
    "damage", ["truncated", "version", "boot", "old", "future", "fields", "list", "bytes"]
)
def test_a_file_that_cannot_be_trusted_is_measured_again(
    tmp_path: Path, four_cores: Hardware, damage: str
) -> None:
    machine = FakeMachine(MODERN)
    first = measure_ceilings(native=machine, directory=tmp_path)
    calls = machine.calls.total()
    path = tmp_path / f"hardware-{four_cores.fingerprint}.json"
    record = json.loads(path.read_text())
    if damage == "version":
        record["version"] += 1
    if damage == "boot":
        record["boot_id"] = "another"
    if damage == "old":
        record["measured_at"] -= 48 * 3600
    if damage == "future":
        record["measured_at"] += 3600
    if damage == "fields":
        record["ceilings"][0]["colour"] = "blue"
    text = json.dumps([record] if damage == "list" else record)
    path.write_bytes(
        b"\xff\xfe{" if damage == "bytes" else text[: 50 if damage == "truncated" else None].encode()
    )
    assert by_name(measure_ceilings(native=machine, directory=tmp_path)).keys() == by_name(first).keys()
    assert machine.calls.total() > calls
    json.loads(path.read_text())  # and replaced by a sound one


def test_progress_counts_up(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    measure_ceilings(
        lambda what, done, of: seen.append((what, done, of)), native=FakeMachine(MODERN), directory=tmp_path
    )
    assert all(done <= of for _, done, of in seen)
    assert [done for _, done, _ in seen[:-1]] == sorted(done for _, done, _ in seen[:-1])
    assert seen[-1][1] == seen[-1][2]


def test_a_slow_machine_stops_after_the_round_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    machine = FakeMachine(MODERN)
    rates = machine.read_rates

    def slow(bytes: int, threads: int, seconds: float) -> list[tuple[str, float]]:
        clock[0] += 1.0
        return rates(bytes, threads, seconds)

    machine.read_rates = slow  # type: ignore[method-assign]
    measure_ceilings(native=machine, directory=tmp_path)
    assert clock[0] == 12.0  # one round of six working sets at two thread counts


def test_too_little_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory", lambda: 100 << 20)
    with pytest.raises(ResourceError, match="needs 512 MB free; found: 100 MB"):
        measure_ceilings(native=FakeMachine(MODERN), directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_the_extension_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import flatout

    monkeypatch.setitem(sys.modules, "flatout._cpu", None)
    monkeypatch.delattr(flatout, "_cpu", raising=False)
    with pytest.raises(BackendError, match=r"extension flatout\._cpu"):
        measure_ceilings(directory=tmp_path)
