"""What every method takes and gives:    method(source, data, recipe) -> (result, report)

source: a Checkpoint, or what another method made of one. recipe: the format of every weight. The result is
either another Source that computes the same and rounds better (smooth, awq, rotate), or rounded weights by
fused name (rtn, gptq, tune); compress/apply.py puts one of each together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flatout.core.formats import Format, Recipe, parse_format
from flatout.core.fuse import Source, native_format
from flatout.core.quantized import QuantizedTensor
from flatout.errors import ConfigError

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total) with total the number of weights."""

_COLLAPSED = 0.5  # of a weight's groups
_TOKENS_PER_INPUT = 0.25


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Data:
    """What a method works with besides the model.

    documents: token ids of the calibration text, each a sequence of its own. keep: a folder in which work is
    kept layer by layer, so that it goes on where it was interrupted; it is emptied at the end. device: where
    gptq and tune compute, "cpu" or "cuda".
    """

    documents: tuple[np.ndarray, ...] = ()
    progress: Progress | None = None
    keep: Path | None = None
    device: str = "cpu"

    @property
    def tokens(self) -> int:
        return sum(len(document) for document in self.documents)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a method did. errors: fused name -> the part of its output's energy, over the calibration text,
    that a rounded linear gets wrong; methods that do not know it leave it out."""

    method: str
    seconds: float
    tokens: int
    errors: dict[str, float]


def data_of(
    calibration: Sequence[Sequence[int] | np.ndarray] | None,
    progress: Progress | None = None,
    keep: Path | None = None,
    device: str = "cpu",
) -> Data:
    """Data of token lists; empty ones are left out. device: as in Data."""
    documents = [np.asarray(document, dtype=np.int64) for document in calibration or () if len(document)]
    return Data(documents=tuple(documents), progress=progress, keep=keep, device=device)


def format_in(recipe: Recipe, name: str) -> Format:
    """The format of fused weight `name`: layers.I.X, embedding or head."""
    if name in ("embedding", "head"):
        return parse_format(recipe.embedding if name == "embedding" else recipe.head)
    _, layer, linear = name.split(".")
    return recipe.format_of(int(layer), linear)


def is_made(source: Source, recipe: Recipe, name: str) -> bool:
    """Whether weight `name` becomes integers that a method chooses, not those of the file."""
    return is_rounded(source, name, format_in(recipe, name))


def is_rounded(source: Source, name: str, fmt: Format) -> bool:
    """Whether weight `name` has to be rounded for `fmt`: to integers, and not those of the file."""
    return fmt.is_integer and not fmt.is_native and native_format(source, name) != fmt.name


def check_text(source: Source, data: Data, recipe: Recipe) -> None:
    """Raise ConfigError for calibration text from which nothing can be learned: none, ids that the model does
    not have, or fewer tokens than a quarter of the inputs of the widest linear that is rounded."""
    spec = source.spec
    if not data.documents:
        raise ConfigError(
            f"method {recipe.method} needs calibration text", "none", "method rtn, or give token lists"
        )
    low = min(int(document.min()) for document in data.documents)
    high = max(int(document.max()) for document in data.documents)
    if low < 0 or high >= spec.vocab_size:
        raise ConfigError(
            f"token ids of calibration text are 0..{spec.vocab_size - 1}",
            f"{low}..{high}",
            "the model's own tokenizer",
        )
    made = [
        (k, f"layers.{i}.{linear}")
        for i in range(spec.num_layers)
        for linear, (_, k) in spec.linears().items()
        if is_made(source, recipe, f"layers.{i}.{linear}")
    ]
    width, name = max(made, default=(0, ""))
    if data.tokens < _TOKENS_PER_INPUT * width:
        raise ConfigError(
            f"{name} has {width} inputs: calibration takes at least {width // 4} tokens, better {8 * width}",
            f"{data.tokens} tokens",
            "more calibration text, or method rtn",
        )


def check_weight(name: str, weight: np.ndarray) -> None:
    """Raise ConfigError, naming it, for a weight that is not finite."""
    if not (np.isfinite(weight.min()) and np.isfinite(weight.max())):
        raise ConfigError("weights must be finite", f"infinity or NaN in {name}", "another checkpoint")


def check_rounded(name: str, weight: QuantizedTensor, original: Callable[[], np.ndarray]) -> None:
    """Raise ConfigError, naming it, for a weight most of whose groups became constants although the original
    (N, K), read only in doubt, is not constant there: outliers have taken the whole range of their scale.

    Such a model loads, runs and answers nonsense.
    """
    n, k = weight.shape
    groups = weight.format.groups(k)
    codes = weight.codes.reshape(n, groups, -1)
    zeros = weight.integer_zero if weight.zeros is None else weight.zeros[:, :, None]
    different = (codes != zeros).sum(axis=2) <= 1
    different |= (codes == codes[:, :, :1]).all(axis=2)
    if different.mean() <= _COLLAPSED:
        return
    grouped = original().reshape(n, groups, -1)
    varied = (grouped != grouped[:, :, :1]).sum(axis=2) > 1
    share = float((different & varied).mean())
    if share > _COLLAPSED:
        raise ConfigError(
            "a rounded weight must not be constant where the original is not",
            f"{share:.0%} of the groups of {name} in {weight.format.name}",
            "a smaller group, more bits for it, or bf16 (--recipe ...,layers.I.X=bf16)",
        )
