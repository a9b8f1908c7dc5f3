"""optimize() with its page: what `flatout.optimize` and `flatout optimize` call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flatout.core.encoder_folder import is_encoder
from flatout.errors import ConfigError
from flatout.report.page import render
from flatout.search.encoder import optimize_encoder
from flatout.search.loop import optimize as search
from flatout.search.request import parse_max_loss
from flatout.search.stages import Status

_OF_ENCODERS = ("max_loss", "recipe", "objective", "workload", "threads")


def optimize(model: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """search.loop.optimize with the report page; see there for the options, the result and the errors. An
    encoder, such as minilm, takes those of search.encoder.optimize_encoder and has no page."""
    parse_max_loss(options.get("max_loss", "1%"))  # before a model is looked for, or fetched
    if not is_encoder(model):
        return search(model, out, render=render, **options)
    listen = options.pop("listen", None)
    for unused in ("note", "fresh"):  # nothing to resume, nothing to tell
        options.pop(unused, None)
    foreign = sorted(name for name, value in options.items() if value and name not in _OF_ENCODERS)
    if foreign:
        raise ConfigError(
            f"optimising an encoder takes {', '.join(_OF_ENCODERS)}", ", ".join(foreign), "without"
        )
    taken = {name: options[name] for name in _OF_ENCODERS if name in options}

    def step(what: str, done: int, total: int) -> None:
        if listen is not None:
            listen(Status(stage=what, number=0, count=0, what="", fraction=done / total, eta_s=0.0))

    return optimize_encoder(model, out, step=step, **taken)
