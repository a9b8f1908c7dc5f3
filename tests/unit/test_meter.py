"""The energy meter on counters that misbehave."""

from __future__ import annotations

from pathlib import Path

import pytest

from flatout.hardware import meter
from flatout.hardware.meter import Meter, rapl_counters


class Fake:
    def __init__(self, shown: list[float | OSError], wraps_at: float | None = None) -> None:
        self.name, self.wraps_at, self._shown = "gpu0", wraps_at, shown

    def joules(self) -> float:
        value = self._shown.pop(0)
        if isinstance(value, OSError):
            raise value
        return value


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    times = [0.0, 2.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: times.pop(0))
    return times


@pytest.mark.parametrize(
    ("shown", "wraps_at", "joules", "reason"),
    [
        ([10.0, 25.5], None, 15.5, None),
        ([990.0, 4.0], 1000.0, 14.0, None),
        ([10.0, 10.0], None, None, "does not move"),
        ([10.0, 9.0], None, None, "went back"),
        ([OSError("denied"), 9.0], None, None, "denied"),
        ([1.0, OSError("lost")], None, None, "lost"),
    ],
)
def test_a_number_or_a_reason(
    clock: list[float],
    shown: list[float | OSError],
    wraps_at: float | None,
    joules: float | None,
    reason: str | None,
) -> None:
    measuring = Meter([Fake(shown, wraps_at)])
    measuring.start()
    found = measuring.stop()
    assert found.seconds == 2.0
    assert found.joules == ({} if joules is None else {"gpu0": joules})
    assert set(found.missing) == (set() if reason is None else {"gpu0"})
    assert reason is None or reason in found.missing["gpu0"]


def test_a_short_stretch_is_not_called_stuck(clock: list[float]) -> None:
    clock[1] = 0.01
    measuring = Meter([Fake([5.0, 5.0])])
    measuring.start()
    assert "too short" in measuring.stop().missing["gpu0"]


def test_rapl_counts_packages(tmp_path: Path) -> None:
    for number, name in enumerate(("package-0", "package-1")):
        folder = tmp_path / f"sys/class/powercap/intel-rapl:{number}"
        folder.mkdir(parents=True)
        (folder / "name").write_text(name + "\n")
        (folder / "max_energy_range_uj").write_text("262143328850\n")
        (folder / "energy_uj").write_text(f"{(number + 1) * 2500000}\n")
    (tmp_path / "sys/class/powercap/intel-rapl:0:0").mkdir()  # a part of package 0, not to be counted twice
    counters = rapl_counters(tmp_path)
    assert [(c.name, c.joules(), c.wraps_at) for c in counters] == [
        ("package-0", 2.5, 262143.32885),
        ("package-1", 5.0, 262143.32885),
    ]
    (counters[0].folder / "energy_uj").unlink()
    measuring = Meter(counters)
    measuring.start()
    assert "energy_uj" in measuring.stop().missing["package-0"]
