"""What drafts from the prompt gain on the GPU, for benchmarks/gpu_engine.py: a model that edits its prompt.

No trained model of that size is at hand, so the answer is planted: the layers' outputs are made small beside
the embedding, and row b of the head becomes the embedding of a wherever b is to follow a. The model then says
one text, that of the prompt in which every EDITED-th token differs from it, as an edit of code or a summary
that quotes does; every layer is computed as always. Tokens are all different, so lookup finds its place again
two tokens after an edit, and never by chance.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from flatout.engine.request import SamplingParams
from flatout.hardware.meter import Meter, nvml_counters

EDITED = 16
_QUIET = 1 / 64  # what the layers' outputs are multiplied by


def plant(bench: Any, prompt: int) -> tuple[list[int], list[int]]:
    """(prompt, answer) of a model in bf16, whose weights are changed for good."""
    ids = np.random.default_rng(0).permutation(bench.spec.vocab_size)[: 2 * prompt].tolist()
    question, answer = ids[:prompt], ids[:prompt]
    answer[::EDITED] = ids[prompt:][: len(answer[::EDITED])]
    question.append(ids[-1])
    for layer in bench.weights.layers:
        for weight in (layer.o, layer.down):
            weight.words.view(torch.bfloat16).mul_(_QUIET)
    said = torch.tensor([question[-1], *answer], device=bench.weights.embedding.device)
    bench.weights.head.words.view(torch.bfloat16)[said[1:]] = bench.weights.embedding[said[:-1]]
    return question, answer


def measure(bench: Any, prompt: int) -> dict[str, Any]:
    """The row: seconds a token with drafts, and what comes without. Raises SystemExit when either answer is
    not the one that the model says."""
    question, answer = plant(bench, prompt)
    answer = answer[: prompt // 2]
    params = SamplingParams(max_tokens=len(answer), ignore_eos=True)
    rates: dict[str, float] = {}
    for name in ("plain", "drafted"):
        engine = bench.engine(1, 2 * prompt, drafts=name == "drafted")
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
        "edited": f"one token of {EDITED}",
        "steps": after.steps - before.steps,
        "drafted_steps": after.drafted_steps - before.drafted_steps,
        "proposed": after.tokens_drafted - before.tokens_drafted,
        "accepted": after.tokens_accepted - before.tokens_accepted,
    }
