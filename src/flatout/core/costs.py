"""Bytes and operations of every op: the one truth that profiler, prediction, search and reports share.

Bytes count what must cross the memory bus once when weights do not fit in cache: packed weights, KV cache,
and (for the embedding look-up) the rows used. Activations stay in cache for one step and are not counted.
"""

from __future__ import annotations

from flatout.core.formats import Format, Recipe, parse_format
from flatout.core.spec import ModelSpec
from flatout.core.types import Cost

_KV_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5}
_SCALE_BYTES = 4.0  # float32 scale per token and head of an int8 or int4 cache


def linear_cost(n: int, k: int, fmt: Format, tokens: int) -> Cost:
    """An (n, k) linear over `tokens` tokens: 2 n k operations a token, weights read once."""
    return Cost(bytes_read=float(fmt.weight_bytes(n, k)), bytes_written=0.0, flops=2.0 * n * k * tokens)


def kv_bytes_per_token(spec: ModelSpec, kv_cache: str) -> float:
    """Bytes one token occupies in one layer's key and value cache."""
    scale = _SCALE_BYTES * spec.num_kv_heads if kv_cache in ("int8", "int4") else 0.0
    return 2 * (spec.kv_size * _KV_BYTES[kv_cache] + scale)


def attention_cost(spec: ModelSpec, kv_cache: str, tokens: int, context: int) -> Cost:
    """One layer, one sequence: `tokens` new tokens after `context` cached ones, causal.

    Token i sees context + i + 1 keys: q.k and p.v take 2 operations per (head, key, head_dim) each.
    """
    seen = tokens * context + tokens * (tokens + 1) / 2
    per_token = kv_bytes_per_token(spec, kv_cache)
    return Cost(
        bytes_read=(context + tokens) * per_token,
        bytes_written=tokens * per_token,
        flops=4.0 * spec.num_heads * spec.head_dim * seen,
    )


def step_costs(
    spec: ModelSpec, recipe: Recipe, *, batch: int, tokens: int, context: int, logits: int | None = None
) -> dict[str, Cost]:
    """Cost of one forward step by op, summed over layers.

    batch sequences of `tokens` new tokens each after `context` cached tokens; `logits` is the number of
    positions the head is computed for (default: one a sequence). Keys: embedding, qkv, attention, o,
    gate_up, down, head.
    """
    total_tokens = batch * tokens
    zero = Cost(bytes_read=0.0, bytes_written=0.0, flops=0.0)
    costs = dict.fromkeys(("embedding", "qkv", "attention", "o", "gate_up", "down", "head"), zero)
    for i in range(spec.num_layers):
        for linear, (n, k) in spec.linears().items():
            costs[linear] += linear_cost(n, k, recipe.format_of(i, linear), total_tokens)
        for _ in range(batch):
            costs["attention"] += attention_cost(spec, recipe.kv_cache, tokens, context)
    embedding = parse_format(recipe.embedding)
    costs["embedding"] = Cost(
        bytes_read=float(embedding.weight_bytes(total_tokens, spec.hidden_size)),
        bytes_written=0.0,
        flops=0.0,
    )
    head = linear_cost(
        spec.vocab_size, spec.hidden_size, parse_format(recipe.head), batch if logits is None else logits
    )
    costs["head"] = head
    return costs


def total(costs: dict[str, Cost]) -> Cost:
    """Sum over ops."""
    result = Cost(bytes_read=0.0, bytes_written=0.0, flops=0.0)
    for cost in costs.values():
        result += cost
    return result


def moment_bytes(spec: ModelSpec) -> int:
    """Bytes of the second moments of every linear's inputs, float32: what GPTQ is calibrated with."""
    return 4 * spec.num_layers * sum(k * k for _, k in spec.linears().values())


def weight_bytes(spec: ModelSpec, recipe: Recipe) -> int:
    """Bytes of all weights under `recipe` as the runner holds them (embedding and head counted apart)."""
    total_bytes = 0
    for i in range(spec.num_layers):
        for linear, (n, k) in spec.linears().items():
            total_bytes += recipe.format_of(i, linear).weight_bytes(n, k)
        total_bytes += 4 * 2 * spec.hidden_size
        total_bytes += 4 * spec.qkv_size if spec.qkv_bias else 0
        total_bytes += 4 * 2 * spec.head_dim if spec.qk_norm else 0
    for name in (recipe.embedding, recipe.head):
        total_bytes += parse_format(name).weight_bytes(spec.vocab_size, spec.hidden_size)
    return total_bytes + 4 * spec.hidden_size
