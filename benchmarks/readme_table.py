"""Write README's table from a results file, between its two HTML comments.

    python benchmarks/readme_table.py           from the newest benchmarks/results/demo_*.json
    python benchmarks/readme_table.py FILE      from this one
    python benchmarks/readme_table.py --check   fail if README says anything else than the file it names

The first comment names the file, so README says where its figures come from and a test can compare them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flatout.search.units import megabytes, percent, rate, times

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
NONE = "none"

_BLOCK = re.compile(r"<!-- table: (?P<file>[\w.-]+) -->\n(?P<table>.*?)<!-- end of table -->", re.DOTALL)
_COLUMNS = ("baseline", "engine_original", "optimized")
_HEADINGS = ("transformers bf16", "flatout, original precision", "flatout, optimised")


def render(file: str, record: Mapping[str, Any] | None) -> str:
    """The block between the comments: the table and a paragraph on how it was measured.

    file: name of the results file; record: its content, None while nothing has been measured.
    """
    result = None if record is None else record["result"]
    rows = [["", *_HEADINGS], ["---", *["--:"] * len(_HEADINGS)]]
    rows += [
        _row("prefill, tokens/s", result, _speed("prefill")),
        _row("decode, tokens/s", result, _speed("decode")),
        _row("weights and KV cache", result, lambda column: megabytes(column["memory_bytes"])),
        _row("perplexity", result, lambda column: _number(column["perplexity"])),
        _row("loss against the original in fp32", result, lambda column: _loss(column["loss"])),
    ]
    table = "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)
    return f"\n{table}\n\n{_how(file, record)}\n\n"


def _row(name: str, result: Mapping[str, Any] | None, cell: Callable[[Mapping[str, Any]], str]) -> list[str]:
    if result is None:
        return [name, *["not measured yet"] * len(_COLUMNS)]
    return [name, *(cell(result[column]) for column in _COLUMNS)]


def _speed(phase: str) -> Callable[[Mapping[str, Any]], str]:
    def cell(column: Mapping[str, Any]) -> str:
        floor = column["floor_fraction"][phase]
        return f"{rate(column[f'{phase}_tokens_per_s'])} ({percent(floor)} of floor)"

    return cell


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _loss(value: float | None) -> str:
    return "-" if value is None else percent(value, signed=True)


def _how(file: str, record: Mapping[str, Any] | None) -> str:
    if record is None:
        return (
            "To fill it: `make demo`, then `python benchmarks/record.py`, then "
            "`python benchmarks/readme_table.py`."
        )
    result = record["result"]
    work, quality = result["request"]["workload"], result["quality"]
    ratio, interval = result["speedup"], result["speedup_interval"]
    gains = " and ".join(
        f"{phase} {times(ratio[phase])} ({times(interval[phase][0])} to {times(interval[phase][1])})"
        for phase in ("decode", "prefill")
    )
    bound = quality["upper_bound"]
    most = "without a bound" if bound is None else f"at most {percent(bound, signed=True)}"
    verdict = quality["verdict"].replace("_", " ")
    return "\n".join(
        [
            f"{result['model']['name']}, {work['prompt']} prompt and {work['output']} generated tokens, "
            f"batch {work['batch']}, on {record['hardware']}, {record['date']}.",
            f"Against {result['races']['baseline']['a']}: {gains}, medians of interleaved runs with 95 % "
            "intervals.",
            f"Certificate at {percent(quality['margin'])}: {verdict}; the loss is {most} at a confidence of "
            f"{100 * (1 - quality['alpha_k']):.1f} %, on {quality['tokens']:,} tokens of "
            f"{quality['clusters']} passages.",
            f"Recipe `{result['optimized']['recipe']}`. Measured by `{record['command']}` at commit "
            f"{record['commit'][:10]}{'-dirty' if record['commit'].endswith('-dirty') else ''}: "
            f"[{file}](benchmarks/results/{file}).",
        ]
    )


def newest() -> str:
    """Name of the demo's results file with the latest date, NONE when there is none."""
    files = sorted(path.name for path in RESULTS.glob("demo_*.json"))
    return max(files, key=lambda name: name.rpartition("_")[2], default=NONE)


def block(file: str) -> str:
    """The comments of `file` and what belongs between them."""
    record = None if file == NONE else json.loads((RESULTS / file).read_text(encoding="utf-8"))
    return f"<!-- table: {file} -->\n{render(file, record)}<!-- end of table -->"


def cited(text: str) -> tuple[str, str]:
    """(file, block) of the table in README's text. Raises ValueError unless there is exactly one."""
    found = list(_BLOCK.finditer(text))
    if len(found) != 1:
        raise ValueError(f"README must hold one table between its two comments, not {len(found)}")
    return found[0]["file"], found[0].group()


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="a results file; the demo's newest by default")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    file, found = cited(text)
    if options.check:
        if found != block(file):
            print(f"README.md differs from {file}: python benchmarks/readme_table.py", file=sys.stderr)
            return 1
        return 0
    wanted = options.file.name if options.file else newest()
    README.write_text(text.replace(found, block(wanted)), encoding="utf-8")
    print(f"README.md: table of {wanted}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
