"""The shipped passages, a user's text, and the detection of text that was used before."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatout.data.passages import (
    SPLITS,
    Passage,
    load_passages,
    load_text,
    passages_sha256,
    split_sha256,
    split_text,
)
from flatout.errors import ConfigError, EvidenceError
from flatout.verify.overlap import LIMIT, ngrams, overlaps, refuse_leaks

FEWEST = {"calibration": 96, "validation": 64, "holdout": 128}
SOURCES = Path(__file__).parents[2] / "src" / "flatout" / "data" / "SOURCES.md"


def passage(text: str, number: int = 0, book: str = "a book") -> Passage:
    return Passage(id=f"p{number}", book=book, text=text)


@pytest.mark.parametrize("split", SPLITS)
def test_shipped_passages_are_enough_and_of_the_stated_length(split: str) -> None:
    passages = load_passages(split)
    assert len(passages) >= FEWEST[split]
    assert all(1800 <= len(p.text) <= 2400 for p in passages)
    assert len({p.id for p in passages}) == len(passages)
    assert len({p.text for p in passages}) == len(passages)


def test_splits_share_no_book_and_no_author() -> None:
    rows = re.findall(r"\| (\w+) \| \d+ \| .* \| (.*) \| (\d+) \|", SOURCES.read_text(encoding="utf-8"))
    stated = {split: {number for s, _, number in rows if s == split} for split in SPLITS}
    authors = {split: {author for s, author, _ in rows if s == split} for split in SPLITS}
    for split in SPLITS:
        assert {p.book for p in load_passages(split)} == stated[split], "SOURCES.md lists every book"
    for one in SPLITS:
        for other in set(SPLITS) - {one}:
            assert not stated[one] & stated[other]
            assert not authors[one] & authors[other]


def test_splits_share_no_text() -> None:
    used = [*load_passages("calibration"), *load_passages("validation")]
    refuse_leaks(load_passages("holdout"), used)
    refuse_leaks(load_passages("validation"), load_passages("calibration"))
    shares = overlaps([p.text for p in load_passages("holdout")], [p.text for p in used])
    assert max(shares) < LIMIT / 5, "the limit is far from what unrelated books share"


def test_hashes_tell_texts_apart() -> None:
    assert len({split_sha256(split) for split in SPLITS}) == 3
    assert passages_sha256([passage("ab"), passage("c")]) != passages_sha256([passage("a"), passage("bc")])
    assert passages_sha256([passage("ab", 1)]) == passages_sha256([passage("ab", 2, "another")])


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="calibration, validation, holdout"):
        load_passages("test")


def test_running_text_is_cut_without_loss(tmp_path: Path) -> None:
    text = "\n\n".join(p.text for p in load_passages("validation")[:12]) + "\n\n" + "x" * 5000
    path = tmp_path / "book.txt"
    path.write_text(text, encoding="utf-8")
    passages = load_text(path)
    assert re.sub(r"\s", "", "".join(p.text for p in passages)) == re.sub(r"\s", "", text)
    assert all(0 < len(p.text) <= 2000 for p in passages)
    assert all(p.text.endswith((".", "!", "?", "”", '"', "’", ")")) for p in passages[:8]), (
        "cut at a sentence"
    )


@given(text=st.text(max_size=6000))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_any_text_is_cut_without_loss(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("text") / "any.txt"
    path.write_bytes(text.encode("utf-8", "replace"))
    written = path.read_text(encoding="utf-8")
    if not written.strip():
        with pytest.raises(EvidenceError, match="must hold text"):
            load_text(path)
        return
    passages = load_text(path)
    assert "".join("".join(p.text for p in passages).split()) == "".join(written.split())


def test_lines_of_json_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    rows = [{"text": "one " * 2000, "domain": "law"}, {"text": "two", "id": "x"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    first, second = load_text(path)
    assert (first.book, first.text) == ("law", "one " * 2000)
    assert (second.id, second.text) == ("x", "two")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": 3}', ConfigError, "a.jsonl:2"),
        ("a.jsonl", b'{"text": "fine"}\n["text"]', ConfigError, "a.jsonl:2"),
        ("a.jsonl", b'{"text": "fi', ConfigError, "a.jsonl:1"),
        ("a.jsonl", b"\n\n", EvidenceError, "must hold text"),
        ("a.txt", b"", EvidenceError, "must hold text"),
        ("a.txt", b"caf\xe9", ConfigError, "UTF-8; found: .*byte 3"),
    ],
)
def test_broken_text_files(
    tmp_path: Path, name: str, content: bytes, error: type[Exception], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        load_text(tmp_path / name)


def test_missing_text_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="readable"):
        load_text(tmp_path / "none.txt")


@pytest.mark.parametrize("books", [1, 5, 200])
def test_split_is_a_partition_and_never_changes(books: int) -> None:
    passages = [passage(f"text {i}", i, f"book {i % books}") for i in range(400)]
    splits = split_text(passages)
    assert sorted(p.id for s in SPLITS for p in splits[s]) == sorted(p.id for p in passages)
    assert len(splits["holdout"]) == pytest.approx(200, abs=40)
    assert split_text(passages) == splits
    if books == 1:
        order = [p.id for s in SPLITS for p in splits[s]]
        assert order == [p.id for p in passages], "one running text is cut into stretches"
        return
    place = {p.id: split for split, members in splits.items() for p in members}
    grown = split_text([passage("new", 999, "book new"), *reversed(passages)])
    moved = [p.id for split, members in grown.items() for p in members if place.get(p.id, split) != split]
    assert moved == [], "more documents, or another order, move none to another split"
    if books == 200:
        assert len({(p.book, split) for split, members in splits.items() for p in members}) == 200


def test_leaked_holdout_is_refused() -> None:
    holdout, used = load_passages("holdout")[:20], load_passages("calibration")[:20]
    refuse_leaks(holdout, used)
    with pytest.raises(EvidenceError, match=rf"1 of 20 do, {holdout[3].id} with 100%"):
        refuse_leaks(holdout, [*used, holdout[3]])


@pytest.mark.parametrize("every", [10, 12, 16])
def test_leak_with_changed_words_is_refused(every: int) -> None:
    """Every n-th word replaced, case and line ends changed: still a copy."""
    holdout = load_passages("holdout")[:5]
    words = holdout[2].text.upper().split()
    disguised = "\n".join("XXXX" if i % every == 0 else word for i, word in enumerate(words))
    with pytest.raises(EvidenceError, match=f"1 of 5 do, {holdout[2].id}"):
        refuse_leaks(holdout, [passage(disguised)])


def test_part_of_a_passage_is_a_leak_and_a_quotation_is_not() -> None:
    holdout = load_passages("holdout")[:5]
    words = holdout[1].text.split()
    refuse_leaks(holdout, [passage(" ".join(words[100:130]))])
    with pytest.raises(EvidenceError, match="1 of 5"):
        refuse_leaks(holdout, [passage(" ".join(words[100:180]))])


def test_ngrams_of_short_and_unspaced_text() -> None:
    assert ngrams("Hello, WORLD") == {"hello world"}
    assert ngrams("...") == set()
    assert len(ngrams("今日は良い天気ですね明日も晴れ")) == 8, "every character counts as a word"
    assert overlaps(["", "a b c"], ["A, b; c."]) == [0.0, 1.0]
