"""The A/B test: its order, its stopping rule, its honesty under load; the drivers; the transformers
baseline."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.tiny import tiny_checkpoint_folder, tiny_spec
from tests.toy import ByteTokenizer, ToyRunner, toy_generate, toy_spec

from flatout.core.types import Workload
from flatout.engine.request import SamplingParams
from flatout.errors import ConfigError, EvidenceError
from flatout.verify import speed
from flatout.verify.drivers import RunnerDriver, tokens_per_second, workload_prompts
from flatout.verify.foreign_load import Ticks, foreign_load, parse_stat, read_ticks, until_quiet
from flatout.verify.race import decode_window, race_workload
from flatout.verify.speed import SpeedResult, ab_test, turns


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that only `advance` moves, and no CPU meter."""
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(speed.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(speed, "read_ticks", lambda: None)

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def side(
    name: str, seconds: Iterator[float], log: list[str], advance: Callable[[float], None]
) -> Callable[[], float]:
    def run() -> float:
        log.append(name)
        value = next(seconds)
        advance(value)
        return value

    return run


def race(
    advance: Callable[[float], None], a: Iterator[float], b: Iterator[float], **options: object
) -> tuple[SpeedResult, str]:
    log: list[str] = []
    result = ab_test(side("A", a, log, advance), side("B", b, log, advance), **options)  # type: ignore[arg-type]
    return result, "".join(log)


def test_steady_sides_stop_at_nine_pairs_in_blocks_of_four(clock: Callable[[float], None]) -> None:
    result, order = race(clock, itertools.repeat(2.0), itertools.repeat(1.0))
    assert order.startswith("AB"), "one warm-up each"
    blocks = [order[2:][i : i + 4] for i in range(0, len(order) - 2, 4)]
    assert set(blocks) == {"ABBA", "BAAB"}, "both orders occur"
    assert result.pairs == 10
    assert (result.ratio, result.low, result.high) == (2.0, 2.0, 2.0)
    assert result.faster
    assert result.coverage >= 0.95
    assert result.stopped_because == "the interval is within 2%"
    assert (result.seconds_a.median, result.seconds_b.median) == (2.0, 1.0)
    assert result.foreign_load is None, "no meter is not a load of zero"


def test_orders_differ_by_seed(clock: Callable[[float], None]) -> None:
    orders = {race(clock, itertools.repeat(1.0), itertools.repeat(1.0), seed=s)[1] for s in range(8)}
    assert len(orders) > 4


def test_ratio_pairs_neighbours_so_that_drift_cancels(clock: Callable[[float], None]) -> None:
    """The machine gets slower all the time; B is 1.5 times faster at every moment."""
    drift = (1.001**i for i in itertools.count())
    result, _ = race(clock, (1.5 * d for d in drift), (d for d in drift))
    assert result.ratio == pytest.approx(1.5, rel=0.01)
    assert result.samples_a[-1] > 1.01 * result.samples_a[0]


def test_noise_takes_more_pairs_until_the_time_is_spent(clock: Callable[[float], None]) -> None:
    draw = random.Random(1)
    noisy = (draw.lognormvariate(0, 0.2) for _ in itertools.count())
    result, _ = race(clock, noisy, noisy, max_seconds=100)
    assert result.stopped_because == "the time is spent"
    assert 40 < result.pairs < 60
    assert result.high - result.low > 0.02 * result.ratio
    assert result.low < 1 < result.high
    assert not result.faster
    longer, _ = race(clock, noisy, noisy, max_seconds=1000)
    assert longer.high - longer.low < result.high - result.low


def test_turns_are_few_and_cancel_a_slow_minute(clock: Callable[[float], None]) -> None:
    """The machine becomes three times slower between two pairs; B is 1.5 times faster at every moment."""
    log: list[str] = []
    pace = itertools.chain([1.0] * 4, itertools.repeat(3.0))
    a, b = itertools.tee(pace)
    run_a, run_b = side("A", (1.5 * x for x in a), log, clock), side("B", b, log, clock)
    assert turns(run_a, run_b, max_seconds=4.0) == pytest.approx(1.5)
    assert "".join(log) in ("ABBA", "BAAB")
    log.clear()
    assert turns(run_a, run_b, max_seconds=30.0) == pytest.approx(1.5)
    assert len(log) == 12


def test_turns_leave_out_pairs_under_foreign_load(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads(monkeypatch, itertools.chain([0.0, 0.0, 1.5, 0.0], itertools.repeat(0.0)))
    log: list[str] = []
    run_a = side("A", itertools.repeat(2.0), log, clock)
    disturbed = side("B", itertools.chain([1.0, 9.0], itertools.repeat(1.0)), log, clock)
    assert turns(run_a, disturbed, max_seconds=1.0, cores=2) == pytest.approx(2.0)


def test_slow_runs_still_get_nine_pairs(clock: Callable[[float], None]) -> None:
    result, _ = race(clock, itertools.cycle([50.0, 70.0]), itertools.repeat(30.0), max_seconds=60)
    assert result.pairs == 10


def test_equal_sides_are_rarely_called_faster(clock: Callable[[float], None]) -> None:
    """The stopping rule looks at the width only, so it gives no side an advantage: a 97.9 % two-sided
    interval of 10 pairs may lie above 1 in 1.1 % of the tests, and of all stopping points in at most 2.5
    %."""
    draw = random.Random(2)
    noisy = (draw.lognormvariate(0, 0.008) for _ in itertools.count())
    tests = [race(clock, noisy, noisy, max_seconds=60)[0] for _ in range(200)]
    assert len({t.pairs for t in tests}) > 5, "different tests stop at different times"
    assert sum(t.faster for t in tests) <= 12  # the 99.8 % point of Binomial(200, 0.025)
    assert sum(t.not_slower for t in tests) > 160


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_timings_are_refused(clock: Callable[[float], None], value: float) -> None:
    with pytest.raises(EvidenceError, match="positive"):
        race(clock, itertools.repeat(1.0), itertools.chain([1.0], itertools.repeat(value)))


@pytest.mark.parametrize(
    "options", [{"min_pairs": 5}, {"max_seconds": 0}, {"width": 0}, {"coverage": 1.0}, {"coverage": 0.3}]
)
def test_senseless_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        ab_test(lambda: 1.0, lambda: 1.0, **options)  # type: ignore[arg-type]


def loads(monkeypatch: pytest.MonkeyPatch, values: Iterator[float | None]) -> None:
    monkeypatch.setattr(speed, "foreign_load", lambda before, after: next(values))


def test_pairs_under_foreign_load_are_thrown_away_and_counted(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third pair is disturbed: B then takes three times as long, which must not show."""
    count = itertools.count()
    loads(monkeypatch, (0.9 if i % 6 == 4 else 0.05 for i in count))
    a = itertools.repeat(2.0)
    b = itertools.chain([1.0], (3.0 if i % 3 == 2 else 1.0 for i in itertools.count()))
    result, _ = race(clock, a, b, cores=2, max_seconds=600)
    assert result.ratio == result.low == result.high == 2.0
    assert result.thrown_away >= 4
    assert result.pairs >= 9
    assert result.kept_noisy == 0
    assert result.foreign_load == pytest.approx(0.05)


def test_a_machine_that_is_never_quiet_widens_the_interval(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads(monkeypatch, itertools.repeat(1.5))
    draw = random.Random(3)
    noisy = (draw.lognormvariate(0, 0.3) for _ in itertools.count())
    result, _ = race(clock, noisy, noisy, cores=2, max_seconds=40)
    assert result.kept_noisy == result.pairs >= 9
    assert result.thrown_away == 0
    assert "too few pairs free of other load" in result.stopped_because
    assert result.foreign_load == 1.5
    assert not result.faster


def test_the_allowance_is_a_share_of_the_cores_and_of_the_meter(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for cores, seconds, load, kept in [
        (2, 1.0, 0.21, True),
        (2, 1.0, 0.23, False),
        (16, 1.0, 1.5, True),
        (2, 0.05, 0.55, True),
    ]:
        loads(monkeypatch, itertools.repeat(load))
        steady = itertools.repeat(seconds)
        result, _ = race(clock, steady, steady, cores=cores, max_seconds=20)
        assert (result.kept_noisy == 0) == kept


def test_proc_stat() -> None:
    content = "cpu  100 5 20 1000 50 2 3 4 60 0\ncpu0 1 2 3 4\n"
    assert parse_stat(content, 100) == (1.34, 11.84)
    assert parse_stat("cpu 1 2 3 4", 1) == (6.0, 10.0)
    for broken in ("", "intr 5", "cpu a b c d", "cpu 1 2", "cpu -1 2 3 4"):
        assert parse_stat(broken, 100) is None


def test_foreign_load_is_what_this_process_did_not_use() -> None:
    start = Ticks(busy_s=10.0, total_s=100.0, own_s=4.0, clock_s=50.0)
    assert foreign_load(start, Ticks(13.0, 104.0, 5.5, 52.0)) == pytest.approx(0.75)
    assert foreign_load(start, Ticks(11.0, 104.0, 5.5, 52.0)) == 0.0, "tick noise is no negative load"
    assert foreign_load(start, Ticks(13.0, 100.0, 5.5, 52.0)) is None, "a meter that stands still"
    assert foreign_load(None, start) is None
    assert foreign_load(start, None) is None


@pytest.mark.parametrize(
    ("loads", "kept"), [([0.1], [0]), ([0.9, 0.3, 0.15], [2]), ([0.9, 0.3, 0.5], [0, 1, 2]), ([None], [0])]
)
def test_what_is_measured_beside_other_load_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, loads: list[float | None], kept: list[int]
) -> None:
    values, count = iter(loads), itertools.count()
    monkeypatch.setattr("flatout.verify.foreign_load.foreign_load", lambda before, after: next(values))
    assert until_quiet(lambda: next(count), cores=2) == kept
    assert next(values, "all used") == "all used"


def test_no_meter_without_proc(tmp_path: Path) -> None:
    assert read_ticks(tmp_path / "stat") is None


class Recorder(ToyRunner):
    """Keeps the tokens of every call of `sample`."""

    def __init__(self, **options: int) -> None:
        super().__init__(**options)
        self.seen: list[np.ndarray] = []

    def sample(self, *args: object, **options: object) -> np.ndarray:
        self.seen.append(super().sample(*args, **options))  # type: ignore[arg-type]
        return self.seen[-1]


def test_driver_generates_what_the_model_says() -> None:
    """Pages, positions and chunks of the driver are right: a toy model that hashes its pages gives the same
    tokens."""
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8]]
    runner = Recorder(num_pages=8, page_size=4)
    seen = runner.seen
    driver = RunnerDriver(runner, step_tokens=4)
    assert driver.decode(prompts, 5) > 0
    assert runner.steps == [(1, 4), (1, 4), (1, 2)] * 2 + [(2, 2)] * 5
    greedy = SamplingParams(max_tokens=6, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        own = [int(seen[3 * i + 2][0]), *(int(step[i]) for step in seen[6:])]
        assert own == toy_generate(prompt, greedy)
    runner.steps.clear()
    assert driver.prefill(prompts) > 0
    assert runner.steps == [(1, 4), (1, 4), (1, 2)] * 2


def test_a_decoder_starts_every_time_at_the_end_of_one_prefill() -> None:
    prompts = [[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]]
    runner = Recorder(num_pages=8, page_size=4)
    seen = runner.seen
    decode = RunnerDriver(runner, step_tokens=8).decoder(prompts, 4)
    assert decode() > 0
    assert decode() > 0
    assert runner.steps == [(1, 5)] * 2 + [(2, 2)] * (1 + 4) * 2
    greedy = SamplingParams(max_tokens=5, ignore_eos=True)
    for first in (3, 8):  # after the untimed step of either call
        for i, prompt in enumerate(prompts):
            own = [int(seen[i][0]), *(int(step[i]) for step in seen[first : first + 4])]
            assert own == toy_generate(prompt, greedy)


@pytest.mark.parametrize(
    ("workload", "window"),
    [
        (Workload(prompt=1024, output=96), (1064, 16)),
        (Workload(prompt=10, output=17), (10, 16)),
        (Workload(prompt=10, output=5), (10, 5)),
    ],
)
def test_decode_is_timed_in_the_middle_of_the_output(workload: Workload, window: tuple[int, int]) -> None:
    assert decode_window(workload) == window


def test_a_race_gives_the_seconds_of_the_whole_workload(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 1 ms and a microsecond for every token before it: 96 from 100 on take 110.16 ms."""

    class Linear:
        name = "linear"

        def __init__(self, factor: float) -> None:
            self.factor, self.prompts = factor, set()

        def prefill(self, prompts: list[list[int]]) -> float:
            self.prompts.add(len(prompts[0]))
            return self.factor * 0.5

        def decode(self, prompts: list[list[int]], tokens: int) -> float:
            raise AssertionError("a race uses a decoder")

        def decoder(self, prompts: list[list[int]], tokens: int) -> Callable[[], float]:
            self.prompts.add(len(prompts[0]))
            return lambda: self.factor * sum(1e-3 + 1e-6 * (len(prompts[0]) + i) for i in range(tokens))

    monkeypatch.setattr(speed.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(speed, "read_ticks", lambda: None)
    a, b, seen = Linear(3.0), Linear(1.0), []
    workload = Workload(prompt=100, output=96)
    found = race_workload(
        a, b, ByteTokenizer(), workload, prefill_s=1, decode_s=1, progress=lambda *step: seen.append(step[0])
    )
    assert a.prompts == b.prompts == {100, 140}
    assert set(seen) == {"prefill", "decode"}
    prefill, decode = found["prefill"], found["decode"]
    whole = sum(1e-3 + 1e-6 * (100 + i) for i in range(96))
    assert prefill.timed_share == 1
    assert decode.timed_share == pytest.approx(1 / 6)
    assert (prefill.seconds_b.median, decode.seconds_b.median) == pytest.approx((0.5, whole))
    assert (decode.seconds_a.p20, decode.samples_a[0]) == pytest.approx((3 * whole, 3 * whole))
    assert (prefill.ratio, decode.ratio) == pytest.approx((3.0, 3.0))


def test_driver_refuses_what_does_not_fit() -> None:
    driver = RunnerDriver(ToyRunner(num_pages=4, page_size=4))
    with pytest.raises(ConfigError, match="4 pages"):
        driver.decode([[1] * 10, [2] * 10], 1)
    with pytest.raises(ConfigError, match="16 positions"):
        RunnerDriver(ToyRunner(num_pages=99, page_size=4, spec=toy_spec(max_positions=16))).decode(
            [[1] * 10], 9
        )
    for prompts in ([], [[]]):
        with pytest.raises(ConfigError, match="prompts with tokens"):
            driver.prefill(prompts)


def test_workload_prompts_are_of_the_length_asked_for() -> None:
    prompts = workload_prompts(ByteTokenizer(), Workload(batch=3, prompt=700, output=1))
    assert [len(p) for p in prompts] == [700] * 3
    assert len({tuple(p) for p in prompts}) == 3
    huge = workload_prompts(ByteTokenizer(), Workload(batch=2, prompt=100_000, output=1))
    assert [len(p) for p in huge] == [100_000] * 2


def test_rates() -> None:
    work = Workload(batch=4, prompt=512, output=64)
    assert tokens_per_second(work, "prefill", 2.0) == 1024
    assert tokens_per_second(work, "decode", 2.0) == 128


@pytest.fixture
def single_thread() -> Iterator[None]:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma"])
def test_baseline_holds_the_checkpoint_in_bfloat16(family: str, tmp_path: Path, single_thread: None) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from flatout.core.checkpoint import open_checkpoint
    from flatout.verify.baseline import TransformersBaseline

    folder = tiny_checkpoint_folder(tmp_path / family, tiny_spec(family))
    baseline = TransformersBaseline(open_checkpoint(folder), threads=1)
    direct = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = torch.tensor([[5, 9, 200, 31]])
    with torch.inference_mode():
        expected, found = direct(ids).logits, baseline._model(ids).logits
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    assert "bf16 (1 threads)" in baseline.name


def test_baseline_decodes_greedily_from_the_whole_prompt(tmp_path: Path, single_thread: None) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from flatout.core.checkpoint import open_checkpoint
    from flatout.verify.baseline import TransformersBaseline

    baseline = TransformersBaseline(
        open_checkpoint(tiny_checkpoint_folder(tmp_path / "m", tiny_spec())), threads=2
    )
    model, calls = baseline._model, []

    def record(ids: object, **options: object) -> object:
        output = model(ids, **options)
        calls.append(
            (ids, output.logits, options, torch.get_num_threads(), torch.is_inference_mode_enabled())
        )
        return output

    baseline._model = record
    prompts = [[7, 8, 9, 10], [11, 12, 13, 14]]
    assert baseline.prefill(prompts) > 0
    assert calls[0][1].shape == (2, 1, 320), "logits of the last token only"
    calls.clear()
    assert baseline.decode(prompts, 5) > 0
    assert [tuple(ids.shape) for ids, *_ in calls] == [(2, 4), *[(2, 1)] * 5]
    tokens = torch.tensor(prompts)
    with torch.inference_mode():
        for ids, *_ in calls[1:]:
            assert torch.equal(ids, model(tokens).logits[:, -1:].argmax(-1)), "as without a cache"
            tokens = torch.cat([tokens, ids], dim=1)
    calls.clear()
    decode = baseline.decoder(prompts, 3)
    assert decode() > 0
    assert decode() > 0
    assert [tuple(ids.shape) for ids, *_ in calls] == [(2, 4), *[(2, 1)] * (1 + 3) * 2]
    for one, other in zip(calls[2:5], calls[6:9], strict=True):
        assert torch.equal(one[1], other[1]), "every call starts where the prompts end"
    assert torch.equal(calls[1][0], calls[2][0]), "and so does its untimed step"
    assert all(threads == 2 and inference for *_, threads, inference in calls)
    assert torch.get_num_threads() == 1, "the thread count is put back"
    with pytest.raises(ConfigError, match="one length"):
        baseline.prefill([[1], [1, 2]])
