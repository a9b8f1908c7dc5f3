"""Sampling: the numpy specification that every runner matches, token for token.

Greedy when temperature <= 0: the largest logit, the lowest id among equals. Otherwise

    l = logits / temperature                     float32
    order candidates by (-l, id); keep the first top_k when 0 < top_k < V
    c = cumulative sum of exp(l - max l)         float64, in that order
    keep the shortest prefix with c / c[last] >= top_p, at least one candidate
    pick the first candidate with c > u * c[last kept]

u is counter-based: splitmix64 of the request's seed and the position of the new token. So a token depends on
its own sequence and parameters alone, never on the batch around it, on preemption or on how the prompt was
chunked. The generator is the finaliser of Steele, Lea and Flood, "Fast splittable pseudorandom number
generators" (2014).
"""

from __future__ import annotations

import numpy as np

from flatout.errors import BackendError

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from a 64-bit seed and the position (from 0) of the new token in its sequence."""
    x = (seed + (position + 1) * _GAMMA) & _MASK
    x ^= x >> 30
    x = (x * 0xBF58476D1CE4E5B9) & _MASK
    x ^= x >> 27
    x = (x * 0x94D049BB133111EB) & _MASK
    x ^= x >> 31
    return (x >> 11) * 2.0**-53


def sample_row(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, seed: int, position: int
) -> int:
    """The next token from float32 logits (V,). Raises BackendError when they hold NaN or no finite value."""
    best = int(logits.argmax())  # the first NaN, if there is one
    if not np.isfinite(logits[best]):
        raise BackendError(
            "a runner must give logits without NaN and with a finite maximum",
            f"{logits[best]} at token {best}",
            "the reference runner, and please report the model",
        )
    if temperature <= 0:
        return best
    scaled = logits.astype(np.float32) / np.float32(temperature)
    order = np.argsort(-scaled, kind="stable")
    if 0 < top_k < len(order):
        order = order[:top_k]
    ranked = scaled[order].astype(np.float64)
    cumulative = np.cumsum(np.exp(ranked - ranked[0]))
    kept = 1 + int(np.searchsorted(cumulative / cumulative[-1], np.float32(top_p).astype(np.float64)))
    kept = min(kept, len(order))
    threshold = uniform(seed, position) * cumulative[kept - 1]
    return int(order[np.searchsorted(cumulative[:kept], threshold, side="right")])


def sample(
    logits: np.ndarray,
    positions: np.ndarray,
    temperature: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
    seeds: np.ndarray,
) -> np.ndarray:
    """int32 (S,): `sample_row` of every row of logits (S, V); positions (S,) are those of the new tokens."""
    return np.array(
        [
            sample_row(
                logits[i], float(temperature[i]), int(top_k[i]), float(top_p[i]), int(seeds[i]), int(p)
            )
            for i, p in enumerate(positions)
        ],
        dtype=np.int32,
    )


def log_probabilities(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """float32 (T,): log softmax of logits (T, V) at targets (T,), summed in float64."""
    scores = np.empty(len(targets), dtype=np.float32)
    for i, target in enumerate(targets):  # by row, because float64 copies of all rows would be large
        row = logits[i].astype(np.float64)
        top = row.max()
        scores[i] = row[target] - top - np.log(np.exp(row - top).sum())
    return scores
