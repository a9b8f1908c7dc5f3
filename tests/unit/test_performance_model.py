"""docs/performance-model.md: its programs run and print what the page says they print."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "performance-model.md"


def test_the_page_computes_what_it_says() -> None:
    blocks = re.findall(
        r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    assert len(blocks) == 4
    namespace: dict[str, Any] = {}
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(PAGE), "exec"), namespace)
        assert printed.getvalue() == expected


def test_the_peaks_are_those_of_the_data_sheet() -> None:
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert "312 TFLOP/s dense bf16, 1,555 GB/s" in text
