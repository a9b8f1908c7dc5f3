"""What every linear of a model receives when calibration text passes through it.

Layer by layer: one layer's float weights and the text's activations are in memory at a time, about 4 bytes x
tokens x (3 x intermediate size + hidden size).
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from flatout.compress.method import check_weight
from flatout.core.fuse import Source, float_weight
from flatout.errors import ConfigError, EvidenceError
from flatout.hardware.detect import detect
from flatout.kernels.linear import as_tensor
from flatout.models.llama import Cache, Linear, Llama, attention, decoder_layer, rms_norm, rope_turns

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_FEWEST_COLUMNS = 64  # of a block
_CHECKED_TOKENS = 128  # of the first document, whose probability says whether the text suits the model
_WORSE_THAN_GUESSING = 1.0  # nats a token above a uniform guess

See = Callable[[str, Tensor, Tensor, np.ndarray], None]
"""see(name, inputs (T, K), hidden (T, D), weight (N, K)): hidden is the state that the layer started from."""


def check_understood(source: Source, documents: Sequence[np.ndarray]) -> None:
    """Raise EvidenceError where the model finds the beginning of the longest document less likely than random
    tokens. A loss that is no number passes: the layer that makes it is named later."""
    ids = np.asarray(max(documents, key=len)[:_CHECKED_TOKENS], dtype=np.int64)
    if len(ids) < 2:
        return  # every document is one token: nothing to predict
    logits = Llama(source).forward(ids)
    loss = float(torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(ids[1:])))
    refuse_nonsense(loss, source.spec.vocab_size)


def refuse_nonsense(loss: float, vocab_size: int) -> None:
    """Raise EvidenceError for text that costs the original `loss` nats a token, more than random ones."""
    guess = math.log(vocab_size)
    if loss >= guess + _WORSE_THAN_GUESSING:
        raise EvidenceError(
            f"the model must predict its text better than random tokens ({guess:.1f} nats each)",
            f"{loss:.1f} nats",
            "text in the model's language, encoded by its own tokenizer",
        )


def check_activations(name: str, inputs: Tensor) -> None:
    """Raise ConfigError, naming it, for a linear that receives `inputs` (any shape) which are not finite."""
    if not bool(torch.isfinite(inputs).all()):
        raise ConfigError(
            "activations must be finite",
            f"infinity or NaN in the inputs of {name}",
            "a checkpoint whose weights do not overflow float32, or other calibration text",
        )


@contextmanager
def fast_products() -> Iterator[None]:
    """Let the processor multiply float32 matrices in bfloat16 with float32 sums, where that is faster: the
    error, 1/500 of a product, is far below that of any rounding that calibration is for."""
    with _precision("bf16"):
        yield


@contextmanager
def exact_products() -> Iterator[None]:
    """Within `fast_products`: products in float32 after all."""
    with _precision("ieee"):
        yield


@contextmanager
def _precision(name: str) -> Iterator[None]:
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = name
    try:
        yield
    finally:
        settings.fp32_precision = before


@contextmanager
def kept_memory() -> Iterator[None]:
    """Let the C library hand freed memory out again instead of returning it: activations are large,
    short-lived and of few sizes, and clearing fresh pages took 6 % of GPTQ's time. Nothing without glibc."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    for setting in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
        libc.mallopt(setting, 1 << 30)
    try:
        yield
    finally:
        for setting in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            libc.mallopt(setting, 128 << 10)  # glibc's own
        libc.malloc_trim(0)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32. Within `fast_products`, on processors that multiply bfloat16 but to which PyTorch
    gives no float32 that way (AVX-512 without tiles), of bfloat16 numbers, rounded once more at the end."""
    fast = a.device.type == "cpu" and torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]
    return (a.bfloat16() @ b.bfloat16()).float() if fast and _multiplies_by_hand() else a @ b


@functools.cache
def _multiplies_by_hand() -> bool:
    features = detect().features
    return "avx512_bf16" in features and "amx_bf16" not in features


def gram(x: Tensor) -> Tensor:
    """x^T x of (T, K). Blocks below the diagonal are those above it."""
    k = x.shape[1]
    size = max(_FEWEST_COLUMNS, -(-k // 256) * 64)
    found = torch.empty(k, k, device=x.device)
    columns = [slice(a, min(a + size, k)) for a in range(0, k, size)]
    for i, left in enumerate(columns):
        for right in columns[i:]:
            torch.mm(x[:, left].T, x[:, right], out=found[left, right])
            if left != right:
                found[right, left] = found[left, right].T
    return found


class Documents(Cache):
    """Attention within each of several documents that lie one after the other. Nothing is kept."""

    def __init__(self, lengths: Sequence[int]) -> None:
        super().__init__()
        self._lengths = list(lengths)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None
    ) -> Tensor:
        read, start = [], 0
        for length in self._lengths:
            own = slice(start, start + length)
            read.append(attention(q[own], k[own], v[own], positions[own], window))
            start += length
        return torch.cat(read)


class Text:
    """Calibration text as the layers see it: `tokens` of all documents, one behind the other. Its activations
    lie on `device`."""

    def __init__(self, source: Source, documents: Sequence[np.ndarray], device: str = "cpu") -> None:
        self.source, self.spec, self.device = source, source.spec, device
        self.documents = documents
        self.positions = torch.cat([torch.arange(len(document)) for document in documents])
        cos, sin = rope_turns(self.spec, self.positions)
        self.turns = cos.to(device), sin.to(device)
        self.cache = Documents([len(document) for document in documents])

    def embed(self) -> Tensor:
        ids = np.concatenate(self.documents).astype(np.int64)
        return Llama(self.source).embed(torch.from_numpy(ids)).to(self.device)

    def layer(self, layer: int, x: Tensor, linear: Linear) -> Tensor:
        """What layer number `layer` makes of x (T, D) with `linear` for its products."""

        def vector(name: str) -> Tensor:
            return as_tensor(float_weight(self.source, name)).to(self.device)

        return decoder_layer(
            self.spec, layer, x, self.positions, self.turns, linear=linear, vector=vector, cache=self.cache
        )


@torch.no_grad()
def linear_inputs(source: Source, documents: Sequence[np.ndarray], see: See) -> None:
    """Call `see` for every fused linear of `source` in execution order and then for the head, with what it
    receives from `documents`: token ids, each a sequence of its own that lies behind the one before. Weights
    are used as they are. Raises ConfigError, naming the linear, for weights or activations that are not
    finite."""
    spec, text = source.spec, Text(source, documents)
    x = text.embed()

    def linear(name: str, inputs: Tensor) -> Tensor:
        weight = float_weight(source, name)
        check_weight(name, weight)
        check_activations(name, inputs)
        see(name, inputs, x, weight)
        return inputs @ as_tensor(weight).T

    for layer in range(spec.num_layers):
        x = text.layer(layer, x, linear)
    normed = rms_norm(x, as_tensor(float_weight(source, "norm")), spec.rms_norm_eps, spec.norm_offset)
    check_activations("head", normed)
    see("head", normed, x, float_weight(source, "head"))


def relative_to(hidden: Tensor, inputs: Tensor) -> Tensor:
    """`inputs` (T, K) of o or down, each token divided by the size of its hidden state (T, D).

    What they add to a token is soon divided by that size in a norm, and so is their error; without this a
    few tokens with huge states outweigh all others.
    """
    size = hidden.square().mean(dim=1, keepdim=True).sqrt()
    return inputs / torch.clamp(size, min=1e-6)
