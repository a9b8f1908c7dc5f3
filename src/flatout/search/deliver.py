"""The last step of a search: write the artifact, read it again, and only then put it in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flatout.core.artifact import check_output, load_artifact, save_artifact
from flatout.core.model import Model
from flatout.core.scratch import replace_folder, scratch_folder
from flatout.core.tokenizer import Tokenizer
from flatout.engine.runner import Runner
from flatout.errors import EvidenceError
from flatout.verify.quality import Cluster, score_model

SCRATCH = ".flatout-work-"
"""Prefix of folders beside the output that are gone when the search ends."""


def deliver(
    model: Model,
    tokenizer: Tokenizer,
    out: Path,
    manifest: Mapping[str, Any],
    runner: Runner,
    serve: Callable[[Model], Runner],
    witness: Cluster,
) -> None:
    """Write `model`, which `runner` has, to the folder `out`, all or nothing.

    Raises EvidenceError, writing nothing, unless what is read back scores `witness` under `serve` exactly as
    `runner` does, and what writing raises.
    """
    expected = score_model(runner, [witness])
    out = out.absolute()
    check_output(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(out.parent, SCRATCH) as folder:
        trial = save_artifact(model, tokenizer, folder / "candidate", manifest)
        again = serve(load_artifact(trial)[0])
        if not np.array_equal(expected[0], score_model(again, [witness])[0]):
            raise EvidenceError(
                "a reloaded artifact must score as the model that was judged",
                f"{model.recipe.name} does not",
                "report this: the artifact was not written",
            )
        replace_folder(trial, out)
