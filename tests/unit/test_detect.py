"""hardware/detect.py on made-up machines: a folder tree stands in for / ."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from flatout.hardware import detect as module
from flatout.hardware.detect import available_cores, available_memory, detect, free_memory

CPUINFO = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Some Xeon @ 2.0GHz
stepping\t: 8
flags\t\t: fpu sse4_2 avx avx2 fma avx512f avx512bw avx512_vnni amx_int8 amx_tile hypervisor

processor\t: 1
vendor_id\t: GenuineIntel
model name\t: Another Processor
flags\t\t: fpu
"""


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def caches(*levels: tuple[str, str, str]) -> dict[str, str]:
    base = "sys/devices/system/cpu/cpu0/cache/index"
    return {
        f"{base}{i}/{name}": value + "\n"
        for i, triple in enumerate(levels)
        for name, value in zip(("level", "type", "size"), triple, strict=True)
    }


FULL = {
    "proc/cpuinfo": CPUINFO,
    "proc/meminfo": "MemTotal:       32000000 kB\nMemFree: 5 kB\nMemAvailable:   20000000 kB\n",
    **caches(
        ("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2048K"), ("3", "Unified", "1G")
    ),
}


def test_everything_is_read_from_the_first_processor(tmp_path: Path) -> None:
    found = detect(machine(tmp_path, FULL))
    assert found.name == "Some Xeon @ 2.0GHz"
    assert found.kind == "cpu"
    assert found.cores == 16
    assert (found.l1d_bytes, found.l2_bytes, found.l3_bytes) == (49152, 2 << 20, 1 << 30)
    assert found.memory_bytes == 32000000 * 1024
    expected = {"sse4_2", "avx", "fma", "avx2", "avx512f", "avx512bw", "avx512_vnni", "amx_tile", "amx_int8"}
    assert set(found.features) == expected
    assert found.ceilings == ()


def test_a_bare_root_gives_zeros_and_no_error(tmp_path: Path) -> None:
    found = detect(tmp_path)
    assert (found.l1d_bytes, found.l2_bytes, found.l3_bytes, found.memory_bytes) == (0, 0, 0, 0)
    assert found.features == ()
    assert found.name
    assert len(found.fingerprint) == 16


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 16),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "450000 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        # The group's own folder is not visible, but its parent's limit holds.
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n"}, 3),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "800000 100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/x\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            16,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/x\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        ({"proc/self/cgroup": "nonsense\n\n::\n", "sys/fs/cgroup/cpu.max": "garbage"}, 16),
    ],
)
def test_cores_follow_the_control_groups_quota(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    assert available_cores(machine(tmp_path, files)) == cores


def test_affinity_bounds_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 9}, raising=False)
    quota = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "900000 100000\n"}
    assert available_cores(machine(tmp_path, quota)) == 2


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 32000000 * 1024),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 32000000 * 1024),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "8000000000\n"}, 8000000000),
        (
            {
                "proc/self/cgroup": "4:memory:/job\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "4000000000\n",
            },
            4000000000,
        ),
    ],
)
def test_memory_follows_the_control_groups_limit(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    root = machine(tmp_path, FULL | files)
    assert available_memory(root) == expected
    assert free_memory(root) == min(expected, 20000000 * 1024)


@pytest.mark.parametrize(
    "files",
    [
        {
            "proc/self/cgroup": "0::/pod/job\n",
            "sys/fs/cgroup/pod/job/memory.max": "max\n",
            "sys/fs/cgroup/pod/memory.max": "8000000000\n",
            "sys/fs/cgroup/pod/memory.current": "5000000000\n",
            "sys/fs/cgroup/pod/memory.stat": "anon 3900000000\ninactive_file 1000000000\nactive_file 7\n",
        },
        {
            "proc/self/cgroup": "4:memory:/job\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "8000000000\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "5000000000\n",
            "sys/fs/cgroup/memory/job/memory.stat": "cache 9\ntotal_inactive_file 1000000000\n",
        },
    ],
    ids=["version 2", "version 1"],
)
def test_free_memory_is_what_the_control_group_has_left(tmp_path: Path, files: dict[str, str]) -> None:
    """Of 8 GB 5 are in use, 1 of them by files that can be read again."""
    root = machine(tmp_path, FULL | files)
    assert available_memory(root) == 8000000000
    assert free_memory(root) == 4000000000
    full = {name: "9000000000\n" for name in files if name.endswith(("memory.current", "usage_in_bytes"))}
    assert free_memory(machine(tmp_path / "full", FULL | files | full)) == 0


def test_the_fingerprint_tells_machines_apart_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = detect(machine(tmp_path / "base", FULL)).fingerprint
    assert detect(machine(tmp_path / "same", FULL)).fingerprint == base
    nearly = FULL | {"proc/meminfo": "MemTotal: 32000004 kB\n"}  # a kernel update reserves a little more
    assert detect(machine(tmp_path / "nearly", nearly)).fingerprint == base
    others = {
        "stepping": FULL | {"proc/cpuinfo": CPUINFO.replace("stepping\t: 8", "stepping\t: 9")},
        "flags": FULL | {"proc/cpuinfo": CPUINFO.replace("amx_int8 ", "")},
        "memory": FULL | {"proc/meminfo": "MemTotal: 64000000 kB\n"},
        "cache": FULL | caches(("1", "Data", "32K")),
    }
    prints = {name: detect(machine(tmp_path / name, files)).fingerprint for name, files in others.items()}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    prints["cores"] = detect(machine(tmp_path / "cores", FULL)).fingerprint
    assert len({base, *prints.values()}) == 1 + len(prints)


def test_lscpu_stands_in_where_sys_shows_no_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    output = "NAME  ONE-SIZE\nL1d      49152\nL1i      65536\nL2     2097152\nL3   503316480\n"

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[0] == "lscpu"
        return subprocess.CompletedProcess(command, 0, stdout=output)

    monkeypatch.setattr(subprocess, "run", run)
    assert module._caches_by_lscpu() == {"l1d": 49152, "l2": 2097152, "l3": 503316480}

    def fails(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", fails)
    assert module._caches_by_lscpu() == {}


def test_this_machine_has_a_core_and_memory() -> None:
    found = detect()
    assert found.cores >= 1
    assert found.memory_bytes > 1 << 28
    assert 0 < free_memory() <= found.memory_bytes
