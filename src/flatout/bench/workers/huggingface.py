"""transformers as a peer: bfloat16, eager mode, in flatout's own environment."""

from __future__ import annotations

from flatout.core.checkpoint import open_checkpoint
from flatout.verify.baseline import TransformersBaseline


class Peer:
    """See `serve`."""

    def load(self, path: str, threads: int) -> dict[str, object]:
        import torch
        import transformers

        checkpoint = open_checkpoint(path)
        self._baseline = TransformersBaseline(checkpoint, threads)
        return {
            "vocab_size": checkpoint.spec.vocab_size,
            "version": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "details": f"eager, {torch.backends.cpu.get_cpu_capability()}",
        }

    def first(self, prompt: list[int]) -> bool:
        self._baseline.prefill([prompt])
        return True

    def prefill(self, prompts: list[list[int]]) -> float:
        return self._baseline.prefill(prompts)

    def decode(self, prompts: list[list[int]], tokens: int) -> float:
        return self._baseline.decode(prompts, tokens)

    def score(self, document: list[int]) -> list[float]:
        return self._baseline.score(document)
