"""The certificate and the way to it: verdicts, every attack on them, the ledger of openings, tampered
files."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.table import VOCABULARY, TableRunner, WordTokenizer, table

from flatout.cli.main import main
from flatout.cli.verify import parse_margin
from flatout.data.passages import Passage, load_passages
from flatout.errors import ConfigError, EvidenceError, FlatoutError, ResourceError
from flatout.verify import ledger
from flatout.verify.certificate import (
    Certificate,
    Side,
    Text,
    certificate_from_json,
    certificate_to_json,
    certify,
    recompute,
)
from flatout.verify.examination import Holdout, Plan, examine, plan_opening, rerun, seal
from flatout.verify.ledger import next_k, record_opening
from flatout.verify.quality import Cluster, ClusterLoss, Divergence, pair_scores, score_model, token_clusters
from flatout.verify.statistics import FEWEST_CLUSTERS, alpha_k

ORIGINAL = Side(source="model.gguf", sha256="a" * 64, recipe="original", runner="reference")
OPTIMISED = Side(source="out", sha256="b" * 64, recipe="w8a8", runner="cpu", derived_from="a" * 64)
TEXT = Text(
    source="shipped", sha256="c" * 64, clusters_sha256="d" * 64, tokenizer_sha256="e", block=1024, available=9
)


def losses(
    count: int = 64, delta: float = 0.0, spread: float = 0.004, seed: int = 0, domain: str = "novel"
) -> list[ClusterLoss]:
    """Clusters of 300 tokens whose mean loss is exactly `delta` nats a token."""
    values = np.random.default_rng(seed).standard_normal(count) if count > 1 else np.zeros(1)
    values = delta + spread * (values - values.mean())
    return [
        ClusterLoss(id=f"{domain}-{i}", domain=domain, tokens=300, nll_original=900.0, loss=300 * float(v))
        for i, v in enumerate(values)
    ]


def judge(found: Sequence[ClusterLoss], k: int = 1, **options: Any) -> Certificate:
    sides = {"original": ORIGINAL, "optimised": OPTIMISED, "text": TEXT}
    return certify(found, k=k, **{**sides, **options})


def test_verdicts() -> None:
    assert judge(losses(delta=0.003)).verdict == "passed"
    assert judge(losses(delta=0.05)).verdict == "failed"
    close = judge(losses(delta=math.log(1.01) - 0.0002))
    assert close.verdict == "cannot_decide"
    assert "cannot decide with this text: upper bound 1.0" in close.reason
    assert judge(losses(delta=0.02), margin=0.05).passed


def test_what_a_certificate_says() -> None:
    certificate = judge(losses(delta=0.003), k=2, hardware="a processor")
    assert certificate.loss == pytest.approx(math.expm1(0.003))
    assert certificate.loss_upper == pytest.approx(math.expm1(certificate.upper))
    assert certificate.alpha_k == alpha_k(2, 0.05)
    assert certificate.lower < certificate.delta < certificate.upper
    assert certificate.perplexity_optimised / certificate.perplexity_original == pytest.approx(
        math.exp(0.003)
    )
    assert certificate.tokens == 64 * 300
    worst = max(certificate.clusters, key=lambda c: c.loss)
    assert certificate.worst_cluster == worst.id


def test_later_openings_need_more() -> None:
    """What passes at the first look need not pass at the tenth."""
    found = losses(delta=0.0085)
    assert judge(found, k=1).passed
    assert judge(found, k=10).verdict == "cannot_decide"


# --- attacks


def test_identical_models_pass_with_no_loss() -> None:
    certificate = judge(losses(spread=0.0))
    assert certificate.passed
    assert certificate.upper == certificate.delta == 0.0


@pytest.mark.parametrize("share", [0.03, 0.1])
def test_one_rare_class_of_documents_wrong(share: float) -> None:
    """Prose is untouched and code is ruined: too rare to move the mean past the margin, the bound still
    sees it."""
    code = round(130 * share)
    found = losses(130 - code, spread=0.001) + losses(code, 0.009 / share, 0.001, domain="code")
    certificate = judge(found)
    assert certificate.loss < certificate.margin
    assert not certificate.passed
    assert certificate.worst_domain == "code"
    assert certificate.worst_domain_loss > 0.08
    assert certificate.worst_cluster.startswith("code")


def test_a_domain_beyond_the_margin_is_named_even_when_the_mean_passes() -> None:
    certificate = judge(losses(120, 0.0, 0.001) + losses(10, 0.02, 0.001, domain="code"))
    assert certificate.passed
    assert certificate.notes == ("the mean is inside the margin, the domain code alone is not",)
    noise = judge(losses(120, 0.0, 0.001) + losses(10, 0.011, 0.02, domain="code"))
    assert noise.worst_domain_loss > noise.margin
    assert noise.notes == (), "noise of a few documents is no finding"


@pytest.mark.parametrize("count", [1, 2, FEWEST_CLUSTERS - 1])
def test_too_little_text_cannot_decide(count: int) -> None:
    """One cluster, or a few, of a model that is better in each: not a pass."""
    certificate = judge(losses(count, -0.1, 0.0))
    assert certificate.verdict == "cannot_decide"
    assert f"{count} clusters, at least {FEWEST_CLUSTERS}" in certificate.reason
    assert certificate.upper == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_are_refused(value: float) -> None:
    found = losses()
    found[3] = replace(found[3], loss=value)
    with pytest.raises(EvidenceError, match="finite"):
        judge(found)


def test_swapped_models_are_refused() -> None:
    """The artifact knows what it was made from."""
    with pytest.raises(EvidenceError, match=r"out was made from model\.gguf; try: swap"):
        judge(losses(), original=OPTIMISED, optimised=ORIGINAL)


def test_swapped_models_without_provenance_are_noticed() -> None:
    found = losses(delta=0.05)
    mirrored = [replace(c, nll_original=c.nll_original + c.loss, loss=-c.loss) for c in found]
    certificate = judge(mirrored, optimised=replace(OPTIMISED, derived_from=""))
    assert certificate.delta == pytest.approx(-judge(found).delta)
    assert any("are the two swapped?" in note for note in certificate.notes)
    assert not judge(losses(delta=-0.002)).notes


@pytest.mark.parametrize("options", [{"margin": 0.0}, {"margin": 1.0}, {"margin": math.nan}, {"alpha": 0.5}])
def test_senseless_levels_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        judge(losses(), **options)


# --- the whole way: seal, plan, open, score


def documents(count: int, words: int = 60, seed: int = 0, book: str = "b") -> list[Passage]:
    rng = np.random.default_rng(seed)
    texts = [" ".join(map(str, rng.integers(0, VOCABULARY - 1, words))) for _ in range(count)]
    return [Passage(id=f"{book}{i}", book=book, text=text) for i, text in enumerate(texts)]


def sealed(count: int = 130, **options: Any) -> Holdout:
    tokenizer = WordTokenizer(vocabulary=VOCABULARY)
    return seal(documents(count), documents(40, seed=1), tokenizer, tokenizer_sha256="words", **options)


def scorer(runner: TableRunner) -> Callable[[Sequence[Cluster]], list[np.ndarray]]:
    return lambda clusters: score_model(runner, clusters)


def validation(noise: float, count: int = 40) -> list[ClusterLoss]:
    clusters = token_clusters(WordTokenizer(vocabulary=VOCABULARY), documents(count, seed=1))
    before, after = (scorer(TableRunner(table(0, n)))(clusters) for n in (0.0, noise))
    return pair_scores(clusters, before, after)


def run(folder: Path, noise: float = 0.01, **options: Any) -> tuple[Certificate, Plan]:
    holdout = options.pop("holdout", None) or sealed()
    plan = plan_opening(validation(noise), holdout, ORIGINAL, ledger=folder)
    settings = {
        "original": ORIGINAL,
        "optimised": OPTIMISED,
        "score_original": scorer(TableRunner(table(0))),
        "score_optimised": scorer(TableRunner(table(0, noise))),
        "ledger": folder,
    }
    return examine(holdout, plan, **{**settings, **options}), plan


def test_identical_models_pass_through_the_whole_way(tmp_path: Path) -> None:
    certificate, plan = run(tmp_path, noise=0.0)
    assert certificate.passed
    assert certificate.upper == 0.0
    assert plan.needed == FEWEST_CLUSTERS


def test_a_good_model_passes_and_a_bad_one_fails(tmp_path: Path) -> None:
    assert run(tmp_path, noise=0.01)[0].passed
    bad, plan = run(tmp_path, noise=0.6)
    assert bad.verdict == "failed"
    assert plan.needed is None
    assert plan.scored == plan.available, "without hope of a pass, all text goes into showing the failure"
    assert "no amount of text" in str(plan)


def test_only_the_first_clusters_are_scored(tmp_path: Path) -> None:
    """As many as the plan says, from the front of the fixed order; the plan knows validation text only."""
    holdout = sealed()
    runner = TableRunner(table(0, 0.01))
    certificate, plan = run(tmp_path, 0.01, holdout=holdout, score_optimised=scorer(runner))
    assert plan.scored == 64 < plan.available == 130
    assert [c.id for c in certificate.clusters] == [c.id for c in holdout.clusters[:64]]
    assert certificate.text.available == 130
    assert runner.scored == certificate.tokens + 59, "and 59 tokens of the check of the logits"
    assert plan.needed_tokens is not None
    assert str(plan).startswith(f"needs {plan.needed_tokens / 1000:.0f}k tokens; you have 8k")


def test_more_noise_needs_more_text(tmp_path: Path) -> None:
    plans = [
        plan_opening(validation(noise), sealed(), ORIGINAL, ledger=tmp_path) for noise in (0.02, 0.05, 0.1)
    ]
    needed = [plan.needed or math.inf for plan in plans]
    assert needed == sorted(needed)
    assert needed[0] < needed[2]
    chances = [plan.chance for plan in plans]
    assert chances == sorted(chances, reverse=True)


def test_a_plan_may_ask_what_a_smaller_loss_would_take(tmp_path: Path) -> None:
    losses = validation(0.1)
    seen = plan_opening(losses, sealed(), ORIGINAL, ledger=tmp_path)
    less = plan_opening(losses, sealed(), ORIGINAL, ledger=tmp_path, less=0.002)
    assert less.delta == pytest.approx(seen.delta - 0.002)
    assert less.needed is not None
    assert less.needed < (seen.needed or math.inf)
    assert less.chance > seen.chance


def test_text_is_capped(tmp_path: Path) -> None:
    holdout = sealed(most_tokens=1000)
    assert len(holdout.clusters) == 1000 // 59
    assert holdout.sha256 == sealed().sha256, "the ledger counts openings of the whole text"


def test_short_text_cannot_decide(tmp_path: Path) -> None:
    certificate, _ = run(tmp_path, holdout=sealed(1))
    assert certificate.verdict == "cannot_decide"
    with pytest.raises(EvidenceError, match="must hold text"):
        run(tmp_path, holdout=replace(sealed(), clusters=()))
    with pytest.raises(EvidenceError, match="cannot decide with this text"):
        plan_opening(validation(0.01, count=5), sealed(), ORIGINAL, ledger=tmp_path)


def test_leaked_holdout_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    shipped = load_passages("holdout")[:40]
    used = [*load_passages("calibration")[:5], shipped[17]]
    with pytest.raises(EvidenceError, match="1 of 40 do"):
        seal(shipped, used, WordTokenizer(), tokenizer_sha256="words")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("side", ["score_original", "score_optimised"])
@pytest.mark.parametrize("fault", ["nan", "short", "missing"])
def test_broken_scores_are_refused(tmp_path: Path, side: str, fault: str) -> None:
    def broken(clusters: Sequence[Cluster]) -> list[np.ndarray]:
        scores = scorer(TableRunner(table(0)))(clusters)
        if fault == "nan":
            scores[5][7] = np.nan
        if fault == "short":
            scores[5] = scores[5][:-1]
        return scores[:-1] if fault == "missing" else scores

    with pytest.raises(EvidenceError, match=r"finite|scored"):
        run(tmp_path, **{side: broken})


def test_openings_are_counted_before_scoring(tmp_path: Path) -> None:
    """A candidate that breaks while it is scored has been looked at."""

    def interrupted(clusters: Sequence[Cluster]) -> list[np.ndarray]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, score_optimised=interrupted)
    assert next_k(sealed().sha256, ORIGINAL.sha256, tmp_path) == 2


def test_each_candidate_and_each_amount_of_text_is_an_opening(tmp_path: Path) -> None:
    first = run(tmp_path)[0]
    again = run(tmp_path)[0]
    assert (first.k, again.k) == (1, 1), "the same computation is no new look"
    assert again.upper == first.upper
    other = run(tmp_path, optimised=replace(OPTIMISED, sha256="f" * 64))[0]
    assert (other.k, other.alpha_k) == (2, alpha_k(2, 0.05))
    assert run(tmp_path, optimised=replace(OPTIMISED, runner="reference"))[0].k == 3
    holdout = sealed()
    plan = plan_opening(validation(0.01), holdout, ORIGINAL, ledger=tmp_path)
    assert (plan.k, plan.alpha_k) == (4, alpha_k(4, 0.05))
    longer = examine(
        holdout,
        replace(plan, scored=100),
        original=ORIGINAL,
        optimised=OPTIMISED,
        score_original=scorer(TableRunner(table(0))),
        score_optimised=scorer(TableRunner(table(0, 0.01))),
        ledger=tmp_path,
    )
    assert longer.k == 4, "looking on after a first look is another look"
    assert run(tmp_path, original=replace(ORIGINAL, sha256="9" * 64))[0].k == 1, (
        "another original counts apart"
    )


# --- the ledger


def test_ledger_counts_across_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    with context.Pool(4) as pool:
        jobs = [("h", "o", f"candidate {i % 30}", tmp_path) for i in range(60)]
        numbers = pool.starmap(record_opening, jobs, chunksize=3)
    assert sorted(set(numbers)) == list(range(1, 31)), "no number twice, none left out"
    assert numbers[:30] == numbers[30:], "a known candidate keeps its number"
    assert next_k("h", "o", tmp_path) == 31
    assert next_k("h", "other", tmp_path) == 1
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*"))


def test_a_kill_while_writing_leaves_the_old_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_opening("h", "o", "first", tmp_path)

    def killed(*names: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        record_opening("h", "o", "second", tmp_path)
    monkeypatch.undo()
    assert next_k("h", "o", tmp_path) == 2
    assert record_opening("h", "o", "third", tmp_path) == 2, "the lock was given back"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"openings": 3}', '{"openings": [{}]}', '{"x": 1}'])
def test_a_damaged_ledger_is_no_fresh_start(tmp_path: Path, content: str) -> None:
    record_opening("h", "o", "first", tmp_path)
    (file,) = tmp_path.glob("*.json")
    file.write_text(content)
    for use in (lambda: next_k("h", "o", tmp_path), lambda: record_opening("h", "o", "b", tmp_path)):
        with pytest.raises(EvidenceError, match="ledger of hold-out openings"):
            use()
    assert file.read_text() == content


def test_a_ledger_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="must be recorded"):
        record_opening("h", "o", "a", tmp_path / "file")


def test_the_ledger_lives_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "cache_dir", lambda: tmp_path)
    record_opening("h", "o", "a")
    assert len(list((tmp_path / "openings").glob("*.json"))) == 1


def test_a_worn_out_holdout_is_refused(tmp_path: Path) -> None:
    record_opening(sealed().sha256, ORIGINAL.sha256, "0", tmp_path)
    (file,) = tmp_path.glob("*.json")
    file.write_text(json.dumps({"openings": [{"judged": str(i)} for i in range(100)]}))
    with pytest.raises(EvidenceError, match="at most 100 times"):
        plan_opening(validation(0.01), sealed(), ORIGINAL, ledger=tmp_path)


# --- files


def stored(certificate: Certificate) -> dict[str, Any]:
    value = json.loads(json.dumps(certificate_to_json(certificate), allow_nan=False))
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("case", ["passed", "failed", "few", "notes"])
def test_a_certificate_survives_its_file(case: str) -> None:
    found = {
        "passed": losses(delta=0.003),
        "failed": losses(delta=0.05, spread=0.3),
        "few": losses(3),
        "notes": losses(120, 0.0, 0.001) + losses(10, 0.02, 0.001, domain="code"),
    }[case]
    divergence = Divergence(mean_kl=0.01, p99_kl=0.1, flip_rate=0.02, tokens=1024)
    certificate = judge(found, k=3, divergence=divergence, notes=["a remark"])
    assert certificate_from_json(stored(certificate)) == certificate
    assert certificate_from_json({"recipe": 1, "certificate": stored(certificate)}) == certificate


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("verdict", "passed"),
        ("upper", 0.001),
        ("delta", 0.0),
        ("k", 2),
        ("alpha_k", 0.05),
        ("alpha", 0.2),
        ("margin", 0.9),
        ("tokens", 1),
        ("worst_domain", "none"),
        ("perplexity_optimised", 1.0),
        ("method", "wishful"),
        ("loss_upper", None),
        ("version", 2),
        ("version", True),
        ("clusters", []),
        ("clusters", None),
        ("notes", "none"),
        ("k", 0),
        ("k", 10**30),
        ("k", 1.0),
        ("margin", math.nan),
        ("original", {}),
        ("hardware", 3),
    ],
)
def test_changed_numbers_are_noticed(key: str, value: Any) -> None:
    row = stored(judge(losses(delta=0.05)))
    row[key] = value
    with pytest.raises(FlatoutError):
        certificate_from_json(row)


def test_changed_clusters_are_noticed() -> None:
    row = stored(judge(losses(delta=0.05)))
    for change in ({"loss": 0.0}, {"tokens": 1}, {"tokens": 0}, {"tokens": -5}, {"loss": math.nan}, {"x": 1}):
        changed = copy.deepcopy(row)
        changed["clusters"][5] |= change
        with pytest.raises(EvidenceError):
            certificate_from_json(changed)
    del row["clusters"][5]
    with pytest.raises(EvidenceError, match="must follow from the clusters"):
        certificate_from_json(row)


BASE = stored(judge(losses(40, 0.003)))


@given(data=st.data())
@settings(deadline=None, derandomize=True, max_examples=60)
def test_no_file_crashes_the_reader(data: st.DataObject) -> None:
    """Any value anywhere gives the certificate or one clear error."""
    row = copy.deepcopy(BASE)
    place: Any = row
    key: Any = data.draw(st.sampled_from(sorted(row)))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    junk = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    if data.draw(st.booleans()):
        place[key] = data.draw(
            junk | st.lists(junk, max_size=2) | st.dictionaries(st.text(), junk, max_size=2)
        )
    else:
        del place[key]
    with contextlib.suppress(FlatoutError):
        assert isinstance(certificate_from_json(row), Certificate)


@pytest.mark.parametrize("value", [None, 3, [], {}, {"certificate": None}, {"certificate": {"k": 1}}])
def test_other_json_is_no_certificate(value: Any) -> None:
    with pytest.raises(EvidenceError, match="has the fields of a Certificate"):
        certificate_from_json(value)


def test_command_recomputes_a_certificate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cert.json"
    file.write_text(json.dumps(stored(judge(losses(delta=0.003)))))
    assert main(["verify", str(file), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["quality"]["verdict"] == "passed"
    assert shown["speed"] is None
    assert main(["verify", str(file)]) == 0
    assert "passed: upper bound" in capsys.readouterr().out
    file.write_text(json.dumps(stored(judge(losses(delta=0.05)))))
    assert main(["verify", str(file)]) == 3
    capsys.readouterr()
    tampered = stored(judge(losses(delta=0.05))) | {"verdict": "passed"}
    file.write_text(json.dumps(tampered))
    assert main(["verify", str(file)]) == 2
    assert "verdict must follow from the clusters" in capsys.readouterr().err


def test_an_artifact_s_folder_holds_a_certificate(tmp_path: Path) -> None:
    certificate = judge(losses(delta=0.003))
    (tmp_path / "flatout.json").write_text(json.dumps({"certificate": stored(certificate)}))
    assert recompute(tmp_path) == recompute(tmp_path / "flatout.json") == certificate


@pytest.mark.parametrize(
    "args", [["nowhere.json"], ["x.json", "--margin", "2%"], ["a", "--against", "b", "--margin", "1000%"]]
)
def test_command_refuses_nonsense(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *args]) == 2
    assert capsys.readouterr().err.startswith("flatout: error: ")


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("0.5%", 0.005), ("0.02", 0.02), (" 2 %", 0.02)])
def test_shares(text: str, share: float) -> None:
    assert parse_margin(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "0%", "100%", "-1%", "1", "nan", "one", "1%%", "1%x", "inf"])
def test_senseless_shares(text: str) -> None:
    with pytest.raises(ConfigError, match="--margin is a perplexity increase above 0%"):
        parse_margin(text)


# --- scored again


def score_again(certificate: Certificate, noise: float = 0.01, **options: Any) -> Certificate:
    settings = {
        "original": ORIGINAL,
        "optimised": OPTIMISED,
        "score_original": scorer(TableRunner(table(0))),
        "score_optimised": scorer(TableRunner(table(0, noise))),
    }
    passages = options.pop("passages", None) or documents(130)
    return rerun(certificate, passages, WordTokenizer(vocabulary=VOCABULARY), **{**settings, **options})


def test_rerun_finds_the_same_numbers(tmp_path: Path) -> None:
    certificate = run(tmp_path)[0]
    again = score_again(certificate)
    assert again.clusters == certificate.clusters
    assert (again.verdict, again.k, again.upper) == (certificate.verdict, certificate.k, certificate.upper)
    assert next_k(sealed().sha256, ORIGINAL.sha256, tmp_path) == 2, "scoring again opens nothing"


def test_rerun_exposes_a_model_that_is_not_as_certified(tmp_path: Path) -> None:
    certificate = run(tmp_path)[0]
    assert score_again(certificate, noise=0.6).verdict == "failed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"original": replace(ORIGINAL, sha256="0" * 64)}, "the original model"),
        ({"optimised": replace(OPTIMISED, sha256="0" * 64)}, "the optimised model"),
        ({"passages": documents(130, seed=5)}, "the hold-out text"),
    ],
)
def test_rerun_needs_the_certified_files(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(EvidenceError, match=f"{message} must be the certified one"):
        score_again(run(tmp_path)[0], **options)
