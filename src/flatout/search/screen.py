"""Steps 1 to 3 of the loop: predict every candidate, build and time the promising ones, look at their loss.

Candidates are tried in the order of their predicted time, but until one is likely to be certified, those
first that round least. One is passed over when even its optimistic prediction is no faster than a candidate
that already passed, or when its expected loss is beyond the budget; every measured candidate corrects the
predictions of the rest. A loss is first looked at on a few passages,
which is enough to see a failure of tens of per cent, then on as many as the power analysis of the hold-out
needs. Where that leaves the candidate undecided that would be the best one, it is looked at on all of them.
Times are taken in turns with the fastest so far (search/times.py), so they compare on a shared machine.

Once a first candidate has been scored, so that something usable is known early, the machine's latency table
and the model's sensitivities are measured. From then on listed candidates are judged by them before they
are built, and recipes that were found (search/joint.py) join the list, one at a time: each is measured,
corrects times and losses, and makes room for the next until none is predicted to be better.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import replace

from flatout.core.formats import Recipe, parse_format
from flatout.errors import EvidenceError, UnsupportedModelError
from flatout.perf.predict import (
    Calibration,
    StepTimes,
    calibrate,
    predict,
    refit,
    workload_prediction,
)
from flatout.perf.profile import Profile
from flatout.perf.tables import add_residuals
from flatout.search.context import Context
from flatout.search.joint import Joint, formats_of
from flatout.search.prepare import prepare
from flatout.search.recipes import ORIGINAL, Candidate, calibrated_candidates
from flatout.search.rows import Row, by_suitability, loss_of, memory_bytes, two_standard_errors
from flatout.search.solve import Solution
from flatout.search.times import Times
from flatout.search.units import megabytes
from flatout.verify.certificate import Side
from flatout.verify.examination import Plan, plan_opening
from flatout.verify.quality import ClusterLoss, pair_scores

QUICK, VALIDATION = 8, 24
"""Validation passages of the first look (about 3,600 tokens), and of the one that a plan is made from."""

NEAR = 1.10
"""Candidates within this factor of the best time are equally good for the stated workload, which is itself a
guess: they are scored, and those that suit most other workloads are preferred (`by_suitability`)."""

_PROPOSALS = 3  # recipes found, built and measured at most
_DRAFTS = 6  # recipes found and built at most, of which those that diverge too far are not measured
_COMPARED, _COMPARED_TOKENS = 5, 128  # validation passages that divergences are taken on, and their tokens
_SLACK = 1.05  # of the budget that a found recipe may be expected to lose once its divergence is known
_GAIN = 0.96  # a further one must be predicted to take less than this part of the best time
_SHY = 0.85  # of the loss of a found recipe that failed its certificate, the next one may lose this part
_HALVINGS = 7

_KEEPS = {"gptq": (0.15, 0.4, 0.85), "smooth": (0.02, 0.3, 1.0)}
_FINER = (0.5, 0.75, 1.0)
"""Share of its relative's loss that a method, or a scale for half the weights, leaves: optimistic, usual,
pessimistic. Assumptions that only decide what is not worth building: GPTQ leaves 0.4 to 0.85 in published
4-bit results and less on small models; the largest of 32 normal weights is 0.86 of the largest of 64, and the
loss goes with the square of the step."""


class Screen:
    """Works through the candidates; `rows` holds what is known, in the order of the list of candidates."""

    def __init__(self, context: Context, candidates: Sequence[Candidate]) -> None:
        self.context = context
        self.rows = [Row(candidate=c, memory_bytes=memory_bytes(context, c.recipe)) for c in candidates]
        self.times = Times(context)
        self.residuals: list[float] = []
        self.joint: Joint | None = None
        self._prepared = False
        self._table: Calibration | None = None
        self._earlier: list[float] = []  # residuals of earlier searches on this machine
        self._rooms: dict[str, float] = {}  # nats a token that a candidate could lose and still be certified
        self.first_usable_s: float | None = None  # when the first candidate was likely to be certified
        self._proposals, self._drafts = _PROPOSALS, _DRAFTS  # that may still be made
        self._undecided: set[str] = set()  # failed on the text of a plan, but not beyond its doubt
        self._refuse_too_large()

    def run(self) -> list[Row]:
        """Screen every candidate and return those that passed, the best first."""
        self.predict()
        self._measure(self.row(ORIGINAL.name))
        self._set(ORIGINAL.name, status="original")
        self.predict()
        return self._finalists()

    def again(self, tried: Collection[str]) -> list[Row]:
        """Like `run` without those that were `tried` and not proven: what was passed over as slower than they
        are has its chance, and so has another found recipe, which loses less."""
        for row in self.rows:
            if row.status == "slower" and row.name not in tried:
                self._set(row.name, status="waiting", reason="")
            elif row.status == "failed" and row.name in tried and row.loss is not None:
                self._rooms[row.name] = min(_SHY * math.log1p(row.loss.value), self._rooms[row.name])
        self._proposals, self._drafts = max(self._proposals, 1), max(self._drafts, 2)
        self.predict()
        self._find()
        return [row for row in self._finalists() if row.name not in tried]

    def _finalists(self) -> list[Row]:
        while True:
            while (row := self._next()) is not None:
                self._try(row)
                self.predict()
                self._find()
            rows = self.ranked([r for r in self.rows if r.status == "passed" or r.name in self._undecided])
            if not rows or rows[0].status == "passed":
                return [row for row in rows if row.status == "passed"]
            self._undecided.discard(rows[0].name)
            self._decide(rows[0], self.losses(rows[0].recipe, len(self.context.texts.validation)))
            self._find()

    def _refuse_too_large(self) -> None:
        limit = self.context.request.max_memory
        for row in self.rows:
            if limit is not None and row.memory_bytes > limit and row.recipe != ORIGINAL:
                reason = f"takes {megabytes(row.memory_bytes)}, at most {megabytes(limit)} are allowed"
                self._set(row.name, status="rejected", reason=reason)

    def _find(self) -> None:
        """Add the recipe that is best by all that is known, unless it is no better than what was measured."""
        if self.context.request.recipe is not None or not self._rooms:
            return
        if not self._prepared:
            self._prepared = True
            self._prepare()
        if self.joint is None or self._table is None:
            return
        if any(row.status == "waiting" and row.recipe.by_library for row in self.rows):
            return
        calibration = self._calibration()
        passed = [row for row in self.rows if row.status == "passed"]
        reference = min(passed, key=self.cost, default=self.row(ORIGINAL.name)).recipe
        least = min((self._predicted(row.recipe, calibration) for row in passed), default=math.inf)
        while self._proposals and self._drafts:
            recipe = self.joint.propose(self._budget(), calibration, reference)
            if recipe is None or self._is_known(recipe):
                break
            if self._predicted(recipe, calibration) > _GAIN * least:
                self._proposals = 0  # it would not pay for being built
                break
            self._drafts -= 1
            candidate = Candidate(recipe=recipe, why="found: least predicted time within the budget")
            self.rows.append(Row(candidate=candidate, memory_bytes=memory_bytes(self.context, recipe)))
            if self._stays_near(recipe):
                self._proposals -= 1
                break
        self.predict()

    def frontier(self) -> list[Solution]:
        """The predicted trade-off by all that was measured, least loss first; none where no recipes are
        found."""
        if self.joint is None or self._table is None:
            return []
        passed = [row for row in self.rows if row.status in ("passed", "chosen")]
        reference = min(passed, key=self.cost, default=self.row(ORIGINAL.name)).recipe
        return self.joint.trade_off(self._calibration(), reference)

    def _is_known(self, recipe: Recipe) -> bool:
        """Whether a candidate that was looked at is this one."""
        spec = self.context.bench.source.spec
        seen = [row for row in self.rows if row.loss is not None or row.status == "rejected"]
        return formats_of(recipe, spec) in [formats_of(row.recipe, spec) for row in seen]

    def _stays_near(self, recipe: Recipe) -> bool:
        """Whether a found recipe may keep the budget as far as its divergence from the original says, which
        corrects the expected losses of the next."""
        joint, texts = self.joint, self.context.texts
        assert joint is not None
        clusters = [
            replace(cluster, tokens=cluster.tokens[:_COMPARED_TOKENS])
            for cluster in texts.validation[:_COMPARED]
        ]
        try:
            found = self.context.divergence(recipe, clusters)
        except (EvidenceError, UnsupportedModelError) as error:  # broken logits, or no kernel for a format
            self._set(recipe.name, status="rejected", reason=str(error))
            return False
        joint.observe(recipe, found)
        expected = joint.interval(recipe)
        if expected is not None and expected[1] > _SLACK * self._budget():
            reason = f"expected to lose {math.expm1(expected[1]):.1%} by its divergence of {found:.3f} nats"
            self._set(recipe.name, status="rejected", reason=reason)
            return False
        return True

    def _budget(self) -> float:
        """What a found recipe may lose, nats a token: the room that others of its method had, whose losses
        scatter alike, or else any."""
        alike = [room for name, room in self._rooms.items() if self.row(name).recipe.by_library]
        return min(alike) if alike else statistics.median(self._rooms.values())

    def _predicted(self, recipe: Recipe, calibration: Calibration | None) -> float:
        """What the objective minimises as predicted now, also for a recipe that was measured: so compared, a
        measurement's luck does not count."""
        workload = self.context.request.workload
        if workload.objective == "memory":
            return float(memory_bytes(self.context, recipe))
        return workload_prediction(workload, self._step_times(recipe, calibration)).mid

    def _step_times(self, recipe: Recipe, calibration: Calibration | None) -> StepTimes:
        context = self.context
        return predict(
            recipe.child(context.bench.source.spec),
            recipe,
            context.hardware,
            context.request.workload,
            calibration=calibration,
            threads=context.bench.threads,
        )

    def _prepare(self) -> None:
        """Measure the latency table and the sensitivities, once a search."""
        prepared = prepare(self.context)
        if prepared is None:
            return
        self._table, self._earlier, self.joint = prepared.table, prepared.earlier, prepared.joint
        if self.joint is not None:
            for row in self.rows:
                self._observe(row)
            self._add_calibrated(self.joint)

    def _add_calibrated(self, joint: Joint) -> None:
        """Join the uniform recipes that are made from the same calibration as found ones."""
        context = self.context
        if context.request.portable is not None:
            return  # no other engine loads 6 bits
        for candidate in calibrated_candidates(context.bench.source, joint.space.method):
            if joint.expected(candidate.recipe) is None:
                continue  # a format that is not in the space of this model
            memory = memory_bytes(context, candidate.recipe)
            self.rows.append(Row(candidate=candidate, memory_bytes=memory))
        self._refuse_too_large()
        self.predict()

    def _calibration(self) -> Calibration | None:
        """What has been measured, as predictions use it."""
        profiles = self.times.profiles()
        if self._table is None:
            return calibrate(profiles, self.residuals) if profiles else None
        return refit(self._table, profiles, [*self._earlier, *self.residuals])

    def _observe(self, row: Row) -> None:
        """Let a measured loss correct the expected ones."""
        if self.joint is None or row.loss is None or row.recipe == ORIGINAL:
            return
        measured, high = math.log1p(row.loss.value), math.log1p(row.loss.high)
        self.joint.observe(row.recipe, measured, (high - measured) / 2)

    def ranked(self, rows: list[Row]) -> list[Row]:
        """Rows by cost; those near the best by how well they suit other workloads. With memory as the
        objective, by cost alone."""
        rows = sorted(rows, key=self.cost)
        if self.context.request.workload.objective == "memory":
            return rows
        near = [row for row in rows if self.cost(row) <= NEAR * self.cost(rows[0])]
        return by_suitability(near, tolerance=NEAR) + rows[len(near) :]

    def cost(self, row: Row) -> float:
        """What the objective minimises: measured (or else predicted) seconds of the workload, or bytes."""
        if self.context.request.workload.objective == "memory":
            return float(row.memory_bytes)
        if row.times is not None:
            return row.times["workload_s"]
        return row.workload.mid if row.workload is not None else math.inf

    def predict(self) -> None:
        """Predict every candidate again with what has been measured so far."""
        calibration = self._calibration()
        for i, row in enumerate(self.rows):
            if row.times is not None and row.predicted is not None:
                continue  # keep the prediction that was made before it was measured
            times = self._step_times(row.recipe, calibration)
            workload = workload_prediction(self.context.request.workload, times)
            self.rows[i] = replace(row, predicted=times, workload=workload)

    def _next(self) -> Row | None:
        """The waiting candidate with the least cost, after passing over those that cannot win."""
        best = min((self.cost(row) for row in self.rows if row.status == "passed"), default=math.inf)
        winner = next(
            (row.name for row in self.rows if row.status == "passed" and self.cost(row) == best), ""
        )
        for row in [row for row in self.rows if row.status == "waiting"]:
            if self._optimistic(row) >= best and self.cost(row) >= best * NEAR:
                self._set(row.name, status="slower", reason=f"predicted no better than {winner}")
                continue
            relative = self._relative(row)
            if relative is not None and relative.status in ("passed", "slower"):
                self._set(row.name, status="slower", reason=f"no faster than {relative.name}")
                continue
            expected = self._expected_loss(row)
            if expected is not None:
                self._set(row.name, expected_loss=expected)
                if expected[0] > self.context.request.max_loss:
                    reason = f"expected to lose at least {expected[0]:.1%}"
                    self._set(row.name, status="rejected", reason=reason)
        waiting = [row for row in self.rows if row.status == "waiting"]
        names = {row.name for row in waiting}
        ready = [row for row in waiting if row.candidate.relative not in names]
        if best == math.inf:
            return min(ready, key=lambda row: (_rounding(row.recipe), self.cost(row)), default=None)
        return min(ready, key=self.cost, default=None)

    def _optimistic(self, row: Row) -> float:
        if self.context.request.workload.objective == "memory" or row.workload is None:
            return self.cost(row)
        return row.workload.low

    def _relative(self, row: Row) -> Row | None:
        return next((r for r in self.rows if r.name == row.candidate.relative), None)

    def _expected_loss(self, row: Row) -> tuple[float, float, float] | None:
        """What a recipe may lose, from the measured or else the expected loss of its relative."""
        known_here = None if self.joint is None else self.joint.interval(row.recipe)
        if known_here is not None:
            low, mid, high = (math.expm1(x) for x in known_here)
            return low, mid, high
        relative, parts = self._relative(row), _KEEPS.get(row.recipe.method, _FINER)
        if relative is None:  # known from what is its own with finer scales?
            relative = next((r for r in self.rows if r.candidate.relative == row.name), None)
            if relative is None or relative.recipe.method != row.recipe.method:
                return None
            parts = 1 / _FINER[2], 1 / _FINER[1], 1 / _FINER[0]
        known = relative.expected_loss if relative.loss is None else (max(relative.loss.value, 0.0),) * 3
        if known is None:
            return None
        low, mid, high = (part * loss for part, loss in zip(parts, known, strict=True))
        return low, mid, high

    def _try(self, row: Row) -> None:
        """Build, time and score one candidate until it is clear what becomes of it."""
        max_loss = self.context.request.max_loss
        try:
            row = self._measure(row)
            best = min((self.cost(r) for r in self.rows if r.status == "passed"), default=math.inf)
            if self.cost(row) > best * NEAR:
                self._set(row.name, status="slower", reason="measured slower than one that passed")
                return
            loss = loss_of(self.losses(row.recipe, QUICK))
            if loss.low > max_loss:
                reason = f"loses {loss.value:.1%} on {loss.tokens:,} tokens"
                self._observe(self._set(row.name, loss=loss, status="rejected", reason=reason))
                return
            losses = self.losses(row.recipe)
        except (EvidenceError, UnsupportedModelError) as error:  # broken logits, or no kernel for the format
            if self.context.request.recipe is not None:
                raise
            self._set(row.name, status="rejected", reason=str(error))
            return
        self._decide(row, losses)

    def _decide(self, row: Row, losses: list[ClusterLoss]) -> None:
        """Passed if a certificate is likely. Undecided, where there is more text to look at, if that depends
        on which end of the loss's interval is true."""
        plan = self.plan(losses)
        likely, doubt = _suffices(plan), two_standard_errors(losses)
        more = len(losses) < len(self.context.texts.validation)
        if more and likely != _suffices(self.plan(losses, less=-doubt / 2 if likely else doubt)):
            self._undecided.add(row.name)
            likely = False
        if likely and self.first_usable_s is None:
            self.first_usable_s = self.context.stages.elapsed()
        first = row.loss is None or row.plan is None
        row = self._set(
            row.name,
            loss=loss_of(losses),
            plan=plan,
            status="passed" if likely else "failed",
            reason="" if likely else f"a certificate is unlikely: {plan}",
        )
        if first:
            self._rooms[row.name] = self._room(losses)
            self._observe(row)

    def _room(self, losses: list[ClusterLoss]) -> float:
        """The most nats a token that a candidate with clusters like these could lose and still be likely to
        be certified, by bisection."""
        seen = loss_of(losses)
        low, high = 0.0, math.log1p(self.context.request.max_loss)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            enough = _suffices(self.plan(losses, less=math.log1p(seen.value) - middle))
            low, high = (middle, high) if enough else (low, middle)
        return low

    def plan(self, losses: list[ClusterLoss], less: float = 0.0) -> Plan:
        """How much sealed text a certificate takes, from validation losses, or `less` nats below them."""
        context = self.context
        return plan_opening(
            losses,
            context.texts.holdout,
            original_side(context),
            margin=context.request.max_loss,
            less=less,
            k=context.next_opening(),
        )

    def losses(self, recipe: Recipe, passages: int = VALIDATION) -> list[ClusterLoss]:
        """Paired losses on the first `passages` validation clusters."""
        clusters = self.context.texts.validation[:passages]
        original = self.context.original_scores(clusters)
        return pair_scores(clusters, original, self.context.scores(recipe, clusters))

    def _measure(self, row: Row) -> Row:
        """Build, profile and time in turns with the fastest that passed, or the original; the times correct
        later predictions."""
        context, known = self.context, self.context.store.hits
        timed = [r for r in self.rows if r.status == "passed" and r.times is not None and r.name != row.name]
        rival = min(timed, key=lambda r: r.times["workload_s"] if r.times else math.inf, default=None)
        if rival is None and row.name != ORIGINAL.name:
            rival = self.row(ORIGINAL.name)
        if rival is None:
            times = self.times.measure(row.recipe, None, None)
        else:
            times = self.times.measure(row.recipe, rival.recipe, rival.times)
        if row.times is None and row.workload is not None and row.workload.tier != "datasheet":
            residual = math.log(times["workload_s"] / row.workload.mid)
            self.residuals.append(residual)
            if self._table is not None and context.store.hits == known:  # measured now, not before a kill
                add_residuals(context.hardware, [residual])
        return self._set(row.name, times=times)

    def profile(self, name: str) -> Profile:
        """Where the time of a candidate goes."""
        return self.times.profile(self.row(name).recipe)

    def row(self, name: str) -> Row:
        """The candidate called `name` as it is known now."""
        return next(row for row in self.rows if row.name == name)

    def _set(self, name: str, **changes: object) -> Row:
        """Replace the row called `name` and return the new one."""
        index = next(i for i, row in enumerate(self.rows) if row.name == name)
        self.rows[index] = replace(self.rows[index], **changes)  # type: ignore[arg-type]
        return self.rows[index]

    def note_loss(self, name: str, losses: list[ClusterLoss]) -> None:
        """A loss measured outside the screening, for the report; a loss on validation text stays."""
        if self.row(name).loss is None:
            self._set(name, loss=loss_of(losses))

    def mark(self, name: str, status: str, reason: str = "") -> None:
        """What later steps found out about a candidate."""
        self._set(name, status=status, reason=reason)


def original_side(context: Context) -> Side:
    """The original as certificates name it."""
    return Side(
        source=context.request.model,
        sha256=context.bench.sha256,
        recipe="original",
        runner="cpu (float32), as the reference",
    )


def _rounding(recipe: Recipe) -> int:
    """How much the layers are rounded, to order by: not at all where the file's own blocks are kept."""
    return 0 if recipe.method == "native" else 32 - parse_format(recipe.layers).bits


def _suffices(plan: Plan) -> bool:
    """Whether there is sealed text enough for a certificate that is likely to pass."""
    return plan.needed is not None and plan.needed <= plan.available
