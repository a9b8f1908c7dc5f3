"""The report: one HTML file that needs no network, from the JSON that `flatout optimize` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from flatout.report import charts
from flatout.search import units

Json = Mapping[str, Any]

WIDE, NARROW = 508.0, 326.0
"""Widths in px that drawings are made for: half of the page on a desk, the whole of it on a phone."""


def render(result: Json) -> str:
    """The page as HTML text. `result` is the object of the command contract; see search/result.py for its
    keys.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = files("flatout.report")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    for name in ("si", "seconds", "megabytes", "percent", "rate", "times"):
        environment.filters[name] = getattr(units, name)
    template = environment.from_string(folder.joinpath("page.html.jinja").read_text(encoding="utf-8"))

    def both(draw: Any, *args: Any) -> Markup:
        """A drawing for desks and one for phones; the style sheet shows one of them. All text in it is
        escaped.
        """
        wide, narrow = draw(*args, WIDE), draw(*args, NARROW)
        return Markup(f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>' if wide else "")

    formats = format_classes(result["recipe_map"])
    full_width = Markup(
        f'<div class="wide">{charts.recipe_map(result["recipe_map"], formats, 2 * WIDE + 40)}</div>'
        f'<div class="narrow">{charts.recipe_map(result["recipe_map"], formats, NARROW)}</div>'
    )
    return template.render(
        r=result,
        style=Markup(folder.joinpath("page.css").read_text(encoding="utf-8")),
        roofline=both(charts.roofline, result),
        trade_off=both(charts.trade_off, result),
        operators={
            phase: both(charts.operators, sides["after"])
            for phase, sides in result["ops"].items()
            if sides["after"]
        },
        recipe_map=full_width,
        formats=formats,
        single_places={place: f[0] for place, f in result["recipe_map"].items() if len(f) == 1},
        advice=advice(result),
        columns=[result["baseline"], result["engine_original"], result["optimized"]],
        total_seconds=sum(stage["seconds"] for stage in result["timings"]),
        op_names=charts.OP_NAMES,
    )


def format_classes(places: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """A colour class of the style sheet for every format, the commonest first and the last for all that are
    left; the KV cache has none."""
    counts: dict[str, int] = {}
    for place, formats in places.items():
        if place == "kv_cache":
            continue
        for name in formats:
            counts[name] = counts.get(name, 0) + 1
    ordered = sorted(counts, key=lambda name: (-counts[name], name))
    return {name: f"format-{min(i, 8)}" for i, name in enumerate(ordered)}


def advice(result: Json) -> list[dict[str, str]]:
    """What would make it faster still, from each operator's distance to its floor, the largest gain first.

    A gain is what the phase would win if that operator alone reached its floor; an operator at its floor gets
    faster only by moving fewer bytes or doing less arithmetic, so the last entry of a phase says which of the
    two.
    """
    found = []
    for phase, sides in result["ops"].items():
        ops = [op for op in sides["after"] if op["seconds"] > 0]
        total = sum(op["seconds"] for op in ops)
        floor = sum(min(op["floor_s"] or 0.0, op["seconds"]) for op in ops)
        if not ops or not floor:
            continue
        by_gap = sorted(ops, key=lambda op: (op["floor_s"] or 0.0) - op["seconds"])
        for op in by_gap[:2]:
            gap = op["seconds"] - min(op["floor_s"] or 0.0, op["seconds"])
            if gap < 0.03 * total:
                continue
            found.append(
                {"phase": phase, "gain": total / (total - gap), **_kernel_advice(op, phase, gap, total)}
            )
        bound = max(ops, key=lambda op: op["floor_s"] or 0.0)
        found.append({"phase": phase, "gain": total / floor, **_limit_advice(bound, phase, total, floor)})
    return [
        {
            "phase": item["phase"],
            "title": item["title"],
            "text": item["text"],
            "gain": units.times(item["gain"]),
        }
        for item in sorted(found, key=lambda item: (item["phase"], -item["gain"]))
    ]


def _kernel_advice(op: Json, phase: str, gap: float, total: float) -> dict[str, str]:
    name = charts.OP_NAMES.get(op["op"], op["op"])
    share = units.percent(gap / total)
    if not op["floor_s"]:
        words = (
            f"{units.seconds(gap)} ({share} of {phase}) go to work that moves and computes next to nothing."
        )
    elif op["bound"] == "memory":
        words = (
            f"{units.seconds(gap)} ({share} of {phase}) above its floor: it waits for more than memory, "
            "so a better kernel or an extra core would help before a smaller format does."
        )
    else:
        words = (
            f"{units.seconds(gap)} ({share} of {phase}) above its floor: the arithmetic units wait, "
            "so a better kernel would help before more cores do."
        )
    return {"title": f"{name}, at its floor", "text": words}


def _limit_advice(op: Json, phase: str, total: float, floor: float) -> dict[str, str]:
    name = charts.OP_NAMES.get(op["op"], op["op"])
    reached = units.percent(floor / total)
    if op["bound"] == "memory":
        words = (
            f"{phase} runs at {reached} of its floor. Past the floor only fewer bytes help (a smaller "
            f"format, first for {name}) or memory that is faster than this machine's."
        )
    else:
        words = (
            f"{phase} runs at {reached} of its floor. Past the floor only less arithmetic helps (a smaller "
            f"model or sparsity, first for {name}) or more cores than this machine's."
        )
    return {"title": "every operator at its floor", "text": words}
