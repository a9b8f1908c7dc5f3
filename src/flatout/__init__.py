"""flatout makes a language model run as fast as the hardware allows, and proves it.

The public names below load on first use, so that `import flatout` needs neither torch nor scipy:

    profile    where time and bytes of a model go, and how far each operator is from its floor
    optimize   the loop: profile, search formats and kernels, verify, write an artifact
    verify     the quality certificate and the speed test for two checkpoints, or a certificate recomputed
    train      a model from scratch, from a checkpoint or from a teacher, on one device
    load       what runs an artifact or a checkpoint: an engine that generates text, or an encoder of texts
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flatout._version import __version__

if TYPE_CHECKING:
    from flatout.compress.encoder import load
    from flatout.report.optimize import optimize

__all__ = ["__version__", "load", "optimize", "profile", "train", "verify"]

_LAZY = {
    "load": ("flatout.compress.encoder", "load"),
    "optimize": ("flatout.report.optimize", "optimize"),
    "profile": ("flatout.perf.profile", "profile"),
    # `flatout.train` and `flatout.verify` are also rooms; their package objects are callable.
    "train": ("flatout.train", ""),
    "verify": ("flatout.verify", ""),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'flatout' has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    module = import_module(module_name)
    return getattr(module, attribute) if attribute else module


def __dir__() -> list[str]:
    return sorted(__all__)
