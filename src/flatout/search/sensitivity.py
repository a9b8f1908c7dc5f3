"""What each format would cost each place: expected loss in nats a token, from one backward pass.

Rounding adds an error e to what the model computes. Where predictions y are those of the original, the
divergence KL(original || rounded) is to second order

    KL = 1/2 E[(g . e)^2]

with g the gradient of the negative log-likelihood of tokens drawn from the model itself (the Fisher
information; Martens, "New Insights and Perspectives on the Natural Gradient Method", 2020).
Rounding errors are independent and have the mean square step^2 / 12, so the cross terms vanish:

    weights       1/2 sum over n, k of  F[n, k] * step[n, group of k]^2 / 12
    activations   1/2 sum over t, k of  (dL / dx[t, k])^2 * (x[t, k] - rounded x[t, k])^2

F[n, k] is the mean over documents of G[n, k]^2, G = dL / dW, which sees that a weight's error is the same at
every token. GPTQ's errors are not independent: with its factor U (compress/gptq.py) column i's error e_i
becomes e_i U[i, :] / U[i, i] of the row, so that with G for every document

    (G U^T)[n, i]^2 / U[i, i]^2   stands in place of   G[n, i]^2

On text that U has not seen this also counts how well U generalises; the diagonal of U alone would promise two
to three times less loss than 8-bit weights have. In a smoothed linear the weight is W s and its input x / s.
Layers with massive activations are left one part in thirty, their neighbours half, so U is taken from every
layer. All places come from the same pass.

Limits: errors are small and do not interact. A few choices are measured as they are (search/divergences.py),
and the search corrects the sum by what whole candidates lose.

Legend: T tokens, N rows and K columns of a weight, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatout.compress.gptq import Factor
from flatout.compress.inputs import Documents, Text
from flatout.compress.library import Library
from flatout.compress.rtn import group_rows, make_grid, round_to_nearest, search_grid
from flatout.core.formats import Format, parse_format
from flatout.core.fuse import Source, native_format
from flatout.kernels.linear import as_tensor
from flatout.models.llama import decoder_layer, rms_norm, round_keys_or_values
from flatout.search.divergences import Progress, float_weights, is_measured, is_spread, rounded_inputs

Losses = dict[tuple[str, str], float]
"""(place, format) -> nats a token. Places: layers.I.LINEAR, head, kv_cache."""

Left = dict[tuple[str, bool], float]
"""(place, smoothed or not) -> the part of its weights' loss that GPTQ leaves."""

_GROUP = 32  # columns whose F is kept as one sum: the narrowest group of any format
_SEED = 0
_EVERY = 4  # rows of a layer's weight whose F is computed: one in four stands for the others


class _Probed(torch.autograd.Function):
    """y = x W^T, or x itself without W; on the way back `see(x, dL/dy, dL/dx)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, see: Callable[..., None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.see = weight, see
        return x.clone() if weight is None else x @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        back = gradient if ctx.weight is None else gradient @ ctx.weight
        ctx.see(x, gradient, back)
        return back, None, None


def _probed(x: Tensor, weight: Tensor | None, see: Callable[..., None]) -> Tensor:
    result: Tensor = _Probed.apply(x, weight, see)  # type: ignore[no-untyped-call]
    return result


class _ProbedCache(Documents):
    """Attention within documents that tells what keys and values are worth."""

    def __init__(self, lengths: Sequence[int], see: Callable[..., None]) -> None:
        super().__init__(lengths)
        self._see = see

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None
    ) -> Tensor:
        k, v = _probed(k, None, self._see), _probed(v, None, self._see)
        return super().attend(layer, q, k, v, positions, window)


def by_rounding(gradient: Tensor, factor: Factor) -> Tensor:
    """The gradient (N, K) of a weight by the rounding of each column, in the order in which GPTQ takes them:
    error e of column i becomes e U[i, :] / U[i, i] of the whole row."""
    upper = torch.from_numpy(factor.upper)
    spread: Tensor = gradient[:, torch.from_numpy(factor.columns)] @ (upper / upper.diagonal()[:, None]).T
    return spread


class _Place:
    """Sums of one linear over documents, for the formats asked for."""

    def __init__(self, library: Library, name: str, formats: Iterable[str]) -> None:
        self.name, self.formats = name, [parse_format(f) for f in formats]
        self.smoothing = (
            as_tensor(library.smoothing(name)) if any(f.scales_tokens for f in self.formats) else None
        )
        self.every = 1 if name == "head" else _EVERY  # a head's rows are tokens, and few of them are frequent
        self.activations = dict.fromkeys([f.name for f in self.formats], 0.0)
        self.fisher: Tensor | float = 0.0  # (N / every, K / _GROUP)
        self.smoothed: Tensor | float = 0.0  # (N / every, 1): that of W s
        self.spread = [f for f in self.formats if is_spread(library, name, f)]
        # smoothed or not -> sums of G^2 (2, N / every) as GPTQ leaves it and as it is
        self.left: dict[bool, Tensor] = {}

    def see(
        self, library: Library, lengths: Sequence[int], x: Tensor, gradient: Tensor, back: Tensor
    ) -> None:
        """Inputs x (T, K) of documents of these lengths, dL / dy (T, N) and dL / dx (T, K)."""
        pieces = zip(x.split(lengths), gradient[:, :: self.every].split(lengths), strict=True)  # type: ignore[no-untyped-call]
        of_weight = torch.cat([of_outputs.T @ inputs for inputs, of_outputs in pieces])
        for smoothed in sorted({f.scales_tokens for f in self.spread}):
            own = of_weight / self.smoothing if smoothed and self.smoothing is not None else of_weight
            both = (by_rounding(own, library.factor(self.name, smoothed)), own)
            sums = [one.square().sum(dim=1).view(len(lengths), -1).sum(dim=0) for one in both]
            self.left[smoothed] = torch.stack(sums)
            for fmt in self.spread:
                if fmt.scales_tokens == smoothed and is_measured(self.name, fmt.name):
                    library.rounded(self.name, smoothed, fmt)  # while its factor is at hand
        squares = of_weight.square_().view(len(lengths), -1, of_weight.shape[1]).sum(dim=0)
        n, k = squares.shape
        self.fisher = self.fisher + squares.view(n, -1, _GROUP if k % _GROUP == 0 else k).sum(dim=2)
        if self.smoothing is not None:
            self.smoothed = self.smoothed + (squares @ self.smoothing.square().reciprocal())[:, None]
        known: dict[tuple[str, int, bool], float] = {}
        for fmt in self.formats:
            key = (fmt.activation, fmt.activation_group, fmt.scales_tokens)
            if key not in known:
                s = self.smoothing if fmt.scales_tokens and self.smoothing is not None else 1.0
                error = s * (x / s - rounded_inputs(x / s, fmt))
                known[key] = 0.5 * float((back * error).square_().sum())
            self.activations[fmt.name] += known[key]

    def left_of(self, library: Library, weight: np.ndarray) -> Iterator[tuple[bool, float]]:
        """(smoothed or not, the part of the weight's loss that GPTQ leaves); rows count by their steps."""
        for smoothed, sums in self.left.items():
            rows = weight[:: self.every] * (library.smoothing(self.name) if smoothed else 1.0)
            after, before = (sums * torch.from_numpy(np.square(np.abs(rows).max(axis=1)))).sum(dim=1)
            yield smoothed, float(after / before) if before else 1.0

    def weights(self, source: Source, library: Library, weight: np.ndarray, fmt: Format) -> float:
        """Loss by rounding the weight (N, K): 0 where the file's own blocks are kept."""
        share = len(weight) / len(weight[:: self.every])
        weight = weight[:: self.every]
        if fmt.is_native or native_format(source, self.name) == fmt.name:
            return 0.0
        fisher = self.fisher
        assert isinstance(fisher, Tensor)
        if not fmt.is_integer:
            error = _bf16_error(weight) * (fmt.bits != 32)
            return share * 0.5 * float((error.view(*fisher.shape, -1).square().mean(dim=2) * fisher).sum())
        if fmt.scales_tokens:
            weight = weight * library.smoothing(self.name)
            assert isinstance(self.smoothed, Tensor)
            fisher = self.smoothed
        squares = _squared_errors(weight, fmt)
        by_group = fisher.view(len(squares), squares.shape[1], -1).sum(dim=2)
        return share * 0.5 * float((squares * by_group).sum())


def _table_error(source: Source, rows: Tensor, name: str) -> Tensor:
    """What rounding does to `rows` of the embedding."""
    fmt = parse_format(name)
    if fmt.bits == 32 or fmt.is_native or native_format(source, "embedding") == name:
        return torch.zeros_like(rows)
    if not fmt.is_integer:
        return rows - rows.bfloat16().float()
    return rows - as_tensor(round_to_nearest(rows.numpy(), fmt).dequantize())


def _squared_errors(weight: np.ndarray, fmt: Format) -> Tensor:
    """Mean squared rounding error (N, groups) of each group of a weight (N, K): step^2 / 12, or where the
    range is searched for, what rounding makes of it."""
    grouped = group_rows(weight, fmt)
    if fmt.bits == 8:
        return torch.from_numpy(make_grid(grouped, fmt).scales).square() / 12
    grid = search_grid(grouped, fmt)
    rounded = (grid.codes(grouped) - grid.zeros[:, :, None]) * grid.scales[:, :, None]
    return torch.from_numpy(np.square(rounded - grouped).mean(axis=2))


def _bf16_error(weight: np.ndarray) -> Tensor:
    exact = torch.from_numpy(np.ascontiguousarray(weight))
    return exact - exact.bfloat16().float()


def sensitivities(
    library: Library,
    documents: Sequence[Sequence[int]],
    choices: Mapping[str, Sequence[str]],
    progress: Progress | None = None,
) -> tuple[Losses, Losses, Left]:
    """Expected loss by (weights, activations) of every choice, weights rounded to nearest; and the part of
    the former that GPTQ leaves.

    choices: place -> formats; those of kv_cache are KV formats, and those of the head stand for the embedding
    too, whose rounding counts as an activation's. documents: calibration token ids. Layer by layer, from
    the states before each: memory is a layer's activations, the states of all, and the logits of a document.
    """
    source = library.source
    spec = source.spec
    lengths = [len(document) for document in documents]
    text = Text(source, [np.asarray(document, dtype=np.int64) for document in documents])
    weight = float_weights(source)
    cache_losses = dict.fromkeys(choices.get("kv_cache", ()), 0.0)
    by_weights: Losses = {}
    by_activations: Losses = {}
    left: Left = {}
    places: dict[str, _Place] = {}  # of the layer that is looked at

    def see_cache(x: Tensor, gradient: Tensor, _: Tensor) -> None:
        for name in cache_losses:
            error = x - round_keys_or_values(x, name)
            cache_losses[name] += 0.5 * float((gradient * error).square().sum())

    def linear(name: str, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return x @ weight(name).T
        its = [len(x)] if name == "head" else lengths
        return _probed(x, weight(name), functools.partial(places[name].see, library, its))

    def look_at(*names: str) -> None:
        places.update({name: _Place(library, name, choices[name]) for name in names})

    def settle() -> None:
        """Turn the sums of `places` into losses, and forget them."""
        for name, place in places.items():
            own = weight(name).numpy()
            for fmt in place.formats:
                by_weights[name, fmt.name] = place.weights(source, library, own, fmt) / sum(lengths)
                by_activations[name, fmt.name] = place.activations[fmt.name] / sum(lengths)
            for smoothed, part in place.left_of(library, own):
                left[name, smoothed] = part
        places.clear()

    def run(layer: int, x: Tensor) -> Tensor:
        cache = _ProbedCache(lengths, see_cache) if x.requires_grad else Documents(lengths)
        return decoder_layer(
            spec, layer, x, text.positions, text.turns, linear=linear, vector=weight, cache=cache
        )

    states = [text.embed()]
    with torch.no_grad():
        for layer in range(spec.num_layers):
            states.append(run(layer, states[-1]))
    draw = torch.Generator().manual_seed(_SEED)
    look_at("head")
    gradients = []
    for final in states.pop().split(lengths):  # type: ignore[no-untyped-call]
        x = final.clone().requires_grad_()
        logits = linear("head", rms_norm(x, weight("norm"), spec.rms_norm_eps, spec.norm_offset))
        gradient = torch.softmax(logits.detach(), dim=1)
        drawn = torch.multinomial(gradient, 1, generator=draw)
        torch.autograd.backward(logits, gradient.scatter_add_(1, drawn, torch.full(drawn.shape, -1.0)))
        gradients.append(x.grad)
        del logits, gradient
    settle()
    back = torch.cat(gradients)
    for layer in reversed(range(spec.num_layers)):
        if progress is not None:
            progress("sensitivity", spec.num_layers - 1 - layer, spec.num_layers)
        look_at(*(f"layers.{layer}.{kind}" for kind in spec.linears()))
        x = states.pop().requires_grad_()
        torch.autograd.backward(run(layer, x), back)
        assert x.grad is not None
        back = x.grad
        settle()
    ids = torch.from_numpy(np.concatenate(text.documents))
    for name in choices.get("head", ()):
        error = spec.embedding_scale * _table_error(source, weight("embedding")[ids], name)
        by_activations["head", name] += 0.5 * float((back * error).square_().sum()) / sum(lengths)
    by_activations |= {("kv_cache", name): loss / sum(lengths) for name, loss in cache_losses.items()}
    return by_weights, by_activations, left
