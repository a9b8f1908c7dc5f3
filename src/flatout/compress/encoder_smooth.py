"""Smoothing of an encoder: outliers move from activations, which share one int8 scale a token, into weights.

    x W^T = (x f) (W / f)^T          for any factors f > 0, one for each input channel

Xiao et al., "SmoothQuant", 2022, arXiv 2211.10438. An encoder's layers are normed behind their sums, so a
norm's output is both what a linear reads and what the next sum adds to, and between up and down lies GELU:
there is no weight into which f would go for nothing. So the runner multiplies by f where it rounds, which is
one product more for each value read. compress/smooth.py fits the factors, to what each linear receives in the
original. Only what reads a norm's output is smoothed, qkv and up: there outliers keep to their channels. In
minilm o and down, smoothed alone, lose what they did (docs/log.md).

Trade-off: a per cent of the time for more than half of what int8 activations lose; nothing for other formats,
whose inputs are not multiplied.

Legend: T tokens of all texts, N rows and K columns of a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from flatout.compress.encoder import EncoderSource, compress_encoder
from flatout.compress.encoder_gptq import checked_texts
from flatout.compress.inputs import check_activations
from flatout.compress.method import check_weight
from flatout.compress.rescale import evenly
from flatout.compress.rtn import round_to_nearest
from flatout.compress.smooth import fit_factors
from flatout.core.encoder import EncoderModel, check_encoder_formats, parse_encoder_formats
from flatout.errors import ConfigError
from flatout.models.bert import Bert

SMOOTHED = ("qkv", "up")
_TOKENS, _ROWS = (
    2048,
    1024,
)  # of a linear's inputs and of its weight, evenly spaced, that factors are fitted to


class _Fitting(Bert):
    """The encoder, whose linears' factors are fitted when all texts pass them."""

    def __init__(self, source: EncoderSource) -> None:
        super().__init__(compress_encoder(source, "fp32"))
        self.factors: dict[str, np.ndarray] = {}

    def _linear(self, name: str, x: Tensor) -> Tensor:
        if not name.endswith(SMOOTHED):
            return super()._linear(name, x)
        weight = self._vector(name)
        check_weight(name, weight.numpy())
        check_activations(name, x)
        columns = torch.arange(weight.shape[1])
        found = fit_factors(x[evenly(len(x), _TOKENS)], weight[evenly(len(weight), _ROWS)], columns)
        self.factors[name] = (1 / found).numpy()
        return super()._linear(name, x)


@torch.no_grad()
def smoothing_factors(source: EncoderSource, texts: Iterable[Sequence[int]]) -> dict[str, np.ndarray]:
    """Factors float32 (K,) of linears that are smoothed, by fused name, for what they receive of `texts`,
    token ids of one text each. Raises ConfigError for too little text and ids that are not the model's; and,
    naming the linear, for what is not finite."""
    given = checked_texts(texts, source.spec)
    fitting = _Fitting(source)
    fitting.hidden(torch.cat(given), [len(ids) for ids in given])
    return fitting.factors


def smooth_encoder(source: EncoderSource, name: str, factors: dict[str, np.ndarray]) -> EncoderModel:
    """The encoder with its linears in the formats `name`, rounded to nearest behind `factors` where
    activations share a scale a token. Raises ConfigError for formats that do not fit, or among which none is
    such."""
    formats, spec = parse_encoder_formats(name), source.spec
    check_encoder_formats(spec, formats)
    smoothed = [linear for linear in factors if formats.at(linear).scales_tokens]
    if not smoothed:
        raise ConfigError(
            "smoothing is for int8 activations that share one scale a token", name, "w8a8/smooth"
        )
    rounded = {}
    for linear in smoothed:
        weight, fmt = source.array(linear) / factors[linear], formats.at(linear)
        check_weight(linear, weight)
        rounded[linear] = round_to_nearest(weight, fmt, search_clip=fmt.bits < 8)
    return compress_encoder(source, name, rounded, {linear: factors[linear] for linear in smoothed})
