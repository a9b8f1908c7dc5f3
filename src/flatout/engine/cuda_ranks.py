"""What several GPUs that share a model tell each other, from one process with a thread for each GPU.

Inside a graph the GPUs meet by themselves (`kernels/triton/exchange.py`). Steps that are launched kernel by
kernel must not: a library that loads a kernel may wait for its GPU, which waits for another GPU, whose thread
waits for the library. There a part is copied to every other GPU, and threads meet before anyone reads it.

Only one thread runs at a time (`Group.baton`), which costs nothing where all of them launch from Python.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import triton
from torch import Tensor

from flatout.errors import BackendError
from flatout.kernels import gpu
from flatout.kernels.gpu import Exchange
from flatout.kernels.triton import exchange


class Group:
    """The GPUs `devices`. numbers: most that are exchanged at once."""

    def __init__(self, devices: Sequence[torch.device], numbers: int) -> None:
        self.devices = tuple(devices)
        self.baton = threading.Lock()
        self.barrier = threading.Barrier(len(devices))
        self.parts: list[list[list[Tensor]]] = [[[] for _ in devices] for _ in range(2)]
        self.capacity = numbers
        _introduce(self.devices)
        words = 2 * len(devices) * self.capacity
        self.rooms = [torch.zeros(words, dtype=torch.int64, device=device) for device in devices]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A thread's work. An error in it reaches the threads that wait for this one."""
        with self.baton:
            try:
                yield
            except BaseException:
                self.barrier.abort()
                raise


class Rank:
    """One GPU's side."""

    def __init__(self, group: Group, index: int) -> None:
        self._group, self.index, self.count = group, index, len(group.devices)
        self._device = group.devices[index]
        self._card = gpu.card(self._device)
        self._half = 0
        self._next = Exchange(
            rooms=torch.tensor([room.data_ptr() for room in group.rooms], device=self._device),
            state=torch.tensor([1, 0], dtype=torch.int32, device=self._device),
            rank=index,
            ranks=self.count,
            capacity=group.capacity,
        )
        self._stalled = torch.zeros(1, dtype=torch.int32, pin_memory=self._device.type == "cuda")

    def meet(self) -> None:
        """Wait until all threads have come here. Raises BrokenBarrierError when one of them failed."""
        self._group.baton.release()
        try:
            self._group.barrier.wait()
        finally:
            self._group.baton.acquire()

    def begin(self) -> None:
        """A step begins."""
        self._next = replace(self._next, index=0)

    def check(self) -> None:
        """Raise BackendError if another rank did not answer in a step that has ended."""
        if self._stalled[0]:
            raise BackendError(
                "GPUs that share a model must answer each other within seconds",
                f"{self._device} waited for another in vain",
                "one GPU; nvidia-smi topo -p2p w shows who can write to whom",
            )

    def prove(self) -> None:
        """Have all ranks exchange a few numbers. Raises BackendError if what comes is not what was sent."""
        if self._device.type != "cuda":
            return
        keys = torch.arange(4, device=self._device) * (self.index + 1) << 32
        self._greatest(keys, self._ticket(only_load=True))
        torch.cuda.synchronize()
        self.meet()  # loading may wait for a GPU, which must not be waiting for this thread
        self._greatest(keys, self._ticket())
        self.meet()
        found = keys.tolist()
        self.check()
        if found != [(i * self.count) << 32 for i in range(4)]:
            raise BackendError(
                "GPUs that share a model must be able to write to each other's memory",
                f"{self._device} found {found}",
                "one GPU",
            )

    def exchange(self) -> Exchange | None:
        """For a product that adds up with those of the other ranks by itself. None where a library that loads
        a kernel may stand between."""
        if self._device.type != "cuda":
            return None
        return self._ticket(only_load=not torch.cuda.is_current_stream_capturing())

    def add(self, part: Tensor, x: Tensor, x_bf16: Tensor | None = None) -> None:
        """x float32 (T, D) += all ranks' parts (T, D); x_bf16 = x."""
        capturing = part.is_cuda and torch.cuda.is_current_stream_capturing()
        if capturing or (part.is_cuda and part.numel() <= self._group.capacity):
            self._add(part, x, x_bf16, self._ticket(only_load=not capturing))
        if capturing:
            return
        for found in self._gathered(part):
            x += found
        if x_bf16 is not None:
            x_bf16.copy_(x)

    def greatest(self, keys: Tensor, first: int) -> None:
        """keys (T,) of `kernels/triton/sample.py` for this rank's tokens, which begin at `first`: the
        greatest of all ranks'."""
        keys -= first  # which makes the token that a key names greater by as much
        capturing = keys.is_cuda and torch.cuda.is_current_stream_capturing()
        if keys.is_cuda:
            self._greatest(keys, self._ticket(only_load=not capturing))
        if capturing:
            return
        for found in self._gathered(keys.clone()):
            torch.maximum(keys, found, out=keys)

    def _ticket(self, only_load: bool = False) -> Exchange:
        found = replace(self._next, only_load=only_load)
        if not only_load:
            self._next = replace(self._next, index=found.index + 1)
        return found

    def _gathered(self, part: Tensor) -> list[Tensor]:
        """All ranks' parts, on this rank's device."""
        self._half = 1 - self._half
        # PyTorch has both GPUs' streams wait for such a copy.
        there = [part if r == self.index else part.to(d) for r, d in enumerate(self._group.devices)]
        parts = self._group.parts[self._half]
        parts[self.index] = there
        self.meet()
        return [found[self.index] for found in parts]

    def _fits(self, words: int) -> None:
        if words > self._group.capacity:
            raise BackendError(
                f"ranks exchange at most {self._group.capacity} numbers", str(words), "a smaller batch"
            )

    def _add(self, part: Tensor, x: Tensor, x_bf16: Tensor | None, ticket: Exchange) -> None:
        size = part.numel()
        self._fits(size)
        block = 128 if size <= exchange.FEW else exchange.BLOCK
        gpu.start(
            self._card, exchange.add, (triton.cdiv(size, block),), part, x, x_bf16, ticket.rooms,
            ticket.state, ticket.index, size, RANK=self.index, RANKS=self.count, CAPACITY=ticket.capacity,
            BLOCK=block, TWICE=x_bf16 is not None, PDL=self._card.pdl, num_warps=block // 128,
            only_load=ticket.only_load,
        )  # fmt: skip

    def _greatest(self, keys: Tensor, ticket: Exchange) -> None:
        size = keys.numel()
        self._fits(2 * size)
        gpu.start(
            self._card, exchange.greatest, (1,), keys, ticket.rooms, ticket.state, self._stalled,
            ticket.index, size, RANK=self.index, RANKS=self.count, CAPACITY=ticket.capacity,
            BLOCK=max(32, triton.next_power_of_2(size)), PDL=self._card.pdl, num_warps=1,
            only_load=ticket.only_load,
        )  # fmt: skip


def _introduce(devices: Sequence[torch.device]) -> None:
    """Have every GPU map the others' memory. Raises BackendError where that is not possible."""
    for a in devices:
        for b in devices:
            if a == b or a.type != "cuda":
                continue
            if not torch.cuda.can_device_access_peer(a, b):
                raise BackendError(
                    "GPUs that share a model must reach each other's memory",
                    f"{a} cannot read {b}",
                    "one GPU",
                )
            torch.ones(1, device=a).to(b)  # PyTorch asks the driver for it with the first copy
