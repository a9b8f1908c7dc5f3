"""Decode steps of the cuda runner: graphs by batch size, and the next step started ahead.

Inputs of a step lie in buffers that stay where they are; graphs read them there. The last kernel of a step
writes the chosen tokens and the next positions into the same buffers, so replaying the graph once more is the
next step of the same sequences. `step` uses that: once a step has continued the one before, it launches the
following one before it waits for the tokens. If then another step is asked for, that launch is thrown away.
It has written a key and a value to a slot that its sequence owned and had not filled, and whatever uses the
slot later runs later on the same stream; so it changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flatout.engine.cuda_host import HostLayer
from flatout.engine.runner import StepInput, sampled_rows
from flatout.engine.scheduler import MAX_DRAFTED_ROWS
from flatout.kernels import gpu, gpu_attention, gpu_linear
from flatout.kernels.gpu import Activations, Product
from flatout.kernels.packed import PackedWeight
from flatout.kernels.sample import draw

if TYPE_CHECKING:
    from flatout.engine.cuda import CudaRunner
    from flatout.engine.cuda_weights import LayerWeights

UNSETTLED = 2
"""Steps of a size before its time is typical: kernels are compiled in the first, captured in the second."""
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)


@dataclass(slots=True, eq=False)
class _Ahead:
    """A step that has been launched: of which sequences, and where its tokens will be."""

    size: int
    slot: int
    event: torch.cuda.Event | None


class Decoder:
    """Buffers, graphs and the step that is under way."""

    def __init__(self, runner: CudaRunner, max_batch: int) -> None:
        self._runner = runner
        self.max_batch = min(max_batch, _SIZES[-1])
        spec, device = runner.spec, runner.device
        self._capacity = rows = max(self.max_batch, MAX_DRAFTED_ROWS)
        width = runner.turns[0].shape[0]
        self._width = -(-width // runner.page_size)

        def buffer(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self._tokens = buffer(rows, dtype=torch.int32)
        self._positions = torch.full((rows,), -1, dtype=torch.int32, device=device)
        self._pages = buffer(rows, self._width, dtype=torch.int32)
        self._temperature = buffer(rows, dtype=torch.float32)
        self._top_k = buffer(rows, dtype=torch.int32)
        self._top_p = buffer(rows, dtype=torch.float32)
        self._seeds = buffer(rows, dtype=torch.int64)
        self._keys = torch.full((rows,), -(1 << 63), dtype=torch.int64, device=device)
        self._attended = buffer(rows, spec.q_size, dtype=torch.bfloat16)
        self._attended_fp8 = buffer(rows, spec.q_size, dtype=torch.uint8).view(torch.float8_e4m3fn)
        self._scales_fp8 = buffer(rows, spec.num_kv_heads, dtype=torch.float32)
        self._on_gpu = device.type == "cuda"
        self._captures = self._on_gpu and isinstance(runner.weights.layers, tuple)
        self._results = torch.empty(2, rows, dtype=torch.int32, pin_memory=self._on_gpu)
        self._turn = buffer(1, dtype=torch.int32)
        self._graphs: dict[tuple[int, bool, bool], torch.cuda.CUDAGraph | None] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._on_gpu else None
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None  # type: ignore[no-untyped-call]
        self._plans: dict[int, gpu_attention.AttentionPlan] = {}
        self._slots: Tensor | None = None  # where the rows of a drafted step go
        # What the device's buffers hold, as the host knows it.
        self._host_pages = np.zeros((rows, self._width), dtype=np.int32)
        self._parameters: tuple[np.ndarray, ...] = ()
        self._last: tuple[np.ndarray, np.ndarray] | None = None  # starts and tokens of the step before
        self._ahead: _Ahead | None = None
        self._slot = 0

    def forget(self) -> None:
        """Another kind of step is about to run."""
        self._ahead = None
        self._last = None

    @torch.no_grad()
    def small_step(
        self,
        batch: StepInput,
        temperature: np.ndarray,
        top_k: np.ndarray,
        top_p: np.ndarray,
        seeds: np.ndarray,
    ) -> np.ndarray:
        """int32 (T,): the token after each of at most MAX_DRAFTED_ROWS new tokens, drafts or short prompts.

        Each has a row of its own, as if it were a sequence of the same pages that ends with it.
        """
        self.forget()
        of, after = sampled_rows(batch, "all")
        starts = (after - 1).astype(np.int32)
        rows = StepInput(batch.tokens, starts, np.ones_like(starts), batch.pages[of])
        hot = bool((temperature > 0).any())
        self._upload(rows, (temperature[of], top_k[of], top_p[of], seeds[of]), hot)
        return self._tokens_of(self._launch(len(of), hot, drafted=True))

    def _tokens_of(self, step: _Ahead) -> np.ndarray:
        """Wait for a step's tokens."""
        if step.event is not None:
            step.event.synchronize()
        if self._runner.rank is not None:
            self._runner.rank.check()
        tokens: np.ndarray = self._results[step.slot, : step.size].numpy().copy()
        return tokens

    def dry_run(self) -> None:
        """Launch a step of one sequence, on a dry card."""
        self._run(1, False)

    @torch.no_grad()
    def step(
        self,
        batch: StepInput,
        temperature: np.ndarray,
        top_k: np.ndarray,
        top_p: np.ndarray,
        seeds: np.ndarray,
    ) -> np.ndarray:
        """int32 (S,): the token after each sequence's new token."""
        parameters = (temperature, top_k, top_p, seeds)
        hot = bool((temperature > 0).any())
        continues = self._last is not None and (
            np.array_equal(self._last[0] + 1, batch.starts)
            and np.array_equal(self._last[1], batch.tokens)
            and all(np.array_equal(a, b) for a, b in zip(self._parameters, parameters, strict=True))
        )
        under_way = self._ahead if continues and self._known(batch) else None
        if under_way is None:
            self._upload(batch, parameters, hot)
            under_way = self._launch(len(batch.starts), hot)
        self._ahead = None
        # Kernels read positions before they wait (attention), so one step may not be launched right behind
        # another kernel by kernel.
        if continues and (self._captures or not self._on_gpu):
            following = batch.starts + 1
            if int(following.max()) < self._width * self._runner.page_size and self._owned(batch, following):
                self._upload_pages(batch)
                self._ahead = self._launch(len(following), hot)
        tokens = self._tokens_of(under_way)
        self._last = batch.starts.copy(), tokens
        return tokens

    def _known(self, batch: StepInput) -> bool:
        """Whether the device had these pages when it was told to go ahead."""
        ours = self._host_pages[: len(batch.starts), : batch.pages.shape[1]]
        used = np.arange(batch.pages.shape[1])[None, :] * self._runner.page_size <= batch.starts[:, None]
        return bool((ours == batch.pages)[used].all())

    def _owned(self, batch: StepInput, positions: np.ndarray) -> bool:
        """Whether every sequence has a page for that position already."""
        entry = positions // self._runner.page_size
        if int(entry.max()) >= batch.pages.shape[1]:
            return False
        return bool((batch.pages[np.arange(len(entry)), entry] >= 0).all())

    def _upload_pages(self, batch: StepInput) -> None:
        size, width = batch.pages.shape
        pages = np.maximum(batch.pages, 0)
        if not np.array_equal(self._host_pages[:size, :width], pages):
            self._host_pages[:size, :width] = pages
            self._pages[:size, :width] = torch.from_numpy(pages).to(self._runner.device)

    def _upload(self, batch: StepInput, parameters: tuple[np.ndarray, ...], hot: bool) -> None:
        size = len(batch.starts)
        rows = self._rows(size)
        both = np.zeros((2, rows), dtype=np.int32)
        both[1] = -1
        both[0, :size], both[1, :size] = batch.tokens, batch.starts
        there = torch.from_numpy(both).to(self._runner.device)
        self._tokens[:rows], self._positions[:rows] = there[0], there[1]
        self._upload_pages(batch)
        if hot:
            buffers = (self._temperature, self._top_k, self._top_p, self._seeds)
            for buffer, values in zip(buffers, parameters, strict=True):
                values = values.view(np.int64) if values.dtype == np.uint64 else values
                buffer[:size] = torch.from_numpy(np.ascontiguousarray(values)).to(buffer)
                buffer[size:rows] = 0
        self._parameters = tuple(values.copy() for values in parameters)

    def _launch(self, size: int, hot: bool, drafted: bool = False) -> _Ahead:
        """Run a step from what the buffers hold, and have its tokens written to the other slot of the
        results."""
        rows = self._rows(size)
        key = rows, hot, drafted
        if key not in self._graphs or not self._captures:
            self._graphs[key] = None
            self._run(*key)  # once without a graph: compiles, and lets libraries set themselves up
        else:
            graph = self._graphs[key]
            if graph is None:
                graph = self._graphs[key] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    self._run(*key)
                self._meet()  # a capture may wait for every GPU, so none may be waiting for this one
            graph.replay()
            self._meet()
        self._slot = 1 - self._slot
        event = None
        if self._on_gpu:
            event = torch.cuda.current_stream().record_event()
        return _Ahead(size, self._slot, event)

    def _meet(self) -> None:
        if self._runner.rank is not None:
            self._runner.rank.meet()

    def _rows(self, size: int) -> int:
        """Rows of the smallest graph that `size` sequences fit."""
        return min(next(s for s in _SIZES if s >= size), self._capacity)

    def _run(self, rows: int, hot: bool, drafted: bool = False) -> None:
        """The kernels of a step of `rows` sequences, or drafted tokens."""
        runner = self._runner
        if runner.rank is not None:
            runner.rank.begin()
        tokens, positions, keys = self._tokens[:rows], self._positions[:rows], self._keys[:rows]
        if rows not in self._plans:
            self._plans[rows] = gpu_attention.attention_plan(runner.card, runner.spec, rows, runner.device)
        self._slots = self._slots_of(rows) if drafted else None
        hidden = None if runner.few(rows) else self._many(rows)
        if hidden is not None and not hot:
            gpu_linear.greedy_keys(runner.card, hidden, runner.weights.head, keys)
        else:
            logits = self._few(rows) if hidden is None else runner.logits(hidden)
            gpu.argmax_keys(runner.card, logits, keys)
        if runner.rank is not None:
            runner.rank.greatest(keys, runner.first_token)
        drawn = None
        if hot:
            drawn = draw(
                logits, positions + 1, self._temperature[:rows], self._top_k[:rows], self._top_p[:rows],
                self._seeds[:rows],
            )  # fmt: skip
        gpu.advance(
            runner.card, keys, drawn, self._temperature[:rows], tokens, positions, self._results, self._turn
        )

    def _slots_of(self, rows: int) -> Tensor:
        """int64 (rows,): page * page size + place of each row's position."""
        size, at = self._runner.page_size, self._positions[:rows].clamp(min=0).long()
        return self._pages[:rows].gather(1, (at // size)[:, None])[:, 0].long() * size + at % size

    def _attend(self, product: Product, layer: LayerWeights, cache: gpu_attention.LayerCache) -> Activations:
        runner, rows, heads = self._runner, product.tokens, layer.heads
        out = Activations(self._attended[:rows])
        if runner.rank is None and not runner.few(rows) and runner.fp8(layer.o):
            spec = runner.spec
            group = spec.q_size // spec.num_kv_heads  # what one program of attention writes
            if gpu_linear.takes_groups(runner.card, layer.o, rows, group):
                out = Activations(self._attended_fp8[:rows], self._scales_fp8[:rows])
        if self._slots is not None:  # rows see the keys of those drafted before them
            gpu_attention.rotate_and_store(
                runner.card, runner.spec, product, heads, runner.turns, cache, self._slots,
                self._positions[:rows],
            )  # fmt: skip
        gpu_attention.decode_attention(
            runner.card, runner.spec, product, heads, runner.turns, cache,
            self._pages, self._positions, self._plans[rows], out,
        )  # fmt: skip
        return out

    def _many(self, rows: int) -> Activations:
        runner = self._runner
        x, _ = runner.embed(self._tokens[:rows])
        pending: Product | None = None
        for layer, cache in zip(runner.weights.layers, runner.caches, strict=True):
            pending = runner.fed_forward(layer, x, runner.attended(layer, x, pending, self._attend, cache))
        return runner.final_norm(x, pending)

    def _few(self, rows: int) -> Tensor:
        runner, spec, card = self._runner, self._runner.spec, self._runner.card
        x, x_bf16 = runner.embed(self._tokens[:rows])
        eps = spec.rms_norm_eps
        epilogue = gpu_linear.GELU if spec.activation == "gelu_tanh" else gpu_linear.SILU
        for layer, cache in zip(runner.weights.few_layers(), runner.caches, strict=True):
            if isinstance(layer, HostLayer):
                layer.advance(spec, x, x_bf16, partial(self._attend, cache=cache))
                continue
            qkv = torch.empty(rows, spec.qkv_size, device=runner.device)
            gpu_linear.multiply_few(card, x_bf16, layer.qkv, qkv, gains=layer.input_norm, eps=eps)
            read = self._attend(Product(qkv), layer, cache)
            self._add(x, x_bf16, read.values, layer.o)
            activated = torch.empty(rows, spec.intermediate_size, dtype=torch.bfloat16, device=runner.device)
            gpu_linear.multiply_few(
                card, x_bf16, layer.gate_up, activated, gains=layer.post_norm, eps=eps, epilogue=epilogue
            )
            self._add(x, x_bf16, activated, layer.down)
        logits = torch.empty(rows, runner.weights.head.n, device=runner.device)
        gpu_linear.multiply_few(card, x_bf16, runner.weights.head, logits, gains=runner.weights.norm, eps=eps)
        return logits

    def _add(self, x: Tensor, x_bf16: Tensor, values: Tensor, weight: PackedWeight) -> None:
        """x and x_bf16 += values W^T, of all ranks."""
        runner = self._runner
        exchange = None if runner.rank is None else runner.rank.exchange()
        if runner.rank is None or exchange is not None:
            gpu_linear.multiply_few(
                runner.card, values, weight, x, residual=x, out_bf16=x_bf16, exchange=exchange
            )
        if runner.rank is not None and (exchange is None or exchange.only_load):
            part = torch.empty_like(x)
            gpu_linear.multiply_few(runner.card, values, weight, part)
            runner.rank.add(part, x, x_bf16)
