"""Expected losses: sensitivities of one backward pass, corrected by a few measured divergences.

What activations lose is corrected by rounding them, in 8 bits and all layers of a kind at once; what GPTQ
leaves of weights by rounding them by GPTQ in 5 and 4 bits, in half the layers.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence

from flatout.compress.library import Library
from flatout.core.formats import Format, parse_format
from flatout.search.divergences import Progress, divergences, is_measured, is_spread
from flatout.search.sensitivity import Left, Losses, sensitivities

_PASSAGES, _PASSAGE = 4, 256  # passages that pass forward and back, and their tokens
_PROBES, _PROBE = 4, 96  # passages that divergences are measured on, and their tokens
_MEASURED = 12  # choices whose divergence is measured
_LEAST, _MOST = 2e-4, 0.02  # expected nats a token of a choice, in all layers, that is worth measuring
_BY_ACTIVATIONS = 0.1  # part of it that activations must have: a measurement corrects nothing else


def expected_losses(
    library: Library,
    documents: Sequence[Sequence[int]],
    choices: Mapping[str, Sequence[str]],
    progress: Progress | None = None,
) -> tuple[Losses, Losses]:
    """(by the library, rounded to nearest): expected nats a token of every choice. Of the 8-bit formats,
    those whose activations matter in all layers together are corrected by their measured divergence, and
    others as the 8-bit one with the same activations; what GPTQ leaves of weights as was measured in the
    format of `SPREAD` with the nearest bits.

    documents: calibration token ids, of which a few thousand tokens are used.
    """
    passages = [document[:_PASSAGE] for document in documents[:_PASSAGES]]
    weights, activations, left = sensitivities(library, passages, choices, progress)
    sums: dict[tuple[str, str], float] = {}
    inputs: dict[tuple[str, str], float] = {}  # what activations have in them
    for (place, name), loss in activations.items():
        key = (place.rpartition(".")[2], name)
        if name == _eight_bit(name):
            sums[key] = sums.get(key, 0.0) + weights.get((place, name), 0.0) + loss
            inputs[key] = inputs.get(key, 0.0) + loss
    worth = [key for key in sums if _LEAST < sums[key] < _MOST and inputs[key] >= _BY_ACTIVATIONS * sums[key]]
    worth.sort(key=lambda key: -sums[key])
    probes = [document[:_PROBE] for document in documents[-_PROBES:]]
    measured = divergences(library, probes, worth[:_MEASURED], progress)
    ratios = {key: min(max(found / sums[key], 0.5), 5.0) for key, found in measured.items()}
    usual = statistics.median(ratios.values()) if ratios else 1.0

    def ratio(place: str, name: str) -> float:
        return ratios.get((place.rpartition(".")[2], _eight_bit(name)), usual)

    rest = {choice: loss * ratio(*choice) for choice, loss in activations.items()}
    nearest = {choice: loss + weights.get(choice, 0.0) * ratio(*choice) for choice, loss in rest.items()}
    # What weights rounded to nearest lose beyond expectation is what their errors have in common: GPTQ takes
    # that out, and has deviations of its own.
    own = {key: loss * _kept(library, left, *key) for key, loss in weights.items()}
    by_gptq = _spread_ratios(library, probes, own, rest, progress)
    by_spreading = dict(rest)
    for (place, name), loss in own.items():
        fmt = parse_format(name)
        rounded = is_spread(library, place, fmt)
        by_spreading[place, name] += loss * (_nearest_bits(by_gptq, place, fmt) if rounded else 1.0)
    return by_spreading, nearest


def _spread_ratios(
    library: Library,
    probes: Sequence[Sequence[int]],
    own: Losses,
    rest: Losses,
    progress: Progress | None,
) -> dict[tuple[str, str], float]:
    """(kind of linear, format) -> measured over expected loss of weights as GPTQ rounds them, in the formats
    `SPREAD` where the space has them. rest: what activations lose."""
    sums: dict[tuple[str, str], list[float]] = {}
    for (place, name), loss in own.items():
        if place != "head" and is_measured(place, name):
            both = sums.setdefault((place.rpartition(".")[2], name), [0.0, 0.0])
            both[0] += loss
            both[1] += rest[place, name]
    found = divergences(library, probes, list(sums), progress, by_gptq=True)
    return {
        key: min(max((found[key] - other) / loss, 0.25), 4.0)
        for key, (loss, other) in sums.items()
        if loss > 0
    }


def _nearest_bits(ratios: Mapping[tuple[str, str], float], place: str, fmt: Format) -> float:
    """The ratio of the measured format with the nearest bits, smoothed as this one is; 1 if there is none."""
    kind = place.rpartition(".")[2]
    alike = [
        (abs(parse_format(name).bits - fmt.bits), ratio)
        for (its_kind, name), ratio in ratios.items()
        if its_kind == kind and parse_format(name).scales_tokens == fmt.scales_tokens
    ]
    return min(alike)[1] if alike else 1.0


def _eight_bit(name: str) -> str:
    """The 8-bit format with the activations of format `name`; other formats are their own."""
    return re.sub(r"^w[3456]a", "w8a", name)


def _kept(library: Library, left: Left, place: str, name: str) -> float:
    """The part of a weight's loss that GPTQ leaves."""
    fmt = parse_format(name)
    if place == "kv_cache" or not is_spread(library, place, fmt):
        return 1.0
    return left[place, fmt.scales_tokens]
