"""`flatout doctor`: hardware, instruction sets, compilers, libraries; what is missing and how to get it."""

from __future__ import annotations

from typing import Annotated

import typer

from flatout.cli.output import aligned, print_json
from flatout.core.sources import cache_dir
from flatout.core.types import Hardware
from flatout.hardware.checks import Check, run_checks
from flatout.hardware.detect import detect


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object: hardware, checks.")] = False,
) -> None:
    """Show the hardware and what flatout finds on it. Nothing is measured or changed."""
    hardware = detect()
    checks = run_checks(hardware, cache_dir())
    if as_json:
        print_json({"hardware": hardware, "checks": checks})
    else:
        print(_table(hardware, checks))


def _table(hardware: Hardware, checks: tuple[Check, ...]) -> str:
    caches = (hardware.l1d_bytes / 2**10, hardware.l2_bytes / 2**20, hardware.l3_bytes / 2**20)
    rows = [
        ["processor", f"{hardware.name}, {hardware.cores} cores for this process"],
        ["caches", "L1d {:.0f} KiB, L2 {:.1f} MiB a core, L3 {:.0f} MiB".format(*caches)],
        ["memory", f"{hardware.memory_bytes / 2**30:.1f} GiB"],
        ["instructions", " ".join(hardware.features)],
        ["fingerprint", hardware.fingerprint],
    ]
    found = [["check", "status", "found", "remedy"]]
    found += [[c.name, c.status, c.found, c.remedy] for c in checks]
    missing = sum(c.status == "missing" for c in checks)
    verdict = f"{missing} missing: see the remedies" if missing else "everything that flatout needs is there"
    return f"{aligned(rows, right=False)}\n\n{aligned(found, right=False)}\n\n{verdict}"
