"""A few functions that draw SVG text: scales, axes, marks and labels that keep out of each other's way.

Colours come from the page's style sheet by class, so one drawing serves light and dark. Every text is escaped
here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_CHARACTER = 7.0  # average advance of a 12 px letter in a wide sans-serif face, in px


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Maps [low, high] to [start, end] pixels, linearly or by logarithm. Values outside are clamped to the
    ends.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """Round values inside the range: powers of ten (with 2 and 5 when few) or steps of 1, 2 or 5."""
        return _log_ticks(self.low, self.high, most) if self.log else _linear_ticks(self.low, self.high, most)


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    if high / low < 8:  # powers of ten would leave such an axis bare
        return _linear_ticks(low, high, most)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [d * 10.0**p for p in range(first, last + 1) for d in digits]
        ticks = [t for t in ticks if low * 0.999 <= t <= high * 1.001]
        if len(ticks) <= most:
            return ticks
    step = math.ceil(len(ticks) / most)
    return ticks[::step]


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * d for d in (1, 2, 5, 10) if power * d >= rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def svg(width: float, height: float, label: str, body: Sequence[str], kind: str = "") -> str:
    """The drawing. `label` is what a screen reader says."""
    return (
        f'<svg class="chart {escape(kind, quote=True)}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{escape(label, quote=True)}">{"".join(body)}</svg>'
    )


def standalone(drawing: str, style: str) -> str:
    """A drawing as a file of its own, with the style sheet that the page would have."""
    opening, closing, rest = drawing.partition(">")
    named = opening.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f"{named}{closing}<style>{style}</style>{rest}\n"


def moved(x: float, y: float, body: Sequence[str]) -> list[str]:
    """The same marks with their origin at (x, y)."""
    return [f'<g transform="translate({x:.1f} {y:.1f})">', *body, "</g>"]


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def path(points: Sequence[tuple[float, float]], kind: str) -> str:
    steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="M{steps}" class="{kind}"/>'


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start", angle: float = 0) -> str:
    """angle: degrees clockwise about (x, y)."""
    turned = f' transform="rotate({angle:.1f} {x:.1f} {y:.1f})"' if angle else ""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}'
    return f'<text {place} class="{kind}">{escape(words)}</text>'


def rect(
    x: float, y: float, width: float, height: float, kind: str, title: str = "", radius: float = 0
) -> str:
    shape = (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" rx="{radius:g}" '
        f'class="{kind}"'
    )
    return f"{shape}>{_title(title)}</rect>" if title else f"{shape}/>"


def circle(x: float, y: float, radius: float, kind: str, title: str = "") -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{kind}">{_title(title)}</circle>'


def square(x: float, y: float, radius: float, kind: str, title: str = "") -> str:
    return rect(x - radius, y - radius, 2 * radius, 2 * radius, kind, title, radius=1)


def _title(words: str) -> str:
    return f"<title>{escape(words)}</title>" if words else ""


def frame(
    x: Scale,
    y: Scale,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    x_name: str,
    y_name: str,
    below: float = 0,
) -> list[str]:
    """Grid lines, tick labels and axis names; the y name stands above the axis, where it is easiest to read.

    `below`: room to leave between the x axis and its tick labels.
    """
    body = []
    for value, words in x_ticks:
        body.append(line(x(value), y.start, x(value), y.end, "grid"))
        body.append(text(x(value), y.start + 16 + below, words, "tick", "middle"))
    for value, words in y_ticks:
        body.append(line(x.start, y(value), x.end, y(value), "grid"))
        body.append(text(x.start - 6, y(value) + 4, words, "tick", "end"))
    body.append(line(x.start, y.start, x.end, y.start, "axis"))
    body.append(text(x.end, y.start + 34 + below, x_name, "name", "end"))
    body.append(text(0, y.end - 12, y_name, "name"))
    return body


@dataclass(frozen=True, slots=True)
class Label:
    """Words that belong to the point (x, y), in px."""

    x: float
    y: float
    words: str
    kind: str = "label"

    @property
    def width(self) -> float:
        return len(self.words) * _CHARACTER

    @property
    def box(self) -> tuple[float, float, float]:
        """(x from, x to, baseline) when the words start at the point."""
        return self.x, self.x + self.width, self.y


def place_labels(
    labels: Sequence[Label],
    left: float,
    right: float,
    top: float,
    bottom: float,
    lift: float = 0,
    fixed: Sequence[tuple[float, float, float]] = (),
) -> list[str]:
    """Draw labels beside their points, moved up or down until no two overlap, with a thin line where one
    moved.

    Greedy: from the top, each label takes the free place nearest to `lift` px above its point, to the right
    of it where that fits inside [left, right] and to the left otherwise. A lifted label starts over its
    point. fixed: (x from, x to, baseline) of other words and lines, which are kept clear of.
    """
    taken = list(fixed)
    body = []
    gap = -4 if lift else 9
    for label in sorted(labels, key=lambda item: (item.y, item.x)):
        to_right = label.x + gap + label.width <= right
        start = max(left, label.x + gap if to_right else label.x - gap - label.width)
        end = start + label.width
        own = label.y + 4 - lift
        free = [
            own + offset
            for offset in sorted((step * 4.0 for step in range(-40, 41)), key=abs)
            if top + 8 <= own + offset <= bottom
            and all(end < a or start > b or abs(own + offset - c) >= 13 for a, b, c in taken)
        ]
        baseline = free[0] if free else own
        taken.append((start, end, baseline))
        if abs(baseline - own) > 8:
            body.append(line(label.x, label.y, start - 2 if to_right else end + 2, baseline - 4, "leader"))
        body.append(text(start, baseline, label.words, label.kind))
    return body
