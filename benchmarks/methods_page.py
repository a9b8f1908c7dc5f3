"""The results files of benchmarks/methods.py and the tables of docs/methods.md, which are made from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from record import RESULTS, ROOT, without_folders

PAGE = ROOT / "docs" / "methods.md"
_DISTILLED = ("child", "childdrawn", "distillation")
_BEGIN, _END = "<!-- tables -->", "<!-- end of tables -->"


def newest(short: str) -> Path | None:
    """The results file of the model called `short` with the latest date, None where there is none."""
    found = sorted(RESULTS.glob(f"methods_{short}_*.json"), key=lambda path: path.stem.rpartition("_")[2])
    return found[-1] if found else None


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    text = json.dumps(without_folders(record), indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def fill_page() -> None:
    """Put the tables of all results files between the marks of docs/methods.md."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(_BEGIN)[0], text.split(_END)[1]
    tables = "\n\n".join([*map(table, sorted(RESULTS.glob("methods_*.json"))), distilled_table()])
    PAGE.write_text(f"{before}{_BEGIN}\n\n{tables}\n\n{_END}{after}", encoding="utf-8")


def table(path: Path) -> str:
    """The rows of one results file as Markdown."""
    result = json.loads(path.read_text(encoding="utf-8"))["result"]
    lines = _encoder_lines(result) if "cosine_mean" in result["rows"][0] else _decoder_lines(result)
    caption = f"**{result['model']}**, {result['judged']}"
    if "speed" in result:
        speed = result["speed"]
        threads = f"{speed['threads']} thread{'s' if speed['threads'] > 1 else ''}"
        caption += f"; speed by {threads} on {speed['hardware']['name']}"
    return f"{caption}\n\n" + "\n".join(lines)


def distilled_table() -> str:
    """Models that were trained after weights were taken away, of benchmarks/distillation.py, as Markdown."""
    lines = [
        "| what was left | weights | judged on | whole | cut | distilled | of the gap, nats | minutes, GPU |",
        "|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for path in sorted(file for theme in _DISTILLED for file in RESULTS.glob(f"{theme}_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))["result"]
        sizes = result.get("structure") or {}
        left = ",".join(f"{name.replace('_', '-')}={size}" for name, size in sizes.items() if size)
        for name, row in result["rows"].items():
            on = "windows" if "windows" in row["whole"] else "wiki.test.raw"
            kinds = ("whole", "cut", "distilled")
            whole, cut, distilled = (f"{math.exp(row[kind][on]):,.2f}" for kind in kinds)
            start = f"| `{name}{' ' + left if left else ''}`"
            where = f"{row['of_the_whole']:.1%} | {'windows of 1,024' if on == 'windows' else 'rows of 512'}"
            end = f"{row['gap_closed'][on]:.0%} | {row['minutes']:.1f}, {result['hardware']['name']} |"
            lines.append(f"{start} | {where} | {whole} | {cut} | {distilled} | {end}")
            if "small" in row:
                small = f"{math.exp(row['small'][on]):,.2f}"
                lines.append(
                    f"{start}, `{row['small']['format']}` | {where} | {whole} | - | {small} | - | - |"
                )
    return "**smollm2-135m**, cut and distilled, perplexity of wiki.test.raw\n\n" + "\n".join(lines)


def _encoder_lines(result: Mapping[str, Any]) -> list[str]:
    return [
        "| recipe | bits a weight | cosine, mean | least | placed | texts/s | minutes |",
        "|---|--:|--:|--:|--:|--:|--:|",
        *(
            f"| `{r['row']}` | {r['bits_per_weight']:.2f} | {r['cosine_mean']:.5f} | {r['cosine_min']:.5f} "
            f"| {r['accuracy']:.2%} | {_rate(r, 'texts_per_s')} | {_minutes(r)} |"
            for r in result["rows"]
        ),
    ]


def _decoder_lines(result: Mapping[str, Any]) -> list[str]:
    return [
        "| recipe | bits a weight | perplexity | loss | KL, nats | other token | decode | prefill "
        "| minutes |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        *(
            f"| `{r['row']}` | {r['bits_per_weight']:.2f} | {r['perplexity']:.3f} | {r['loss']:+.2%} "
            f"± {r['loss_error']:.2%} | {r['kl']:.4f} | {r['flips']:.1%} | {_rate(r, 'decode_tokens_per_s')} "
            f"| {_rate(r, 'prefill_tokens_per_s')} | {_minutes(r)} |"
            for r in result["rows"]
        ),
    ]


def _minutes(row: Mapping[str, Any]) -> str:
    return f"{row['cpu_seconds'] / 60:.1f}" if row.get("cpu_seconds") is not None else "-"


def _rate(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:,.0f}" if name in row else "-"
