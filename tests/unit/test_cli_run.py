"""`flatout run` over a toy engine: one answer, JSON, and conversations with commands and interruptions."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable, Iterator

import pytest
from tests.toy import ByteTokenizer, ScriptedRunner, ToyRunner, toy_spec

from flatout.cli import run as command
from flatout.cli.run import Chat, run
from flatout.engine.engine import Engine
from flatout.engine.request import SamplingParams
from flatout.errors import ConfigError

PARAMS = SamplingParams(max_tokens=20, ignore_eos=True)


def toy_engine(positions: int = 4096) -> Engine:
    return Engine(ToyRunner(256, 4, toy_spec(positions)), ByteTokenizer())


def saying(text: str, prompt: str) -> Engine:
    script = ScriptedRunner(list(text.encode()), prompt_length=len(prompt.encode()))
    return Engine(script, ByteTokenizer())


def reader(*lines: str | type[BaseException]) -> Callable[[str], str]:
    """input() that gives `lines`, raises those that are exceptions, and then is at its end."""
    left: Iterator[str | type[BaseException]] = iter(lines)

    def read(mark: str) -> str:
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def talk(engine: Engine, *lines: str | type[BaseException]) -> tuple[Chat, list[str]]:
    written: list[str] = []
    chat = Chat(engine, PARAMS, reader(*lines), written.append)
    chat.loop()
    return chat, "".join(written).split("\n")[:-1]


def test_one_answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "<user>Hi<assistant>"
    monkeypatch.setattr(command, "load", lambda *_, **__: saying("Grüße 漢", prompt))
    run("model", "Hi")
    out, err = capsys.readouterr()
    assert out == "Grüße 漢\n"
    assert err.startswith("12 tokens, ")
    assert "tokens/s, first after" in err


def test_json_is_one_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "load", lambda *_, **__: saying("yes", "<user>Hi<assistant>"))
    run("model", "Hi", as_json=True)
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert record["text"] == "yes"
    assert record["tokens"] == 4
    assert record["prompt_tokens"] == len("<user>Hi<assistant>")
    assert record["finish_reason"] == "stop"
    assert record["tokens_per_s"] > 0
    assert record["speculation"] == {"steps": 0, "proposed": 0, "accepted": 0}
    assert err == ""


def test_json_needs_a_prompt() -> None:
    with pytest.raises(ConfigError, match="--json prints one answer, so it needs a prompt"):
        run("nothing is loaded", as_json=True)


def test_prompt_from_stdin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "load", lambda *_, **__: saying("ok", "<user>from a pipe<assistant>"))
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    run("model", "-")
    assert capsys.readouterr().out == "ok\n"


def test_without_a_chat_template(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    engine = saying("more", "Once")
    monkeypatch.setattr(engine.tokenizer, "chat_template", None)
    monkeypatch.setattr(command, "load", lambda *_, **__: engine)
    run("model", "Once")
    out, err = capsys.readouterr()
    assert out == "more\n"
    assert "continues the prompt as plain text" in err
    with pytest.raises(ConfigError, match="a conversation needs a model with a chat template"):
        run("model")


def test_a_conversation_reuses_its_pages() -> None:
    engine = toy_engine()
    chat, answers = talk(engine, "hello", "  ", "and then?")
    assert len(answers) >= 2
    assert [m["role"] for m in chat._messages] == ["user", "assistant"] * 2
    assert chat._last is not None
    # Of the second prompt at least the whole first prompt, <user>hello<assistant>, is in the cache.
    assert chat._last.reused_tokens >= len("<user>hello<assistant>") // 4 * 4
    alone = Engine(ToyRunner(256, 4), ByteTokenizer(), prefix_reuse=False)
    again, _ = talk(alone, "hello", "and then?")
    assert again._messages == chat._messages


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    chat, _ = talk(toy_engine(), "/help", "/stats", "hello", "/stats", "/what", "/reset", "/quit", "never")
    err = capsys.readouterr().err
    assert "Ctrl-C  stop the answer" in err
    assert "no command /what" in err
    assert "of 1024 tokens" in err
    assert "messages     2" in err
    assert "the conversation starts anew" in err
    assert chat._messages == []


def test_ctrl_c_stops_the_answer_and_not_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    engine = toy_engine()
    written: list[str] = []

    def write(text: str) -> None:
        if text and not written:
            signal.raise_signal(signal.SIGINT)
        written.append(text)

    before = signal.getsignal(signal.SIGINT)
    chat = Chat(engine, PARAMS, reader("one", KeyboardInterrupt, "two"), write)
    chat.loop()
    assert signal.getsignal(signal.SIGINT) is before
    err = capsys.readouterr().err
    assert err.count("interrupted") == 1
    assert "/quit or Ctrl-D leaves" in err
    assert [m["role"] for m in chat._messages] == ["user", "assistant"] * 2
    assert len(chat._messages[1]["content"]) < len(chat._messages[3]["content"])
    assert engine.stats().pages_held == 0


def test_a_conversation_that_no_longer_fits_can_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    chat, answers = talk(toy_engine(positions=64), "hello", "x" * 60, "/reset", "hi")
    err = capsys.readouterr().err
    assert "must fit into 64 tokens" in err
    assert "/reset starts a new conversation" in err
    assert len(answers) >= 2
    assert chat._messages[0]["content"] == "hi"


def test_terminal_controls_are_not_obeyed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    command._write("a\x1b[2Jb\tc\n\x9bd")
    assert capsys.readouterr().out == "a[2Jb\tc\nd"
