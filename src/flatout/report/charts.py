"""The page's four drawings, each a function from the result's JSON to SVG text at a given width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flatout.report import svg
from flatout.report.svg import Label, Scale
from flatout.search.units import percent, seconds, si

Json = Mapping[str, Any]

OP_NAMES = {
    "embedding": "embedding",
    "qkv": "q, k, v",
    "attention": "attention",
    "o": "output proj.",
    "gate_up": "gate, up",
    "down": "down",
    "head": "head",
    "other": "norms, sampling",
    "outside": "call, Python",
}


_SAME_LINE = 14
"""Ceilings closer than a line of text are drawn as one."""


def roofline(result: Json, width: float) -> str:
    """Achieved op/s over arithmetic intensity of each operator, before and after, under the machine's
    ceilings.

    Circles are decode, squares prefill; hollow is the engine at original precision, filled the optimised
    model. Empty when the operators were not measured.
    """
    bandwidth = result["roofs"]["read"]
    roofs = [(name, value) for name, value in result["roofs"].items() if name != "read"]
    points = _roofline_points(result)
    if not points:
        return ""
    places = [p["at"] for p in points] + [p["before"] for p in points if p["before"] is not None]
    height = min(400, max(340, width * 0.78))
    top_roof = max(value for _, value in roofs)
    x = Scale(
        low=10 ** _floor10(min(place[0] for place in places) * 0.8),
        high=max(8 * max(place[0] for place in places), 8 * top_roof / bandwidth),
        start=46,
        end=width - 8,
        log=True,
    )
    lowest = min([place[1] for place in places] + [bandwidth * x.low])
    y = Scale(low=lowest / 1.6, high=2.2 * top_roof, start=height - 44, end=34, log=True)
    few = 4 if width < 420 else 6
    body = svg.frame(
        x,
        y,
        [(t, si(t, "").strip()) for t in x.ticks(few)],
        [(t, si(t, "").strip()) for t in y.ticks(5)],
        "operations per byte read",
        "operations per second",
    )
    fixed = []
    for name, value in roofs:
        ridge = x(value / bandwidth)
        near = [n for n, other in roofs if abs(y(other) - y(value)) < _SAME_LINE]
        if name != near[0]:
            continue  # named with the line that it would lie on
        words = Label(ridge + 10, y(value) - 4, f"{', '.join(near)} {si(value, 'op/s')}")
        body.append(svg.path([(ridge, y(value)), (x.end, y(value))], "roof"))
        body.append(svg.text(words.x, words.y, words.words, "roof-name"))
        fixed += [words.box, (ridge, x.end, y(value) + 4)]  # the line itself is kept clear of too
    body += _slope(x, y, bandwidth, top_roof)
    labels = []
    for p in points:
        draw = svg.circle if p["phase"] == "decode" else svg.square
        at = (x(p["at"][0]), y(p["at"][1]))
        if p["before"] is not None:
            before = (x(p["before"][0]), y(p["before"][1]))
            body.append(svg.line(*before, *at, "move"))
            body.append(draw(*before, 3.5, "before", f"{p['title']}, original precision"))
        body.append(draw(*at, 4.5, "after", p["title"]))
        labels.append(Label(*at, p["name"]))
    body += svg.place_labels(labels, x.start, x.end, y.end, y.start, fixed=fixed)
    return svg.svg(width, height, "Roofline of each operator before and after", body)


def _slope(x: Scale, y: Scale, bandwidth: float, top_roof: float) -> list[str]:
    """The memory roof, with its name along it."""
    low, high = x.low, top_roof / bandwidth
    ends = [(x(value), y(bandwidth * value)) for value in (low, high)]
    (x1, y1), (x2, y2) = ends
    angle = math.degrees(math.atan2(y2 - y1, x2 - x1))
    middle = ((x1 + x2) / 2 - 5, (y1 + y2) / 2 - 5)
    name = f"memory {si(bandwidth, 'B/s')}"
    return [svg.path(ends, "roof"), svg.text(*middle, name, "roof-name", "middle", angle)]


def _floor10(value: float) -> float:
    """Exponent e so that 10**e is a round value at or below `value` (1 or 3 times a power of ten)."""
    exponent = math.floor(math.log10(value))
    return exponent + (math.log10(3) if value >= 3 * 10**exponent else 0)


def _roofline_points(result: Json) -> list[dict[str, Any]]:
    points = []
    for phase, sides in result.get("ops", {}).items():
        before = {op["op"]: op for op in sides["before"]}
        for op in sides["after"]:
            place = _intensity(op)
            if place is None:
                continue
            name = OP_NAMES.get(op["op"], op["op"])
            points.append(
                {
                    "phase": phase,
                    "name": name,
                    "title": f"{name}, {phase}: {seconds(op['seconds'])}, floor {seconds(op['floor_s'])}",
                    "at": place,
                    "before": _intensity(before[op["op"]]) if op["op"] in before else None,
                }
            )
    return points


def _intensity(op: Json) -> tuple[float, float] | None:
    """(operations per byte, operations per second) of an op, None for one that computes or moves nothing."""
    if not op["flops"] or not op["bytes"] or not op["seconds"]:
        return None
    return op["flops"] / op["bytes"], op["flops"] / op["seconds"]


def trade_off(result: Json, width: float) -> str:
    """Loss over time of every candidate: hollow with interval where predicted, filled where measured. The
    line is the best that any recipe is predicted to reach.

    Losses are on a logarithmic axis from 0.01 %; a candidate whose loss is not known stands on the rail below
    the axis.
    """
    rows = [c for c in result["candidates"] if c["predicted"] is not None or c["measured"] is not None]
    if not rows:
        return ""
    height = min(400, max(340, width * 0.78))
    best = [(point["workload_s"], max(point["loss"], 1e-4)) for point in result["frontier"]]
    times = [t for c in rows for t in _times(c)]
    x = Scale(low=0.85 * min(times), high=1.12 * max(times), start=46, end=width - 8, log=True)
    losses = [c["loss"]["value"] for c in rows if c["loss"]]
    budget = result["request"]["max_loss"]
    top = max([0.03, 3 * budget, *(2 * value for value in losses)])
    y = Scale(low=1e-4, high=min(top, 10.0), start=height - 66, end=34, log=True)
    rail = height - 52
    body = svg.frame(
        x,
        y,
        [(t, seconds(t)) for t in x.ticks(4 if width < 420 else 6)],
        [(t, f"{100 * t:g} %") for t in y.ticks(5)],
        "time of the workload (left is faster)",
        "perplexity increase",
        below=24,
    )
    fixed = []
    if budget > 0:
        body.append(svg.rect(x.start, y(budget), x.end - x.start, y.start - y(budget), "allowed"))
        body.append(svg.line(x.start, y(budget), x.end, y(budget), "budget"))
        words = f"budget {percent(budget)}"
        fixed.append((x.end - Label(0, 0, words).width, x.end, y(budget) - 5))
        body.append(svg.text(x.end, y(budget) - 5, words, "budget-name", "end"))
    body.append(svg.line(x.start, rail, x.end, rail, "rail"))
    inside = [(x(t), y(loss)) for t, loss in best if x.low <= t <= x.high and loss <= y.high]
    if len(inside) > 1:
        body.append(svg.path(inside, "frontier"))
    labels = []
    for c in rows:
        known = _loss(c)
        height_px = rail if known is None else y(known)
        body += _candidate(c, x, y, height_px)
        if known is not None:
            kind = "label chosen" if c["status"] == "chosen" else "label"
            labels.append(Label(x(_time(c)), height_px, c["name"], kind))
    if any(_loss(c) is None for c in rows):
        body.append(svg.text(x.start, rail + 4, "loss not measured", "rail-name"))
    body += svg.place_labels(labels, x.start, x.end, y.end, y.start, lift=10, fixed=fixed)
    return svg.svg(width, height, "Perplexity increase over time of every candidate", body)


def _times(candidate: Json) -> list[float]:
    found = [candidate["measured"]["workload_s"]] if candidate["measured"] else []
    if candidate["predicted"] is not None:
        found.append(candidate["predicted"]["workload_s"]["mid"])  # wide intervals may leave the axis
    return found


def _loss(candidate: Json) -> float | None:
    """Measured loss, or else the predicted one."""
    if candidate["loss"]:
        return max(float(candidate["loss"]["value"]), 0.0)
    expected = candidate["predicted_loss"]
    return float(expected["mid"]) if expected else None


def _time(candidate: Json) -> float:
    """Measured time of the workload, or else the predicted one, in seconds."""
    if candidate["measured"]:
        return float(candidate["measured"]["workload_s"])
    return float(candidate["predicted"]["workload_s"]["mid"])


def _candidate(c: Json, x: Scale, y: Scale, height: float) -> list[str]:
    """One candidate's marks at the pixel height of its loss."""
    kind = "chosen" if c["status"] == "chosen" else "point"
    title = f"{c['name']}: {c['status']}" + (f", {c['reason']}" if c["reason"] else "")
    body = []
    spread = c["loss"] or c["predicted_loss"]
    if spread:
        at = x(_time(c))
        body.append(svg.line(at, y(max(spread["low"], 0)), at, y(max(spread["high"], 0)), f"interval {kind}"))
    if c["predicted"] is not None:
        time = c["predicted"]["workload_s"]
        body.append(svg.line(x(time["low"]), height, x(time["high"]), height, f"interval {kind}"))
        body.append(svg.circle(x(time["mid"]), height, 4, f"hollow {kind}", f"{title} (predicted)"))
    if c["measured"]:
        body.append(svg.circle(x(c["measured"]["workload_s"]), height, 5, f"filled {kind}", title))
    return body


def operators(ops: Sequence[Json], width: float) -> str:
    """Time of each operator as a bar: the dark part is its floor, the light part what could still be won."""
    rows = [op for op in ops if op["seconds"] > 0]
    if not rows:
        return ""
    rows = sorted(rows, key=lambda op: -op["seconds"])
    step, left, right = 26.0, 112.0, 152.0
    x = Scale(low=0, high=max(op["seconds"] for op in rows), start=left, end=width - right)
    body = []
    for i, op in enumerate(rows):
        y = i * step + 4
        floor = min(op["floor_s"] or 0.0, op["seconds"])
        share = floor / op["seconds"]
        title = f"{seconds(op['seconds'])}, floor {seconds(floor)} ({op['bound']})"
        name = str(OP_NAMES.get(op["op"], op["op"]))
        body.append(svg.text(left - 8, y + 12, name, "label", "end"))
        body.append(svg.rect(left, y, x(op["seconds"]) - left, 16, "gap", title, radius=2))
        body.append(svg.rect(left, y, x(floor) - left, 16, "floor", title, radius=2))
        words = f"{seconds(op['seconds'])}" + (f" · {percent(share)} of floor" if floor else "")
        body.append(svg.text(x(op["seconds"]) + 6, y + 12, words, "tick"))
    return svg.svg(width, len(rows) * step + 4, "Time of each operator and its floor", body, "bars")


def recipe_map(places: Mapping[str, Sequence[str]], colour: Mapping[str, str], width: float) -> str:
    """Which format every layer uses: a row an operator, a column a layer, a colour a format."""
    rows = {name: formats for name, formats in places.items() if len(formats) > 1}
    if not rows:
        return ""
    layers = max(map(len, rows.values()))
    left, step = 92.0, 24.0
    cell = (width - left - 2) / layers
    body = []
    for i, (name, formats) in enumerate(rows.items()):
        body.append(svg.text(left - 8, i * step + 15, OP_NAMES.get(name, name), "label", "end"))
        for layer, fmt in enumerate(formats):
            gap = 1.5 if cell > 5 else 0.5
            body.append(
                svg.rect(
                    left + layer * cell,
                    i * step + 2,
                    cell - gap,
                    step - 6,
                    colour[fmt],
                    f"layer {layer}, {OP_NAMES.get(name, name)}: {fmt}",
                    radius=1.5,
                )
            )
    bottom = len(rows) * step + 12
    body += [
        svg.text(left + (layer + 0.5) * cell - 1, bottom, str(layer), "tick", "middle")
        for layer in sorted({0, layers // 2, layers - 1})
    ]
    body.append(svg.text(left - 8, bottom, "layer", "tick", "end"))
    return svg.svg(width, bottom + 6, "Format of every layer", body, "map")
