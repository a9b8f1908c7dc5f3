"""Cut the passages that ship with flatout from public-domain books, and write their list of sources.

    python benchmarks/make_passages.py BOOKS OUT

BOOKS holds train.txt.gz, heldout.txt.gz (UTF-8 text, an empty line between paragraphs) and index.tsv with
the columns split, ebook_no, title, author, byte_offset, byte_length, words. OUT receives passages.jsonl.gz
and SOURCES.md.

Each book belongs to one of three splits, and so does each author. A book is cut into equal stretches
without its first and last 3 % (contents, notes); each stretch gives one passage, which starts at a
paragraph and ends at the first sentence end after 1,800 characters. The same input gives the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import re
from pathlib import Path

SPLITS: dict[str, tuple[int, tuple[str, ...]]] = {
    "calibration": (
        8,
        ("2701", "1342", "98", "1400", "46", "76", "74", "3176", "55", "2591", "37106", "815", "11030"),
    ),
    "validation": (8, ("1260", "120", "11", "308", "7370", "23", "435", "45", "174")),
    "holdout": (
        10,
        ("84", "36", "35", "2298", "345", "244", "834", "1661", "829", "20203", "6688", "1301", "205"),
    ),
}
"""Split -> (passages a book, Project Gutenberg numbers)."""

SHORTEST, LONGEST = 1800, 2400
_SENTENCE_END = re.compile(r"[.!?][\"'”’)_]*(?=\s|$)")


def usable(text: str) -> bool:
    """Running prose: mostly lower-case letters, no picture captions, HTML, tables of contents or slurs."""
    letters = sum(c.islower() for c in text)
    unwanted = ("[Illustration", "&", "nigger", "Nigger")
    return letters > 0.65 * len(text) and not any(word in text for word in unwanted)


def passage_from(paragraphs: list[str], first: int) -> str | None:
    """Paragraphs from `first` on, cut at a sentence end between SHORTEST and LONGEST characters."""
    text = ""
    for paragraph in paragraphs[first:]:
        text += ("\n\n" if text else "") + paragraph
        if len(text) >= SHORTEST:
            end = _SENTENCE_END.search(text, SHORTEST - 1)
            if end is not None and end.end() <= LONGEST:
                return text[: end.end()]
            if len(text) >= LONGEST:
                return None
    return None


def cut(book: str, count: int) -> list[str]:
    """`count` passages spread evenly over the book, none overlapping another."""
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", book) if p.strip()]
    starts, position = [], 0
    for paragraph in paragraphs:
        starts.append(position)
        position += len(paragraph) + 2
    low, high = 0.03 * position, 0.97 * position
    passages = []
    for stretch in range(count):
        begin = low + (high - low) * stretch / count
        end = low + (high - low) * (stretch + 1) / count
        for i, start in enumerate(starts):
            text = passage_from(paragraphs, i) if begin <= start < end else None
            if text is not None and usable(text) and start + len(text) <= end:
                passages.append(text)
                break
        else:
            raise SystemExit(f"no usable passage in stretch {stretch} of {count}")
    return passages


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("books", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    texts = {
        name: gzip.decompress((arguments.books / f"{name}.txt.gz").read_bytes())
        for name in ("train", "heldout")
    }
    with open(arguments.books / "index.tsv", encoding="utf-8", newline="") as file:
        rows = {row["ebook_no"]: row for row in csv.DictReader(file, delimiter="\t")}

    authors: dict[str, str] = {}
    lines, sources = [], []
    for split, (count, books) in SPLITS.items():
        for number in books:
            row = rows[number]
            if authors.setdefault(row["author"], split) != split:
                raise SystemExit(f"{row['author']} is in {split} and in {authors[row['author']]}")
            offset, length = int(row["byte_offset"]), int(row["byte_length"])
            book = texts[row["split"]][offset : offset + length].decode("utf-8")
            for i, text in enumerate(cut(book, count)):
                record = {"split": split, "id": f"{number}-{i:02d}", "book": number, "text": text}
                lines.append(json.dumps(record, ensure_ascii=False))
            sources.append(f"| {split} | {count} | {row['title']} | {row['author']} | {number} |")

    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=9, mtime=0) as archive:
        archive.write(("\n".join(lines) + "\n").encode("utf-8"))
    (arguments.out / "passages.jsonl.gz").write_bytes(packed.getvalue())
    (arguments.out / "SOURCES.md").write_text(
        "# Sources of the passages\n\n"
        "`passages.jsonl.gz` holds short passages of the books below, all public domain in the USA, from\n"
        "the plain-text editions of Project Gutenberg (header, licence text and name removed). No book and\n"
        "no author is in two splits. `benchmarks/make_passages.py` writes both files.\n\n"
        "| split | passages | title | author | Project Gutenberg number |\n|---|---|---|---|---|\n"
        + "\n".join(sources)
        + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
