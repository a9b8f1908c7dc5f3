"""`flatout run MODEL [PROMPT]`: one answer on stdout, or a conversation when no prompt is given."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer

from flatout.cli.output import aligned, log, print_json
from flatout.core.sources import cache_dir
from flatout.engine.engine import Engine
from flatout.engine.load import load
from flatout.engine.request import Result, SamplingParams
from flatout.errors import ConfigError, FlatoutError

HELP = """\
/reset  forget the conversation
/stats  tokens, speed and cache
/quit   leave (so does Ctrl-D)
Ctrl-C  stop the answer"""

# What a terminal would obey instead of showing: control characters but tab and newline.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


def run(
    model: Annotated[str, typer.Argument(help="Artifact, checkpoint folder, GGUF file, or built-in name.")],
    prompt: Annotated[
        str | None, typer.Argument(help="A question; - reads it from stdin; none starts a conversation.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from this many likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Same seed, same answer.")] = 0,
    threads: Annotated[int | None, typer.Option(help="Threads; all cores by default.")] = None,
    runner: Annotated[str, typer.Option(help="auto, cpu, cuda (GPU) or reference.")] = "auto",
    speculate: Annotated[
        str, typer.Option(help="ngram or draft guesses tokens ahead, off none; auto guesses where exact.")
    ] = "auto",
    draft: Annotated[
        str | None, typer.Option(help="A cheaper model of the same vocabulary that guesses where that pays.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="GPUs that share the model, with --runner cuda.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object: text, tokens_per_s.")] = False,
) -> None:
    """Generate text with an artifact or a checkpoint, or talk when no prompt is given."""
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    if as_json and prompt is None:
        raise ConfigError(
            "--json prints one answer, so it needs a prompt", "none", 'flatout run MODEL "Hello"'
        )
    engine = load(model, runner=runner, threads=threads, speculate=speculate, draft=draft, gpus=gpus)
    if prompt is None:
        log(f"{model} on {engine.runner.name}; /help lists commands")
        with _history():
            Chat(engine, params).loop()
        return
    result = _one_answer(engine, sys.stdin.read() if prompt == "-" else prompt, params, as_json)
    if as_json:
        print_json(_record(model, engine, result))
    else:
        log(_summary(result))


def _one_answer(engine: Engine, prompt: str, params: SamplingParams, quiet: bool) -> Result:
    if engine.tokenizer.chat_template is None:
        log("the model has no chat template: it continues the prompt as plain text")
        request = engine.add_request(prompt, params)
    else:
        request = engine.add_request(engine.chat_prompt([{"role": "user", "content": prompt}]), params)
    result = _follow(engine, request, _nowhere if quiet else _write)
    if not quiet:
        _write("\n")
    return result


def _follow(
    engine: Engine,
    request: int,
    write: Callable[[str], None],
    interrupted: Callable[[], bool] = lambda: False,
) -> Result:
    """Step until the request ends, writing its text as it comes; cancels it once `interrupted`."""
    while True:
        if interrupted():
            engine.cancel(request)
        for output in engine.step():
            write(output.text)
            if output.result is not None:
                return output.result


class Chat:
    """A conversation at the terminal. Answers go to `write`, everything else to stderr. `read` is like
    input()."""

    def __init__(
        self,
        engine: Engine,
        params: SamplingParams,
        read: Callable[[str], str] = input,
        write: Callable[[str], None] | None = None,
    ) -> None:
        if engine.tokenizer.chat_template is None:
            raise ConfigError(
                "a conversation needs a model with a chat template",
                "none",
                "a prompt, which it will continue",
            )
        self._engine, self._params, self._read = engine, params, read
        self._write = write or _write
        self._messages: list[dict[str, str]] = []
        self._last: Result | None = None

    def loop(self) -> None:
        """Read and answer until /quit or the end of input."""
        mark = "> " if sys.stdin.isatty() else ""
        while True:
            try:
                line = self._read(mark).strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                log("\n/quit or Ctrl-D leaves")
                continue
            if line == "/quit":
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)

    def _command(self, line: str) -> None:
        if line == "/reset":
            self._messages.clear()
            log("the conversation starts anew")
        elif line == "/stats":
            log(self._stats())
        elif line == "/help":
            log(HELP)
        else:
            log(f"no command {line}\n{HELP}")

    def _answer(self, line: str) -> None:
        self._messages.append({"role": "user", "content": line})
        try:
            # The prompt repeats the conversation; what is in the KV cache already is not computed again.
            request = self._engine.add_request(self._engine.chat_prompt(self._messages), self._params)
        except FlatoutError as error:
            self._messages.pop()
            log(f"{error}; /reset starts a new conversation")
            return
        with _interruptible() as interrupted:
            result = _follow(self._engine, request, self._write, interrupted)
        self._write("\n")
        log(_summary(result))
        self._messages.append({"role": "assistant", "content": result.text})
        self._last = result

    def _stats(self) -> str:
        stats, last = self._engine.stats(), self._last
        rows = [["runner", self._engine.runner.name], ["messages", str(len(self._messages))]]
        if last is not None:
            context = last.prompt_tokens + len(last.token_ids)
            rows += [
                ["context", f"{context} of {self._engine.scheduler.capacity} tokens"],
                ["last answer", _summary(last)],
            ]
        rows += [
            ["computed", f"{stats.tokens_computed} tokens in {stats.steps} steps"],
            ["reused", f"{stats.tokens_reused} tokens"],
            ["guessed", f"{stats.tokens_accepted} of {stats.tokens_drafted} tokens right"],
        ]
        return aligned(rows, right=False)


def _summary(result: Result) -> str:
    """ "23 tokens, 310 tokens/s, first after 45 ms, 64 of 80 prompt tokens reused"."""
    parts = [f"{len(result.token_ids)} tokens"]
    if result.tokens_per_s is not None:
        parts.append(f"{result.tokens_per_s:.0f} tokens/s")
    parts.append(f"first after {result.first_token_s * 1e3:.0f} ms")
    if result.reused_tokens:
        parts.append(f"{result.reused_tokens} of {result.prompt_tokens} prompt tokens reused")
    if result.finish_reason == "length":
        parts.append("cut at the most tokens allowed")
    if result.finish_reason == "cancelled":
        parts.append("interrupted")
    return ", ".join(parts)


def _record(model: str, engine: Engine, result: Result) -> dict[str, object]:
    """The JSON of the command contract."""
    stats = engine.stats()
    return {
        "model": model,
        "runner": engine.runner.name,
        "text": result.text,
        "finish_reason": result.finish_reason,
        "tokens": len(result.token_ids),
        "prompt_tokens": result.prompt_tokens,
        "first_token_s": result.first_token_s,
        "decode_s": result.decode_s,
        "tokens_per_s": result.tokens_per_s,
        "speculation": {
            "steps": stats.drafted_steps,
            "proposed": stats.tokens_drafted,
            "accepted": stats.tokens_accepted,
        },
    }


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets a flag that is looked at between steps, so that no step is left half-done."""
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _history() -> Iterator[None]:
    """Line editing with the lines of earlier conversations, at a terminal that has it."""
    if not sys.stdin.isatty():
        yield
        return
    try:
        import readline
    except ImportError:  # Python without line editing: plain input() remains
        yield
        return
    path = cache_dir() / "run_history"
    try:
        path.touch(mode=0o600)  # what people ask is theirs
        readline.read_history_file(path)
    except OSError as error:
        log(f"the history was not read: {error}")
    readline.set_history_length(1000)
    try:
        yield
    finally:
        try:
            readline.write_history_file(path)
        except OSError as error:
            log(f"the history was not saved: {error}")


def _write(text: str) -> None:
    if not text:
        return
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a terminal without some character shows a question mark
    sys.stdout.write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _nowhere(text: str) -> None:
    """Quiet."""
