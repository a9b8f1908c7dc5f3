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

import torch
from torch import Tensor

from flatout.errors import BackendError
from flatout.kernels import gpu
from flatout.kernels.triton.exchange import PROGRAMS, exchange


class Group:
    """The GPUs `devices`. numbers: most that are exchanged at once, each of 4 bytes."""

    def __init__(self, devices: Sequence[torch.device], numbers: int) -> None:
        self.devices = tuple(devices)
        self.baton = threading.Lock()
        self.barrier = threading.Barrier(len(devices))
        self.parts: list[list[list[Tensor]]] = [[[] for _ in devices] for _ in range(2)]
        self.capacity = 2 * -(-numbers // 2)
        _introduce(self.devices)
        count = len(devices)
        self.rooms = [torch.empty(2 * count * self.capacity, device=device) for device in devices]
        self.flags = [torch.zeros(count * PROGRAMS, dtype=torch.int32, device=d) for d in devices]

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
        device = group.devices[index]
        self._card = gpu.card(device)
        self._half = 0
        self._rooms = torch.tensor([room.data_ptr() for room in group.rooms], device=device)
        self._flags = torch.tensor([flags.data_ptr() for flags in group.flags], device=device)
        self._counts = torch.zeros(PROGRAMS, dtype=torch.int32, device=device)

    def meet(self) -> None:
        """Wait until all threads have come here. Raises BrokenBarrierError when one of them failed."""
        self._group.baton.release()
        try:
            self._group.barrier.wait()
        finally:
            self._group.baton.acquire()

    def add(self, part: Tensor, x: Tensor, x_bf16: Tensor | None = None) -> None:
        """x float32 (T, D) += all ranks' parts (T, D); x_bf16 = x."""
        if part.is_cuda and torch.cuda.is_current_stream_capturing():
            self._launch(part, x, x_bf16, greatest=False)
            return
        for found in self._gathered(part):
            x += found
        if x_bf16 is not None:
            x_bf16.copy_(x)

    def greatest(self, keys: Tensor, first: int) -> None:
        """keys (T,) of `kernels/triton/sample.py` for this rank's tokens, which begin at `first`: the
        greatest of all ranks'."""
        keys -= first  # which makes the token that a key names greater by as much
        if keys.is_cuda and torch.cuda.is_current_stream_capturing():
            self._launch(keys, keys, None, greatest=True)
            return
        for found in self._gathered(keys.clone()):
            torch.maximum(keys, found, out=keys)

    def _gathered(self, part: Tensor) -> list[Tensor]:
        """All ranks' parts, on this rank's device."""
        self._half = 1 - self._half
        # PyTorch has both GPUs' streams wait for such a copy.
        there = [part if r == self.index else part.to(d) for r, d in enumerate(self._group.devices)]
        parts = self._group.parts[self._half]
        parts[self.index] = there
        self.meet()
        return [found[self.index] for found in parts]

    def _launch(self, part: Tensor, x: Tensor, x_bf16: Tensor | None, greatest: bool) -> None:
        size = part.numel()
        if size * (2 if greatest else 1) > self._group.capacity:
            raise BackendError(
                f"ranks exchange at most {self._group.capacity} numbers", str(size), "a smaller batch"
            )
        few = size <= 128 * PROGRAMS
        gpu.start(
            self._card, exchange, (PROGRAMS,), part, x, x_bf16, self._rooms, self._flags, self._counts, size,
            RANK=self.index, RANKS=self.count, CAPACITY=self._group.capacity, BLOCK=128 if few else 1024,
            GREATEST=greatest, TWICE=x_bf16 is not None, PDL=self._card.pdl, num_warps=1 if few else 8,
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
