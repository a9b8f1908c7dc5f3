"""GPTQ of an encoder: every linear rounded for what it receives behind those already rounded.

    minimise  sum over tokens |W x - Q x|^2      x: inputs of the linear in the model as rounded so far

compress/gptq.py rounds each linear (Frantar et al., "GPTQ", 2022, arXiv 2210.17323), compress/refine.py
improves coarse ones. The texts pass the layers together, layer by layer. Trade-off as of GPTQ: seconds of one
core a layer and less error than rounding to nearest, if the text is like what will be encoded.

AWQ's factors have no free place here, but for o: layers are normed behind their sums, so that a norm's output
is both what a linear reads and what the next sum adds to, and between up and down lies GELU.

Legend: T tokens of all texts, D hidden size, N rows and K columns of a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from flatout.compress.encoder import EncoderSource, compress_encoder
from flatout.compress.gptq import round_linear
from flatout.compress.inputs import check_activations
from flatout.compress.layers import dequantized
from flatout.compress.method import check_rounded, check_weight
from flatout.compress.prune import FEWEST_TOKENS
from flatout.core.encoder import (
    EncoderFormats,
    EncoderModel,
    EncoderSpec,
    check_encoder_formats,
    parse_encoder_formats,
)
from flatout.core.quantized import QuantizedTensor
from flatout.errors import ConfigError
from flatout.models.bert import Bert


def checked_texts(texts: Iterable[Sequence[int]], spec: EncoderSpec) -> list[Tensor]:
    """Token ids (T,) of each text that has any. Raises ConfigError for too few tokens in all to calibrate
    with, and for ids that are not the model's."""
    given = [torch.tensor(np.asarray(ids, dtype=np.int64)) for ids in texts if len(ids)]
    total = sum(len(ids) for ids in given)
    if total < FEWEST_TOKENS:
        raise ConfigError(f"calibration needs at least {FEWEST_TOKENS} tokens", str(total), "more texts")
    low, high = min(int(ids.min()) for ids in given), max(int(ids.max()) for ids in given)
    if low < 0 or high >= spec.vocab_size:
        raise ConfigError(f"token ids are 0..{spec.vocab_size - 1}", f"{low}..{high}", "its own tokenizer")
    return given


class _Rounding(Bert):
    """The encoder, whose linears are rounded when all texts first pass them: `rounded` by fused name."""

    def __init__(self, source: EncoderSource, formats: EncoderFormats) -> None:
        super().__init__(compress_encoder(source, "fp32"))
        self._formats = formats
        self.rounded: dict[str, QuantizedTensor] = {}

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight = self._vector(name)
        check_weight(name, weight.numpy())
        hessian = x.T @ x / len(x)
        check_activations(name, hessian)
        rounded = round_linear(weight, hessian, self._formats.at(name))
        check_rounded(name, rounded, weight.numpy)
        self.rounded[name] = rounded
        return x @ dequantized(rounded, x.device).T + self._vector(f"{name}_bias")


@torch.no_grad()
def gptq_encoder(source: EncoderSource, name: str, texts: Iterable[Sequence[int]]) -> EncoderModel:
    """The encoder with its linears in the integer formats `name`. texts: token ids of one text each.

    Raises ConfigError for a format that does not fit, too little text and ids that are not the model's; and,
    naming the linear, for what is not finite or rounded to constants.
    """
    formats, spec = parse_encoder_formats(name), source.spec
    check_encoder_formats(spec, formats)
    if not formats.of(0, "qkv").is_integer:
        raise ConfigError("gptq chooses integer codes", name, "w4a16-g32")
    given = checked_texts(texts, spec)
    rounding = _Rounding(source, formats)
    rounding.hidden(torch.cat(given), [len(ids) for ids in given])
    return compress_encoder(source, name, rounding.rounded)
