"""The page: self-contained, well-formed, safe against hostile names, and right about the numbers it shows."""

from __future__ import annotations

import itertools
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_sample import sample

from flatout.report import charts
from flatout.report.page import NARROW, WIDE, advice, format_classes, render
from flatout.report.svg import Label, Scale, place_labels
from flatout.search import units


class Page(HTMLParser):
    """Collects tags, attributes and words, and checks that tags are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_page_needs_no_network_and_runs_no_code() -> None:
    html = render(sample())
    page = Page(html)
    assert not re.search(r"https?://|//[a-z]+\.|url\(|@import|<script|javascript:", html)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "img", "object", "embed", "base", "form")
        assert not {"src", "href", "srcset", "action"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]


def test_the_page_says_what_was_measured() -> None:
    result = sample()
    text = Page(render(result)).text
    assert result["verdict"] in text
    for shown in (
        "SmolLM2-135M-Instruct", "18.2\N{MULTIPLICATION SIGN}", "3.90\N{MULTIPLICATION SIGN}", "+0.31 %",
        "at most +0.48 %, budget 1.0 %", "1,578 (31 %)", "786 (83 %)", "20.426", "64 clusters, 28,416 tokens",
        "+0.00312 nats", "k = 1", "0.025", "97.50 % confidence", "bootstrap-t", "2 min 54 s",
        "flatout run demo/artifact", "flatout verify demo/artifact",
    ):  # fmt: skip
        assert shown in text, shown
    for candidate in result["candidates"]:
        assert candidate["name"] in text
    for stage in result["timings"]:
        assert stage["stage"] in text


def test_the_four_drawings_are_there_for_both_widths() -> None:
    labels = [attributes.get("aria-label") for tag, attributes in Page(render(sample())).tags if tag == "svg"]
    assert sorted(labels) == sorted(
        2 * ["Roofline of each operator before and after"]
        + 2 * ["Perplexity increase over time of every candidate"]
        + 2 * ["Format of every layer"]
        + 4 * ["Time of each operator and its floor"]
    )


HOSTILE = "</title><script>alert(1)</script>\"'&<b onload=x>"


def poisoned(value: Any) -> Any:
    """The value with every free text in it hostile."""
    if isinstance(value, dict):
        keep = ("status", "bound", "op", "tier", "verdict")
        return {k: v if k in keep else poisoned(v) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(v) for v in value]
    return HOSTILE if isinstance(value, str) else value


def test_hostile_names_stay_text() -> None:
    html = render(poisoned(sample()) | {"verdict": HOSTILE})
    page = Page(html)
    assert "<script" not in html
    assert "<b onload" not in html
    assert HOSTILE in page.text


def edge_cases() -> dict[str, dict[str, Any]]:
    nothing_measured = sample()
    for candidate in nothing_measured["candidates"]:
        candidate.update(measured=None, loss=None, predicted_loss=None)
    nothing_predicted = sample()
    for candidate in nothing_predicted["candidates"]:
        candidate["predicted"] = None
    no_candidates = sample() | {"candidates": []}
    undecided = sample()
    undecided["quality"].update(upper_bound=None, passed=False, verdict="cannot_decide")
    undecided.update(passed=False)
    extreme = sample()
    losses = [0.0, -0.002, 1e-9, 40.0, 0.5, 0.01]
    for candidate, loss in zip(extreme["candidates"], losses, strict=False):
        candidate["loss"] = {"value": loss, "low": loss - 1, "high": loss + 1, "tokens": 10}
    no_ops = sample() | {
        "ops": {"prefill": {"before": [], "after": []}, "decode": {"before": [], "after": []}}
    }
    one_layer = sample()
    one_layer["recipe_map"] = {place: formats[:1] for place, formats in one_layer["recipe_map"].items()}
    many_layers = sample()
    many_layers["recipe_map"] = {
        place: formats * (8 if len(formats) > 1 else 1)
        for place, formats in many_layers["recipe_map"].items()
    }
    return {
        "nothing measured": nothing_measured,
        "nothing predicted": nothing_predicted,
        "no candidates": no_candidates,
        "undecided": undecided,
        "extreme losses": extreme,
        "no operators": no_ops,
        "one layer": one_layer,
        "many layers": many_layers,
        "no stages": sample() | {"timings": []},
        "ten thousand times": sample() | {"speedup": {"decode": 12345.6, "prefill": 0.001, "workload": 1.0}},
    }


@pytest.mark.parametrize("case", edge_cases())
def test_unusual_results_still_make_a_page(case: str) -> None:
    html = render(edge_cases()[case])
    Page(html)
    assert "nan" not in re.sub(r"<style>.*?</style>", "", html, flags=re.S).lower().split()
    drawn = re.findall(r' (?:x|y|x1|x2|y1|y2|cx|cy|width|height)="([^"]+)"', html)
    assert all(math.isfinite(float(value)) for value in drawn)


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_marks_stay_inside_the_drawing(width: float) -> None:
    result = sample()
    for drawing in (charts.roofline(result, width), charts.trade_off(result, width)):
        height = float(re.search(r'height="([\d.]+)"', drawing)[1])  # type: ignore[index]
        for x, y in re.findall(r'c?x="([\d.-]+)" c?y="([\d.-]+)"', drawing):
            assert -1 <= float(x) <= width + 1
            assert -1 <= float(y) <= height + 1


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.tuples(st.floats(40, 460), st.floats(20, 380)), max_size=9), st.sampled_from([0.0, 10.0]))
def test_labels_do_not_overlap(points: list[tuple[float, float]], lift: float) -> None:
    labels = [Label(x, y, f"label {i}") for i, (x, y) in enumerate(points)]
    drawn = "".join(place_labels(labels, 40, 500, 10, 390, lift))
    placed = [(float(x), float(y)) for x, y in re.findall(r'<text x="([\d.-]+)" y="([\d.-]+)"', drawn)]
    assert len(placed) == len(points)
    width = labels[0].width if labels else 0
    for (x1, y1), (x2, y2) in itertools.combinations(placed, 2):
        assert abs(x1 - x2) >= width - 0.2 or abs(y1 - y2) >= 12.8
    assert all(39.9 <= x <= 500 for x, _ in placed)


RANGES = st.tuples(st.floats(1e-9, 1e12), st.floats(1.05, 1e9)).map(lambda pair: (pair[0], pair[0] * pair[1]))


@settings(deadline=None, derandomize=True, max_examples=200)
@given(RANGES, st.booleans(), st.integers(2, 8))
def test_scales_are_monotone_and_their_ticks_lie_inside(
    ends: tuple[float, float], log: bool, most: int
) -> None:
    low, high = ends
    scale = Scale(low=low, high=high, start=400, end=20, log=log)
    assert scale(low) == pytest.approx(400)
    assert scale(high) == pytest.approx(20)
    middle = math.sqrt(low * high)
    assert scale(low) >= scale(middle) >= scale(high)
    assert scale(low / 2) == scale(low)  # clamped
    ticks = scale.ticks(most)
    assert ticks == sorted(set(ticks))
    assert len(ticks) <= most + 2
    assert all(low * 0.998 <= tick <= high * 1.002 for tick in ticks)


def test_a_log_scale_places_decades_evenly() -> None:
    scale = Scale(low=1, high=1000, start=0, end=300, log=True)
    assert [scale(v) for v in (1, 10, 100, 1000)] == pytest.approx([0, 100, 200, 300])
    assert scale.ticks(4) == [1, 10, 100, 1000]


def test_advice_ranks_what_could_be_won() -> None:
    """10 ms with a floor of 6 ms; the head wastes 2.5 ms, attention 1 ms, qkv 0.5 ms."""

    def op(name: str, seconds: float, floor_s: float | None, bound: str = "memory") -> dict[str, Any]:
        return {"op": name, "seconds": seconds, "floor_s": floor_s, "bound": bound}

    ops = [op("head", 5e-3, 2.5e-3), op("attention", 2e-3, 1e-3, "compute"), op("qkv", 3e-3, 2.5e-3)]
    found = advice({"ops": {"decode": {"before": [], "after": ops}}})
    assert [item["gain"][:-1] for item in found] == ["1.67", "1.33", "1.11"]
    assert [item["title"] for item in found] == [
        "every operator at its floor", "head, at its floor", "attention, at its floor",
    ]  # fmt: skip
    assert found[1]["text"].startswith("2.5 ms (25 % of decode) above its floor")
    assert "60 % of its floor" in found[0]["text"]
    assert "fewer bytes" in found[0]["text"]
    assert "arithmetic units wait" in found[2]["text"]


def test_advice_without_floors_is_none() -> None:
    assert advice({"ops": {"decode": {"before": [], "after": []}}}) == []


def test_formats_get_colours_by_how_common_they_are() -> None:
    places = {"embedding": ["q8_0"], "qkv": ["q4_1", "w8a8"], "o": ["q4_1", "q4_1"], "kv_cache": ["int8"]}
    assert format_classes(places) == {"q4_1": "format-0", "q8_0": "format-1", "w8a8": "format-2"}


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (units.si(1.234e9, "byte/s"), "1.23 Gbyte/s"),
        (units.si(999, "op"), "999 op"),
        (units.seconds(0.00123), "1.23 ms"),
        (units.seconds(2.5e-6), "2.5 \N{MICRO SIGN}s"),
        (units.seconds(61.2), "61.2 s"),
        (units.seconds(125), "2 min 05 s"),
        (units.seconds(0.9996), "1000 ms"),
        (units.percent(0.0031, signed=True), "+0.31 %"),
        (units.percent(-0.0004, signed=True), "-0.04 %"),
        (units.percent(0.123), "12 %"),
        (units.percent(1.5), "150 %"),
        (units.rate(1578.4), "1,578"),
        (units.rate(43.21), "43.2"),
        (units.times(18.23), "18.2\N{MULTIPLICATION SIGN}"),
        (units.times(0.5), "0.50\N{MULTIPLICATION SIGN}"),
        (units.times(250.0), "250\N{MULTIPLICATION SIGN}"),
        (units.megabytes(1.3e8), "130 MB"),
        (units.megabytes(2.5e9), "2.50 GB"),
    ],
)
def test_units(shown: str, expected: str) -> None:
    assert shown == expected
