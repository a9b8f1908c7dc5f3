"""Traces, and the few candidates that serve one best."""

from __future__ import annotations

import math
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatout.errors import ConfigError
from flatout.search.traffic import Speed, Trace, envelope, read_trace, serve

DECODER = Speed(name="decoder", prompt_s=3.0, output_s=10.0)
READER = Speed(name="reader", prompt_s=1.0, output_s=20.0)

seconds = st.integers(1, 50).map(float)
speed_lists = st.lists(st.tuples(seconds, seconds), min_size=1, max_size=6).map(
    lambda pairs: [Speed(name=f"c{i}", prompt_s=p, output_s=o) for i, (p, o) in enumerate(pairs)]
)
traces = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), min_size=1, max_size=40).map(
    lambda rows: Trace(prompt=np.array([r[0] for r in rows]), output=np.array([r[1] for r in rows]))
)


def total(trace: Trace, speeds: list[Speed]) -> float:
    requests = zip(trace.prompt.tolist(), trace.output.tolist(), strict=True)
    return float(sum(min(s.prompt_s * p + s.output_s * o for s in speeds) for p, o in requests))


def test_two_candidates_meet_where_their_times_do() -> None:
    trace = Trace(prompt=np.array([100, 100, 1000]), output=np.array([100, 50, 10]))
    service = serve(trace, [READER, DECODER])
    assert [(v.name, v.low, v.high) for v in service.variants] == [
        ("decoder", 0.0, 5.0),
        ("reader", 5.0, math.inf),
    ]
    assert [v.share for v in service.variants] == pytest.approx([2 / 3, 1 / 3])
    assert service.seconds == total(trace, [READER, DECODER])
    assert service.saving == pytest.approx(1 - service.seconds / total(trace, [READER]))


def test_a_variant_that_saves_too_little_is_left_out() -> None:
    nearly = Speed(name="nearly", prompt_s=2.98, output_s=10.1)
    trace = Trace(prompt=np.array([100, 1000]), output=np.array([100, 10]))
    assert [v.name for v in serve(trace, [DECODER, nearly]).variants] == ["nearly"]
    assert len(serve(trace, [DECODER, nearly], worth=0.0).variants) == 2


@settings(max_examples=200, deadline=None)
@given(traces, speed_lists, st.integers(1, 3))
def test_without_a_price_the_set_is_the_best_of_all(trace: Trace, speeds: list[Speed], most: int) -> None:
    service = serve(trace, speeds, most=most, worth=0.0)
    sets = [list(c) for n in range(1, most + 1) for c in combinations(speeds, n)]
    assert service.seconds == pytest.approx(min(total(trace, chosen) for chosen in sets))
    assert sum(v.seconds for v in service.variants) == pytest.approx(service.seconds)
    assert sum(v.share for v in service.variants) == pytest.approx(1.0)
    assert 0.0 <= service.saving < 1.0


@settings(max_examples=200, deadline=None)
@given(speed_lists)
def test_the_envelope_covers_every_ratio_with_the_lowest_line(speeds: list[Speed]) -> None:
    spans = envelope(speeds)
    assert spans[0][1] == 0.0
    assert spans[-1][2] == math.inf
    assert all(a[2] == b[1] for a, b in pairwise(spans))
    for i, low, high in spans:
        assert high > low or len(spans) == 1
        for ratio in (low, (low + min(high, low + 7.0)) / 2):
            lines = [s.prompt_s * ratio + s.output_s for s in speeds]
            assert lines[i] == pytest.approx(min(lines))


def test_traces_are_read(tmp_path: Path) -> None:
    azure = tmp_path / "azure.csv"
    azure.write_text("\ufeffTIMESTAMP,ContextTokens,GeneratedTokens\n2023,374,44\n2023,396,109\n2023,879,0\n")
    trace = read_trace(azure)
    assert (trace.prompt.tolist(), trace.output.tolist()) == ([374, 396, 879], [44, 109, 0])
    assert trace.median() == (396, 44)
    plain = tmp_path / "plain.csv"
    plain.write_text("output_tokens,prompt_tokens\n1,2\n")
    assert read_trace(plain).median() == (2, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names its columns; found: an empty file"),
        ("a,b\n1,2\n", "names its columns; found: a, b"),
        ("ContextTokens,GeneratedTokens\n", "at least one request"),
        ("ContextTokens,GeneratedTokens\n3,4\n5,x\n", "'x' in line 3"),
        ("ContextTokens,GeneratedTokens\n3\n", "None in line 2"),
        ("ContextTokens,GeneratedTokens\n-3,4\n", "'-3' in line 2"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_trace(path)
    with pytest.raises(ConfigError, match="readable"):
        read_trace(tmp_path / "missing.csv")
