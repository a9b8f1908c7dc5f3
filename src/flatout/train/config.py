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
        for name in ("steps", "rows", "length", "save_every", "judge_every", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1", str(getattr(self, name)), f"{name}=1")
        if self.together < 0 or self.rows % (self.together or self.rows):
            raise ConfigError(
                "together must divide rows", f"{self.together} and {self.rows}", "together=1, or 0 for all"
            )
        if not self.learning_rate > 0 or not self.clip > 0 or not 0 <= self.final <= 1:
            raise ConfigError(
                "learning_rate and clip are positive, and final lies between 0 and 1",
                f"{self.learning_rate}, {self.clip} and {self.final}",
                "learning_rate=1e-3, clip=1.0, final=0.1",
            )
        if not 0 <= self.warmup <= self.steps or self.weight_decay < 0:
            raise ConfigError(
                "warmup lies between 0 and steps, and weight_decay is not negative",
                f"{self.warmup} of {self.steps}, {self.weight_decay}",
                "warmup=0",
            )
        if self.precision not in ("bf16", "fp32"):
            raise ConfigError("the precision is bf16 or fp32", repr(self.precision), "bf16")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError("the device is auto, cpu or cuda", repr(self.device), "auto")

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1..."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done)))
