"""Tasks: reading every form, what counts as right against a plain computation, and verdicts."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.table import WordTokenizer
from tests.toy import ToyRunner, toy_generate, toy_logits

from flatout.engine.request import SamplingParams
from flatout.engine.score import score_continuations
from flatout.errors import ConfigError, FlatoutError
from flatout.verify.examine_tasks import decide, encode_tasks, examine_tasks
from flatout.verify.paired import paired_change
from flatout.verify.tasks import Task, answer_task, encode_task, read_task

CLOZE = {"context": "1 2 3", "continuation": "4"}
CHOICE = {"query": "1 2", "choices": ["3", "4 5"], "gold": 1}
SCHEMA = {"context_options": ["1 2", "1 3"], "continuation": "4 5", "gold": 0}
PAIR = {"sentence_good": "1 2 3", "sentence_bad": "3 2 1", "UID": "order"}


class Words(WordTokenizer):
    """Numbers are tokens below 256; token 255 ends a text."""

    def __init__(self, adds_bos: bool = False) -> None:
        super().__init__(adds_bos, 256)
        self.eos: int | None = 255


def write(path: Path, rows: Sequence[Any]) -> Path:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def task_of(tmp_path: Path, rows: Sequence[Any], name: str = "t.jsonl") -> Task:
    return read_task(write(tmp_path / name, rows))


def numbers(rng: np.random.Generator, most: int = 6) -> str:
    return " ".join(str(n) for n in rng.integers(0, 250, rng.integers(1, most)))


def log_p(context: Sequence[int], answer: Sequence[int]) -> float:
    """Plainly: log softmax of the toy model's logits, in float64, one token after the other."""
    total, tokens = 0.0, list(context)
    for token in answer:
        logits = toy_logits(tokens).astype(np.float64)
        total += logits[token] - np.log(np.exp(logits).sum())
        tokens.append(token)
    return total


def ids(text: str) -> list[int]:
    return [int(word) for word in text.split()]


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
@pytest.mark.parametrize(
    ("row", "form", "alternatives"),
    [(CLOZE, "cloze", 1), (CHOICE, "choice", 2), (SCHEMA, "schema", 2), (PAIR, "pair", 2)],
)
def test_every_form_is_known_by_its_keys(
    tmp_path: Path, row: dict[str, Any], form: str, alternatives: int, name: str
) -> None:
    task = task_of(tmp_path, [row, "", row], name)
    assert (task.form, task.name, len(task.items), task.repeated) == (form, "t", 1, 1)
    assert len(task.items[0].texts) == alternatives


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "1"}], r"an item has the keys \{context, continuation\} or .*t.jsonl:1: \['text'\]"),
        ([CLOZE, PAIR], r"the keys of the first: context, continuation; found: no context in .*t.jsonl:2"),
        ([CLOZE, "{"], r"each line must be a JSON object; found: .*t.jsonl:2: "),
        (["[1]"], r"each line must be a JSON object; found: .*t.jsonl:1"),
        ([CHOICE | {"gold": 2}], r"0 to 1; found: 2 in .*t.jsonl:1"),
        ([CHOICE | {"gold": True}], "0 to 1; found: True"),
        ([CHOICE | {"gold": "0"}], "0 to 1; found: 0"),
        ([CHOICE | {"choices": ["1"]}], "choices must be two texts or more"),
        ([CHOICE | {"choices": ["1", " "]}], "choices must be a text"),
        ([CHOICE | {"query": 7}], "query must be a text; found: 7 in"),
        ([SCHEMA | {"context_options": "1 2"}], "context_options must be two texts or more"),
        ([], "a task must hold items"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task_of(tmp_path, rows)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.jsonl.gz", [CLOZE] * 50).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(whole[:-9])
    (tmp_path / "c.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "d.jsonl").write_bytes(b'{"context": "\xff", "continuation": "1"}')
    for name in ("b.jsonl.gz", "c.jsonl.gz", "d.jsonl", "missing.jsonl"):
        with pytest.raises(FlatoutError, match=name):
            read_task(tmp_path / name)


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    row = json.dumps({"context": "1\u2028\x852", "continuation": "3"}, ensure_ascii=False)
    assert len(task_of(tmp_path, [row]).items) == 1


def test_questions_are_asked_as_the_harnesses_do(tmp_path: Path) -> None:
    asked = [CHOICE | {"query": "Question: why?\n"}, CHOICE | {"query": "He fell, because"}]
    texts = {item.texts[0] for item in task_of(tmp_path, asked).items}
    assert texts == {("Question: why?\nAnswer:", "3"), ("He fell, because", "3")}


@pytest.mark.parametrize("adds_bos", [False, True])
def test_choices_against_a_plain_computation(tmp_path: Path, adds_bos: bool) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):
        choices = [numbers(rng) for _ in range(2 + i % 3)]
        rows.append({"query": numbers(rng), "choices": choices, "gold": int(rng.integers(len(choices)))})
    task, tokenizer = task_of(tmp_path, rows), Words(adds_bos)
    runner = ToyRunner(num_pages=40, page_size=4)
    got = answer_task(runner, task, encode_task(tokenizer, task, None, 100))
    prefix = [tokenizer.bos] if adds_bos else []
    plain, normalised = [], []
    for item in task.items:
        sums = [log_p([*prefix, *ids(query)], ids(choice)) for query, choice in item.texts]
        plain.append(int(np.argmax(sums)) == item.gold)
        each = [total / len(choice) for total, (_, choice) in zip(sums, item.texts, strict=True)]
        normalised.append(int(np.argmax(each)) == item.gold)
    assert got.right_plain is not None
    assert got.right.tolist() == normalised
    assert got.right_plain.tolist() == plain
    assert normalised != plain, "the items tell the two rules apart"
    assert max(sequences for sequences, _ in runner.steps) > 4, "items share steps"


def test_schemas_and_pairs_against_a_plain_computation(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    schemas = [
        {"context_options": [numbers(rng), numbers(rng)], "continuation": numbers(rng), "gold": i % 2}
        for i in range(30)
    ]
    pairs = [{"sentence_good": numbers(rng), "sentence_bad": numbers(rng)} for _ in range(30)]
    for rows, name, start in ((schemas, "s.jsonl", []), (pairs, "p.jsonl", [255])):
        task = task_of(tmp_path, rows, name)
        runner = ToyRunner(num_pages=40)
        got = answer_task(runner, task, encode_task(Words(), task, None, 100))
        expected = []
        for item in task.items:
            sums = [log_p([*start, *ids(context)], ids(answer)) for context, answer in item.texts]
            expected.append(int(np.argmax(sums)) == item.gold)
        assert got.right.tolist() == expected
        assert got.right_plain is None


def test_a_cloze_is_right_only_if_every_token_is_greedy(tmp_path: Path) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    rng = np.random.default_rng(2)
    rows, expected = [], {}
    for i in range(24):
        context = numbers(rng, 12)
        answer = toy_generate(ids(context), greedy)
        if i % 2:
            answer[i % 3] = (answer[i % 3] + 1) % 250  # one of three tokens is not the greedy one
        rows.append({"context": context, "continuation": " ".join(map(str, answer))})
        expected[context] = i % 2 == 0
    task = task_of(tmp_path, rows)
    for pages in (5, 60):
        got = answer_task(ToyRunner(pages), task, encode_task(Words(), task, None, 20))
        assert got.right.tolist() == [expected[item.texts[0][0]] for item in task.items]
        nll = -sum(log_p(ids(item.texts[0][0]), ids(item.texts[0][1])) for item in task.items)
        assert got.nll == pytest.approx(nll, rel=1e-5)
        assert got.tokens == 3 * 24


@pytest.mark.parametrize("step_tokens", [1, 5, 64])
def test_greedy_tokens_do_not_depend_on_how_documents_are_cut(step_tokens: int) -> None:
    rng = np.random.default_rng(3)
    docs = [rng.integers(0, 256, n).tolist() for n in (2, 9, 17, 30, 3)]
    firsts = [1, 9, 4, 29, 2]
    scores, greedy = score_continuations(ToyRunner(num_pages=12), docs, firsts, step_tokens)
    for doc, first, score, drawn in zip(docs, firsts, scores, greedy, strict=True):
        assert drawn.tolist() == [int(toy_logits(doc[:i]).argmax()) for i in range(first, len(doc))]
        assert score[-1] == pytest.approx(log_p(doc[:-1], doc[-1:]), abs=1e-4)
    with pytest.raises(ConfigError, match="after the first token; found: 0 in document 1"):
        score_continuations(ToyRunner(num_pages=12), docs, [1, 0, 1, 1, 1], step_tokens)


class Merging(Words):
    """Joins the words 7 and 8 into the token 78."""

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        return super().encode(text.replace("7 8", "78"), add_bos)


def test_tokens_that_span_the_boundary_belong_to_the_answer(tmp_path: Path) -> None:
    task = task_of(tmp_path, [{"context": "1 7", "continuation": "8 9"}])
    encoded = encode_task(Merging(), task, None, 100)
    assert encoded.alternatives[0].tokens == (1, 78, 9)
    assert encoded.firsts == (1,)
    alone = task_of(tmp_path, [{"context": "7", "continuation": "8"}])
    with pytest.raises(ConfigError, match=r"an item needs a context and tokens after it; found: .*t.jsonl:1"):
        encode_task(Merging(), alone, None, 100)


def test_items_that_cannot_be_asked_are_refused(tmp_path: Path) -> None:
    task = task_of(tmp_path, [CLOZE, {"context": "1 " * 50, "continuation": "2"}])
    with pytest.raises(ConfigError, match=r"must fit into 48 tokens.*found: 51 in .*t.jsonl:2"):
        encode_tasks([task], Words(), ToyRunner(12), ToyRunner(13))
    tokenizer = Words()
    tokenizer.eos = tokenizer.bos = None  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="whole sentences need a begin-of-text"):
        encode_task(tokenizer, task_of(tmp_path, [PAIR]), None, 100)
    with pytest.raises(ConfigError, match="--limit leaves at least one"):
        encode_tasks([task], Words(), ToyRunner(12), ToyRunner(12), limit=0)


def test_a_limit_takes_the_first_by_hash_wherever_they_stand(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    rows = [CLOZE | {"context": numbers(rng, 9)} for _ in range(30)]
    taken = []
    for order in (rows, rows[::-1]):
        task = task_of(tmp_path, order)
        taken.append(encode_task(Words(), task, 7, 100).alternatives)
    assert [c.tokens for c in taken[0]] == [c.tokens for c in taken[1]]
    assert len(taken[0]) == 7
    assert {c.tokens for c in taken[0]} != {(*ids(row["context"]), 4) for row in rows[:7]}


class Spoilt(ToyRunner):
    """Another model where a sequence's first token is below 60."""

    def _write(self, tokens: np.ndarray, start: int, pages: np.ndarray) -> None:
        changed = tokens.copy()
        if start == 0 and tokens[0] < 60:
            changed[0] = 251
        super()._write(changed, start, pages)


def test_both_models_and_their_flips_are_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    rows = [
        {"query": numbers(rng), "choices": [numbers(rng) for _ in range(2)], "gold": i % 2}
        for i in range(200)
    ]
    tasks = encode_tasks([task_of(tmp_path, rows)], Words(), ToyRunner(40), Spoilt(40), limit=150)
    seen: list[tuple[str, int, int]] = []
    (found,) = examine_tasks(
        tasks, ToyRunner(40), Spoilt(40), margin=0.01, listen=lambda *stage: seen.append(stage)
    )
    assert (found.n, found.available) == (150, 200)
    assert found.lost > 0
    assert found.gained > 0
    difference = found.accuracy_optimised - found.accuracy_original
    assert difference == pytest.approx((found.gained - found.lost) / 150)
    expected = paired_change(150, found.lost, found.gained, 0.05)
    assert (found.low, found.high, found.mcnemar_p) == (expected.low, expected.high, expected.mcnemar_p)
    assert not found.passed
    assert seen[-1] == ("t: optimised", 300, 300)
    (same,) = examine_tasks(tasks, ToyRunner(40), ToyRunner(40), margin=0.03, listen=lambda *stage: None)
    assert same.passed
    assert (same.lost, same.gained, same.mcnemar_p) == (0, 0, 1)
    with pytest.raises(ConfigError, match="margin"):
        examine_tasks(tasks, ToyRunner(40), ToyRunner(40), margin=0, listen=lambda *stage: None)


@pytest.mark.parametrize(
    ("counts", "verdict", "reason"),
    [
        ((2000, 10, 12), "passed", "accuracy falls by at most 0.30%, margin 1.00%"),
        ((2000, 90, 10), "failed", "accuracy falls by at least 3.2"),
        ((300, 9, 8), "cannot_decide", "items would decide"),
        ((300, 9, 2), "cannot_decide", r"accuracy falls by at most 4.\d+%, margin 1.00%$"),
        ((20, 0, 0), "cannot_decide", "20 items, at least 32 are needed"),
    ],
)
def test_the_verdict_says_why(counts: tuple[int, int, int], verdict: str, reason: str) -> None:
    found = decide(paired_change(*counts, 0.05), 0.01, 0.05)
    assert found[0] == verdict
    assert re.search(reason, found[1]), found[1]
