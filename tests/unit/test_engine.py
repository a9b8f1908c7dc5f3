"""The engine over a toy runner: the same answer however it was batched, chunked, preempted, reused or
interrupted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.toy import (
    EOS,
    PROMPTS,
    ByteTokenizer,
    ScriptedRunner,
    ToyRunner,
    toy_generate,
    toy_logits,
    toy_spec,
)

from flatout.engine.engine import Engine
from flatout.engine.request import Output, Result, SamplingParams, StopFinder
from flatout.engine.sampler import log_probabilities
from flatout.engine.score import score_documents
from flatout.errors import ConfigError


def engine(num_pages: int = 64, page_size: int = 4, positions: int = 4096, **options: int | bool) -> Engine:
    runner = ToyRunner(num_pages, page_size, toy_spec(positions))
    return Engine(runner, ByteTokenizer(), **options)  # type: ignore[arg-type]


def says(text: str | bytes | list[int]) -> Engine:
    """An engine whose answer to a prompt of one token is `text`, then the end of sequence."""
    script = text if isinstance(text, list) else list(text.encode() if isinstance(text, str) else text)
    return Engine(ScriptedRunner(script), ByteTokenizer())


def answer(text: str | bytes | list[int], **params: object) -> Result:
    one = SamplingParams(**{"max_tokens": 100, **params})  # type: ignore[arg-type]
    return says(text).generate(["?"], one)[0]


def run(e: Engine) -> dict[int, list[Output]]:
    """Step until nothing is left; outputs by request."""
    outputs: dict[int, list[Output]] = {}
    while e.has_work:
        for output in e.step():
            outputs.setdefault(output.id, []).append(output)
    return outputs


MIXED = [
    SamplingParams(max_tokens=7),
    SamplingParams(max_tokens=20, temperature=1.0, seed=1),
    SamplingParams(max_tokens=1),
    SamplingParams(max_tokens=13, temperature=0.7, top_k=5, seed=2),
    SamplingParams(max_tokens=30, temperature=2.0, top_p=0.9, seed=2**64 - 1),
    SamplingParams(max_tokens=9, temperature=1.0, seed=1, ignore_eos=True),
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch": 1},
        {"max_batch": 2, "max_step_tokens": 2},
        {"max_step_tokens": 33},
        {"num_pages": 14, "max_batch": 6, "max_step_tokens": 7},
        {"page_size": 1, "num_pages": 100},
        {"page_size": 64},
        {"prefix_reuse": False},
    ],
    ids=str,
)
def test_answers_do_not_depend_on_how_they_were_computed(options: dict[str, int | bool]) -> None:
    e = engine(**options)  # type: ignore[arg-type]
    for _ in range(2):  # the second time with whatever prefixes are cached
        results = e.generate(PROMPTS, MIXED)
        for prompt, params, result in zip(PROMPTS, MIXED, results, strict=True):
            assert result.token_ids == toy_generate(prompt, params)
            assert result.prompt_tokens == len(prompt)
            stopped = result.token_ids[-1] == EOS and not params.ignore_eos
            assert result.finish_reason == ("stop" if stopped else "length")
        assert e.stats().pages_held == 0
    assert (e.stats().tokens_reused > 0) == (
        options.get("prefix_reuse", True) and options.get("page_size") != 64
    )


def test_the_urgent_are_answered_first_with_the_same_tokens() -> None:
    urgent = [replace(params, priority=-i) for i, params in enumerate(MIXED)]
    e = engine(num_pages=14, max_batch=1)
    ids = [e.add_request(p, params) for p, params in zip(PROMPTS, urgent, strict=True)]
    outputs: dict[int, Result] = {}
    while e.has_work:
        outputs |= {output.id: output.result for output in e.step() if output.result is not None}
    assert list(outputs) == ids[::-1], "in order of their ends"
    for number, prompt, params in zip(ids, PROMPTS, MIXED, strict=True):
        assert outputs[number].token_ids == toy_generate(prompt, params)


def test_few_pages_do_preempt() -> None:
    e = engine(num_pages=14, max_batch=6, max_step_tokens=7)
    e.generate(PROMPTS, MIXED)
    assert e.stats().preemptions > 0, "the case above must exercise preemption"


@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_random_traffic(data: st.DataObject) -> None:
    """Arrivals, cancellations and failing steps at random times: every answer is right or a beginning of
    it."""
    e = engine(num_pages=9, page_size=3, positions=24, max_batch=3, max_step_tokens=6)
    runner = e.runner
    assert isinstance(runner, ToyRunner)
    asked: dict[int, tuple[list[int], SamplingParams]] = {}
    outputs: dict[int, list[Output]] = {}
    for _ in range(data.draw(st.integers(5, 40))):
        action = data.draw(st.sampled_from(["add", "add", "step", "step", "step", "cancel", "fail"]))
        if action == "add":
            prompt = data.draw(st.sampled_from([[1, 2, 3], [1, 2, 3, 4, 5, 6], [4]])) * data.draw(
                st.integers(1, 3)
            )
            params = SamplingParams(
                max_tokens=data.draw(st.integers(1, 30)),
                temperature=data.draw(st.sampled_from([0.0, 1.0])),
                seed=len(asked),
                priority=data.draw(st.sampled_from([0, 0, 2, -1])),
            )
            asked[e.add_request(prompt, params)] = (prompt, params)
        elif action == "cancel" and asked:
            e.cancel(data.draw(st.sampled_from(sorted(asked))))
        elif action == "fail" and e.has_work:
            runner.fail_next = True
            try:
                for output in e.step():
                    outputs.setdefault(output.id, []).append(output)
            except RuntimeError:
                pass
            runner.fail_next = False
        elif action == "step":
            for output in e.step():
                outputs.setdefault(output.id, []).append(output)
    for number, more in run(e).items():
        outputs.setdefault(number, []).extend(more)
    assert e.stats().pages_held == 0
    assert outputs.keys() == asked.keys()
    for number, (prompt, params) in asked.items():
        result = outputs[number][-1].result
        assert result is not None
        assert all(output.result is None for output in outputs[number][:-1])
        expected = toy_generate(prompt, params, capacity=24)
        if result.finish_reason == "cancelled":
            expected = expected[: len(result.token_ids)]
        assert result.token_ids == expected
        assert result.text == ByteTokenizer().decode(expected)
        assert "".join(output.text for output in outputs[number]) == result.text


def test_stream_is_generate() -> None:
    e = engine()
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=5)
    pieces = list(e.stream("hello", params))
    assert len(pieces) > 1
    assert "".join(pieces) == e.generate(["hello"], params)[0].text


def test_streams_and_requests_interleave_without_losing_output() -> None:
    e = engine()
    params = [SamplingParams(max_tokens=20, ignore_eos=True, seed=s, temperature=1.0) for s in range(3)]
    expected = [ByteTokenizer().decode(toy_generate(list(b"abc"), p)) for p in params]
    number = e.add_request("abc", params[2])
    first, second = e.stream("abc", params[0]), e.stream("abc", params[1])
    texts = ["", ""]
    live: list[tuple[int, Iterator[str]]] = [(0, first), (1, second)]
    while live:
        for i, stream in list(live):
            piece = next(stream, None)
            if piece is None:
                live.remove((i, stream))
            else:
                texts[i] += piece
    assert texts == expected[:2]
    assert "".join(output.text for output in run(e)[number]) == expected[2]


def test_closing_a_stream_frees_its_pages() -> None:
    e = engine()
    stream = e.stream("hello", SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    assert e.stats().pages_held > 0
    stream.close()
    assert e.stats().pages_held == 0
    assert not e.has_work


def test_an_error_in_generate_frees_everything() -> None:
    e = engine()
    assert isinstance(e.runner, ToyRunner)
    e.runner.fail_next = True
    with pytest.raises(RuntimeError, match="told to fail"):
        e.generate(["abc", "def"])
    assert e.stats().pages_held == 0
    assert not e.has_work
    with pytest.raises(ConfigError, match="at least one token"):
        e.generate(["abc", ""])
    assert not e.has_work
    assert e.generate(["abc"], SamplingParams(max_tokens=3))[0].token_ids == toy_generate(
        list(b"abc"), SamplingParams(max_tokens=3)
    )


def test_cancel_before_during_and_after() -> None:
    e = engine(max_batch=1)
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    running, waiting, early = (e.add_request("abc", params) for _ in range(3))
    e.cancel(early)
    outputs = {o.id: [o] for o in e.step()}
    e.cancel(running)
    e.cancel(waiting)
    outputs |= run(e)
    results = [outputs[number][-1].result for number in (running, waiting, early)]
    assert [r.finish_reason for r in results if r] == ["cancelled"] * 3
    assert [len(r.token_ids) for r in results if r] == [1, 0, 0]
    e.cancel(running)
    e.cancel(12345)
    assert run(e) == {}


def test_requests_may_come_from_other_threads() -> None:
    e = engine(num_pages=200, max_batch=8)
    params = SamplingParams(max_tokens=5)
    ids: list[int] = []

    def ask() -> None:
        ids.extend(e.add_request("abc", params) for _ in range(50))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    outputs: dict[int, Result] = {}
    while any(thread.is_alive() for thread in threads) or e.has_work:
        outputs.update({o.id: o.result for o in e.step() if o.result})
    assert sorted(outputs) == sorted(ids)
    assert len(set(ids)) == 200
    expected = toy_generate(list(b"abc"), params)
    assert all(result.token_ids == expected for result in outputs.values())


def test_prefix_of_a_conversation_is_reused() -> None:
    e = engine()
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = e.chat_prompt(messages)
    first = e.generate([prompt], SamplingParams(max_tokens=9, ignore_eos=True))[0]
    follow = [*prompt, *first.token_ids, *b"<user>and of Spain?"]
    second = e.generate([follow], SamplingParams(max_tokens=9))[0]
    assert second.reused_tokens == (len(prompt) + 8) // 4 * 4, "all full pages of prompt and answer"
    assert second.token_ids == toy_generate(follow, SamplingParams(max_tokens=9))


# Text


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    text=st.text(alphabet="ab é漢😀", max_size=20),
    stop=st.lists(st.text(alphabet="ab é漢😀", min_size=1, max_size=4), max_size=3).map(tuple),
)
def test_stop_strings_across_tokens(text: str, stop: tuple[str, ...]) -> None:
    """One token a byte, so stop strings and characters always cross tokens; the answer ends before the stop
    string that is complete first."""
    result = answer(text, stop=stop)
    ends = sorted((text.find(s) + len(s), text.find(s)) for s in stop if s in text)
    assert result.text == (text[: ends[0][1]] if ends else text)
    assert result.finish_reason == "stop"
    if ends:
        assert len(result.token_ids) == len(text[: ends[0][0]].encode())


@settings(deadline=None, derandomize=True, max_examples=200)
@given(data=st.data())
def test_stop_finder_does_not_depend_on_pieces(data: st.DataObject) -> None:
    text = data.draw(st.text(alphabet="abc", max_size=24))
    stop = tuple(data.draw(st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    finder, whole = StopFinder(stop), StopFinder(stop)
    shown = ""
    for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True):
        if not finder.found:
            shown += finder.push(text[a:b])
            assert not any(s in shown for s in stop)
    if not finder.found:
        shown += finder.finish()
    expected = whole.push(text)
    if not whole.found:
        expected += whole.finish()
    assert (shown, finder.found) == (expected, whole.found)
    assert finder.found == any(s in text for s in stop)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(text=st.text(max_size=30))
def test_streamed_text_is_never_broken(text: str) -> None:
    pieces = list(says(text).stream("?", SamplingParams(max_tokens=200)))
    assert "".join(pieces) == text
    for piece in pieces:
        assert piece.encode().decode() == piece


def test_an_answer_cut_inside_a_character_says_so() -> None:
    result = answer("a漢", max_tokens=3)
    assert (result.text, result.finish_reason) == ("a\ufffd", "length")


def test_end_of_sequence_is_counted_but_not_text() -> None:
    result = answer("ab")
    assert (result.text, result.token_ids, result.finish_reason) == ("ab", [97, 98, EOS], "stop")


def test_stop_string_with_the_last_token_is_a_stop() -> None:
    result = answer("abc", max_tokens=3, stop=("bc",))
    assert (result.text, result.finish_reason) == ("a", "stop")


def test_text_that_only_began_like_a_stop_string_is_kept() -> None:
    assert answer("one tw", stop=("two",)).text == "one tw"
    assert answer("one tw", stop=("two",), max_tokens=5).text == "one t"


# Errors


def test_a_prompt_longer_than_capacity_is_one_clear_error() -> None:
    for e in (engine(num_pages=4, page_size=4), engine(positions=16)):
        with pytest.raises(ConfigError) as caught:
            e.add_request([1] * 16)
        assert str(caught.value) == (
            "prompt and answer must fit into 16 tokens, the lesser of the model's positions and the KV "
            "cache, so the prompt must be shorter than that; found: a prompt of 16 tokens; "
            "try: a shorter prompt, or a larger cache if the model's context allows"
        )
        result = e.generate([[1] * 15], SamplingParams(max_tokens=50))[0]
        assert (len(result.token_ids), result.finish_reason) == (1, "length")


def test_ids_outside_the_vocabulary_are_refused() -> None:
    for bad in (-1, 257):
        with pytest.raises(ConfigError, match="token ids lie between 0 and 256; found: "):
            engine().add_request([1, bad])


def test_parameters_must_match_prompts() -> None:
    with pytest.raises(ConfigError, match="found: 2 for 1 prompts"):
        engine().generate(["a"], [SamplingParams(), SamplingParams()])


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": 1e-9},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": -1},
        {"seed": 1 << 64},
        {"stop": "x"},
        {"stop": ("",)},
        {"priority": 0.5},
    ],
    ids=str,
)
def test_senseless_parameters_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong)).replace("seed", "a seed")):
        SamplingParams(**wrong)  # type: ignore[arg-type]


# Scoring


def expected_scores(doc: list[int]) -> np.ndarray:
    if len(doc) < 2:
        return np.empty(0, dtype=np.float32)
    logits = np.stack([toy_logits(doc[:i]) for i in range(1, len(doc))])
    return log_probabilities(logits, np.array(doc[1:]))


@pytest.mark.parametrize("step_tokens", [1, 3, 16, 512])
def test_scores_are_those_of_each_document_alone(step_tokens: int) -> None:
    rng = np.random.default_rng(0)
    docs = [rng.integers(0, 256, n).tolist() for n in (5, 0, 1, 2, 17, 3, 33, 4, 16, 17)]
    runner = ToyRunner(num_pages=9, page_size=4)
    done: list[tuple[int, int]] = []
    scores = score_documents(runner, docs, step_tokens, progress=lambda a, b: done.append((a, b)))
    assert len(scores) == len(docs)
    for doc, got in zip(docs, scores, strict=True):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, expected_scores(doc))
    assert all(tokens <= step_tokens for _, tokens in runner.steps)
    assert done == [(i + 1, len(docs)) for i in range(len(docs))]


def test_short_documents_share_steps() -> None:
    runner = ToyRunner(num_pages=64, page_size=4)
    score_documents(runner, [[1] * 11] * 10, step_tokens=40)
    assert runner.steps == [(4, 40), (4, 40), (2, 20)]


def test_documents_that_cannot_be_scored_are_refused_before_work() -> None:
    runner = ToyRunner(num_pages=4, page_size=4)
    with pytest.raises(ConfigError, match=r"must fit into 17 tokens.*document 1 with 18 tokens"):
        score_documents(runner, [[1, 2], [1] * 18])
    with pytest.raises(ConfigError, match="between 0 and 256; found: document 0 with 3 to 300"):
        score_documents(runner, [[3, 300]])
    with pytest.raises(ConfigError, match="1 to 512 tokens; found: 0"):
        score_documents(runner, [[1, 2]], step_tokens=0)
    assert runner.steps == []
    score_documents(runner, [[1] * 17])


def test_engine_scores_between_requests_only() -> None:
    e = engine(num_pages=8)
    prompt = list(range(12))
    before = e.generate([prompt], SamplingParams(max_tokens=3))[0]
    np.testing.assert_array_equal(e.score_documents([[9] * 20])[0], expected_scores([9] * 20))
    after = e.generate([prompt], SamplingParams(max_tokens=3))[0]
    assert after.token_ids == before.token_ids
    assert after.reused_tokens == 0, "scoring overwrote the pages"
    e.add_request(prompt)
    with pytest.raises(ConfigError, match="no request may be under way; found: 1 requests"):
        e.score_documents([[1, 2]])
