"""detect(): the machine this process may use, as a Hardware without ceilings.

Everything comes from files that Linux keeps under /proc and /sys, below a `root` that tests replace. In a
container the cores and the memory are those of its control group, not the host's. What cannot be read is 0
or empty, never a guess.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from pathlib import Path

from flatout.core.types import Hardware

_FEATURES = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl",
    "avx512_vbmi", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
"""Instruction sets that matter to kernels, as /proc/cpuinfo spells them (x86 flags, then Arm features)."""

_CACHES = {("1", "Data"): "l1d", ("2", "Unified"): "l2", ("3", "Unified"): "l3"}


def detect(root: Path = Path("/")) -> Hardware:
    """The cores, instruction sets, caches and memory of this machine. `root` replaces / in tests."""
    cpu = cpu_info(root)
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    caches = _caches(root)
    cores = available_cores(root)
    memory = available_memory(root)
    features = tuple(name for name in _FEATURES if name in flags)
    name = cpu.get("model name") or platform.processor() or platform.machine() or "unknown processor"
    identity = [
        name,
        *(cpu.get(key, "") for key in ("vendor_id", "cpu family", "model", "stepping")),
        *features,
        *(str(caches[level]) for level in ("l1d", "l2", "l3")),
        str(cores),
        str(round(memory / 2**30)),
    ]
    return Hardware(
        name=name,
        kind="cpu",
        cores=cores,
        features=features,
        l1d_bytes=caches["l1d"],
        l2_bytes=caches["l2"],
        l3_bytes=caches["l3"],
        memory_bytes=memory,
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16],
    )


def cpu_info(root: Path = Path("/")) -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in _read(root / "proc/cpuinfo").splitlines():
        if not line.strip() and fields:
            break
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    return fields


def available_cores(root: Path = Path("/")) -> int:
    """Cores this process may keep busy: its affinity, cut by the control group's quota (at least 1)."""
    by_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if by_affinity else os.cpu_count() or 1
    for folder in _control_groups(root, "cpu"):
        quota, period = "", ""
        if (folder / "cpu.max").exists():
            quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
        elif (folder / "cpu.cfs_quota_us").exists():
            quota = _read(folder / "cpu.cfs_quota_us").strip()
            period = _read(folder / "cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit() and int(period) > 0:  # "max" and -1 mean no quota
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of memory this process may ever use: the machine's, cut by the control group's limit."""
    limits = [limit for _, limit in _memory_limits(root)]
    machine = _meminfo(root, "MemTotal")
    return min([machine, *limits] if machine else limits, default=0)


def give_back_memory() -> None:
    """Return to the system what the allocator has kept of freed memory: hundreds of megabytes after weights
    were rounded, since glibc keeps pieces below 32 MB."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that could be allocated now without swapping, in the machine and in every control group."""
    left = [max(0, limit - _used(folder)) for folder, limit in _memory_limits(root)]
    return min([_meminfo(root, "MemAvailable"), *left])


def _memory_limits(root: Path) -> list[tuple[Path, int]]:
    """(folder, bytes) of the control groups around this process that limit memory."""
    found = []
    for folder in _control_groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _read(folder / name).strip()
            if limit.isdigit() and int(limit) > 0:
                found.append((folder, int(limit)))
    return found


def _used(folder: Path) -> int:
    """Bytes in use by a control group, without the file cache that it would give back."""
    used = _read(folder / "memory.current").strip() or _read(folder / "memory.usage_in_bytes").strip()
    cache = re.search(r"^(?:total_)?inactive_file (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
    return int(used) - (int(cache[1]) if cache else 0) if used.isdigit() else 0


def _meminfo(root: Path, key: str) -> int:
    match = re.search(rf"^{key}:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _control_groups(root: Path, controller: str) -> list[Path]:
    """Folders whose limits hold for this process: its control group and those around it, version 1 or 2."""
    folders: list[Path] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, names, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not names:
            base = root / "sys/fs/cgroup"
        elif controller in names.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        inside = Path(path.strip().lstrip("/"))
        # A container often sees only its own group, mounted at the base, so missing folders are no error.
        folders += [base / inside, *(base / parent for parent in inside.parents)]
    return list(dict.fromkeys(folder for folder in folders if folder.is_dir()))


def _caches(root: Path) -> dict[str, int]:
    """Bytes of the level 1 data, level 2 and level 3 cache that one core sees."""
    sizes = {"l1d": 0, "l2": 0, "l3": 0}
    for index in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = (_read(index / "level").strip(), _read(index / "type").strip())
        size = re.fullmatch(r"(\d+)([KMG]?)", _read(index / "size").strip())
        if kind in _CACHES and size:
            sizes[_CACHES[kind]] = int(size[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[size[2]]
    if not any(sizes.values()) and root == Path("/"):
        sizes |= _caches_by_lscpu()
    return sizes


def _caches_by_lscpu() -> dict[str, int]:
    """The same from `lscpu`, which reads cpuid where a virtual machine hides /sys's cache folder."""
    import subprocess

    try:
        command = ["lscpu", "--bytes", "--caches=NAME,ONE-SIZE"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    pairs = (line.split() for line in output.splitlines()[1:])
    return {
        name.lower(): int(size)
        for name, size in (pair for pair in pairs if len(pair) == 2)
        if name.lower() in ("l1d", "l2", "l3") and size.isdigit()
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
