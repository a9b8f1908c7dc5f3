"""Rotation: turn the residual stream and the values of each head, so that no channel sticks out.

    (x R) (W R)^T = x W^T          for any orthogonal R

Rounding to a few levels loses most where one weight of a group is far larger than the rest. An orthogonal R
mixes channels until all are alike: a Hadamard matrix (entries +-1 / sqrt(D)) with random signs, as in QuaRot
(Ashkboos et al., 2024, arXiv 2404.00456). All of it is folded into weights and nothing is left to do at run
time:

    norms           their weights go into the columns of the linears that follow (and become 1), since
                    rms(x R) = rms(x) but R and a diagonal do not commute
    residual        embedding E R; qkv, gate_up and head W R; o and down R^T W
    values          v_proj H by head, o_proj takes it back; attention is linear in its values

Trade-off: the file's own blocks and a head tied to the embedding are given up (both tables change, and the
head carries the last norm). What would need work at run time is left out, because the engine does not do
it: the input of down, and queries and keys behind RoPE.

Legend: D hidden size, E head size.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from flatout.compress.method import Data, Report
from flatout.core.formats import Recipe
from flatout.core.fuse import Source
from flatout.core.quantized import QuantizedTensor
from flatout.core.spec import ModelSpec

_READS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def hadamard(n: int) -> np.ndarray | None:
    """A Hadamard matrix (n, n) of +-1 with orthogonal rows, None where neither doubling (Sylvester) nor
    Paley's construction over a prime field, nor products of such, give one."""
    if n in (1, 2):
        return np.array([[1.0]] if n == 1 else [[1.0, 1.0], [1.0, -1.0]])
    if n % 4:
        return None
    for factor in range(2, n // 2 + 1):
        if n % factor == 0:
            a, b = hadamard(factor), hadamard(n // factor)
            if a is not None and b is not None:
                return np.kron(a, b)
    return _paley(n - 1)


def _paley(q: int) -> np.ndarray | None:
    """Paley's matrix of order q + 1 for a prime q = 3 mod 4 (Paley, 1933)."""
    if q % 4 != 3 or any(q % d == 0 for d in range(2, int(q**0.5) + 1)):
        return None
    character = np.full(q, -1.0)
    character[[i * i % q for i in range(1, q)]] = 1.0
    character[0] = 0.0
    at = np.arange(q)
    jacobsthal = character[(at[:, None] - at[None, :]) % q]
    skew = np.zeros((q + 1, q + 1))
    skew[0, 1:], skew[1:, 0] = 1.0, -1.0
    skew[1:, 1:] = jacobsthal
    found: np.ndarray = skew + np.eye(q + 1)
    return found


def orthogonal(n: int, seed: int) -> np.ndarray:
    """A random orthogonal matrix float32 (n, n): Hadamard with random signs where one of order n is known,
    otherwise drawn evenly (the Q of a normal matrix)."""
    rng = np.random.default_rng([seed, n])
    known = hadamard(n)
    if known is not None:
        known = rng.choice([-1.0, 1.0], n)[:, None] * known / np.sqrt(n)
    else:
        q, r = np.linalg.qr(rng.standard_normal((n, n)))
        known = q * np.sign(np.diag(r))
    return np.asarray(known, dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rotated:
    """A Source that computes what `original` does with the residual stream turned by `residual` (D, D) and
    values by `values` (E, E). Its head is a tensor of its own and its norms are 1."""

    spec: ModelSpec
    original: Source
    residual: np.ndarray
    values: np.ndarray

    def array(self, name: str) -> np.ndarray:
        if name.endswith("norm.weight") and ".self_attn." not in name:
            ones: np.ndarray = np.full(self.spec.hidden_size, 1 - self.spec.norm_offset, dtype=np.float32)
            return ones
        array = self.original.array(name)
        part = name.rpartition(".")[0].rpartition(".")[2]
        if part == "embed_tokens":
            return _product(array, self.residual)
        if part == "lm_head":
            return _product(array * self._norm("model.norm.weight"), self.residual)
        if name.endswith("v_proj.bias"):
            return _product(array.reshape(-1, self.spec.head_dim), self.values).reshape(-1)
        if name.endswith(".bias") or array.ndim != 2:
            return array
        if part in _READS:
            before = "post_attention_layernorm" if ".mlp." in name else "input_layernorm"
            layer = name.partition(".self_attn.")[0].partition(".mlp.")[0]
            array = _product(array * self._norm(f"{layer}.{before}.weight"), self.residual)
            if part == "v_proj":
                heads = array.reshape(-1, self.spec.head_dim, array.shape[1])
                array = np.einsum("gek,ef->gfk", heads, self.values).reshape(array.shape)
            return array
        if part == "o_proj":
            array = _product(array.reshape(-1, self.spec.head_dim), self.values).reshape(array.shape)
        return _product(self.residual.T, array)

    def native(self, name: str) -> QuantizedTensor | None:
        return None

    def _norm(self, name: str) -> np.ndarray:
        weight: np.ndarray = self.original.array(name) + np.float32(self.spec.norm_offset)
        return weight


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    found: np.ndarray = a @ b
    return found


def turned(source: Source, seed: int = 0) -> Rotated:
    """`source` turned by random matrices of `seed`. No text is needed."""
    spec = source.spec
    return Rotated(
        spec=replace(spec, tie_embeddings=False),
        original=source,
        residual=orthogonal(spec.hidden_size, seed),
        values=orthogonal(spec.head_dim, seed + 1),
    )


def rotate(source: Source, data: Data, recipe: Recipe, seed: int = 0) -> tuple[Rotated, Report]:
    """`source` turned by random matrices of `seed`, whatever is made of it."""
    start = time.perf_counter()
    rotated = turned(source, seed)
    return rotated, Report(method="rotate", seconds=time.perf_counter() - start, tokens=0, errors={})
