"""The search's bench on a real, small checkpoint: whose float32 judges candidates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flatout.compress.apply import compress
from flatout.core.checkpoint import open_checkpoint
from flatout.core.fuse import float_recipe
from flatout.core.types import Workload
from flatout.data.passages import load_passages
from flatout.engine.reference import ReferenceRunner
from flatout.errors import ConfigError, EvidenceError
from flatout.search import bench as module
from flatout.verify.quality import Cluster, fits, refuse_different, score_model, token_clusters

MODEL = Path(__file__).parents[1] / "data" / "offgrid"
WORK = Workload(objective="latency", prompt=64, output=16, batch=1)


def silent(what: str, done: int, of: int) -> None:
    pass


def test_the_engine_scores_the_original_as_the_reference_does() -> None:
    """In float32 with a float32 cache only the order of sums differs: 1e-5 nats is a hundred roundings."""
    checkpoint = open_checkpoint(str(MODEL))
    clusters = token_clusters(checkpoint.tokenizer, load_passages("validation")[:3], fits(checkpoint.spec))
    found = module.CpuBench(str(MODEL), 2, WORK).score_original(clusters, silent)
    refuse_different(score_model(ReferenceRunner(checkpoint, 17), clusters), found, tolerance=1e-5)


def test_an_engine_that_differs_from_the_reference_scores_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(checkpoint: Any, recipe: Any) -> Any:
        return compress(checkpoint, float_recipe("bf16"))

    monkeypatch.setattr(module, "compress", rounded)
    bench = module.CpuBench(str(MODEL), 1, WORK)
    clusters = token_clusters(bench.tokenizer, load_passages("validation")[:1], fits(bench.source.spec))
    with pytest.raises(EvidenceError, match="must agree with the reference within"):
        bench.score_original(clusters, silent)


def test_an_original_that_overflows_is_told_by_the_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = module.CpuBench(str(MODEL), 1, WORK)
    clusters = token_clusters(bench.tokenizer, load_passages("validation")[:1], fits(bench.source.spec))
    read, name = bench.source.array, "model.layers.4.mlp.up_proj.weight"
    monkeypatch.setattr(
        type(bench.source),
        "array",
        lambda _, tensor: read(tensor) * np.float32(3e38 if tensor == name else 1),
    )
    with pytest.raises(ConfigError, match=r"activations must be finite; .* in the inputs of layers.4.down"):
        bench.score_original(clusters, silent)


def test_text_of_another_tokenizer_is_told_before_anything_is_searched() -> None:
    bench = module.CpuBench(str(MODEL), 1, WORK)
    draw = np.random.default_rng(0).integers(0, bench.source.spec.vocab_size, 120)
    cluster = Cluster(id="c", domain="d", tokens=tuple(int(token) for token in draw))
    with pytest.raises(EvidenceError, match=r"predict its text better than random tokens \(9.0 nats each\)"):
        bench.score_original([cluster], silent)


def test_what_is_compared_once_is_not_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = module.CpuBench(str(MODEL), 1, WORK)
    clusters = token_clusters(bench.tokenizer, load_passages("validation")[:1], fits(bench.source.spec))
    first = bench.score_original(clusters, silent)
    monkeypatch.setattr(module, "refuse_different", lambda *_: pytest.fail("compared again"))
    bench._exact = None  # as after the sensitivities, which take its place in memory
    np.testing.assert_array_equal(bench.score_original(clusters, silent)[0], first[0])
