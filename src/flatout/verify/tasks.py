"""Tasks besides perplexity: a file of items, and what a model answers to them.

A task is a .jsonl or .jsonl.gz file, one item a line, in one of the forms of lm-eval and llm-foundry. The
keys of the first line say which one; keys that a form does not know are ignored:

    cloze   {context, continuation}     right if every token of the continuation is the greedy one (LAMBADA)
    choice  {query, choices, gold}      right if the gold choice is the likeliest after the query, by
                                        log-probability a character (ARC, PIQA, COPA)
    schema  {context_options, continuation, gold}
                                        right if the continuation is likeliest after the gold context
                                        (WinoGrande)
    pair    {sentence_good, sentence_bad}
                                        right if the good sentence is the likelier (BLiMP)

Log-probabilities are of the answer's tokens given those before it; a tie is not right. A space joins the
parts; after a query that begins with "Question:" it is "\\nAnswer: ", as in both harnesses. A text starts
with the model's begin-of-text token where it was trained with one. A whole sentence needs some first token:
begin-of-text, or end-of-text. No examples are shown before an item (0 shots).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flatout.core.files import open_regular, shown
from flatout.engine.runner import Runner
from flatout.engine.score import score_continuations, score_documents
from flatout.errors import ConfigError
from flatout.verify.quality import Cluster, Progress, check_logits, check_scores

FORMS = {
    "cloze": ("context", "continuation"),
    "choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "pair": ("sentence_good", "sentence_bad"),
}
RULES = {
    "cloze": "every token of the continuation is the greedy one",
    "choice": "the gold choice has the greatest log-probability a character",
    "schema": "the continuation has its greatest log-probability after the gold context",
    "pair": "the good sentence has the greater log-probability",
}
_MOST_BYTES = 1 << 28


class TaskEncoder(Protocol):
    """What items need of a tokenizer; bos and eos are token ids or None."""

    @property
    def adds_bos(self) -> bool: ...

    @property
    def bos(self) -> int | None: ...

    @property
    def eos(self) -> int | None: ...

    def encode(self, text: str, add_bos: bool = False) -> list[int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """Alternative (context, answer) texts and which of them is right; a cloze has one."""

    line: int
    texts: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A file of items, each once, in the order in which they are judged: that of a hash, so that the first n
    are a random sample that nobody chose. sha256: of the unpacked file; repeated: lines left out as
    copies."""

    name: str
    source: str
    sha256: str
    form: str
    items: tuple[Item, ...]
    repeated: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """The items as tokens. alternatives: every (context, answer) of every item in order; firsts: where each
    answer begins; characters: its length as text; counts: alternatives of each item."""

    alternatives: tuple[Cluster, ...]
    firsts: tuple[int, ...]
    characters: tuple[int, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answers:
    """One model's answers, bool (items,): by the form's rule, and by plain log-probability where the two
    differ (choice). nll and tokens: of all continuations of a cloze, otherwise 0."""

    right: np.ndarray
    right_plain: np.ndarray | None
    nll: float = 0.0
    tokens: int = 0


def read_task(path: str | Path) -> Task:
    """The items of a file. Raises ConfigError naming the line at fault, ModelFileError for a file that cannot
    be read."""
    path = Path(path)
    data = _contents(path)
    form, items, seen, repeated = "", [], set(), 0
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{shown(str(path), 300)}:{number}"
        row = _row(line, where)
        form = form or _form(row, where)
        item = _item(row, form, number, where)
        if (item.texts, item.gold) in seen:
            repeated += 1
            continue
        seen.add((item.texts, item.gold))
        items.append(item)
    if not items:
        raise ConfigError("a task must hold items", f"none in {shown(str(path), 300)}", "another file")
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return Task(
        name=name,
        source=str(path),
        sha256=hashlib.sha256(data).hexdigest(),
        form=form,
        items=tuple(sorted(items, key=lambda item: hashlib.sha256(repr(item.texts).encode()).digest())),
        repeated=repeated,
    )


def _contents(path: Path) -> bytes:
    """The file's text, unpacked if need be, at most _MOST_BYTES of it."""
    with open_regular(path) as file:
        try:
            if path.suffix == ".gz":
                with gzip.GzipFile(fileobj=file) as unpacked:
                    data = unpacked.read(_MOST_BYTES + 1)
            else:
                data = file.read(_MOST_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(
                "a .gz file must be whole", f"{shown(str(path), 300)}: {shown(str(error))}", "a fresh copy"
            ) from error
    if len(data) > _MOST_BYTES:
        raise ConfigError(
            f"a task holds at most {_MOST_BYTES >> 20} MiB of text", shown(str(path), 300), "a part of it"
        )
    return data


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        found = f"{where}: {shown(str(error))}"
        raise ConfigError("each line must be a JSON object", found, "fix the line") from error
    if not isinstance(row, dict):
        raise ConfigError("each line must be a JSON object", f"{where}: {shown(row)}", "fix the line")
    return row


def _form(row: dict[str, Any], where: str) -> str:
    for form, keys in FORMS.items():
        if all(key in row for key in keys):
            return form
    known = " or ".join("{" + ", ".join(keys) + "}" for keys in FORMS.values())
    raise ConfigError(f"an item has the keys {known}", f"{where}: {shown(sorted(row))}", "another file")


def _item(row: dict[str, Any], form: str, number: int, where: str) -> Item:
    missing = [key for key in FORMS[form] if key not in row]
    if missing:
        raise ConfigError(
            f"every line must have the keys of the first: {', '.join(FORMS[form])}",
            f"no {missing[0]} in {where}",
            "one form a file",
        )
    if form == "cloze":
        pairs = [(_text(row, "context", where), _text(row, "continuation", where))]
    elif form == "choice":
        query = _text(row, "query", where)
        question = query.lstrip().startswith("Question:")
        asked = query.rstrip() + "\nAnswer:" if question else query
        pairs = [(asked, choice) for choice in _texts(row, "choices", where)]
    elif form == "schema":
        rest = _text(row, "continuation", where)
        pairs = [(option, rest) for option in _texts(row, "context_options", where)]
    else:
        pairs = [("", _text(row, key, where)) for key in FORMS["pair"]]
    gold = row.get("gold", 0) if form in ("choice", "schema") else 0
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(pairs):
        raise ConfigError(
            f"gold is the number of the right one, 0 to {len(pairs) - 1}",
            f"{shown(gold)} in {where}",
            "fix the line",
        )
    return Item(line=number, texts=tuple(pairs), gold=gold)


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(row[key], str) or not row[key].strip():
        raise ConfigError(f"{key} must be a text", f"{shown(row[key])} in {where}", "fix the line")
    return str(row[key])


def _texts(row: dict[str, Any], key: str, where: str) -> list[str]:
    texts = row[key]
    if not isinstance(texts, list) or len(texts) < 2:
        raise ConfigError(f"{key} must be two texts or more", f"{shown(texts)} in {where}", "fix the line")
    return [_text({key: text}, key, where) for text in texts]


def encode_task(tokenizer: TaskEncoder, task: Task, limit: int | None, capacity: int) -> Encoded:
    """The first `limit` items (all by default) as tokens. capacity: tokens of a text that both runners hold.

    An answer begins where the tokens of context and answer together first differ from those of the context
    alone. Raises ConfigError for an item that does not fit or has no answer left.
    """
    prefix = [tokenizer.bos] if tokenizer.adds_bos and tokenizer.bos is not None else []
    if task.form == "pair" and not prefix:
        start = tokenizer.bos if tokenizer.bos is not None else tokenizer.eos
        if start is None:
            raise ConfigError(
                "whole sentences need a begin-of-text or end-of-text token to start from",
                f"a tokenizer without either for {task.name}",
                "a task with contexts",
            )
        prefix = [start]
    alternatives: list[Cluster] = []
    firsts: list[int] = []
    characters: list[int] = []
    counts: list[int] = []
    for item in task.items[:limit]:
        counts.append(len(item.texts))
        for context, answer in item.texts:
            before, whole = _joined(tokenizer, context, answer)
            where = f"{task.source}:{item.line}"
            if len(prefix) + len(whole) > capacity:
                raise ConfigError(
                    f"an item must fit into {capacity} tokens (the model's positions)",
                    f"{len(prefix) + len(whole)} in {where}",
                    "a file without it",
                )
            first = len(prefix) + _common(before, whole)
            if not 1 <= first < len(prefix) + len(whole):
                raise ConfigError("an item needs a context and tokens after it", where, "a file without it")
            alternatives.append(Cluster(id=where, domain=task.name, tokens=(*prefix, *whole)))
            firsts.append(first)
            characters.append(len(answer))
    return Encoded(
        alternatives=tuple(alternatives),
        firsts=tuple(firsts),
        characters=tuple(characters),
        counts=tuple(counts),
    )


def _joined(tokenizer: TaskEncoder, context: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of the context alone, and of context and answer joined by a space unless one has it."""
    if not context:
        return [], tokenizer.encode(answer)
    space = "" if context[-1].isspace() or answer[0].isspace() else " "
    return tokenizer.encode(context.rstrip()), tokenizer.encode(context + space + answer)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return same


def answer_task(runner: Runner, task: Task, items: Encoded, progress: Progress | None = None) -> Answers:
    """What the model on `runner` answers to encoded items; several items share a step. Raises EvidenceError
    for broken logits."""
    clusters, firsts = items.alternatives, items.firsts
    docs = [cluster.tokens for cluster in clusters]
    check_logits(runner, docs[0][:64])
    if task.form == "cloze":
        scores, greedy = score_continuations(runner, docs, firsts, progress=progress)
    else:
        scores, greedy = score_documents(runner, docs, progress=progress), []
    check_scores(clusters, scores)
    answers = [score[first - 1 :] for score, first in zip(scores, firsts, strict=True)]
    sums = np.array([answer.sum(dtype=np.float64) for answer in answers])
    if task.form == "cloze":
        told = zip(greedy, docs, firsts, strict=True)
        right = np.array([np.array_equal(drawn, doc[first:]) for drawn, doc, first in told])
        tokens = sum(len(answer) for answer in answers)
        return Answers(right=right, right_plain=None, nll=-float(sums.sum()), tokens=tokens)
    gold = [item.gold for item in task.items[: len(items.counts)]]
    plain = _likeliest(sums, items.counts, gold)
    if task.form != "choice":
        return Answers(right=plain, right_plain=None)
    return Answers(right=_likeliest(sums / np.array(items.characters), items.counts, gold), right_plain=plain)


def _likeliest(values: np.ndarray, counts: Sequence[int], gold: Sequence[int]) -> np.ndarray:
    """bool (items,): whether the gold alternative's value is greater than all others of its item."""
    right, at = np.zeros(len(counts), dtype=bool), 0
    for i, count in enumerate(counts):
        group = values[at : at + count]
        right[i] = bool((np.delete(group, gold[i]) < group[gold[i]]).all())
        at += count
    return right
