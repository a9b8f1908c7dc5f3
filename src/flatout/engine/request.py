"""What a caller asks for and gets back, and how tokens become text while they arrive."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

from flatout.engine.scheduler import Sequence
from flatout.errors import ConfigError

MAX_STOP_CHARACTERS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How an answer is drawn, when it ends, and how urgent it is.

    max_tokens: most new tokens; an answer also ends when prompt and answer fill the context. temperature: 0
    is greedy. top_k: 0 keeps all tokens. seed: the same prompt, parameters and seed give the same tokens in
    any batch. stop: strings that end the answer and are not part of it. ignore_eos: run on to max_tokens.
    priority: the lower number is served first, among equals who came first; it changes no token
    (`scheduler`).
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    priority: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError("max_tokens must be at least 1", str(self.max_tokens), "max_tokens=256")
        if self.temperature != 0 and not 0.01 <= self.temperature <= 100:
            raise ConfigError(
                "temperature is 0 (greedy) or between 0.01 and 100", str(self.temperature), "temperature=0.8"
            )
        if not 0 <= self.top_k < 1 << 31:
            raise ConfigError("top_k is 0 (all tokens) or positive", str(self.top_k), "top_k=40")
        if not 0 < self.top_p <= 1:
            raise ConfigError("top_p is above 0 and at most 1", str(self.top_p), "top_p=0.95")
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError("a seed is an unsigned 64-bit number", str(self.seed), "seed=0")
        if not isinstance(self.priority, int):
            raise ConfigError("a priority is a whole number", repr(self.priority), "priority=0")
        if isinstance(self.stop, str) or not all(0 < len(s) <= MAX_STOP_CHARACTERS for s in self.stop):
            raise ConfigError(
                f"stop is a tuple of strings of 1 to {MAX_STOP_CHARACTERS} characters",
                repr(self.stop),
                'stop=("\\n\\n",)',
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished answer.

    token_ids: every new token, the end-of-sequence token included; text has neither that nor a stop string.
    finish_reason: "stop" (end of sequence or stop string), "length" or "cancelled". prompt_tokens counts the
    whole prompt, reused_tokens those of it taken from cached pages. first_token_s: from the request to its
    first token; decode_s: from the first token to the last.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    reused_tokens: int
    first_token_s: float
    decode_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """Decoding speed: tokens after the first over the time they took. None for fewer than two tokens."""
        count = len(self.token_ids) - 1
        return count / self.decode_s if count > 0 and self.decode_s > 0 else None


@dataclass(frozen=True, slots=True)
class Output:
    """What one step added to one request: text that will not change any more, and the Result with the last of
    it."""

    id: int
    text: str
    result: Result | None = None


class TokenStream(Protocol):
    """Turns tokens into text one at a time; `Tokenizer.stream()` makes one."""

    def push(self, token: int) -> str:
        """Text that `token` completes; "" while a character is still incomplete."""
        ...

    def finish(self) -> str:
        """Whatever is left at the end of the answer."""
        ...


class StopFinder:
    """Cuts a stream of text before the first stop string, wherever the pieces are split.

    Text that could be the beginning of a stop string is held back until that is decided.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Text that is now certain. Sets `found` once a stop string is complete."""
        if not self._stop or not piece:
            return piece
        text = self._held + piece
        # The match that is complete first ends the answer; of several, the one that begins first.
        ends = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        if ends:
            self.found = True
            self._held = ""
            return text[: min(at for end, at in ends if end == min(ends)[0])]
        keep = max(_overlap(text, s) for s in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text held back, when no stop string came of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


@dataclass(slots=True, eq=False)
class Request:
    """One request on its way through the engine: its sequence, its text so far, and where its outputs go."""

    sequence: Sequence
    stream: TokenStream
    stops: StopFinder
    sink: list[Output] | None = None  # None: handed out by Engine.step
    pieces: list[str] = field(default_factory=list)
    created: float = field(default_factory=time.perf_counter)
    first_token: float = 0.0
    last_token: float = 0.0

    def take(self, token: int, now: float) -> str:
        """Text certain after `token`, which the sequence has just been given."""
        if not self.first_token:
            self.first_token = now
        self.last_token = now
        if token in self.sequence.stop_ids:
            return ""
        text = self.stops.push(self.stream.push(token))
        if text:
            self.pieces.append(text)
        return text

    def close(self) -> tuple[str, Result]:
        """The last text and the Result of a sequence that has finished."""
        tail = ""
        if not self.stops.found:
            tail = self.stops.push(self.stream.finish())
            if not self.stops.found:
                tail += self.stops.finish()
            self.pieces.append(tail)
        sequence = self.sequence
        result = Result(
            text="".join(self.pieces),
            token_ids=sequence.tokens[sequence.prompt_length :],
            finish_reason="stop" if self.stops.found else sequence.finish_reason or "cancelled",
            prompt_tokens=sequence.prompt_length,
            reused_tokens=sequence.reused,
            first_token_s=self.first_token - self.created if self.first_token else 0.0,
            decode_s=self.last_token - self.first_token,
        )
        return tail, result
