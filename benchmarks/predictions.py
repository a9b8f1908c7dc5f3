"""How far predicted times are from measured ones: whole steps of mixed recipes, from a latency table.

    python benchmarks/predictions.py [MODEL] [--recipes N] [--workload 1024+96 ...] [--seed S] [--write]

Weights are random in MODEL's shapes, for times do not depend on them (but a head's screen does, so heads are
those of stand-ins). For each workload the table is measured anew, as a search does it (perf/tables.py); then
every format throughout, and recipes that draw a format for each linear of each layer, the head and the cache.
Each is predicted, then timed, and corrects the next as in a search (perf/predict.py:refit). Two rows:

    measured      every format stands in the table
    calibrated    a format throughout that was struck from the table: others of its arithmetic stand in

Errors are |measured / predicted - 1| of the workload's seconds. Coverage is the share of 90 % intervals that
held what was measured, of predictions whose interval comes from earlier ones. Needs a quiet machine and about
four minutes a workload. Prints a table; --write keeps it in benchmarks/results.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flatout.core.checkpoint import open_checkpoint
from flatout.core.formats import Recipe
from flatout.core.spec import ModelSpec
from flatout.core.types import Hardware, Workload
from flatout.hardware.ceilings import measure_ceilings
from flatout.hardware.detect import available_cores
from flatout.perf.predict import (
    ENOUGH,
    Calibration,
    predict,
    refit,
    transfer_residuals,
    workload_prediction,
)
from flatout.perf.profile import Profile, profile_model
from flatout.perf.tables import latency_table, random_runner
from flatout.search.joint import recipe_of, space_of, stand_ins
from flatout.search.request import parse_workload
from flatout.verify.foreign_load import until_quiet
from record import measured_here, write

SECONDS, STEPS = 1.5, 16


def timed(spec: ModelSpec, recipe: Recipe, hardware: Hardware, workload: Workload, threads: int) -> Profile:
    """The profile of a model of random weights, as undisturbed as it comes."""
    runner = random_runner(spec, recipe, workload, threads)

    def measure() -> Profile:
        return profile_model(
            runner, recipe, hardware, workload, threads=threads, max_seconds=SECONDS, steps=STEPS
        )

    return min(until_quiet(measure), key=lambda profile: workload.seconds(*profile.seconds))


def struck(table: Calibration, name: str) -> Calibration:
    """`table` without format `name`."""
    fractions = {key: value for key, value in table.fractions.items() if key[2] != name}
    return replace(table, fractions=fractions, transfer=transfer_residuals(fractions))


def recipes_of(spaces: Mapping[str, Sequence[str]], spec: ModelSpec, count: int, seed: int) -> list[Recipe]:
    """Every format throughout that all linears may take, then `count` recipes of drawn formats."""
    draw = random.Random(seed)
    linears = [set(names) for place, names in spaces.items() if place.startswith("layers.")]
    heads, caches = spaces["head"], spaces["kv_cache"]
    found = [
        Recipe(name=name, layers=name, head=heads[0], embedding=heads[0], kv_cache=caches[0])
        for name in sorted(set.intersection(*linears))
    ]
    for i in range(count):
        few = {place: draw.choice(names) for place, names in spaces.items()}
        found.append(recipe_of(few, spec, f"drawn-{i + 1}"))
    return found


def compare(
    spec: ModelSpec, recipes: Sequence[Recipe], stand: Sequence[Recipe], workload: Workload, threads: int
) -> list[dict[str, Any]]:
    """One entry for every prediction: tier, recipe, workload, predicted seconds with their interval, measured
    ones, and whether the interval came from enough earlier predictions."""
    hardware = measure_ceilings()
    table = latency_table(spec, stand, workload, hardware, threads, fresh=True).calibration()
    profiles: list[Profile] = []
    residuals: dict[str, list[float]] = {"measured": [], "calibrated": []}
    rows = []
    for recipe in recipes:
        known = {"measured": refit(table, profiles, residuals["measured"]) if profiles else table}
        if not recipe.overrides:
            known["calibrated"] = struck(table, recipe.layers)
        expected = {
            tier: workload_prediction(
                workload, predict(spec, recipe, hardware, workload, calibration=calibration, threads=threads)
            )
            for tier, calibration in known.items()
        }
        profile = timed(spec, recipe, hardware, workload, threads)
        measured = workload.seconds(*profile.seconds)
        for tier, found in expected.items():
            low, mid, high = found.low, found.mid, found.high
            row = {"tier": tier, "recipe": recipe.name, "workload": f"{workload.prompt}+{workload.output}"}
            row |= {"low": low, "predicted": mid, "high": high, "measured": measured}
            row["learned"] = tier == "calibrated" or len(residuals[tier]) >= ENOUGH
            rows.append(row)
            residuals[tier].append(math.log(measured / mid))
            print(
                f"{row['workload']:9} {tier:10} {recipe.name:12} {mid:.3f} s, took {measured:.3f}",
                file=sys.stderr,
            )
        profiles.append(profile)
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one tier: median error and the share of learned intervals that held."""
    errors = [abs(row["measured"] / row["predicted"] - 1) for row in rows]
    learned = [row for row in rows if row["learned"]]
    held = sum(row["low"] <= row["measured"] <= row["high"] for row in learned)
    return {
        "predictions": len(rows),
        "median_error": statistics.median(errors),
        "largest_error": max(errors),
        "intervals": len(learned),
        "covered": held / len(learned) if learned else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--recipes", type=int, default=32, help="drawn for each workload")
    parser.add_argument("--workload", action="append", help="default: 1024+96 and 128+512")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    source = open_checkpoint(args.model)
    space, threads = space_of(source), available_cores()
    rows = []
    for number, text in enumerate(args.workload or ["1024+96", "128+512"]):
        recipes = recipes_of(space.choices(), source.spec, args.recipes, args.seed + number)
        workload = parse_workload(text, "latency")
        rows += compare(source.spec, recipes, stand_ins(space), workload, threads)
    tiers = {tier: summary([r for r in rows if r["tier"] == tier]) for tier in ("measured", "calibrated")}
    for tier, found in tiers.items():
        covered = (
            ""
            if found["covered"] is None
            else f", {found['covered']:.0%} of {found['intervals']} intervals held"
        )
        print(
            f"{tier}: {found['predictions']} predictions, median error {found['median_error']:.1%}, "
            f"largest {found['largest_error']:.1%}{covered}"
        )
    if args.write:
        result = {**measured_here(), "random_weights": True, "tiers": tiers, "rows": rows}
        print(write("predictions", result, " ".join(["python benchmarks/predictions.py", *sys.argv[1:]])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
