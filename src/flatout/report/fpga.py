"""The page of `flatout fpga --report`: one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

Json = Mapping[str, Any]

PUBLISHED = (
    ("Hummingbird", "KV260", "LLaMA3-8B, 4 bits", "4.8", "93-94 %", "arXiv 2507.03308"),
    ("Pushing up to the Limit", "KV260", "LLaMA2-7B, 4 bits", "4.9", "84-85 %", "arXiv 2502.10659"),
    ("TeLLMe v2", "KV260", "ternary, 1.58 bits", "25", "", "arXiv 2510.15926"),
    ("FlightLLM", "U280", "LLaMA2-7B", "55", "65.9 %", "arXiv 2401.03868"),
)
"""(work, device, model, tokens/s, MBU as they define it, source): all on silicon, all larger models."""
KINDS = {
    "qkv": "linears", "o": "linears", "gate_up": "linears", "down": "linears", "head": "head",
    "attention": "attention", "heads": "rotation of heads", "input_norm": "norms",
    "post_norm": "norms", "norm": "norms", "read": "rounding", "hidden": "rounding",
}  # fmt: skip
UNUSED = (
    "most of the memory's bandwidth would stay unused: the generator makes one bus of 64 bytes;"
    " several would be needed"
)


def render(model: str, result: Json) -> str:
    """The page as HTML text. `result`: a fpga.evaluate.Evaluation as JSON."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = files("flatout.report")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["percent"] = lambda value, digits=0: f"{100 * value:.{digits}f} %"
    environment.filters["short"] = short
    template = environment.from_string(folder.joinpath("fpga.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        r=result,
        model=model,
        style=Markup(folder.joinpath("page.css").read_text(encoding="utf-8")),
        cycles=cycles_by_part(result["decode"]),
        published=PUBLISHED,
        why_not=why_not(result),
    )


def cycles_by_part(step: Json) -> list[tuple[str, int]]:
    """(part, cycles) of one token, the most first; what no instruction is charged for is between them."""
    parts: dict[str, int] = {}
    for kind, cycles in step["cycles_by_kind"].items():
        parts[KINDS[kind]] = parts.get(KINDS[kind], 0) + cycles
    parts["between instructions"] = step["cycles"] - sum(parts.values())
    return sorted(parts.items(), key=lambda part: -part[1])


def why_not(result: Json) -> list[tuple[str, str]]:
    """(boards, what keeps the design from them, or what it leaves unused there)."""
    found: dict[str, list[str]] = {}
    for board in result["boards"]:
        reasons = list(board["why_not"])
        if board["bandwidth_share"] < 0.5:
            reasons.append(UNUSED)
        for reason in reasons:
            found.setdefault(reason, []).append(board["board"])
    return [(", ".join(boards), reason) for reason, boards in found.items()]


def short(value: int) -> str:
    """12,345,678 as 12.3 M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)
