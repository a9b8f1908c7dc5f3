"""The drawing of a benchmark: a panel for every phase with a bar for every contender, the best first.

Ours are in colour; bars of contenders that lost more than 1 % are pale, because speed at the cost of quality
is another thing. The last panel sums up: the best of ours over the best peer. A file of its own, so its
colours come with it, on white.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flatout.report import svg
from flatout.report.svg import Scale
from flatout.search.units import amount, percent, times

Json = Mapping[str, Any]

OURS = "flatout"
_MARGIN = 0.01  # loss above which a bar is pale

_EDGE, _GAP, _PANEL = 36.0, 56.0, 620.0
_TOP, _HEAD, _STEP, _BAR = 108.0, 50.0, 21.0, 13.0
_NAME, _LOSS, _AMOUNT = 236.0, 66.0, 62.0  # widths of the words before and behind a bar
_LONGEST = 36  # letters of a name that fit

_TITLES = {
    "prefill": "Prefill",
    "decode": "Decode",
    "decode_ctx1024": "Decode, long context",
    "batch_8": "Decode, 8 sequences",
    "batch_32": "Decode, 32 sequences",
    "load": "Load",
    "peak_memory": "Peak memory",
}
_UNITS = {
    "token/s": "tokens/s, more is better",
    "s": "seconds, less is better",
    "byte": "MB, less is better",
}

STYLE = """
svg { background: #ffffff; font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums; }
.paper { fill: #ffffff; }
text { fill: #5c6270; }
.title { fill: #1b1d21; font-size: 22px; font-weight: 650; letter-spacing: -0.01em; }
.panel { fill: #1b1d21; font-size: 15px; font-weight: 650; }
.label, .amount { fill: #1b1d21; }
.strong { fill: #0b6e69; font-weight: 650; }
.lossy { fill: #b4500f; }
.bar { fill: #9aa0ab; }
.bar.pale { fill: #dfe1e5; }
.bar.ours { fill: #0b6e69; }
.bar.ours.pale { fill: #a5cfcb; }
.whisker { stroke: #1b1d21; stroke-width: 1.2; }
.axis { stroke: #9aa0ab; }
.even { stroke: #1b1d21; stroke-dasharray: 3 3; }
.any { fill: #ffffff; stroke: #0b6e69; stroke-width: 1.6; }
.equal { fill: #0b6e69; stroke: #0b6e69; stroke-width: 1.6; }
.join { stroke: #cfe5e2; stroke-width: 3; }
"""


def bench_chart(result: Json) -> str:
    """A standalone SVG file of the JSON that `flatout bench` writes."""
    phases = [phase for phase in _TITLES if any(row["phase"] == phase for row in result["rows"])]
    panels = [(_panel(result, phase), _count(result, phase)) for phase in phases]
    panels.append((_summary(result, phases), len(phases) + 1))
    body: list[str] = []
    y = _TOP
    for left in range(0, len(panels), 2):
        pair = panels[left : left + 2]
        for i, (panel, _) in enumerate(pair):
            body += svg.moved(_EDGE + i * (_PANEL + _GAP), y, panel)
        y += _HEAD + max(lines for _, lines in pair) * _STEP + 30
    width = 2 * _EDGE + 2 * _PANEL + _GAP
    body = [svg.rect(0, 0, width, y, "paper"), *_heading(result), *body]
    label = f"Speed of {', '.join(result['models'])} beside other engines"
    return svg.standalone(svg.svg(width, y, label, body), STYLE)


def _count(result: Json, phase: str) -> int:
    return sum(row["phase"] == phase for row in result["rows"])


def _heading(result: Json) -> list[str]:
    machine = result["machine"]
    rounds = f"{result['rounds']} round{'s' if result['rounds'] > 1 else ''}"
    ran = f"{result['threads']} threads, {rounds}, {result['taken'][:10]}"
    scored = any(row["loss"] is not None for row in result["rows"])
    words = ["flatout", "other engines", *(["pale: more than 1 % loss"] if scored else [])]
    body = [
        svg.text(_EDGE, 44, f"{' and '.join(result['models'])} beside other engines", "title"),
        svg.text(_EDGE, 66, f"{machine['name']}, {ran}; whiskers: 20th to 80th percentile"),
    ]
    x = _EDGE
    for name, kind in zip(words, ("bar ours", "bar", "bar pale"), strict=False):
        body += [svg.rect(x, 79, 13, 11, kind, radius=2), svg.text(x + 19, 89, name)]
        x += 19 + 7 * len(name) + 18
    return body


def _panel(result: Json, phase: str) -> list[str]:
    """One phase, its corner at the origin."""
    rows = [row for row in result["rows"] if row["phase"] == phase]
    lower = rows[0]["unit"] != "token/s"
    rows.sort(key=lambda row: row["median"], reverse=not lower)
    body = [
        svg.text(0, 14, _TITLES[phase], "panel"),
        svg.text(0, 33, _work(rows[0])),
        svg.text(_NAME + _LOSS, 33, _UNITS[rows[0]["unit"]]),
    ]
    if any(row["loss"] is not None for row in rows):
        body.append(svg.text(_NAME + _LOSS - 12, 33, "loss", "", "end"))
    x = Scale(low=0, high=max(row["p80"] for row in rows), start=_NAME + _LOSS, end=_PANEL - _AMOUNT)
    for i, row in enumerate(rows):
        body += _bar(row, x, _HEAD + i * _STEP)
    bottom = _HEAD + len(rows) * _STEP - 4
    body.append(svg.line(x.start, _HEAD - 6, x.start, bottom, "axis"))
    return body


def _work(row: Json) -> str:
    if row["phase"] == "load":
        return f"a fresh process to the token after {row['prompt']}"
    if row["phase"] == "peak_memory":
        return "of a fresh process at its first token"
    batch, prompt = row["batch"], row["prompt"]
    tokens = f"{prompt} tokens" if row["phase"] == "prefill" else f"{row['output']} tokens after {prompt}"
    return f"{tokens}, {batch} sequence{'s' if batch > 1 else ''}"


def _bar(row: Json, x: Scale, y: float) -> list[str]:
    name = f"{row['engine']} {row['format']}"
    ours, loss = row["engine"] == OURS, row["loss"]
    pale = loss is not None and loss > _MARGIN
    kind = "bar" + (" ours" if ours else "") + (" pale" if pale else "")
    value, middle = amount(row["median"], row["unit"]), y + _BAR / 2
    body = [
        svg.text(0, middle + 4, _clipped(name, _LONGEST - 5 * ours), "strong" if ours else "label"),
        svg.rect(x.start, y, x(row["median"]) - x.start, _BAR, kind, f"{name}: {value}", radius=2),
    ]
    if loss is not None:
        words = percent(loss, signed=True)
        body.append(svg.text(x.start - 12, middle + 4, words, "lossy" if pale else "", "end"))
    low, high = x(row["p20"]), x(row["p80"])
    body.append(svg.line(low, middle, high, middle, "whisker"))
    body += [svg.line(at, middle - 3, at, middle + 3, "whisker") for at in (low, high)]
    body.append(svg.text(max(high, x(row["median"])) + 7, middle + 4, value, "amount"))
    return body


def _clipped(name: str, longest: int) -> str:
    """Letters in bold are wider, so fewer of them fit."""
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _summary(result: Json, phases: Sequence[str]) -> list[str]:
    """How many times better the best of ours is, by phase: hollow over all, filled at equal quality."""
    every, equal = result["ratio_to_best_peer"], result["ratio_at_equal_quality"]
    known = [of[phase] for of in (every, equal) for phase in phases if of.get(phase) is not None]
    title = [svg.text(0, 14, "Ours over the best peer", "panel")]
    if not known:
        return [*title, svg.text(0, 33, "no peer was measured in the same phases")]
    low, high = min([*known, 1.0]) / 1.15, max([*known, 1.0]) * 1.15
    x = Scale(low=low, high=high, start=_NAME + _LOSS - 90, end=_PANEL - 2 * _AMOUNT, log=True)
    bottom = _HEAD + len(phases) * _STEP
    body = [*title, svg.text(0, 33, "right of the line ours is better")]
    body += [
        svg.circle(_PANEL - 218, 29, 4.5, "any"),
        svg.text(_PANEL - 208, 33, "any loss"),
        svg.circle(_PANEL - 138, 29, 4.5, "equal"),
        svg.text(_PANEL, 33, "both within 1 % loss", "", "end"),
        svg.line(x(1.0), _HEAD - 6, x(1.0), bottom, "even"),
        svg.text(x(1.0), bottom + 14, "1×", "", "middle"),
    ]
    for i, phase in enumerate(phases):
        middle = _HEAD + i * _STEP + _BAR / 2
        found = [(of[phase], kind) for of, kind in ((every, "any"), (equal, "equal")) if of.get(phase)]
        body.append(svg.text(0, middle + 4, _TITLES[phase], "label"))
        if len(found) == 2:
            body.append(svg.line(x(found[0][0]), middle, x(found[1][0]), middle, "join"))
        body += [svg.circle(x(value), middle, 4.5, kind, times(value)) for value, kind in found]
        words = " / ".join(times(value) for value, _ in found) or "-"
        body.append(svg.text(_PANEL, middle + 4, words, "amount", "end"))
    return body
