"""Refining: codes and scales of a rounded linear, improved in turns until neither helps the other.

    minimise  trace((W - Q) H (W - Q)^T),   Q[n, k] = s[n, g(k)] * c[n, k],   H = mean of x x^T

    codes    one column after another, all others fixed: the best real value of column k is
             q_k - ((Q - W) H)_k / H[k, k], and its nearest level is taken (coordinate descent; Behdin et al.,
             "QuantEase", 2023, arXiv 2309.01885)
    scales   with codes fixed the error of a row is a quadratic in its G scales, whose least value solves
             A s = b with A[g, h] = c_g^T H[g, h] c_h and b[g] = c_g^T (H w)_g

Neither step can raise the error; scales are kept as they will be stored (float16), and only where that is
better. Trade-off: two passes take twice as long as the rest of GPTQ, and left 2 to 8 % less error on
other text at 3 bits (docs/log.md); at 8 bits there is nothing to gain.

Legend: N rows, K columns, G groups of a row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flatout.compress.rtn import storable
from flatout.core.quantized import QuantizedTensor
from flatout.kernels.linear import as_tensor
from flatout.kernels.rounding import BLOCK, Base, GroupLevels, round_block

_ROWS = 4096  # rows refined at a time by a processor, whose cache a block of them fits; a GPU takes all
_RIDGE = 1e-3  # of the mean of A's diagonal, towards the scales there are


def refine(
    weight: np.ndarray | Tensor, hessian: Tensor, rounded: QuantizedTensor, passes: int
) -> QuantizedTensor:
    """`rounded` with codes and scales that suit `weight` float32 (N, K) and `hessian` (K, K) better, computed
    where the Hessian lies.

    The Hessian is damped already and positive definite. Zeros stay as they are. Raises nothing of its own.
    """
    rows = _ROWS if hessian.device.type == "cpu" else len(weight)
    parts = []
    for a in range(0, len(weight), rows):
        own = as_tensor(weight[a : a + rows]).to(hessian.device)
        parts.append(_refine_rows(own, hessian, rounded.rows(a, a + rows), passes))
    return QuantizedTensor(
        format=rounded.format,
        codes=np.concatenate([codes for codes, _ in parts]),
        scales=np.concatenate([scales for _, scales in parts]).astype(rounded.scales.dtype),
        zeros=rounded.zeros,
    )


def _refine_rows(
    weight: Tensor, h: Tensor, rounded: QuantizedTensor, passes: int
) -> tuple[np.ndarray, np.ndarray]:
    """(codes (N, K), scales float32 (N, G)). Works on the transposed weight, where a column is contiguous."""
    width = weight.shape[1] // rounded.scales.shape[1]
    zeros, scales = (
        torch.from_numpy(part).to(h.device).T.contiguous()
        for part in (rounded.float_zeros, rounded.scales.astype(np.float32))
    )
    low, high = rounded.code_range
    every = zeros.repeat_interleave(width, dim=0)
    codes = as_tensor(rounded.codes).to(h.device)
    levels = codes.T.contiguous().float() - every
    w = weight.T.contiguous()
    wanted = h @ w
    float16 = rounded.scales.dtype == np.float16
    for _ in range(passes):
        scales = _fit_scales(levels, scales, wanted, h, float16)
        levels = _descend(w, h, levels, GroupLevels(scales, low - zeros, high - zeros))
    scales = _fit_scales(levels, scales, wanted, h, float16)
    found = (levels + every).to(codes.dtype).T.contiguous()
    return found.cpu().numpy(), scales.T.contiguous().cpu().numpy()


def _fit_scales(levels: Tensor, scales: Tensor, wanted: Tensor, h: Tensor, float16: bool) -> Tensor:
    """The least-squares scales (G, N) of `levels` (K, N); the old ones of rows that would get worse."""
    k, n = levels.shape
    groups = len(scales)
    width = k // groups
    a = torch.empty(groups, groups, n, device=h.device)
    for g in range(groups):
        own, behind = slice(g * width, (g + 1) * width), slice(g * width, k)  # A is symmetric
        products = (h[behind, own] @ levels[own]).mul_(levels[behind])
        a[g, g:] = products.reshape(groups - g, width, n).sum(dim=1)
        a[g + 1 :, g] = a[g, g + 1 :]
    a = a.permute(2, 0, 1).contiguous()
    b = (levels * wanted).reshape(groups, width, n).sum(dim=1).T
    before = scales.T
    ridge = _RIDGE * a.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_(min=1e-30)[:, None]
    damped = a.double()
    damped.diagonal(dim1=1, dim2=2).add_(ridge)
    fitted = torch.linalg.solve(damped, (b + ridge * before).double()).float()
    fitted = torch.where((fitted > 0) & fitted.isfinite(), fitted, before)
    if float16:
        largest = float(np.finfo(np.float16).max)
        fitted = torch.from_numpy(storable(fitted.clamp(max=largest).cpu().numpy())).to(h.device)

    def error(s: Tensor) -> Tensor:
        """Of each row, without the part that does not depend on the scales."""
        return ((a @ s[:, :, None])[:, :, 0] * s).sum(dim=1) - 2 * (b * s).sum(dim=1)

    better = error(fitted) < error(before)
    return torch.where(better[:, None], fitted, before).T.contiguous()


def _descend(w: Tensor, h: Tensor, levels: Tensor, bounds: GroupLevels) -> Tensor:
    """`levels` (K, N) of `w` (K, N) after one pass over the columns."""
    k = len(w)
    width = k // len(bounds.steps)
    q = levels * bounds.steps.repeat_interleave(width, dim=0)
    slope = h @ (q - w)  # half the error's gradient
    gains, groups = (1 / h.diagonal()).tolist(), [j // width for j in range(k)]
    found = torch.empty_like(q)
    for start in range(0, k, BLOCK):
        own = slice(start, min(start + BLOCK, k))
        base = Base(q[own], gains[own])
        # What comes back is how far each column has moved, backwards.
        found[own], moved = round_block(slope[own], h[own, own], groups[own], bounds, base)
        slope[own.stop :].addmm_(h[own.stop :, own], moved, alpha=-1)
    return found
