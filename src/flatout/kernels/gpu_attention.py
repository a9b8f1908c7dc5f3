"""Launching attention on a GPU: of one new token a sequence, and of prompts.

Legend: S sequences, T tokens, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flatout.core.spec import ModelSpec
from flatout.kernels import gpu_prompt
from flatout.kernels.gpu import (
    FEW_SHARED,
    MANY_SHARED,
    Activations,
    Card,
    Product,
    carve,
    measured_routes,
    start,
)
from flatout.kernels.triton import attention

MOST_SPLITS = 16


@dataclass(frozen=True, slots=True, eq=False)
class HeadWeights:
    """What queries and keys go through before they meet: optional bias of the linear, optional norms."""

    bias: Tensor | None = None
    q_gains: Tensor | None = None
    k_gains: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LayerCache:
    """keys and values (pages, G, PAGE, E)."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """How attention of a batch is cut up, and room for its parts; counters are zero between launches."""

    splits: int
    parts: Tensor
    peaks: Tensor
    counters: Tensor


def attention_plan(card: Card, spec: ModelSpec, sequences: int, device: torch.device) -> AttentionPlan:
    """Splits so that all multiprocessors have work."""
    groups = sequences * spec.num_kv_heads
    wanted = 2 * card.units / groups
    splits = MOST_SPLITS if wanted > 8 else 4 if wanted > 2 else 1
    repeat = spec.num_heads // spec.num_kv_heads
    return AttentionPlan(
        splits,
        torch.empty(groups * splits * repeat * spec.head_dim, device=device),
        torch.empty(groups * splits * 2 * repeat, device=device),
        torch.zeros(groups, dtype=torch.int32, device=device),
    )


class DecodeRoute(NamedTuple):
    """How attention of one new token a sequence is launched: tokens read at a time, warps, and stages of the
    compiler's pipeline."""

    block: int
    warps: int
    stages: int


def route_key(size: int, splits: int) -> str:
    """What the table calls attention over a cache of `size` bytes a number."""
    return f"attention {8 * size} bits {splits}"


def decode_route(name: str, size: int, splits: int) -> DecodeRoute:
    """For a cache of `size` bytes a number on the card called `name`."""
    return DecodeRoute(*measured_routes(name).get(route_key(size, splits), (64, 2, 3)))


def _compute(keys: Tensor) -> Any:
    """bfloat16 as stored, or float16, in which e4m3 is exact; the interpreter multiplies neither bfloat16."""
    if keys.device.type == "cpu":
        return tl.float32
    return tl.float16 if keys.dtype == torch.float8_e4m3fn else tl.bfloat16


def decode_attention(
    card: Card,
    spec: ModelSpec,
    product: Product,
    heads: HeadWeights,
    turns: tuple[Tensor, Tensor],
    cache: LayerCache,
    pages: Tensor,
    positions: Tensor,
    plan: AttentionPlan,
    out: Activations,
) -> None:
    """out (S, H E) of one new token a sequence, bfloat16, or e4m3 with scales (S, G); writes its key and
    value. Rows with position -1 are left alone."""
    sequences, page = product.tokens, cache.keys.shape[2]
    repeat = spec.num_heads // spec.num_kv_heads
    route = decode_route(card.name, cache.keys.element_size(), plan.splits)
    kernel = start(
        card,
        attention.decode_attention,
        (plan.splits, spec.num_kv_heads, sequences),
        product.values,
        product.token_scales,
        product.row_scales,
        heads.bias,
        heads.q_gains,
        heads.k_gains,
        *turns,
        cache.keys,
        cache.values,
        pages,
        positions,
        out.values,
        out.scales,
        plan.parts,
        plan.peaks,
        plan.counters,
        pages.stride(0),
        spec.head_dim**-0.5,
        spec.rms_norm_eps,
        spec.sliding_window or 1 << 30,
        product.part_size,
        G=spec.num_kv_heads,
        R=repeat,
        ROWS=max(16, triton.next_power_of_2(repeat)),
        E=spec.head_dim,
        PAGE=page,
        BLOCK=min(page, route.block),
        SPLITS=plan.splits,
        COMPUTE=_compute(cache.keys),
        CUT=product.cut,
        SCALED=product.token_scales is not None,
        BIAS=heads.bias is not None,
        NORM=heads.q_gains is not None,
        PDL=card.pdl,
        num_warps=route.warps,
        num_stages=route.stages,
    )
    carve(card, kernel, FEW_SHARED if plan.splits == MOST_SPLITS else MANY_SHARED)


def rotate_and_store(
    card: Card,
    spec: ModelSpec,
    product: Product,
    heads: HeadWeights,
    turns: tuple[Tensor, Tensor],
    cache: LayerCache,
    slots: Tensor,
    positions: Tensor,
) -> Tensor:
    """bfloat16 (T, (H + 2 G) E): queries, keys and values as attention takes them; the last two go to the
    cache at `slots` too."""
    values, repeat = product.values, spec.num_heads // spec.num_kv_heads
    out = torch.empty(product.tokens, values.shape[-1], dtype=torch.bfloat16, device=values.device)
    start(
        card,
        attention.rotate_and_store,
        (product.tokens, spec.num_kv_heads),
        values,
        product.token_scales,
        product.row_scales,
        heads.bias,
        heads.q_gains,
        heads.k_gains,
        *turns,
        cache.keys,
        cache.values,
        slots,
        positions,
        out,
        spec.rms_norm_eps,
        product.part_size,
        G=spec.num_kv_heads,
        R=repeat,
        ROWS=triton.next_power_of_2(repeat),
        E=spec.head_dim,
        PAGE=cache.keys.shape[2],
        CUT=product.cut,
        SCALED=product.token_scales is not None,
        BIAS=heads.bias is not None,
        NORM=heads.q_gains is not None,
        PDL=card.pdl,
        num_warps=1,
    )
    return out


def causal_attention(card: Card, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """bfloat16 (T, H E): the last T of S tokens, q (T, H, E), over k and v (S, G, E), by the project's kernel
    where there is one, or by PyTorch's fused kernels."""
    tokens, seen = q.shape[0], k.shape[0]
    reach = seen if window is None else min(seen, tokens + window)
    if gpu_prompt.serves(card, tokens, reach, *q.shape[1:]):
        return gpu_prompt.attend(card, q, k, v, window)
    if card.dry:  # as for products (gpu_linear)
        return torch.empty(tokens, q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
    q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
    causal = tokens == seen
    mask: Tensor | None = None
    windowed = window is not None and window < seen
    if not causal and not windowed and q.is_cuda:
        # Its mask ends at the last query and the last key. PyTorch's own way there, attention.bias, imports
        # its compiler, which takes four seconds.
        read: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=True)[0]
        return read[0].transpose(0, 1).reshape(tokens, -1)
    if windowed or not causal:
        at = torch.arange(seen, device=q.device)
        distance = at[seen - tokens :, None] - at[None, :]
        mask, causal = (distance >= 0) & (distance < (window or seen)), False
    read = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
    return read[0].transpose(0, 1).reshape(tokens, -1)
