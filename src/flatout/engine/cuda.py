"""The cuda runner: PyTorch and Triton, a whole decode step in one CUDA graph.

A step in which every sequence gets one token (decode), or that has few tokens in all, is replayed from a
graph captured the second time its size, rounded up, occurs. The graph of decode ends by writing the tokens it
chose and the next positions where its next replay reads them, so the runner can start the next step before
anyone has read this one's tokens: it does when a step continued the one before, and throws the result away
when the next step turns out to be another (engine/cuda_decode.py). Every other step (prompts, scores, logits)
is launched kernel by kernel.

One to a few tokens go through the matrix-vector kernels, which norm, activation and residual are part of;
more through the vendor's matrix products with small kernels between them.

Legend: T tokens, S sequences, H query heads, G key/value heads, E head size, D hidden size, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flatout.core.formats import Recipe
from flatout.core.model import Model
from flatout.core.spec import ModelSpec
from flatout.engine.cuda_attend import StepAttention, brought
from flatout.engine.cuda_decode import Decoder
from flatout.engine.cuda_memory import HEAD_ROWS, MAX_STEP_TOKENS, Claim, layers_that_fit, memory_is_free
from flatout.engine.cuda_ranks import Rank
from flatout.engine.cuda_stream import StreamedLayers
from flatout.engine.cuda_weights import GpuWeights, LayerWeights, load_weights
from flatout.engine.runner import StepInput, check_step, sampled_rows
from flatout.engine.sampler import sample
from flatout.engine.scheduler import MAX_DRAFTED_ROWS
from flatout.errors import BackendError, UnsupportedModelError
from flatout.kernels import gpu, gpu_linear
from flatout.kernels.gpu import Activations, Card, Product
from flatout.kernels.gpu_attention import LayerCache
from flatout.kernels.packed import PackedWeight
from flatout.models.llama import rope_frequencies

Attend = Callable[[Product, LayerWeights, LayerCache], Activations]
"""What a step's tokens read (T, H E), given a layer's product of qkv."""


class CudaRunner:
    """Weights on one GPU, pages of keys and values beside them.

    kv_cache: "bf16" or "fp8" (e4m3 without scales). rank: this GPU's place among several that share a model,
    whose spec is that of its share (`cuda_parallel`).
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: GpuWeights,
        num_pages: int,
        page_size: int = 64,
        kv_cache: str = "bf16",
        max_batch: int = 256,
        card: Card | None = None,
        rank: Rank | None = None,
    ) -> None:
        self.spec, self.page_size, self.num_pages = spec, page_size, num_pages
        self.max_step_tokens = MAX_STEP_TOKENS
        self.weights, self.rank = weights, rank
        self.device = weights.embedding.device
        self.card: Card = card or gpu.card(self.device)
        self.name = f"cuda ({self.card.name}, {kv_cache} cache)"
        dtype = torch.float8_e4m3fn if kv_cache == "fp8" else torch.bfloat16
        shape = (num_pages, spec.num_kv_heads, page_size, spec.head_dim)
        # Zeros, because a block that is read holds slots nobody has written, and 0 * NaN is NaN.
        self.caches = tuple(
            LayerCache(*(torch.zeros(shape, dtype=torch.uint8 if kv_cache == "fp8" else dtype,
                                     device=self.device).view(dtype) for _ in range(2)))
            for _ in range(spec.num_layers)
        )  # fmt: skip
        positions = torch.arange(min(spec.max_positions, num_pages * page_size)).float()
        angles = (positions[:, None] * rope_frequencies(spec)[None, :]).to(self.device)
        # Arithmetic on "meta", for a dry card, has PyTorch import its compiler.
        self.turns = (angles, angles) if self.card.dry else (angles.cos(), angles.sin())
        self._decoder = Decoder(self, max_batch)

    def forward(self, batch: StepInput, rows: Literal["last", "all"]) -> np.ndarray:
        hidden = self._hidden(batch, rows)
        logits = [self.logits(Activations(*part)) for part in _pieces(hidden)]
        found: np.ndarray = torch.cat(logits).cpu().numpy()
        return found

    def score(self, batch: StepInput, targets: np.ndarray) -> np.ndarray:
        chosen, total = self.score_parts(batch, targets)
        found: np.ndarray = chosen - total
        return found

    def score_parts(self, batch: StepInput, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float32 (T,) each: logits of the targets, -inf for those that another rank has, and the logarithm
        of the sum of all exponentials here."""
        hidden = self._hidden(batch, "all")
        ids = torch.from_numpy(np.asarray(targets, dtype=np.int64)).to(self.device) - self.first_token
        chosen, total, first = [], [], 0
        for values, scales in _pieces(hidden):
            logits = self.logits(Activations(values, scales))
            own = ids[first : first + len(logits)]
            inside = (own >= 0) & (own < logits.shape[1])
            there = logits.gather(1, torch.where(inside, own, 0)[:, None])[:, 0]
            chosen.append(torch.where(inside, there, -torch.inf))
            total.append(torch.logsumexp(logits, dim=1))
            first += len(logits)
        return torch.cat(chosen).cpu().numpy(), torch.cat(total).cpu().numpy()

    def sample(
        self,
        batch: StepInput,
        temperature: np.ndarray,
        top_k: np.ndarray,
        top_p: np.ndarray,
        seeds: np.ndarray,
        rows: Literal["last", "all"] = "last",
    ) -> np.ndarray:
        check_step(batch, self.spec, self.page_size, self.num_pages)
        tokens: np.ndarray
        if len(batch.tokens) == len(batch.starts) <= self._decoder.max_batch:
            tokens = self._decoder.step(batch, temperature, top_k, top_p, seeds)
        elif len(batch.tokens) <= MAX_DRAFTED_ROWS:
            tokens = self._decoder.small_step(batch, temperature, top_k, top_p, seeds)
            if rows == "last":
                tokens = tokens[np.cumsum(batch.lengths) - 1]
        elif (temperature <= 0).all():
            tokens = self._greedy(self._hidden(batch, rows))
        else:
            of, positions = sampled_rows(batch, rows)
            logits = self.forward(batch, rows)
            return sample(logits, positions, temperature[of], top_k[of], top_p[of], seeds[of])
        if (tokens < 0).any():
            raise BackendError(
                "a runner must give logits without NaN and with a finite maximum",
                f"none in row {int(tokens.argmin())}",
                "the reference runner, and please report the model",
            )
        return tokens

    @property
    def first_token(self) -> int:
        """The first of the tokens that this rank has logits of."""
        return 0 if self.rank is None else self.rank.index * self.weights.head.n

    def dry_run(self, prompt: StepInput) -> None:
        """Launch, on a dry card, what a prompt and a token of one sequence need."""
        self.logits(self._hidden(prompt, "last"))
        self._decoder.dry_run()

    def few(self, tokens: int) -> bool:
        """Whether a step of that many tokens goes through the matrix-vector kernels."""
        if tokens & (tokens - 1):
            return False
        return all(
            tokens <= gpu_linear.FEW_ROWS[w.format]
            for layer in self.weights.layers[:1]
            for w in layer.linears
        )

    def fp8(self, weight: PackedWeight) -> bool:
        """Whether many tokens meet this weight in e4m3."""
        return weight.format == "fp8" and self.card.fp8

    def logits(self, hidden: Activations) -> Tensor:
        """float32 (rows, V) of what `final_norm` left."""
        return gpu_linear.logits(self.card, hidden, self.weights.head)

    def attended(
        self,
        layer: LayerWeights,
        x: Tensor,
        pending: Product | None,
        attend: Attend,
        cache: LayerCache,
    ) -> Activations:
        """The first half of a layer of many tokens on the residual stream x (T, D) float32, to which
        `pending` is added: what they read (T, H E)."""
        normal = gpu.add_norm(
            self.card, x, pending, layer.input_norm, self.spec.rms_norm_eps, self.fp8(layer.qkv)
        )
        return attend(gpu_linear.multiply(self.card, normal, layer.qkv), layer, cache)

    def fed_forward(self, layer: LayerWeights, x: Tensor, read: Activations) -> Product | None:
        """The second half; what it returns is still to be added to x."""
        card, eps = self.card, self.spec.rms_norm_eps
        if self.fp8(layer.o) and read.scales is None:
            read = gpu.quantize(card, read.values)
        o = self._added(x, read, layer.o)
        normal = gpu.add_norm(card, x, o, layer.post_norm, eps, self.fp8(layer.gate_up))
        gelu = self.spec.activation == "gelu_tanh"
        activated = gpu_linear.multiply_gated(
            card, normal, layer.gate_up, gelu, self.fp8(layer.down), layer.down if self.rank is None else None
        )
        return self._added(x, activated, layer.down)

    def _added(self, x: Tensor, values: Activations, weight: PackedWeight) -> Product | None:
        """A product that is still to be added to x, or None where ranks have added theirs."""
        if self.rank is None:
            return gpu_linear.multiply(self.card, values, weight)
        self.rank.add(gpu_linear.multiply_whole(self.card, values, weight), x)
        return None

    def _greedy(self, hidden: Activations) -> np.ndarray:
        """int32 (rows,): the greatest logit's token."""
        logits = self.logits(hidden)
        if self.rank is None:
            best: np.ndarray = logits.argmax(dim=1).int().cpu().numpy()
            return best
        keys = torch.full((len(logits),), -(1 << 63), dtype=torch.int64, device=self.device)
        gpu.argmax_keys(self.card, logits, keys)
        self.rank.greatest(keys, self.first_token)
        tokens: np.ndarray = (0xFFFFFFFF - (keys & 0xFFFFFFFF)).int().cpu().numpy()
        return tokens

    def final_norm(self, x: Tensor, pending: Product | None) -> Activations:
        """What the head multiplies, of rows x (rows, D)."""
        weights, eps = self.weights, self.spec.rms_norm_eps
        return gpu.add_norm(self.card, x, pending, weights.norm, eps, self.fp8(weights.head))

    def embed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """float32 (T, D) of token ids int32 (T,), and the same in bfloat16."""
        x = torch.empty(len(tokens), self.spec.hidden_size, device=self.device)
        x_bf16 = torch.empty(x.shape, dtype=torch.bfloat16, device=self.device)
        gpu.embed(self.card, tokens, self.weights.embedding, self.spec.embedding_scale, x, x_bf16)
        return x, x_bf16

    @torch.no_grad()
    def _hidden(self, batch: StepInput, rows: Literal["last", "all"]) -> Activations:
        """After the last norm: (S, D) of each sequence's last new token, or (T, D) of all."""
        check_step(batch, self.spec, self.page_size, self.num_pages)
        self._decoder.forget()
        x, _ = self.embed(*brought([batch.tokens], np.int32, self.device))
        attend = StepAttention(self, batch)
        fewer = rows == "last" and len(batch.lengths) < len(batch.tokens)
        pending: Product | None = None
        for i, (layer, cache) in enumerate(zip(self.weights.layers, self.caches, strict=True)):
            if fewer and i == len(self.caches) - 1:  # of this layer nobody asks for the other rows
                read = self.attended(layer, x, pending, attend.last, cache)
                x = x.index_select(0, attend.last_rows)
            else:
                read = self.attended(layer, x, pending, attend, cache)
            pending = self.fed_forward(layer, x, read)
        return self.final_norm(x, pending)


def _pieces(hidden: Activations) -> list[tuple[Tensor, Tensor | None]]:
    values = torch.split(hidden.values, HEAD_ROWS)
    scales = [None] * len(values) if hidden.scales is None else torch.split(hidden.scales, HEAD_ROWS)
    return list(zip(values, scales, strict=True))


@memory_is_free()
def open_device() -> torch.device:
    """The current GPU. Raises BackendError where there is none that runs the kernels, with the reason, and
    ResourceError where its memory is full."""
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None or torch.version.hip is not None
        raise BackendError(
            "the cuda runner needs a GPU, its driver and a PyTorch built for it",
            "no usable device (driver missing or too old)" if built else f"PyTorch {torch.__version__}",
            "nvidia-smi to see the driver, or --runner cpu"
            if built
            else "pip install torch from the index of your CUDA version, or --runner cpu",
        )
    device = torch.device("cuda", torch.cuda.current_device())
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        raise BackendError(
            "the cuda runner needs compute capability 8.0 (Ampere) or newer, for bfloat16",
            f"{torch.cuda.get_device_name(device)}, {torch.cuda.get_device_capability(device)}",
            "--runner cpu",
        )
    return device


def check_formats(recipe: Recipe, card: Card) -> None:
    """Raise UnsupportedModelError for formats that this card has no instructions for."""
    names = {recipe.layers, recipe.head, recipe.kv_cache, *(name for _, name in recipe.overrides)}
    if "fp8" in names and not card.fp8:
        raise UnsupportedModelError(
            "fp8 needs a GPU with e4m3 (compute capability 8.9 or newer)", card.name, "bf16 or w8a16"
        )


@memory_is_free()
def open_runner(
    model: Model,
    weight_bytes: float,
    tokens: int | None,
    page_size: int,
    max_batch: int,
    beside: Claim | None = None,
) -> CudaRunner:
    """A runner for `model` on the current GPU, leaving room for what another model claims. Raises
    BackendError, UnsupportedModelError or ResourceError before weights are read, and ResourceError where
    memory runs out all the same."""
    from flatout.engine.cuda_compile import compile_ahead

    device = open_device()
    card = gpu.card(device)
    check_formats(model.recipe, card)
    free, _ = torch.cuda.mem_get_info(device)
    resident, pages = layers_that_fit(model.spec, model.recipe, weight_bytes, tokens, page_size, free, beside)
    kv_cache = "fp8" if model.recipe.kv_cache == "fp8" else "bf16"
    compiling = compile_ahead(model.spec, model.recipe, card, page_size)
    try:
        weights = load_weights(model, device, resident)
        if isinstance(weights.layers, StreamedLayers) and (division := weights.layers.divide()) is not None:
            print(f"flatout: {division}", file=sys.stderr)
        return CudaRunner(model.spec, weights, pages, page_size, kv_cache, max_batch)
    finally:
        compiling.join()  # a process may not end while it compiles
