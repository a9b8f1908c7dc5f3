"""Distillation: a student learns the predictions of a teacher, which say more than the text does.

    logits   T^2 KL(teacher || student) of both softened by the temperature T (Hinton et al., 2015, arXiv
             1503.02531). With top_k, of the teacher's k likeliest tokens and all others as one: a lower bound
             of the whole, and no gradient that tells the others apart
    hidden   mean over layers of |h_s - h_t|^2 / mean |h_t|^2 (FitNets: Romero et al., 2015, arXiv 1412.6550)
    text     the usual cross-entropy

Forward KL covers all that the teacher finds likely; it is zero exactly where the student is the teacher, so
its value is a loss in nats that can be compared with what rounding costs.

Legend: M positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from flatout.errors import ConfigError
from flatout.train.data import IGNORED, Batch
from flatout.train.trainable import Trainable

Objective = Callable[[Trainable, Batch], Tensor]
"""objective(model, batch) -> the loss summed over the positions of the batch that predict something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """Weights of the three terms, the temperature of the logits' and top_k (0 = the whole vocabulary).

    layers: the teacher's layer, counted from 0, whose states each of the student's layers follows; needed
    where hidden > 0.
    """

    logits: float = 1.0
    hidden: float = 0.0
    text: float = 0.0
    temperature: float = 1.0
    top_k: int = 0
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if min(self.logits, self.hidden, self.text) < 0 or self.logits + self.hidden + self.text <= 0:
            raise ConfigError(
                "weights of a distillation are not negative and not all zero",
                f"{self.logits}, {self.hidden}, {self.text}",
                "logits=1.0",
            )
        if not self.temperature > 0 or self.top_k < 0:
            raise ConfigError(
                "the temperature is positive and top_k not negative",
                f"{self.temperature} and {self.top_k}",
                "temperature=1.0, top_k=0",
            )


def text_loss(model: Trainable, batch: Batch) -> Tensor:
    """Cross-entropy of the next token, summed: the objective of training without a teacher."""
    hidden, _ = model.hidden(batch)
    return _cross_entropy(model.logits(hidden), batch)


def _cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    return cross_entropy(logits.float(), batch.targets.reshape(-1), ignore_index=IGNORED, reduction="sum")


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, top_k: int = 0) -> Tensor:
    """T^2 KL(teacher || student) in nats at each of M positions, float32 (M,), of logits (M, V)."""
    q = log_softmax(student.float() / temperature, dim=-1)
    p = log_softmax(teacher.float() / temperature, dim=-1)
    if 0 < top_k < p.shape[-1]:
        p, likely = p.topk(top_k, dim=-1)
        q = q.gather(-1, likely)
        p, q = (torch.cat([x, _rest(x)], dim=-1) for x in (p, q))
    return temperature**2 * (p.exp() * (p - q)).sum(dim=-1)


def _rest(log_p: Tensor) -> Tensor:
    """log(1 - sum of exp(log_p)), (M, 1); at least the rounding error of a float32 sum."""
    return torch.log((1 - log_p.exp().sum(dim=-1, keepdim=True)).clamp(min=1e-7))


def distillation(teacher: Trainable, config: Distillation) -> Objective:
    """The objective of following `teacher`. Raises ConfigError where `layers` do not fit."""
    if config.hidden and (
        not config.layers or not all(0 <= layer < teacher.spec.num_layers for layer in config.layers)
    ):
        raise ConfigError(
            f"layers name one of the teacher's {teacher.spec.num_layers} for each of the student's",
            str(config.layers),
            "layers=tuple(range(n))",
        )

    def loss(model: Trainable, batch: Batch) -> Tensor:
        followed = range(model.spec.num_layers) if config.hidden else ()
        if config.hidden and len(config.layers) != len(followed):
            raise ConfigError(
                f"layers name one for each of the student's {len(followed)}", str(config.layers), "as many"
            )
        predicts = batch.targets.reshape(-1) != IGNORED
        with torch.no_grad():
            seen, states = teacher.hidden(batch, config.layers if config.hidden else ())
            target = teacher.logits(seen) if config.logits else None
        hidden, own = model.hidden(batch, followed)
        logits = model.logits(hidden) if config.logits or config.text else None
        total = torch.zeros((), device=batch.tokens.device)
        if logits is not None and target is not None:
            each = divergence(logits, target, config.temperature, config.top_k)
            total = total + config.logits * (each * predicts).sum()
        if logits is not None and config.text:
            total = total + config.text * _cross_entropy(logits, batch)
        if config.hidden:
            by_layer = dict(zip(sorted(set(config.layers)), states, strict=True))
            pairs = [(mine, by_layer[layer]) for mine, layer in zip(own, config.layers, strict=True)]
            errors = [_relative_error(mine.float(), theirs.float(), predicts) for mine, theirs in pairs]
            total = total + config.hidden * torch.stack(errors).mean()
        return total

    return loss


def _relative_error(student: Tensor, teacher: Tensor, predicts: Tensor) -> Tensor:
    """|h_s - h_t|^2 of (M, D) over the mean of |h_t|^2, summed over positions that predict something."""
    scale = (teacher.square().mean(dim=1) * predicts).sum() / predicts.sum().clamp(min=1)
    return ((student - teacher).square().mean(dim=1) * predicts).sum() / scale
