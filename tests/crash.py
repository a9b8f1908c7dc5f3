"""A search whose process is killed (SIGKILL) at every file that it puts in place.

    python -m tests.crash FOLDER

A process dies when a file is written and not yet renamed, which is also the state behind the file before
it, and behind the output folder and its page. The next one, a fork of this process as well, goes on from
there, until one comes to its end. Model, rounding, scores, certificate and files are real; the clock is not,
so that two searches choose alike.

Prints {"kills": [...], "broken": [...]}: where processes were killed, and after which kill the output folder
could not be loaded. FOLDER/whole holds what an undisturbed search wrote, FOLDER/killed what this one did.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit")]

import torch  # noqa: E402
from fake_bench import HARDWARE, FakeBench  # noqa: E402
from tests.tiny import tiny_checkpoint_folder, tiny_model, tiny_spec  # noqa: E402

from flatout.core import scratch  # noqa: E402
from flatout.core.artifact import load_artifact, save_artifact  # noqa: E402
from flatout.core.formats import Recipe, uniform  # noqa: E402
from flatout.core.tokenizer import Tokenizer  # noqa: E402
from flatout.core.types import Hardware  # noqa: E402
from flatout.data.passages import Passage, load_passages  # noqa: E402
from flatout.errors import FlatoutError  # noqa: E402
from flatout.perf.profile import Profile  # noqa: E402
from flatout.perf.tables import Table  # noqa: E402
from flatout.search import context, loop, screen  # noqa: E402
from flatout.search.bench import CpuBench  # noqa: E402
from flatout.search.request import Request  # noqa: E402
from flatout.search.stages import Status  # noqa: E402
from flatout.search.texts import Texts  # noqa: E402
from flatout.verify.examination import seal  # noqa: E402
from flatout.verify.quality import Cluster, token_clusters  # noqa: E402
from flatout.verify.speed import SpeedResult  # noqa: E402

LOADED_ON_USE = (
    "scipy.optimize", "scipy.sparse", "scipy.special", "flatout.compress.gptq", "flatout.compress.library",
    "flatout.engine.reference", "flatout.search.expected",
)  # fmt: skip
"""Modules that a search loads when it needs them; here they are loaded once, before the forks."""

SPEC = tiny_spec("llama", num_layers=1)
SPEEDS = {"bf16": 1.0, "w8a8": 2.0}
RECIPES = ("w8a8", "bf16")
"""Listed candidates that are tried; the search adds those that it finds."""

LAST = ("out", "report.html")
MOST_KILLS = 200


class TimelessBench(CpuBench):
    """Everything but the times is real."""

    def __init__(self, request: Request) -> None:
        super().__init__(request.model, 1, request.workload)
        self._clock = FakeBench({}, defaultdict(lambda: 1.5, SPEEDS))

    def hardware(self, step: Any) -> Hardware:
        return HARDWARE

    def table(self, *args: Any) -> Table:
        return self._clock.table(*args)

    def profile(self, recipe: Recipe, *args: Any) -> Profile:
        self._clock.built.add(recipe)
        return self._clock.profile(recipe, *args)

    def turns(self, first: Recipe, second: Recipe, *args: Any) -> dict[str, float]:
        self._clock.built |= {first, second}
        return self._clock.turns(first, second, *args)

    def race(self, first: Recipe | None, second: Recipe, *args: Any) -> dict[str, SpeedResult]:
        self._clock.built.add(second)
        return self._clock.race(first, second, *args)

    def score_baseline(self, clusters: Sequence[Cluster], step: Any) -> list[Any]:
        return [score - 1e-4 for score in self.score_original(clusters, step)]


def short_texts(tokenizer: Any, tokenizer_sha256: str) -> Texts:
    """A few words of every shipped passage."""

    def passages(split: str) -> list[Passage]:
        return [Passage(id=p.id, book=p.book, text=p.text[:120]) for p in load_passages(split)]

    return Texts(
        calibration=tuple(token_clusters(tokenizer, passages("calibration")[:24])),
        validation=tuple(token_clusters(tokenizer, passages("validation"))),
        holdout=seal(passages("holdout"), [], tokenizer, tokenizer_sha256=tokenizer_sha256),
    )


class Killer:
    """Ends the process at the first place that is not among `survived`."""

    def __init__(self, survived: set[str], told: Path) -> None:
        self._survived, self._told = survived, told
        self._stage = ""

    def listen(self, status: Status) -> None:
        self._stage = status.stage

    def around(self, put_in_place: Callable[..., Any]) -> Callable[..., Any]:
        def put(source: Any, target: Any) -> Any:
            name = os.path.basename(target)
            self._maybe(f"{self._stage}: before {name}")
            done = put_in_place(source, target)
            if name in LAST:
                self._maybe(f"{self._stage}: after {name}")
            return done

        return put

    def _maybe(self, place: str) -> None:
        if place not in self._survived:
            self._told.write_text(place)
            os.kill(os.getpid(), signal.SIGKILL)


def search(folder: Path, model: Path, killer: Killer | None) -> None:
    """One process of a search that writes to folder/out, with the cache folder/cache."""
    os.environ["FLATOUT_CACHE"] = str(folder / "cache")
    if killer is not None:
        os.replace, os.rename = killer.around(os.replace), killer.around(os.rename)  # type: ignore[assignment]
        scratch._exchange = killer.around(scratch._exchange)
    loop.optimize(
        model,
        folder / "out",
        max_loss="5%",
        workload="16+4",
        render=lambda result: f"<p>{result['optimized']['recipe']}</p>",
        listen=None if killer is None else killer.listen,
        open_bench=TimelessBench,
    )


def fork(work: Callable[[], None]) -> int:
    """How a process that does `work` ended: its exit code, or the negative number of a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path) -> int:
    for module in LOADED_ON_USE:
        import_module(module)
    torch.set_num_threads(1)  # no threads that a fork would lack
    model = tiny_checkpoint_folder(folder / "model", SPEC)
    tokenizer = Tokenizer.from_folder(model)
    texts = short_texts(tokenizer, tokenizer.sha256)
    loop.read_texts = lambda *args: texts  # type: ignore[assignment]
    context._CHUNK = 64
    screen._PROPOSALS = 2
    listed = loop.candidates
    loop.candidates = lambda source: [c for c in listed(source) if c.recipe.name in RECIPES]
    for name in ("whole", "killed"):
        save_artifact(
            tiny_model(SPEC, uniform("bf16")), tokenizer, folder / name / "out", {"note": "an older one"}
        )
    if fork(lambda: search(folder / "whole", model, None)) != 0:
        return 1
    told = folder / "place"
    kills: list[str] = []
    broken: list[str] = []
    while len(kills) < MOST_KILLS:
        killer = Killer(set(kills), told)
        code = fork(lambda killer=killer: search(folder / "killed", model, killer))  # type: ignore[misc]
        if code != -signal.SIGKILL:
            print(json.dumps({"kills": kills, "broken": broken}))
            return abs(code)
        kills.append(told.read_text())
        try:
            load_artifact(folder / "killed" / "out")
        except FlatoutError as error:
            broken.append(f"{kills[-1]}: {error}")
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
