"""Passages: the texts that calibrate, choose and judge a compressed model.

Three splits that share no book: `calibration` feeds the methods, `validation` chooses between candidates as
often as wanted, `holdout` stays sealed until a final candidate is judged. The shipped text is public-domain
English prose (sources in SOURCES.md); a user's own text is split by `split_text`, the same way on every
run, so that text which calibrated a model yesterday does not judge it today.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from flatout.errors import ConfigError, EvidenceError

SPLITS = ("calibration", "validation", "holdout")
_CHUNK = 2000  # characters of one passage cut from running text, about 450 tokens of English
_MANY_BOOKS = 24  # from here on whole books are dealt to the splits


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A stretch of text. `book` names the book, document or domain that it is from."""

    id: str
    book: str
    text: str


@cache
def _shipped() -> dict[str, tuple[Passage, ...]]:
    packed = files("flatout.data").joinpath("passages.jsonl.gz").read_bytes()
    splits: dict[str, list[Passage]] = {split: [] for split in SPLITS}
    for line in gzip.decompress(packed).decode("utf-8").splitlines():
        row = json.loads(line)
        splits[row["split"]].append(Passage(id=row["id"], book=row["book"], text=row["text"]))
    return {split: tuple(passages) for split, passages in splits.items()}


def load_passages(split: str) -> list[Passage]:
    """The shipped passages of `split`: calibration, validation or holdout; about 1,900 characters each."""
    if split not in SPLITS:
        raise ConfigError(f"a split is one of {', '.join(SPLITS)}", repr(split), "holdout")
    return list(_shipped()[split])


def passages_sha256(passages: Sequence[Passage]) -> str:
    """Hash of the texts in order, independent of ids and file form."""
    digest = hashlib.sha256()
    for passage in passages:
        encoded = passage.text.encode("utf-8")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()


def split_sha256(split: str) -> str:
    """Hash of a shipped split; certificates carry it."""
    return passages_sha256(load_passages(split))


def load_text(path: str | Path) -> list[Passage]:
    """Passages of a user's file, in the file's order.

    .jsonl: one JSON object a line with the string `text` and, optionally, `id` and `book` (or `domain`); a
    line is one passage, however long. Anything else is UTF-8 text, cut at paragraph or sentence ends into
    passages of about 2,000 characters. Raises ConfigError for a file that cannot be read, EvidenceError for
    one without text.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            "the text file must be readable", f"{path}: {error.strerror}", "another path"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            "the text file must be UTF-8", f"{path}: byte {error.start}", "iconv -t utf-8"
        ) from error
    if path.suffix == ".jsonl":
        passages = [_from_line(path, i, line) for i, line in enumerate(content.splitlines()) if line.strip()]
    else:
        passages = [
            Passage(id=f"{path.name}:{i}", book=path.name, text=text)
            for i, text in enumerate(_chunks(content))
        ]
    if not passages:
        raise EvidenceError("the text file must hold text", f"{path} is empty", "a longer text")
    return passages


def _from_line(path: Path, index: int, line: str) -> Passage:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(
            "each line must be a JSON object", f"{path}:{index + 1}: {error.msg}", "fix the line"
        ) from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"].strip():
        raise ConfigError(
            'each line must be an object with a non-empty string "text"',
            f"{path}:{index + 1}",
            "fix the line",
        )
    book = row.get("book", row.get("domain", f"{path.name}:{index}"))
    return Passage(id=str(row.get("id", f"{path.name}:{index}")), book=str(book), text=row["text"])


def _chunks(content: str) -> list[str]:
    """Consecutive stretches of at most _CHUNK characters, cut at a paragraph, sentence or word end if there
    is one."""
    chunks: list[str] = []
    start = 0
    while start < len(content):
        window = content[start : start + _CHUNK]
        end = len(window)
        if start + end < len(content):
            for boundary in (r"\n\s*\n", r"[.!?。！？][\"'”’)]*\s+", r"\s+"):
                cuts = [match.end() for match in re.finditer(boundary, window) if match.end() > _CHUNK // 2]
                if cuts:
                    end = cuts[-1]
                    break
        chunks.append(window[:end].strip())
        start += end
    return [chunk for chunk in chunks if chunk]


def split_text(passages: Sequence[Passage]) -> dict[str, list[Passage]]:
    """Deal a user's passages to the splits: a quarter calibration, a quarter validation, half hold-out.

    One running text is cut into three consecutive stretches. Otherwise a hash decides, so that adding
    documents moves none: for each book as a whole when there are 24 or more, for each passage when there
    are fewer.
    """
    splits: dict[str, list[Passage]] = {split: [] for split in SPLITS}
    books = {passage.book for passage in passages}
    if len(books) == 1:
        first, second = len(passages) // 4, len(passages) // 2
        splits["calibration"] = list(passages[:first])
        splits["validation"] = list(passages[first:second])
        splits["holdout"] = list(passages[second:])
        return splits
    for passage in passages:
        key = passage.book if len(books) >= _MANY_BOOKS else passage.text
        bucket = hashlib.sha256(key.encode("utf-8")).digest()[0] % 4
        splits[SPLITS[min(bucket, 2)]].append(passage)
    return splits
