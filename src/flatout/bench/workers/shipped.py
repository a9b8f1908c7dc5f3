"""flatout itself in a fresh process, as `flatout run` loads and asks it: `load()`, then a request."""

from __future__ import annotations

import flatout
from flatout.engine.load import load
from flatout.engine.request import SamplingParams


class Peer:
    """See `serve`. The speeds of loaded models are measured in the benchmark's own process."""

    def load(self, path: str, threads: int) -> dict[str, object]:
        self._engine = load(path, runner="cpu", threads=threads)
        return {
            "vocab_size": self._engine.runner.spec.vocab_size,
            "version": f"flatout {flatout.__version__}",
            "details": self._engine.runner.name,
        }

    def first(self, prompt: list[int]) -> bool:
        self._engine.generate([prompt], SamplingParams(max_tokens=1, ignore_eos=True))
        return True
