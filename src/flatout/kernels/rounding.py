"""Columns of a block rounded in turn, the error of each spread over those behind it: the inner loop of GPTQ's
sweep (compress/gptq.py) and of refining (compress/refine.py). On a processor the C++ extension does it
(kernels/cpu/rounding.cpp).

    x_j = values_j - sum over i < j of factor[i, j] e_i

    without a base    c_j = round(clamp(x_j / s_j))                  e_j = x_j - c_j s_j
    with one          c_j = round(clamp((b_j - a_j x_j) / s_j))      e_j = b_j - c_j s_j

Products with the columns behind the block are the caller's: matrices multiply them. PyTorch needs five
operations a column, each of which takes longer to start than to run. The extension's results are those of
`reference`, which a GPU uses, up to the order in which a multiplication and an addition round: a value
halfway between two levels may go to the other one.

Legend: B columns of the block, N rows of the weight, G groups. Blocks are transposed: a column's N values
lie together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flatout.kernels.grids import extension

BLOCK = 64
"""Columns of a block. More of them cost more here and less in the products behind."""


@dataclass(frozen=True, slots=True, eq=False)
class GroupLevels:
    """The levels of each group: multiples low to high of a step. All float32 (G, N)."""

    steps: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """Where columns lie (B, N) and how far a value (B,) moves them from there."""

    columns: Tensor
    gains: Sequence[float]


def round_block(
    values: Tensor, factor: Tensor, groups: Sequence[int], levels: GroupLevels, base: Base | None = None
) -> tuple[Tensor, Tensor]:
    """(c, e), both float32 (B, N), of `values` (B, N), of which rows lie together, and `factor` (B, B), of
    which only what is above the diagonal is read. groups: the group of each column.

    Raises nothing of its own: callers have checked that everything is finite and steps are positive.
    """
    cpu = extension() if values.device.type == "cpu" else None
    if cpu is None or len(values) > cpu.max_block_columns:
        return reference(values, factor, groups, levels, base)
    c, e = torch.empty_like(values), torch.empty_like(values)
    gains = np.zeros(len(values)) if base is None else np.array(base.gains)
    cpu.round_block(
        cpu.isas()[0],
        values.numpy(),
        None if base is None else base.columns.numpy(),
        factor.contiguous().numpy(),
        gains.astype(np.float32),
        np.array(groups, dtype=np.int32),
        levels.steps.numpy(),
        levels.low.numpy(),
        levels.high.numpy(),
        c.numpy(),
        e.numpy(),
    )
    return c, e


def reference(
    values: Tensor, factor: Tensor, groups: Sequence[int], levels: GroupLevels, base: Base | None = None
) -> tuple[Tensor, Tensor]:
    """As `round_block`, in PyTorch, wherever the tensors lie."""
    chosen = torch.tensor(groups, device=values.device)
    steps, low, high = (part[chosen].unbind() for part in (levels.steps, levels.low, levels.high))
    x = values.clone()
    c, e = torch.empty_like(x), torch.empty_like(x)
    origins = (x if base is None else base.columns).unbind()
    for j, (column, origin, code, error) in enumerate(
        zip(x.unbind(), origins, c.unbind(), e.unbind(), strict=True)
    ):
        wanted = column if base is None else torch.add(origin, column, alpha=-base.gains[j])
        torch.clamp((wanted / steps[j]).round_(), low[j], high[j], out=code)
        torch.addcmul(origin, code, steps[j], value=-1, out=error)
        x[j + 1 :].addr_(factor[j, j + 1 :], error, alpha=-1)
    return c, e
