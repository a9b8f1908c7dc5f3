"""The joint choice: one format for every place, least time under a loss budget and a memory limit.

    minimise    sum of seconds[p, c] x[p, c]
    subject to  sum over c of x[p, c] = 1 for every place p,    x in {0, 1}
                sum of loss[p, c] x[p, c] <= budget,    sum of bytes[p, c] x[p, c] <= memory

a multiple-choice knapsack, solved to optimality by HiGHS's branch and bound (Huangfu and Hall, "Parallelizing
the dual revised simplex method", 2018) through scipy.optimize.milp. Losses add because rounding errors are
independent, times because ops run one after the other; what that leaves out is corrected by measuring
(search/joint.py). Matrices that run fused are one place: q, k and v share a format, gate and up share one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flatout.errors import BackendError

Objective = Literal["seconds", "bytes"]
Conflict = tuple[tuple[str, str], tuple[str, str]]
"""Two (place, format)."""

_SECONDS = 10.0  # of one solution; a few hundred places take well under one
_GAP = 1e-5  # of the objective, at which a solution counts as the best


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A format for a place. seconds: of the whole workload; loss: nats a token; bytes: resident."""

    place: str
    format: str
    seconds: float
    loss: float
    bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """One choice for each place, and their sums."""

    choices: tuple[Choice, ...]

    @property
    def seconds(self) -> float:
        return sum(choice.seconds for choice in self.choices)

    @property
    def loss(self) -> float:
        return sum(choice.loss for choice in self.choices)

    @property
    def bytes(self) -> float:
        return sum(choice.bytes for choice in self.choices)

    def formats(self) -> dict[str, str]:
        """Place -> format."""
        return {choice.place: choice.format for choice in self.choices}


def solve(
    places: Sequence[Sequence[Choice]],
    budget: float,
    memory_bytes: float = np.inf,
    objective: Objective = "seconds",
    conflicts: Sequence[Conflict] = (),
) -> Solution | None:
    """The best choice for every place, or None where the budget or the memory admits none.

    places: the choices of each place. conflicts: pairs that must not be chosen together. Equal objectives
    are broken by the smaller loss. Raises BackendError when the solver gives up.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    flat = [choice for choices in places for choice in choices]
    seconds, losses, sizes = (
        np.array([getattr(choice, field) for choice in flat]) for field in ("seconds", "loss", "bytes")
    )
    owner = np.repeat(np.arange(len(places)), [len(choices) for choices in places])
    one_each = csr_array((np.ones(len(flat)), (owner, np.arange(len(flat)))), (len(places), len(flat)))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for values, limit in ((losses, budget), (sizes, memory_bytes)):
        if np.isfinite(limit):
            unit = max(abs(limit), float(np.abs(values).max()), 1e-300)
            constraints.append(LinearConstraint(values[None, :] / unit, -np.inf, limit / unit))
    index = {(choice.place, choice.format): i for i, choice in enumerate(flat)}
    pairs = [(index[a], index[b]) for a, b in conflicts if a in index and b in index]
    if pairs:
        at = (np.repeat(np.arange(len(pairs)), 2), np.array(pairs).ravel())
        either = csr_array((np.ones(2 * len(pairs)), at), (len(pairs), len(flat)))
        constraints.append(LinearConstraint(either, -np.inf, 1))
    cost = seconds if objective == "seconds" else sizes
    tie = losses / max(float(losses.max()), 1e-300) if len(flat) else losses
    with _no_output():
        found = milp(
            cost / max(float(cost.max()), 1e-300) + 1e-7 * tie,
            constraints=constraints,
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            options={"time_limit": _SECONDS, "mip_rel_gap": _GAP},
        )
    if found.x is None:
        if found.status == 2:  # infeasible
            return None
        raise BackendError(
            "the solver must find a choice or prove that there is none", found.message, "--recipe"
        )
    return Solution(choices=tuple(choice for choice, x in zip(flat, found.x, strict=True) if x > 0.5))


@contextmanager
def _no_output() -> Iterator[None]:
    """HiGHS as of scipy 1.17 writes a debugging line straight to the process's standard output, which holds
    results here; whatever C code writes meanwhile is dropped."""
    import ctypes

    flush = ctypes.CDLL(None).fflush
    flush(None)
    try:
        kept = os.dup(1)
    except OSError:  # standard output is closed: nothing to protect
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def frontier(
    places: Sequence[Sequence[Choice]],
    points: int = 16,
    memory_bytes: float = np.inf,
    objective: Objective = "seconds",
    conflicts: Sequence[Conflict] = (),
) -> list[Solution]:
    """The trade-off between the objective and loss, least loss first: solutions of `points` budgets, evenly
    spaced in log loss between the least there can be and that of the cheapest, none dominated by another."""
    cheapest = solve(places, np.inf, memory_bytes, objective, conflicts)
    if cheapest is None:
        return []
    least = sum(min(choice.loss for choice in choices) for choices in places)
    budgets = np.geomspace(max(least, 1e-3 * cheapest.loss, 1e-12), max(cheapest.loss, 1e-12), points)
    found = [
        solve(places, float(budget) * (1 + 1e-9), memory_bytes, objective, conflicts)
        for budget in budgets[:-1]
    ]
    kept: list[Solution] = []
    for solution in [*found, cheapest]:
        cost = None if solution is None else getattr(solution, objective)
        if solution is not None and (not kept or cost < getattr(kept[-1], objective)):
            kept.append(solution)
    return kept
