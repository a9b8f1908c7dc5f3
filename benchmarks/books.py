"""Public-domain books to train on, without what ships for judging.

BOOKS holds train.txt.gz, heldout.txt.gz (UTF-8 text, an empty line between paragraphs) and index.tsv with the
columns split, ebook_no, title, author, byte_offset, byte_length, words.
"""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

from flatout.data.passages import SPLITS, load_passages
from flatout.errors import ConfigError


def read_books(folder: Path) -> tuple[list[str], list[str]]:
    """(training text, held-out books). Every passage that ships with the package is cut out of the training
    text, which ends one document there and starts another; neighbouring pages of the same books stay."""
    books: dict[str, list[str]] = {"train": [], "heldout": []}
    with (folder / "index.tsv").open(encoding="utf-8", newline="") as index:
        rows = list(csv.DictReader(index, delimiter="\t"))
    for split, texts in books.items():
        whole = gzip.decompress((folder / f"{split}.txt.gz").read_bytes())
        for row in rows:
            if row["split"] == split:
                start = int(row["byte_offset"])
                texts.append(whole[start : start + int(row["byte_length"])].decode("utf-8").strip())
    documents = books["train"]
    for passage in (passage for split in SPLITS for passage in load_passages(split)):
        if any(passage.text in book for book in books["heldout"]):
            continue
        pieces = [piece for document in documents for piece in document.split(passage.text)]
        if len(pieces) == len(documents):
            raise ConfigError("every passage that ships stands in a book", passage.id, "the books it is from")
        documents = pieces
    return [document.strip() for document in documents if document.strip()], books["heldout"]
