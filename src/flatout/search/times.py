"""Candidates' times on one scale: each is timed in turns with the fastest so far.

A shared machine's memory rate moves by a third within minutes, so seconds taken minutes apart do not say
which of two candidates is faster. A candidate's profile says where its time goes; how long it takes is the
ratio of a few pairs (verify/speed.py:turns) times what its rival takes, whose time is one of the same scale.
The scale is that of the original, which is timed first and alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatout.core.formats import Recipe
from flatout.perf.profile import Profile, profile_from_json, profile_to_json, rescaled
from flatout.search.context import Context

_PROFILE_S = 1.0
_TURNS_S = 2.0  # more where a sample takes long: two pairs of each phase at least

Phases = Mapping[str, float]
"""Seconds of "prefill_s" (the whole prompt) and "decode_s" (one step)."""


class Times:
    """Profiles of one search by recipe name, and what they were scaled by."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._profiles: dict[str, Profile] = {}
        self._scales: dict[str, dict[str, float]] = {}  # phase -> common seconds over those of the profile

    def profile(self, recipe: Recipe, rival: Recipe | None = None) -> Profile:
        """Where the time of a candidate goes, in the seconds of its own minute; measured once a run. rival:
        what it will be compared with, which stays loaded meanwhile."""
        if recipe.name not in self._profiles:
            self._profiles[recipe.name] = self._profile(recipe, rival)
        return self._profiles[recipe.name]

    def profiles(self) -> list[Profile]:
        """All of them on the common scale."""
        return [rescaled(profile, self._scales.get(name, {})) for name, profile in self._profiles.items()]

    def measure(self, recipe: Recipe, rival: Recipe | None, rivals: Phases | None) -> dict[str, float]:
        """Seconds of a candidate's phases and of the workload; `rivals` are those of `rival`, None for both
        where there is nothing to compare with."""
        alone = dict(zip(("prefill", "decode"), self.profile(recipe, rival).seconds, strict=True))
        found = alone
        if rival is not None and rivals is not None:
            ratios = self._turns(rival, recipe)
            found = {phase: rivals[f"{phase}_s"] / ratio for phase, ratio in ratios.items()}
            self._scales[recipe.name] = {phase: found[phase] / alone[phase] for phase in found}
        workload = self._context.request.workload
        return {
            "prefill_s": found["prefill"],
            "decode_s": found["decode"],
            "workload_s": workload.seconds(found["prefill"], found["decode"]),
        }

    def _turns(self, first: Recipe, second: Recipe) -> dict[str, float]:
        context = self._context
        workload = context.request.workload

        def compute() -> dict[str, Any]:
            context.build(first)
            context.build(second)
            return context.bench.turns(first, second, workload, _TURNS_S)

        sides = {"first": context.inputs(first), "second": context.inputs(second)}
        inputs = {**sides, "workload": workload, "code": context.bench.code}
        return {phase: float(r) for phase, r in context.timed("turns", second.name, inputs, compute).items()}

    def _profile(self, recipe: Recipe, rival: Recipe | None) -> Profile:
        context, workload = self._context, self._context.request.workload
        where = (context.hardware, workload)

        def compute() -> dict[str, Any]:
            for built in (rival, recipe):
                if built is not None:
                    context.build(built)
            return profile_to_json(context.bench.profile(recipe, *where, _PROFILE_S))

        inputs = {**context.inputs(recipe), "workload": workload, "code": context.bench.code}
        found = context.timed("profile", recipe.name, inputs, compute)
        spec = recipe.child(context.bench.source.spec)
        return profile_from_json(found, spec, recipe, *where, context.bench.threads)
