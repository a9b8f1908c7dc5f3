"""What 3-bit and 2:4 sparse weights would lose, imitated in float32 on the reference runner.

    python benchmarks/sparse_and_three_bits.py [MODEL] [--kind KIND] [--method NAME]

Weights of the chosen linears are rounded or pruned, everything else has 8 bits in groups of 64, activations,
keys and values stay float32. 3-bit symmetric codes span -4..3 with scale amax / 3.5, asymmetric ones 0..7;
2:4 keeps two of four neighbours along a row, by |w| or by |w| * rms(input), at 8 bits in groups of 64.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from flatout.compress import gptq, rtn
from flatout.compress.method import data_of
from flatout.core.checkpoint import Checkpoint, open_checkpoint
from flatout.core.formats import Format, Recipe, parse_format
from flatout.core.fuse import assemble, float_recipe, float_weight
from flatout.core.model import Model
from flatout.core.quantized import QuantizedTensor
from flatout.engine.reference import ReferenceRunner
from flatout.search.rows import loss_of
from flatout.search.texts import read_texts
from flatout.verify.quality import pair_scores, score_model

KINDS = ("all", "qkv", "o", "gate_up", "down")
METHODS = {
    name: Format(name=name, bits=3, group=group, zero="asymmetric")
    for group, zero, how in itertools.product((32, 64), ("", "-asym"), ("nearest", "gptq"))
    for name in [f"w3-g{group}{zero} {how}"]
}
METHODS |= {name: Format(name=name, bits=8, group=64) for name in ("2:4 magnitude", "2:4 wanda")}
REST = parse_format("w8a8-g64")
HOPELESS = 0.1  # a row that surely loses more than this on half the passages is left at that
PASSAGES, CALIBRATION = 16, 24  # that judge, and that calibrate as in a search
_grid_between, _gptq = rtn.grid_between, gptq.gptq


def grid_between(minimum: np.ndarray, maximum: np.ndarray, fmt: Format, clip: float = 1.0) -> rtn.Grid:
    """As in compress/rtn.py; symmetric 3-bit codes are kept as asymmetric ones whose zero is always 4."""
    if fmt.bits != 3 or "asym" in fmt.name:
        return _grid_between(minimum, maximum, fmt, clip)
    scales = rtn.storable(np.maximum(-minimum, maximum) * np.float32(clip / 3.5))
    return rtn.Grid(scales=scales, zeros=np.full_like(scales, 4), low=0, high=7)


def change(weight: np.ndarray, hessian: np.ndarray | None, fmt: Format) -> QuantizedTensor:
    """`weight` by the method that `fmt` names; stands in for `gptq` while a model is calibrated."""
    if fmt.bits == 3:
        return rtn.round_to_nearest(weight, fmt, True) if hessian is None else _gptq(weight, hessian, fmt)
    rms = 1.0 if hessian is None else np.sqrt(np.diag(hessian))
    fours = (np.abs(weight) * rms).reshape(-1, 4)
    kept = np.zeros(fours.shape, dtype=bool)
    np.put_along_axis(kept, np.argsort(-fours, axis=1, kind="stable")[:, :2], True, axis=1)
    return rtn.round_to_nearest(np.where(kept.reshape(weight.shape), weight, np.float32(0)), REST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Imitated(Recipe):
    """A recipe in which linears of one kind, or all, have a format outside the grammar; the rest is float."""

    kind: str
    format: Format

    def format_of(self, layer: int, linear: str) -> Format:
        return self.format if self.kind in ("all", linear) else parse_format("fp32")


def imitate(source: Checkpoint, rest: Model, name: str, kind: str, text: Sequence[np.ndarray]) -> Model:
    """`rest` with the linears of `kind` changed by the method called `name`."""
    fmt = METHODS[name]
    if name.endswith(("gptq", "wanda")):
        changed = gptq.gptq_layers(source, data_of(text), Imitated(name=name, kind=kind, format=fmt))[0]
    else:
        kinds = KINDS[1:] if kind == "all" else (kind,)
        names = [f"layers.{i}.{k}" for i in range(source.spec.num_layers) for k in kinds]
        changed = {name: change(float_weight(source, name), None, fmt) for name in names}
    floats = {name: weight.dequantize() for name, weight in changed.items()}
    return replace(rest, weights={**rest.weights, **floats})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--kind", choices=KINDS, action="append", help="linears that change; default: each")
    parser.add_argument("--method", choices=METHODS, action="append", help="default: each")
    args = parser.parse_args()
    vars(rtn)["grid_between"], vars(gptq)["gptq"] = grid_between, change
    source = open_checkpoint(args.model)
    texts = read_texts(source.tokenizer, source.tokenizer.sha256, source.spec)
    clusters = texts.validation[:PASSAGES]
    text = [np.asarray(cluster.tokens) for cluster in texts.calibration[:CALIBRATION]]
    original = assemble(source, float_recipe("fp32"))
    floats = {name: w for name, w in original.weights.items() if isinstance(w, np.ndarray)}
    eight = {name: rtn.round_to_nearest(w, REST).dequantize() for name, w in floats.items() if w.ndim == 2}
    rest = replace(original, weights={**floats, **eight})
    expected = score_model(ReferenceRunner(original, 32, as_served=False), clusters)

    def show(method: str, kind: str, model: Model) -> None:
        runner, scores = ReferenceRunner(model, 32, as_served=False), []
        for part in (clusters[: len(clusters) // 2], clusters[len(clusters) // 2 :]):
            scores += score_model(runner, part, sound=True)
            loss = loss_of(pair_scores(clusters[: len(scores)], expected[: len(scores)], scores))
            if loss.low > HOPELESS:
                break
        doubt = f"{loss.low:+.2%} to {loss.high:+.2%}"
        print(f"| {method} | {kind} | {loss.value:+.2%} | {doubt} | {loss.tokens:,} |", flush=True)

    print("| weights | of | increase | within two standard errors | tokens |\n|---|---|--:|---|--:|")
    show("8 bits, groups of 64", "all", rest)
    for method, kind in itertools.product(args.method or METHODS, args.kind or KINDS):
        show(method, kind, imitate(source, rest, method, kind, text))


if __name__ == "__main__":
    main()
