"""Sparsity: which weights of a matrix become zero, said as a share or as n kept of m neighbours along a row.

    METHOD-50%      half of the weights become zero, wherever they are
    METHOD-2:4      of every four neighbours along a row two stay, the pattern that GPUs have products for

METHOD says who chooses (compress/magnitude.py, compress/wanda.py, compress/sparsegpt.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from flatout.errors import ConfigError, nearest

METHODS = ("magnitude", "wanda", "sparsegpt")
_GRAMMAR = re.compile(r"(?P<method>[a-z]+)-((?P<percent>\d{1,2}(\.\d+)?)%|(?P<kept>\d{1,2}):(?P<of>\d{1,2}))")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsity:
    """fraction: of the weights that become zero. kept, of: the n and m of n:m, both 0 if unstructured."""

    method: str
    fraction: float
    kept: int = 0
    of: int = 0

    def check(self, where: str, width: int) -> None:
        """Raise ConfigError unless the pattern fits rows of `width` weights."""
        if self.of and width % self.of:
            raise ConfigError(
                f"{self.kept}:{self.of} needs rows of a multiple of {self.of} weights",
                f"{where} of width {width}",
                f"{self.method}-{self.fraction:.0%}",
            )

    @property
    def needs_calibration(self) -> bool:
        return self.method != "magnitude"


def parse_sparsity(name: str) -> Sparsity:
    """The sparsity called `name`. Raises ConfigError with the grammar for anything else."""
    match = _GRAMMAR.fullmatch(name)
    if match is None or match["method"] not in METHODS:
        method, dash, pattern = name.partition("-")
        near = f"{nearest(method, METHODS, 'wanda')}{dash}{pattern}"
        remedy = near if _GRAMMAR.fullmatch(near) else "wanda-50% or sparsegpt-2:4"
        raise ConfigError(f"a sparsity is {{{','.join(METHODS)}}}-P% or -N:M", repr(name), remedy)
    if match["of"]:
        kept, of = int(match["kept"]), int(match["of"])
        if not 1 <= kept < of:
            raise ConfigError("N:M keeps at least one of M weights and not all", repr(name), "wanda-2:4")
        return Sparsity(method=match["method"], fraction=1 - kept / of, kept=kept, of=of)
    fraction = float(match["percent"]) / 100
    if fraction == 0:
        raise ConfigError("a sparsity takes weights away", repr(name), "wanda-50%")
    return Sparsity(method=match["method"], fraction=fraction)
