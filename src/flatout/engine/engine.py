"""Engine: prompts in, text out, over any runner.

One request goes: `add_request` (text -> tokens, checked) -> scheduler (pages, batch) -> runner (one step,
sampled) -> `Request.take` (token -> text, stop strings) -> Output. `generate` and `stream` drive the steps
themselves; a server calls `step` in a loop on one thread, and `add_request` and `cancel` from any thread.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as List
from typing import Protocol

import numpy as np

from flatout.engine import score
from flatout.engine.request import Output, Request, Result, SamplingParams, StopFinder, TokenStream
from flatout.engine.runner import Runner
from flatout.engine.scheduler import Scheduler, SchedulerStats, Sequence
from flatout.engine.score import score_documents
from flatout.engine.speculate import Speculator
from flatout.errors import ConfigError

__all__ = ["Engine", "Prompt", "SamplingParams", "score_documents"]

Prompt = str | List[int]
"""Text, or token ids."""


class TextCodec(Protocol):
    """What the engine needs of a core.tokenizer.Tokenizer."""

    @property
    def eos(self) -> int | None: ...

    @property
    def adds_bos(self) -> bool: ...

    @property
    def chat_template(self) -> str | None: ...

    def encode(self, text: str, add_bos: bool = False) -> list[int]: ...

    def stream(self) -> TokenStream: ...

    def apply_chat_template(self, messages: List[Mapping[str, str]]) -> str: ...


class Engine:
    """Serves requests from one runner. Prompts of the same beginning share its KV cache pages.

    max_batch: most sequences in a step. max_step_tokens: most tokens in a step, prompt chunks included; by
    default the runner's most. speculator: guesses tokens and has several judged in a step, for the same
    answers; None decodes one by one.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: TextCodec,
        *,
        max_batch: int = 32,
        max_step_tokens: int | None = None,
        prefix_reuse: bool = True,
        speculator: Speculator | None = None,
    ) -> None:
        if max_step_tokens is None:
            max_step_tokens = runner.max_step_tokens
        if max_step_tokens > runner.max_step_tokens:
            raise ConfigError(
                f"a step of this runner has at most {runner.max_step_tokens} tokens",
                f"max_step_tokens {max_step_tokens}",
                f"max_step_tokens={runner.max_step_tokens}",
            )
        self.runner = runner
        self.speculator = speculator
        self.tokenizer = tokenizer
        self.scheduler = Scheduler(
            num_pages=runner.num_pages,
            page_size=runner.page_size,
            max_positions=runner.spec.max_positions,
            max_batch=max_batch,
            max_step_tokens=max_step_tokens,
            prefix_reuse=prefix_reuse,
        )
        ends = {*runner.spec.eos_token_ids, tokenizer.eos}
        self._eos = frozenset(token for token in ends if token is not None)
        self._ids = itertools.count()
        self._requests: dict[int, Request] = {}
        self._outbox: list[Output] = []
        # New requests, and ids to cancel, in order. Appending to a deque is atomic, so any thread may.
        self._inbox: deque[Request | int] = deque()

    @property
    def has_work(self) -> bool:
        """Whether a call of `step` has anything to do."""
        return bool(self._requests or self._inbox or self._outbox)

    def stats(self) -> SchedulerStats:
        return self.scheduler.stats()

    def chat_prompt(self, messages: List[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation ({"role", "content"} messages) ready for the assistant's answer. Raises
        ConfigError when the model has no chat template."""
        return self.tokenizer.encode(self.tokenizer.apply_chat_template(messages))

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None) -> int:
        """Queue a prompt; its Outputs come out of `step` under the returned id. Raises ConfigError for a
        prompt that is empty, too long for the context, or holds ids outside the vocabulary."""
        return self._add(prompt, params or SamplingParams(), None).sequence.id

    def cancel(self, request_id: int) -> None:
        """End a request before the next step; it gives a last Output with the finish reason "cancelled". A
        request that has already ended, or that never was, is left alone."""
        self._inbox.append(request_id)

    def step(self) -> list[Output]:
        """Run one step and return what it added, in step order. An error of the runner leaves every request
        as it was before the step."""
        self._advance()
        outputs, self._outbox = self._outbox, []
        return outputs

    def generate(
        self,
        prompts: List[Prompt],
        params: SamplingParams | List[SamplingParams] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Result]:
        """Answers to all prompts, in their order, batched together. progress(done, total) counts prompts."""
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ConfigError(
                "give one SamplingParams for all prompts or one for each",
                f"{len(params)} for {len(prompts)} prompts",
                "a list of the same length",
            )
        sink: list[Output] = []
        requests: list[Request] = []
        results: dict[int, Result] = {}
        try:
            for prompt, one in zip(prompts, params, strict=True):
                requests.append(self._add(prompt, one, sink))
            while len(results) < len(requests):
                self._advance()
                finished = {o.id: o.result for o in sink if o.result is not None}
                results.update(finished)
                sink.clear()
                if progress is not None and finished:
                    progress(len(results), len(requests))
        finally:
            self._drop(requests)
        return [results[request.sequence.id] for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The answer's text in pieces as they become certain. Closing the iterator cancels the request."""
        sink: list[Output] = []
        request = self._add(prompt, params or SamplingParams(), sink)
        return self._stream(request, sink)

    def score_documents(
        self, docs: List[List[int]], progress: Callable[[int, int], None] | None = None
    ) -> list[np.ndarray]:
        """score.score_documents on this engine's runner. Raises ConfigError while requests are under way."""
        if self._requests or self._inbox:
            raise ConfigError(
                "scoring writes to all pages, so no request may be under way",
                f"{len(self._requests) + len(self._inbox)} requests",
                "score before or after serving",
            )
        self.scheduler.pool.forget()
        return score.score_documents(self.runner, docs, self.scheduler.max_step_tokens, progress)

    def _stream(self, request: Request, sink: list[Output]) -> Iterator[str]:
        try:
            finished = False
            while not finished:
                self._advance()
                outputs = list(sink)
                sink.clear()
                for output in outputs:
                    finished = output.result is not None
                    if output.text:
                        yield output.text
        finally:
            self._drop([request])

    def _add(self, prompt: Prompt, params: SamplingParams, sink: list[Output] | None) -> Request:
        tokenizer = self.tokenizer
        tokens = (
            tokenizer.encode(prompt, add_bos=tokenizer.adds_bos) if isinstance(prompt, str) else list(prompt)
        )
        vocabulary = self.runner.spec.vocab_size
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise ConfigError(
                f"token ids lie between 0 and {vocabulary - 1}",
                f"{min(tokens)} to {max(tokens)}",
                "the model's own tokenizer",
            )
        self.scheduler.check_prompt(len(tokens))
        sequence = Sequence(
            id=next(self._ids),
            tokens=tokens,
            limit=len(tokens) + params.max_tokens,
            stop_ids=frozenset() if params.ignore_eos else self._eos,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            seed=params.seed,
            priority=params.priority,
        )
        request = Request(sequence, tokenizer.stream(), StopFinder(params.stop), sink)
        self._inbox.append(request)
        return request

    def _take_in(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Request):
                self._requests[item.sequence.id] = item
                self.scheduler.add(item.sequence)
            elif item in self._requests:
                request = self._requests[item]
                self.scheduler.finish(request.sequence, "cancelled")
                self._deliver(request, "")

    def _advance(self) -> None:
        self._take_in()
        speculator = self.speculator
        step = self.scheduler.schedule(None if speculator is None else speculator.propose)
        if step is None:
            return
        begin = time.perf_counter()
        sampled = self.runner.sample(
            step.batch, step.temperature, step.top_k, step.top_p, step.seeds, step.rows
        )
        now = time.perf_counter()
        if speculator is not None:
            speculator.record(step, now - begin)
        for sequence, new in self.scheduler.commit(step, sampled):
            request = self._requests[sequence.id]
            text = ""
            for i in range(len(sequence.tokens) - new, len(sequence.tokens)):
                text += request.take(sequence.tokens[i], now)
                if request.stops.found:
                    del sequence.tokens[i + 1 :]  # accepted, but the answer ends before them
                    self.scheduler.finish(sequence, "stop")
                    break
            if text or sequence.finish_reason is not None:
                self._deliver(request, text)

    def _deliver(self, request: Request, text: str) -> None:
        result = None
        if request.sequence.finish_reason is not None:
            del self._requests[request.sequence.id]
            tail, result = request.close()
            text += tail
        output = Output(request.sequence.id, text, result)
        (self._outbox if request.sink is None else request.sink).append(output)

    def _drop(self, requests: List[Request]) -> None:
        """Cancel whatever of `requests` has not ended, now, without an output to anyone else."""
        live = [r for r in requests if r.sequence.finish_reason is None]
        if live:
            for request in live:
                self.cancel(request.sequence.id)
            self._take_in()
