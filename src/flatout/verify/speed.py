"""Is B faster than A on this machine? Interleaved pairs, a distribution-free interval, and no peeking at
the answer.

Both sides are warmed, then timed in blocks A B B A or B A A B, drawn at random, so that drift and
neighbours hit both alike. Each block gives two pairs; a pair's ratio is seconds of A / seconds of B, above
1 when B is faster. At least `min_pairs` pairs, until the interval of the median is narrower than `width` of
it or the time is spent: the rule looks at the width only, never at the side of 1 on which the ratio lies. A
pair during which other processes kept more than `max_foreign` of the cores busy is thrown away and counted;
when the time ends with too few clean pairs, all are used, which widens the interval, and the result says
so.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from flatout.core.garbage import without_garbage_collection
from flatout.core.types import Measurement, measurement
from flatout.errors import ConfigError, EvidenceError
from flatout.hardware.detect import available_cores
from flatout.verify.foreign_load import MAX_FOREIGN, Ticks, foreign_load, read_ticks
from flatout.verify.statistics import Interval, order_statistic_interval

Timed = Callable[[], float]
"""Does the work once and returns the seconds that count."""

_FEWEST = 6  # pairs below which no 95 % interval of a median exists
_METER_S = 0.02  # CPU seconds that /proc/stat may be off by: two ticks
SETTLE_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedResult:
    """A paired comparison. ratio, low, high: seconds of A / seconds of B (speed of B in units of A).

    pairs: used; thrown_away: pairs under foreign load that were left out; kept_noisy: such pairs that had
    to be used; foreign_load: median cores kept busy by others during the pairs used, None without a meter.
    timed_share: part of the work that a sample timed; seconds are those of the whole.
    """

    ratio: float
    low: float
    high: float
    coverage: float
    seconds_a: Measurement
    seconds_b: Measurement
    samples_a: tuple[float, ...]
    samples_b: tuple[float, ...]
    pairs: int
    thrown_away: int
    kept_noisy: int
    foreign_load: float | None
    stopped_because: str
    timed_share: float = 1.0

    def of_whole(self, share: float) -> SpeedResult:
        """The same comparison as seconds of the whole work, of which `share` was timed."""

        def whole(seconds: Measurement) -> Measurement:
            return replace(
                seconds, median=seconds.median / share, p20=seconds.p20 / share, p80=seconds.p80 / share
            )

        return replace(
            self,
            seconds_a=whole(self.seconds_a),
            seconds_b=whole(self.seconds_b),
            samples_a=tuple(sample / share for sample in self.samples_a),
            samples_b=tuple(sample / share for sample in self.samples_b),
            timed_share=share,
        )

    @property
    def faster(self) -> bool:
        """Whether B is faster than A beyond doubt: the promise never to be slower."""
        return self.low > 1.0

    @property
    def not_slower(self) -> bool:
        """Whether B is at most 2 % slower, for objectives where another quantity has to win."""
        return self.low > 0.98


@dataclass(frozen=True, slots=True)
class Sample:
    """One timing. foreign: cores that others kept busy meanwhile, None without a meter; noisy: too many."""

    seconds: float
    foreign: float | None
    noisy: bool


@dataclass(frozen=True, slots=True)
class _Pair:
    a: float
    b: float
    foreign: float | None
    noisy: bool


def ab_test(
    run_a: Timed,
    run_b: Timed,
    *,
    min_pairs: int = 9,
    max_seconds: float = 60.0,
    width: float = 0.02,
    coverage: float = 0.95,
    warmups: int = 1,
    max_foreign: float = MAX_FOREIGN,
    settle_s: float = SETTLE_S,
    seed: int = 0,
    cores: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SpeedResult:
    """Time two sides against each other; the module docstring has the rules.

    max_seconds bounds the timed part: it may run over by one block, or longer to reach the fewest pairs
    that give an interval. width: of the interval, relative to the median. max_foreign: share of `cores`
    (all that this process may use by default). settle_s: pause between samples, in which spinning threads
    of the other side go to sleep.
    """
    if min_pairs < _FEWEST or max_seconds <= 0 or not 0 < width < 1 or not 0.5 <= coverage < 1:
        raise ConfigError(
            f"a comparison needs at least {_FEWEST} pairs, time, and a width and coverage below 1",
            f"{min_pairs} pairs, {max_seconds} s, width {width}, coverage {coverage}",
            "the defaults",
        )
    allowed = max_foreign * (cores or available_cores())
    draw = random.Random(seed)
    for _ in range(warmups):
        run_a()
        run_b()
    pairs: list[_Pair] = []
    with without_garbage_collection(collect=True):
        started = time.perf_counter()
        while True:
            pairs += _block(run_a, run_b, draw, settle_s, allowed)
            clean = [pair for pair in pairs if not pair.noisy]
            if progress is not None:
                progress(min(len(clean), min_pairs), min_pairs)
            if len(clean) >= min_pairs:
                interval = _interval(clean, coverage)
                if interval.high - interval.low <= width * interval.median:
                    return _result(clean, pairs, interval, f"the interval is within {width:.0%}")
            if time.perf_counter() - started >= max_seconds and len(pairs) >= min_pairs:
                if len(clean) >= min_pairs:
                    return _result(clean, pairs, _interval(clean, coverage), "the time is spent")
                reason = "the time is spent, with too few pairs free of other load"
                return _result(pairs, pairs, _interval(pairs, coverage), reason)


def turns(
    run_a: Timed,
    run_b: Timed,
    *,
    max_seconds: float,
    min_pairs: int = 2,
    max_foreign: float = MAX_FOREIGN,
    settle_s: float = SETTLE_S,
    seed: int = 0,
    cores: int | None = None,
) -> float:
    """Median of seconds of A / seconds of B over a few pairs in blocks of random order, without a warm-up;
    pairs under foreign load are left out where others are left. To choose by: there is no interval, so
    nothing is claimed from it."""
    allowed, draw = max_foreign * (cores or available_cores()), random.Random(seed)
    pairs: list[_Pair] = []
    with without_garbage_collection(collect=True):
        started = time.perf_counter()
        while len(pairs) < min_pairs or time.perf_counter() - started < max_seconds:
            pairs += _block(run_a, run_b, draw, settle_s, allowed)
    clean = [pair for pair in pairs if not pair.noisy] or pairs
    return statistics.median(pair.a / pair.b for pair in clean)


def time_sample(
    run: Timed, *, allowed: float, settle_s: float = SETTLE_S, ticks: Callable[[], Ticks | None] | None = None
) -> Sample:
    """Time one side once, after a pause in which spinning threads of the other side go to sleep.

    allowed: cores that others may keep busy before the sample counts as noisy, beyond what two ticks of the
    meter could feign in a short one. ticks: the meter, where the work is not all done by this process. Raises
    EvidenceError when the time is not positive.
    """
    read = ticks or read_ticks
    time.sleep(settle_s)
    before = read()
    value = run()
    load = foreign_load(before, read())
    if not (math.isfinite(value) and value > 0):
        raise EvidenceError("a timing must be positive", f"{value} s", "a longer run")
    return Sample(value, load, load is not None and load > allowed + _METER_S / value)


def _block(run_a: Timed, run_b: Timed, draw: random.Random, settle_s: float, allowed: float) -> list[_Pair]:
    """Two pairs, A first in one of them, in random order."""
    a_first = draw.random() < 0.5
    return [_time_pair(run_a, run_b, first, settle_s, allowed) for first in (a_first, not a_first)]


def _time_pair(run_a: Timed, run_b: Timed, a_first: bool, settle_s: float, allowed: float) -> _Pair:
    """Time both sides in the given order. The pair is noisy when either sample is."""
    runs = (run_a, run_b) if a_first else (run_b, run_a)
    samples = [time_sample(run, allowed=allowed, settle_s=settle_s) for run in runs]
    a, b = samples if a_first else samples[::-1]
    loads = [sample.foreign for sample in samples if sample.foreign is not None]
    return _Pair(a.seconds, b.seconds, max(loads) if loads else None, a.noisy or b.noisy)


def _interval(pairs: list[_Pair], coverage: float) -> Interval:
    return order_statistic_interval([pair.a / pair.b for pair in pairs], coverage)


def _result(pairs: list[_Pair], timed: list[_Pair], interval: Interval, reason: str) -> SpeedResult:
    a, b = [pair.a for pair in pairs], [pair.b for pair in pairs]
    loads = sorted(pair.foreign for pair in pairs if pair.foreign is not None)
    return SpeedResult(
        ratio=interval.median,
        low=interval.low,
        high=interval.high,
        coverage=interval.coverage,
        seconds_a=measurement("A", "s", a),
        seconds_b=measurement("B", "s", b),
        samples_a=tuple(a),
        samples_b=tuple(b),
        pairs=len(pairs),
        thrown_away=len(timed) - len(pairs),
        kept_noisy=sum(pair.noisy for pair in pairs),
        foreign_load=loads[len(loads) // 2] if loads else None,
        stopped_because=reason,
    )
