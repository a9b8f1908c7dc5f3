"""CTranslate2 as a peer: int8 weights and 8-bit activations, the library's own greedy search.

CTranslate2 gives no step of its own to a caller: `generate_batch` takes the prompts in at once, then calls
back with every token. A prefill ends with the first of these calls, and decoding is the time from the first
token of all sequences to the last: what `Session` times, with the library's own sampling in it. The end of a
sequence is never taken. A text is scored by `forward_batch`.
"""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from . import greedy


class Peer:
    """See `serve`."""

    def __init__(self) -> None:
        # By name: the package is in this peer's environment only.
        self._library: Any = importlib.import_module("ctranslate2")

    def convert(self, source: str, target: str, threads: int, quantization: str) -> bool:
        """Convert the transformers folder `source` to the folder `target`."""
        converters: Any = importlib.import_module("ctranslate2.converters")
        converters.TransformersConverter(source).convert(target, quantization=quantization)
        return True

    def load(self, path: str, threads: int) -> dict[str, object]:
        self._generator = self._library.Generator(
            path, device="cpu", compute_type="int8", inter_threads=1, intra_threads=threads
        )
        # A search is asked for by words; ids are looked up in the list of those that the converter wrote.
        self._words: list[str] = json.loads((Path(path) / "vocabulary.json").read_text(encoding="utf-8"))
        return {
            "vocab_size": len(self._words),
            "version": f"ctranslate2 {self._library.__version__}",
            "details": f"{self._generator.compute_type}, float32 KV cache, greedy search",
        }

    def first(self, prompt: list[int]) -> bool:
        return len(self._arrivals([prompt], 1)) == 1

    def prefill(self, prompts: list[list[int]]) -> float:
        start = time.perf_counter()
        return self._arrivals(prompts, 1)[-1] - start

    def decode(self, prompts: list[list[int]], tokens: int) -> float:
        """Of tokens + 1 a sequence the first comes with the prefill."""
        arrivals = self._arrivals(prompts, tokens + 1)
        return arrivals[-1] - arrivals[len(prompts) - 1]

    def score(self, document: list[int]) -> list[float]:
        logits = self._generator.forward_batch([document[:-1]])
        return greedy.log_probabilities(np.asarray(logits)[0], np.array(document[1:]))

    def _arrivals(self, prompts: list[list[int]], tokens: int) -> list[float]:
        """When each token of a greedy search came, all sequences in step."""
        found: list[float] = []

        def came(step: object) -> bool:
            found.append(time.perf_counter())
            return False  # go on

        self._generator.generate_batch(
            [[self._words[token] for token in prompt] for prompt in prompts],
            min_length=tokens,
            max_length=tokens,
            include_prompt_in_result=False,
            callback=came,
        )
        if len(found) != len(prompts) * tokens:
            raise RuntimeError(
                f"{len(prompts)} sequences of {tokens} tokens must come, not {len(found)} tokens"
            )
        return found
