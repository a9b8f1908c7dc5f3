"""Keep what a command measured as a results file that documents may quote.

    python benchmarks/record.py demo demo/result.json --command "make demo"
    python benchmarks/record.py bench build/bench.json
    python benchmarks/record.py fpga build/fpga.json --here verilator --command "flatout fpga ..."

The first argument is the theme, the second the JSON of `flatout optimize --json` or `flatout bench --out`.
With --here, a result that says neither when nor where (`flatout fpga --json`) was measured here and today,
with the packages named.
Writes benchmarks/results/THEME_HARDWARE_DATE.json: command, commit, date, hardware and versions, then the
result as it was; of a benchmark also its drawing, with .svg for .json. Of absolute paths only the last part
is kept, since folders of one machine mean nothing elsewhere. docs/benchmarks.md describes the file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flatout.hardware.detect import detect
from flatout.report.bench import bench_chart

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_BUILT_FROM = ("src", "CMakeLists.txt", "pyproject.toml")


def make_record(result: Mapping[str, Any], command: str | None, commit: str) -> dict[str, Any]:
    """The results file of `result`; `command` None takes the one that the result names itself.

    Raises ValueError for a result that is not one, or that does not say how it was made.
    """
    hardware = result.get("hardware") or result.get("machine")
    date = result.get("date") or result.get("taken")
    # `flatout optimize` writes its name only, `flatout bench` the whole line.
    known = result.get("command") if " " in str(result.get("command")) else None
    if not isinstance(hardware, dict) or not isinstance(date, str) or "error" in result:
        raise ValueError("a result has hardware and a date: give the JSON of a run that ended well")
    if command is None and known is None:
        raise ValueError("this result does not say which command made it: give --command")
    return {
        "command": _cut(command or known or ""),
        "commit": result.get("commit") or commit,
        "date": date[:10],
        "hardware": f"{hardware['name']}, {hardware['cores']} cores",
        "versions": result.get("versions", {}),
        "result": without_folders(result),
    }


def file_name(theme: str, result: Mapping[str, Any], date: str) -> str:
    """THEME_HARDWARE_DATE.json, e.g. demo_intel-xeon-2c_2026-11-22.json."""
    hardware = result.get("hardware") or result["machine"]
    name = re.sub(r"\(\w+\)|\b(cpu|processor)\b|@.*", " ", hardware["name"].lower())
    words = re.findall(r"[a-z0-9.]+", name) or [hardware["kind"]]
    return f"{theme}_{'-'.join(words)}-{hardware['cores']}c_{date}.json"


def measured_here(*packages: str) -> dict[str, Any]:
    """When, where and with which versions of `packages` (those installed) a benchmark ran."""
    hardware = detect()
    versions = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": {"name": hardware.name, "kind": hardware.kind, "cores": hardware.cores},
        "versions": versions,
    }


def write(theme: str, result: Mapping[str, Any], command: str | None = None) -> Path:
    """Write the results file of `result` and return its path. Raises ValueError as make_record does."""
    record = make_record(result, command, commit_of(ROOT))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / file_name(theme, result, record["date"])
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if "ratio_to_best_peer" in result:
        drawing = bench_chart(record["result"])
        path.with_suffix(".svg").write_text(drawing, encoding="utf-8")
    return path


def commit_of(folder: Path) -> str:
    """The commit that is checked out, with "-dirty" behind it when what is built from it has changed."""
    git = ["git", "-C", str(folder)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    status = [*git, "status", "--porcelain", "--", *_BUILT_FROM]
    changed = subprocess.run(status, capture_output=True, text=True, check=True)
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def _cut(command: str) -> str:
    return " ".join(Path(word).name if word.startswith("/") else word for word in command.split(" "))


def without_folders(value: Any) -> Any:
    """JSON with the last part alone of absolute paths."""
    if isinstance(value, dict):
        return {
            key: _cut(item) if key == "command" and isinstance(item, str) else without_folders(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if isinstance(value, str) and value.startswith("/") and "\n" not in value:
        return Path(value).name
    return value


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("theme", help="what was measured, e.g. demo")
    parser.add_argument("result", type=Path, help="JSON of flatout optimize or flatout bench")
    parser.add_argument("--command", help="the command line that measured it")
    parser.add_argument("--here", metavar="PACKAGES", help="measured here and today, with these")
    options = parser.parse_args()
    result = json.loads(options.result.read_text(encoding="utf-8"))
    if options.here is not None:
        result = {**measured_here(*options.here.split(",")), **result}
    try:
        path = write(options.theme, result, options.command)
    except ValueError as error:
        print(f"{options.result}: {error}", file=sys.stderr)
        return 2
    print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
