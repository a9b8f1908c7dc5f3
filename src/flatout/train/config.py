"""TrainConfig: how long, how fast and on what a model is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flatout.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One run. A step takes `rows` rows of `length` tokens, `together` of them at a time.

    The learning rate climbs to `learning_rate` in `warmup` steps and falls along half a cosine to `final`
    of it. weight_decay acts on matrices only. clip: largest norm of the gradient. precision: "bf16"
    multiplies in bfloat16, parameters and their sums stay float32. device: "cpu", "cuda" or "auto". The state
    is saved, held-out text is judged and a line is logged every so many steps, and after the last.
    """

    steps: int
    rows: int = 8
    length: int = 512
    together: int = 0  # rows at a time, 0 = all
    learning_rate: float = 1e-3
    warmup: int = 0
    final: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    precision: str = "bf16"
    device: str = "auto"
    seed: int = 0
    save_every: int = 500
    judge_every: int = 500
    log_every: int = 1

    def __post_init__(self) -> None:
        def need(holds: bool, rule: str, names: str, remedy: str) -> None:
            if not holds:
                found = ", ".join(f"{name}={getattr(self, name)!r}" for name in names.split())
                raise ConfigError(rule, found, remedy)

        for name in ("steps", "rows", "length", "save_every", "judge_every", "log_every"):
            need(getattr(self, name) >= 1, f"{name} must be at least 1", name, f"{name}=1")
        divides = self.together >= 0 and self.rows % (self.together or self.rows) == 0
        need(divides, "together must divide rows", "together rows", "together=1, or 0 for all")
        for name, usual in (("learning_rate", 1e-3), ("clip", 1.0)):
            need(0 < getattr(self, name) < math.inf, f"{name} is positive", name, f"{name}={usual}")
        need(0 <= self.final <= 1, "final lies between 0 and 1", "final", "final=0.1")
        need(0 <= self.warmup <= self.steps, "warmup lies between 0 and steps", "warmup steps", "warmup=0")
        need(self.weight_decay >= 0, "weight_decay is not negative", "weight_decay", "weight_decay=0.1")
        need(self.precision in ("bf16", "fp32"), "the precision is bf16 or fp32", "precision", "bf16")
        need(self.device in ("auto", "cpu", "cuda"), "the device is auto, cpu or cuda", "device", "auto")

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1..."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done)))
