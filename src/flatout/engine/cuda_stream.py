"""Layers that do not fit on the GPU: kept in the host's memory, copied over when their turn comes, or
computed there (`cuda_host`).

Two places on the GPU take turns. While a layer is computed from one, the next layer is copied into the other,
and as soon as it has been, the one after that takes its place; the first layers of the next step follow the
last ones of this step. So the bus is busy all the time, also while the processor computes, and a step takes
the bytes of the layers that are copied over its rate.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flatout.engine.cuda_host import Division, HostLayer, computable, divide, processor_rate
from flatout.errors import ResourceError

if TYPE_CHECKING:
    from flatout.engine.cuda_weights import LayerWeights

_MEASURED = 8  # layers that are copied, and computed, to see how fast that is
_ALIGNMENT = 256  # bytes; the bulk copy engine wants 16, the vendor's products run faster with more


def held(layers: Iterable[LayerWeights], resident: int | None) -> tuple[LayerWeights, ...] | StreamedLayers:
    """`layers`, which are made one after another, all on their GPU, or those from `resident` on in the host's
    memory."""
    if resident is None:
        return tuple(layers)
    kept: list[LayerWeights] = []
    streamed: list[tuple[LayerWeights, Tensor]] = []
    device = torch.device("cpu")
    for i, layer in enumerate(layers):
        device = layer.input_norm.device
        if i < resident:
            kept.append(layer)
        else:
            streamed.append(_in_one_piece(layer))
    return StreamedLayers(tuple(kept), streamed, device)


class StreamedLayers:
    """A sequence of layers; iterating over it, once a step, gives each on the GPU at its turn. What is given
    holds until the next is asked for. Not to be captured in a graph."""

    def __init__(
        self,
        resident: tuple[LayerWeights, ...],
        streamed: list[tuple[LayerWeights, Tensor]],
        device: torch.device,
    ) -> None:
        self._resident, self._streamed = resident, streamed
        self._on_gpu = device.type == "cuda"
        size = max((len(piece) for _, piece in streamed), default=0)
        self._places = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._views = [[_viewed(layer, place) for layer, _ in streamed] for place in self._places]
        self._holds = [-1, -1]  # which of the streamed layers is in each place, or on its way there
        self._turn = 0
        self._computed: dict[int, HostLayer] = {}  # by the processor, in steps of few tokens
        if self._on_gpu:
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._arrived = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
            self._done = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
            weakref.finalize(self, _unregister, [piece for _, piece in streamed])

    def __len__(self) -> int:
        return len(self._resident) + len(self._streamed)

    def __getitem__(self, index: Any) -> Any:
        """Layers where they are kept: formats and sizes can be read off them."""
        return (*self._resident, *(layer for layer, _ in self._streamed))[index]

    @property
    def streamed_bytes(self) -> int:
        """Bytes copied in a step in which the processor computes nothing."""
        return sum(len(piece) for _, piece in self._streamed)

    def __iter__(self) -> Iterator[LayerWeights]:
        for layer in self._in_turn({}):
            assert not isinstance(layer, HostLayer)
            yield layer

    def divided(self) -> Iterator[LayerWeights | HostLayer]:
        """The same for steps of few tokens, of which the processor computes its layers."""
        return self._in_turn(self._computed)

    def divide(self, division: Division | None = None) -> Division | None:
        """Give the processor its layers, by default as many as is best by what bus and processor reach now.
        None where it cannot compute any."""
        if division is None and self._on_gpu and all(computable(layer) for layer, _ in self._streamed):
            division = divide(len(self._streamed), self.streamed_bytes / len(self._streamed), *self._rates())
        if division is not None:
            device = self._places[0].device
            self._computed = {
                i: HostLayer(
                    dataclasses.replace(layer, heads=_mapped(layer.heads, lambda tensor: tensor.to(device)))
                )
                for i, (layer, _) in enumerate(self._streamed)
                if division.takes(i)
            }
        return division

    def _rates(self) -> tuple[float, float, float]:
        """bytes/s of the bus alone, and of bus and processor together, with as many threads of PyTorch's as
        are faster, all or all but one; that many they stay."""
        pieces = [piece for _, piece in self._streamed[:_MEASURED]]
        layers = [layer for layer, _ in self._streamed[:_MEASURED]]
        size = sum(map(len, pieces))
        place, self._holds = self._places[0], [-1, -1]

        def together(computed: list[LayerWeights]) -> tuple[float, float]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            with torch.cuda.stream(self._copies):
                begin.record()
                for piece in pieces:
                    place[: len(piece)].copy_(piece, non_blocking=True)
                end.record()
            rate = processor_rate(computed, lambda: not end.query()) if computed else 0.0  # type: ignore[no-untyped-call]
            end.synchronize()
            return size / begin.elapsed_time(end) * 1e3, rate

        together([])  # the first of anything is not timed
        alone, _ = together([])
        every = torch.get_num_threads()
        found: dict[int, tuple[float, float]] = {}
        # A product waits for its slowest thread, and one shares a core with whatever else runs.
        for threads in (every, max(1, every - 1)):
            torch.set_num_threads(threads)
            processor_rate(layers, lambda: False)  # starts them
            found[threads] = together(layers)
        best = max(found, key=lambda threads: sum(found[threads]))
        torch.set_num_threads(best)
        return alone, *found[best]

    def _in_turn(self, computed: dict[int, HostLayer]) -> Iterator[LayerWeights | HostLayer]:
        yield from self._resident
        copied = [i for i in range(len(self._streamed)) if i not in computed]
        for j, i in enumerate(copied[:2]):
            self._fetch(i, (self._turn + j) % 2)
        at = 0
        for i in range(len(self._streamed)):
            if i in computed:
                yield computed[i]
                continue
            place = self._turn
            if self._on_gpu:
                torch.cuda.current_stream().wait_event(self._arrived[place])
            yield self._views[place][i]
            if self._on_gpu:
                self._done[place].record()
            if len(copied) > 1:
                self._turn = 1 - place
            self._fetch(copied[(at + 2) % len(copied)], place)
            at += 1

    def _fetch(self, i: int, place: int) -> None:
        """Have streamed layer i copied to that place once the layer there has been computed, unless it is
        there."""
        if self._holds[place] == i:
            return
        self._holds[place] = i
        _, piece = self._streamed[i]
        if not self._on_gpu:
            self._places[place][: len(piece)].copy_(piece)
            return
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._done[place])
            self._places[place][: len(piece)].copy_(piece, non_blocking=True)
            self._arrived[place].record()


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass of tensors and dataclasses, with its tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: _mapped(getattr(value, f.name), change) for f in dataclasses.fields(value)}
        return type(value)(**parts)
    return value


def _viewed(layer: LayerWeights, piece: Tensor) -> LayerWeights:
    """The layer with its tensors one after the other in `piece`, uint8 on any device."""
    at = 0

    def view(tensor: Tensor) -> Tensor:
        nonlocal at
        size = tensor.numel() * tensor.element_size()
        found = piece[at : at + size].view(tensor.dtype).view(tensor.shape)
        at += -(-size // _ALIGNMENT) * _ALIGNMENT
        return found

    viewed: LayerWeights = _mapped(layer, view)
    return viewed


def _in_one_piece(layer: LayerWeights) -> tuple[LayerWeights, Tensor]:
    """A copy of the layer in the host's memory, in one piece that a GPU can read."""
    tensors: list[Tensor] = []
    _mapped(layer, lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
    size = sum(-(-t.numel() * t.element_size() // _ALIGNMENT) * _ALIGNMENT for t in tensors)
    # PyTorch's own pinned memory comes in powers of two.
    piece = torch.empty(size, dtype=torch.uint8)
    if tensors[0].is_cuda:
        code = _driver().cudaHostRegister(piece.data_ptr(), size, 0)
        if int(code) != 0:
            raise ResourceError(
                "the driver must lock the layers that are streamed in the host's memory",
                f"CUDA error {int(code)} for {size / 1e9:.2f} GB",
                "more host memory, a higher limit on locked memory, or a smaller format",
            )
    there = _viewed(layer, piece)
    targets: list[Tensor] = []
    _mapped(there, lambda tensor: targets.append(tensor) or tensor)  # type: ignore[func-returns-value]
    for target, tensor in zip(targets, tensors, strict=True):
        target.copy_(tensor)
    return there, piece


def _unregister(pieces: list[Tensor]) -> None:
    torch.cuda.synchronize()
    for piece in pieces:
        _driver().cudaHostUnregister(piece.data_ptr())


def _driver() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
