"""What drafts gain on the GPU, for benchmarks/gpu_engine.py: a model that edits its prompt, and one for which
a smaller model guesses.

No trained models of that size are at hand, so the answer is planted: the layers' outputs are made small
beside the embedding, and row b of the head becomes the embedding of a wherever b is to follow a. The model
then says one text, and every layer is computed as always. Tokens are all different, so lookup finds its place
again two tokens after an edit, and never by chance.

Lookup: the text is that of the prompt in which every EDITED-th token differs from it, as an edit of code or a
summary that quotes does. Draft model: the text has no token of the prompt, and the model that guesses says
the same text, but is wrong about one token of MISTAKEN, drawn at random (evenly spaced, mistakes and drafts
fall into step, and all guesses come true).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from flatout.engine.cuda_decode import UNSETTLED
from flatout.engine.draft import DraftProposer
from flatout.engine.request import SamplingParams
from flatout.engine.speculate import NgramProposer, Speculator
from flatout.hardware.meter import Meter, nvml_counters

EDITED = 16
MISTAKEN = 8
_QUIET = 1 / 64  # what the layers' outputs are multiplied by


def texts(vocabulary: int, prompt: int, repeats: bool) -> tuple[list[int], list[int]]:
    """(prompt, answer), of different tokens each; `repeats`: the answer is an edit of the prompt."""
    ids = np.random.default_rng(0).permutation(vocabulary)[: 2 * prompt + 1].tolist()
    question, answer = ids[:prompt], ids[prompt : 2 * prompt]
    if repeats:
        answer = ids[:prompt]
        answer[::EDITED] = ids[prompt:][: len(answer[::EDITED])]
    return [*question, ids[-1]], answer


def plant(bench: Any, text: list[int]) -> None:
    """Have a model in bf16 say each token of `text` after the one before it, for good."""
    for layer in bench.weights.layers:
        for weight in (layer.o, layer.down):
            weight.words.view(torch.bfloat16).mul_(_QUIET)
    said = torch.tensor(text, device=bench.weights.embedding.device)
    bench.weights.head.words.view(torch.bfloat16)[said[1:]] = bench.weights.embedding[said[:-1]]


def measure(bench: Any, prompt: int, drafting: Any = None) -> dict[str, Any]:
    """The row: seconds a token with drafts, and what comes without. drafting: a Bench of the model that
    guesses; None looks up. Raises SystemExit when an answer is not the one that the model says."""
    question, answer = texts(bench.spec.vocab_size, prompt, repeats=drafting is None)
    text = [question[-1], *answer]
    plant(bench, text)
    proposer = None
    if drafting is not None:
        plant(drafting, text)
        wrong = np.array(text)[np.random.default_rng(1).random(len(text)) < 1 / MISTAKEN].tolist()
        drafting.weights.head.words.view(torch.bfloat16)[wrong] = 0
        proposer = DraftProposer(drafting.runner(1, 2 * prompt), UNSETTLED)
    answer = answer[: prompt // 2]
    params = SamplingParams(max_tokens=len(answer), ignore_eos=True)
    rates: dict[str, float] = {}
    speculator = Speculator(NgramProposer(), proposer, UNSETTLED)
    for name, guesses in (("plain", None), ("drafted", speculator)):
        engine = bench.engine(1, 2 * prompt, guesses)
        for again in (False, True):  # the first answer compiles, captures, and learns what steps cost
            meter, begin, first = Meter(nvml_counters()), 0.0, 0
            before = engine.stats()
            engine.add_request(question, params)
            tokens: list[int] = []
            while engine.has_work:
                for output in engine.step():
                    if output.result is not None:
                        tokens = list(output.result.token_ids)
                running = engine.scheduler.running
                if not begin and running and len(running[0].tokens) > len(question):
                    begin, first = time.perf_counter(), len(running[0].tokens) - len(question)
                    meter.start()
            seconds, energy = time.perf_counter() - begin, meter.stop()
            if tokens != answer:
                raise SystemExit(f"drafts: the {name} answer is not the one that the model says")
            if again:
                rates[name] = (len(answer) - first) / seconds
    after = engine.stats()
    joules = {name: used / (len(answer) - first) for name, used in energy.joules.items()}
    row: dict[str, Any] = bench.row(
        [1 / rates["drafted"]], 1, bench.decode_floor(1, prompt + len(answer) / 2), joules, energy.missing
    )
    return row | {
        "plain_tokens_per_s": rates["plain"],
        "gain": rates["drafted"] / rates["plain"],
        "wrong": f"one token of {EDITED if drafting is None else MISTAKEN}",
        "steps": after.steps - before.steps,
        "drafted_steps": after.drafted_steps - before.drafted_steps,
        "proposed": after.tokens_drafted - before.tokens_drafted,
        "accepted": after.tokens_accepted - before.tokens_accepted,
    }
