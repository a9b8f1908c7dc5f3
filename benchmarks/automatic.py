"""Our joint search beside uniform recipes and the automatic modes of OpenVINO and NNCF, by our yardsticks.

    python benchmarks/automatic.py ORIGINAL ARTIFACT [--uniform w8a8-g32,w6a16/smooth-gptq]
                                   [--modes accuracy,mixed] [--max-loss 1%] [--workload 1024+96] [--threads N]

ORIGINAL is a checkpoint off any grid (benchmarks/make_offgrid.py), ARTIFACT what `flatout optimize ORIGINAL`
made of it. Every mode (benchmarks/automatic_openvino.py) and recipe gets the shipped calibration passages, a
mode also the validation passages, to keep its budget. What comes out is certified on the sealed passages like
our own, with one opening each, and timed against ARTIFACT in pairs that take turns, prefill and decode.
Prints a table and writes a file to benchmarks/results. Needs a quiet machine; the first run makes OpenVINO's
environment, and each mode takes minutes (--calibration, --validation, --sealed and --seconds make a trial
run short).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flatout.bench import peers
from flatout.bench.install import install
from flatout.bench.worker import LOAD_S, Worker
from flatout.compress.apply import compress
from flatout.core.checkpoint import Checkpoint, open_checkpoint
from flatout.core.files import sha256_of
from flatout.core.folder import write_folder
from flatout.core.types import to_json
from flatout.engine.cpu import CpuRunner
from flatout.engine.load import load
from flatout.engine.reference import ReferenceRunner
from flatout.errors import FlatoutError
from flatout.hardware.detect import available_cores
from flatout.search.recipes import recipe_from_name
from flatout.search.request import parse_max_loss, parse_workload
from flatout.search.texts import read_texts
from flatout.verify.certificate import Certificate, Side
from flatout.verify.drivers import Driver, RunnerDriver
from flatout.verify.examination import examine, plan_opening
from flatout.verify.quality import Cluster, fits, pair_scores, score_model
from flatout.verify.race import race_workload
from record import measured_here, write

HERE = Path(__file__).resolve().parent
MODES = ("accuracy", "mixed")
PAGE = 64


class WorkerDriver:
    """A worker as a `verify.drivers.Driver`; every decode sample has its own, untimed prefill."""

    def __init__(self, worker: Worker) -> None:
        self.name, self.prefill, self.decode = worker.name, worker.prefill, worker.decode

    def decoder(self, prompts: Sequence[Sequence[int]], tokens: int) -> Callable[[], float]:
        return lambda: self.decode(prompts, tokens)


def start(mode: str, python: Path) -> Worker:
    serve = Path(peers.__file__).parent / "workers" / "serve.py"
    environment = peers.environment(peers.OPENVINO) | {"PYTHONPATH": str(HERE)}
    return Worker(f"OpenVINO {mode}", [str(python), str(serve), "automatic_openvino"], environment)


def convert(mode: str, python: Path, original: Checkpoint, folder: Path, **arguments: Any) -> Path:
    """What the mode makes of the original, written in float32 first."""
    source, target = folder / f"original-{mode}", folder / mode
    source.mkdir()
    weights = {name: original.array(name) for name in original.names}
    write_folder(source, original.spec, original.tokenizer, weights)
    with start(mode, python) as worker:
        worker.request("convert", 4 * LOAD_S, source=str(source), target=str(target), mode=mode, **arguments)
    return target


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("original")
    parser.add_argument("artifact")
    parser.add_argument("--uniform", default="", help="recipes of ours for the whole model")
    parser.add_argument("--modes", default=",".join(MODES), help='of NNCF; "" for none')
    parser.add_argument("--max-loss", default="1%")
    parser.add_argument("--workload", help="PROMPT+OUTPUT, default as of `flatout optimize`")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--calibration", type=int, default=48, help="passages")
    parser.add_argument("--validation", type=int, default=32, help="passages")
    parser.add_argument("--sealed", type=int, help="passages; default as many as the plan asks for")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each A/B test")
    parser.add_argument("--theme", default="automatic", help="of the results file")
    parser.add_argument("--dry", action="store_true", help="write no results file")
    args = parser.parse_args()
    margin, threads = parse_max_loss(args.max_loss), args.threads
    workload = parse_workload(args.workload, "latency")
    original = open_checkpoint(args.original)
    texts = read_texts(original.tokenizer, original.tokenizer.sha256, original.spec)
    pages = max(2 * fits(original.spec), workload.prompt + workload.output) // PAGE + 2
    reference = ReferenceRunner(original, pages, PAGE, as_served=False)
    ours = load(args.artifact, runner="cpu", threads=threads, max_tokens=pages * PAGE).runner
    side = Side(source=args.original, sha256=original.sha256, recipe="original", runner=reference.name)
    known: dict[tuple[int, ...], np.ndarray] = {}

    def score_original(clusters: Sequence[Cluster]) -> list[np.ndarray]:
        for cluster in clusters:
            if cluster.tokens not in known:
                known[cluster.tokens] = score_model(reference, [cluster], sound=bool(known))[0]
        return [known[cluster.tokens] for cluster in clusters]

    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flatout-automatic-")))
        lists = {
            "calibration": [list(c.tokens) for c in texts.calibration[: args.calibration]],
            "validation": [list(c.tokens) for c in texts.validation[: args.validation]],
        }
        (folder / "texts.json").write_text(json.dumps(lists))

        def certify(
            name: str, sha256: str, score: Callable[[Sequence[Cluster]], list[np.ndarray]]
        ) -> Certificate:
            seen = texts.validation[: max(args.validation, 12)]
            losses = pair_scores(seen, score_original(seen), score(seen))
            plan = plan_opening(losses, texts.holdout, side, margin=margin, ledger=folder / "ledger")
            if args.sealed is not None:
                plan = replace(plan, scored=args.sealed)
            return examine(
                texts.holdout, plan, original=side, score_original=score_original, score_optimised=score,
                optimised=Side(source=name, sha256=sha256, recipe=name, runner=name), margin=margin,
                ledger=folder / "ledger",
            )  # fmt: skip

        artifact = Path(args.artifact) / "model.safetensors"
        found = certify("flatout", sha256_of([artifact]), lambda clusters: score_model(ours, clusters))
        rows.append(row("flatout " + ours.recipe.name, found, None))  # type: ignore[attr-defined]

        def compare(found: Certificate, other: Driver) -> None:
            race = race_workload(
                other, RunnerDriver(ours), original.tokenizer, workload,
                prefill_s=args.seconds, decode_s=args.seconds,
            )  # fmt: skip
            rows.append(row(other.name, found, race))

        for name in filter(None, args.uniform.split(",")):
            recipe = recipe_from_name(name, original)
            runner = CpuRunner(compress(original, recipe, lists["calibration"]), threads, num_pages=pages)
            runner.name = name
            key = f"{name} of {original.sha256}"
            found = certify(name, key, lambda clusters, runner=runner: score_model(runner, clusters))
            compare(found, RunnerDriver(runner))
            del runner
        modes = [mode for mode in args.modes.split(",") if mode]

        def tell(what: str, done: int, of: int) -> None:
            print(what, file=sys.stderr)

        python = install(peers.OPENVINO, tell) if modes else Path()
        for mode in modes:
            target = convert(
                mode, python, original, folder,
                threads=threads, texts=str(folder / "texts.json"), budget=math.log1p(margin),
            )  # fmt: skip
            worker = stack.enter_context(start(mode, python))
            worker.load(str(target), threads)

            def score(clusters: Sequence[Cluster], worker: Worker = worker) -> list[np.ndarray]:
                return [np.array(worker.score(list(c.tokens)), dtype=np.float32) for c in clusters]

            found = certify(worker.name, sha256_of(sorted(target.iterdir())), score)
            compare(found, WorkerDriver(worker))
            worker.close()
    print(
        "| | verdict | loss | at most | our prefill over it | our decode over it |\n|---|---|--:|--:|--:|--:|"
    )
    for one in rows:
        ratios = [
            "" if one["race"] is None else f"{r['ratio']:.2f}x ({r['low']:.2f} to {r['high']:.2f})"
            for r in (one["race"] or dict.fromkeys(("prefill", "decode"))).values()
        ]
        upper = "-" if one["loss_upper"] is None else f"{one['loss_upper']:.2%}"
        print(f"| {one['name']} | {one['verdict']} | {one['loss']:.2%} | {upper} | {' | '.join(ratios)} |")
    if not args.dry:
        result = {
            **measured_here("torch", "transformers"),
            "peers": list(peers_of()) if modes else [],
            "threads": threads,
            "margin": margin,
            "workload": to_json(workload),
            "rows": rows,
        }
        print(write(args.theme, result, command=" ".join(["python benchmarks/automatic.py", *sys.argv[1:]])))
    return 0


def peers_of() -> Sequence[str]:
    from flatout.bench.install import OPENVINO_PACKAGES, OPTIMUM

    return (*OPENVINO_PACKAGES, *OPTIMUM)


def row(name: str, found: Certificate, race: Any) -> dict[str, Any]:
    return {
        "name": name,
        "verdict": found.verdict,
        "loss": found.loss,
        "loss_upper": found.loss_upper if math.isfinite(found.loss_upper) else None,
        "tokens": found.tokens,
        "k": found.k,
        "race": None if race is None else to_json(race),
    }


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FlatoutError as error:
        sys.exit(f"automatic: {error}")
