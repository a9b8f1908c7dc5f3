"""Accuracy of an optimised model against its original on the same items, with a verdict on each task.

Items are independent draws of the task; both models answer all of them, and only those that flip count
(`verify.paired`). A loss of accuracy is judged against a margin of its own, in points of accuracy. Each task
must pass by itself at level alpha: asking for all of several needs no correction, because a false pass of
the whole needs a false pass of each (intersection-union test: Berger 1982).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flatout.engine.runner import Runner
from flatout.errors import ConfigError
from flatout.verify.certificate import check_levels
from flatout.verify.paired import FEWEST_ITEMS, PairedChange, needed_items, paired_change
from flatout.verify.quality import exp_or_inf
from flatout.verify.tasks import RULES, Answers, Encoded, Task, TaskEncoder, answer_task, encode_task

Listener = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """Both models on one task.

    rule: what counts as right. accuracy_*_plain: by plain log-probability, where the rule normalises by
    length. perplexity_*: of a cloze's continuations, exp(nats a token). lost, gained: items right under the
    original only, and under the optimised model only. low, high: one-sided bounds on the change at 1 - alpha.
    verdict: "passed" when low > -margin, "failed" when high < -margin, otherwise "cannot_decide".
    """

    task: str
    source: str
    sha256: str
    form: str
    rule: str
    n: int
    available: int
    repeated: int
    accuracy_original: float
    accuracy_optimised: float
    accuracy_original_plain: float | None
    accuracy_optimised_plain: float | None
    perplexity_original: float | None
    perplexity_optimised: float | None
    lost: int
    gained: int
    change: float
    low: float
    high: float
    mcnemar_p: float
    margin: float
    alpha: float
    verdict: str
    reason: str

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"


def encode_tasks(
    tasks: Sequence[Task],
    tokenizer: TaskEncoder,
    original: Runner,
    optimised: Runner,
    limit: int | None = None,
) -> list[tuple[Task, Encoded]]:
    """The tasks as tokens, `limit` items of each in the order of a hash. Raises ConfigError for items that do
    not fit."""
    if limit is not None and limit < 1:
        raise ConfigError("--limit leaves at least one item of each task", str(limit), "--limit 500")
    capacity = min(min(r.spec.max_positions, r.num_pages * r.page_size) for r in (original, optimised))
    return [(task, encode_task(tokenizer, task, limit, capacity)) for task in tasks]


def examine_tasks(
    tasks: Sequence[tuple[Task, Encoded]],
    original: Runner,
    optimised: Runner,
    *,
    margin: float,
    alpha: float = 0.05,
    listen: Listener,
) -> tuple[TaskResult, ...]:
    """Answer every encoded task with both models, and judge. Raises EvidenceError for broken logits."""
    check_levels(margin, alpha)
    results = []
    for task, items in tasks:
        before = answer_task(original, task, items, _progress(listen, f"{task.name}: original"))
        after = answer_task(optimised, task, items, _progress(listen, f"{task.name}: optimised"))
        results.append(_result(task, before, after, margin, alpha))
    return tuple(results)


def _progress(listen: Listener, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: listen(stage, done, total)


def _result(task: Task, before: Answers, after: Answers, margin: float, alpha: float) -> TaskResult:
    lost = int((before.right & ~after.right).sum())
    gained = int((~before.right & after.right).sum())
    n = len(before.right)
    found = paired_change(n, lost, gained, alpha)
    verdict, reason = decide(found, margin, alpha)
    cloze = task.form == "cloze"
    return TaskResult(
        task=task.name,
        source=task.source,
        sha256=task.sha256,
        form=task.form,
        rule=RULES[task.form],
        n=n,
        available=len(task.items),
        repeated=task.repeated,
        accuracy_original=float(before.right.mean()),
        accuracy_optimised=float(after.right.mean()),
        accuracy_original_plain=_mean(before.right_plain),
        accuracy_optimised_plain=_mean(after.right_plain),
        perplexity_original=exp_or_inf(before.nll / before.tokens) if cloze else None,
        perplexity_optimised=exp_or_inf(after.nll / after.tokens) if cloze else None,
        lost=lost,
        gained=gained,
        change=found.change,
        low=found.low,
        high=found.high,
        mcnemar_p=found.mcnemar_p,
        margin=margin,
        alpha=alpha,
        verdict=verdict,
        reason=reason,
    )


def _mean(values: np.ndarray | None) -> float | None:
    return None if values is None else float(values.mean())


def decide(found: PairedChange, margin: float, alpha: float) -> tuple[str, str]:
    """(verdict, reason) of a change of accuracy against a margin, both as fractions of the items."""
    if found.n < FEWEST_ITEMS:
        return "cannot_decide", f"{found.n} items, at least {FEWEST_ITEMS} are needed"
    shown = f"accuracy falls by at most {max(-found.low, 0.0):.2%}, margin {margin:.2%}"
    if found.low > -margin:
        return "passed", shown
    if found.high < -margin:
        return "failed", f"accuracy falls by at least {-found.high:.2%}, margin {margin:.2%}"
    needed = needed_items(found, margin, alpha)
    more = "" if needed is None else f"; about {max(needed, found.n + 1):,} items would decide"
    return "cannot_decide", shown + more
