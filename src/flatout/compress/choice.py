"""Which structure loses the least for what the hardware gains.

    minimise  loss_layers(d) + loss_ffn(f) + loss_groups(g)   where   cost(d, f, g) <= share * cost(parent)

Scores of importance rank units of one kind and do not compare kinds. So each kind (layers, feed-forward
channels, head groups) is cut alone at a few sizes, and what the text's loss becomes is measured; sizes
between are interpolated, losses of different kinds added, and of all combinations that cost at most a share
of the parent, in predicted seconds or in parameters, the one with the least sum is taken. Sizes are
multiples of the kernels' tile, since a width between two tiles takes as long as the larger.

That is the first step of Minitron (Muralidharan et al., 2024, arXiv 2407.14679), which lists candidates by
parameters and trains each for a while. Trade-off: a few dozen passes over a little text instead of training,
and losses of cuts do not quite add (what is left out twice hurts more), so the sum orders candidates and
promises nothing; the child's own loss is measured like any model's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flatout.compress.importance import Importance
from flatout.compress.structure import cut
from flatout.core.formats import Recipe
from flatout.core.fuse import Source
from flatout.core.spec import ModelSpec
from flatout.core.structure import Structure
from flatout.core.types import Hardware, Workload
from flatout.errors import ConfigError
from flatout.models.llama import Llama
from flatout.perf.predict import predict

TILE = 64  # channels: four panels of 16 rows, and the scale groups of every format divide it
_STEPS = 4  # sizes of each kind at which the loss is measured
_SMALLEST = 0.4  # share of the parent's size that is tried at least


def mean_loss(source: Source, documents: Sequence[np.ndarray]) -> float:
    """Nats a token of the text under `source`, each document's first token given."""
    model = Llama(source)
    total, count = 0.0, 0
    for document in documents:
        if len(document) > 1:
            ids = torch.from_numpy(np.asarray(document, dtype=np.int64))
            logits = model.forward(ids[:-1].numpy())
            total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
            count += len(ids) - 1
    if not count:
        raise ConfigError("a loss needs documents of two tokens or more", "none", "a longer text")
    return total / count


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A structure, its cost over the parent's, and the loss in nats a token that its cuts add up to."""

    structure: Structure
    cost: float
    expected_loss: float


def choose(
    source: Source,
    importance: Importance,
    documents: Sequence[np.ndarray],
    share: float,
    cost: Callable[[ModelSpec], float],
    tile: int = TILE,
) -> list[Choice]:
    """Structures that cost at most `share` of the parent, the least expected loss first.

    cost: of a spec, e.g. `seconds_on(...)` or ModelSpec.num_parameters. documents: text that losses are
    measured on, another than the importance's. Raises ConfigError when nothing gets that cheap.
    """
    spec = source.spec
    if not 0 < share < 1:
        raise ConfigError("a child costs a share of its parent between 0 and 1", str(share), "0.6")
    before = mean_loss(source, documents)
    losses: dict[str, dict[int, float]] = {}
    for kind, sizes in _sizes(spec, tile).items():
        probes = {sizes[round(i)] for i in np.linspace(0, len(sizes) - 1, min(_STEPS, len(sizes)))}
        measured = {sizes[-1]: 0.0}
        for size in sorted(probes - {sizes[-1]}, reverse=True):
            child = cut(source, Structure.of(((kind, size),)), importance)
            measured[size] = mean_loss(child, documents) - before
        losses[kind] = {
            size: float(np.interp(size, sorted(measured), [measured[s] for s in sorted(measured)]))
            for size in sizes
        }
    parent = cost(spec)
    found = []
    for chosen in itertools.product(*losses.values()):
        sizes_of = tuple(zip(losses, chosen, strict=True))
        structure = Structure.of(sizes_of)
        relative = cost(structure.child(spec)) / parent
        if relative <= share:
            expected = sum(losses[kind][size] for kind, size in sizes_of)
            found.append(Choice(structure=structure, cost=relative, expected_loss=expected))
    if not found:
        raise ConfigError(
            f"a child must cost at most {share:.0%} of its parent",
            "none of those tried does",
            "a larger share",
        )
    return sorted(found, key=lambda choice: (choice.expected_loss, choice.cost))


def _sizes(spec: ModelSpec, tile: int) -> dict[str, list[int]]:
    """Sizes of each kind that are considered, rising, the parent's own last."""
    widths = list(range(tile, spec.intermediate_size, tile))
    kinds = {
        "depth": list(range(1, spec.num_layers)),
        "ffn": widths,
        "groups": list(range(1, spec.num_kv_heads)),
    }
    own = {"depth": spec.num_layers, "ffn": spec.intermediate_size, "groups": spec.num_kv_heads}
    return {
        kind: [size for size in sizes if size >= math.floor(_SMALLEST * own[kind])] + [own[kind]]
        for kind, sizes in kinds.items()
    }


def seconds_on(hardware: Hardware, recipe: Recipe, workload: Workload) -> Callable[[ModelSpec], float]:
    """Predicted seconds of `workload` as a cost for `choose`, without overrides by layer
    (perf/predict.py)."""

    def seconds(spec: ModelSpec) -> float:
        times = predict(spec, recipe, hardware, workload)
        return workload.seconds(times.prefill.mid, times.decode.mid)

    return seconds
