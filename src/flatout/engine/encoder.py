"""Encoder: texts in, vectors out, over the C++ kernels or the PyTorch reference.

Batches are packed: sequences lie one after the other, no padding is computed, and a sequence sees only
itself. In integer formats a text's vector is the same bits whatever it is batched with and however many
threads run. Legend: S sequences, T tokens of all of them, D hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from flatout.core.encoder import EncoderModel, EncoderSpec, expected_encoder_weights
from flatout.core.formats import parse_format
from flatout.engine.cpu import choose, extension, set_weight
from flatout.errors import ConfigError, ResourceError, UnsupportedModelError


class EncoderRunner(Protocol):
    """Executes packed batches, checked already."""

    @property
    def spec(self) -> EncoderSpec: ...

    @property
    def name(self) -> str:
        """What runs, for people: "cpu (amx, 2 threads)"."""
        ...

    def forward(self, tokens: np.ndarray, starts: np.ndarray, pooling: str, normalize: bool) -> np.ndarray:
        """float32 (T, D) token states with pooling "none"; (S, D) with "mean" or "cls", divided by their
        length if `normalize`. tokens (T,) and starts (S,) are int32; starts[0] is 0."""
        ...


class BatchCodec(Protocol):
    """What an Encoder needs of a core.encoder_folder.TextTokenizer."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


class CpuEncoder:
    """An EncoderModel packed for this machine's instructions, with its own threads. Arguments and errors as
    of engine.cpu.CpuRunner."""

    def __init__(self, model: EncoderModel, threads: int | None = None, isa: str | None = None) -> None:
        cpu = extension()
        isa, threads = choose(cpu, isa, threads)
        self.spec = model.spec
        config = dataclasses.asdict(model.spec) | {
            "head_dim": model.spec.head_dim,
            "kv_cache": model.kv_cache,
        }
        try:
            self._model: Any = cpu.Encoder(config, threads, isa)
            for name, _, fmt in expected_encoder_weights(model.spec, model.formats):
                set_weight(self._model, name, model.weights[name], fmt)
            for name, factors in model.factors.items():
                set_weight(self._model, f"{name}_factors", factors, parse_format("fp32"))
            self._model.finalize()
        except ValueError as error:
            raise UnsupportedModelError(
                "the encoder must fit the cpu runner's kernels", str(error), 'runner="reference"'
            ) from error
        except MemoryError as error:
            raise ResourceError("the weights must fit into memory", str(error), "a smaller format") from error
        self.threads = threads
        self.name = f"cpu ({self._model.isa}, {threads} thread{'s' if threads > 1 else ''})"

    def forward(self, tokens: np.ndarray, starts: np.ndarray, pooling: str, normalize: bool) -> np.ndarray:
        states: np.ndarray = self._model.forward(tokens, starts, pooling, normalize)
        return states

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weights, embeddings included."""
        return int(self._model.weight_bytes)


class Encoder:
    """Turns texts into vectors. Made by `flatout.load`, or by hand from a runner and a tokenizer.

    pooling: "mean" of the token states or "cls", the first one; normalize: whether vectors have length 1.
    """

    def __init__(
        self, runner: EncoderRunner, tokenizer: BatchCodec, *, pooling: str = "mean", normalize: bool = True
    ) -> None:
        if pooling not in ("mean", "cls"):
            raise ConfigError("pooling is mean or cls", repr(pooling), "mean")
        self.runner, self.tokenizer = runner, tokenizer
        self.pooling, self.normalize = pooling, normalize

    @classmethod
    def of(
        cls,
        model: EncoderModel,
        tokenizer: BatchCodec,
        *,
        runner: str = "cpu",
        threads: int | None = None,
        pooling: str = "mean",
        normalize: bool = True,
    ) -> Encoder:
        """An Encoder of `model` on the runner "cpu" or "reference"."""
        if runner == "cpu":
            return cls(CpuEncoder(model, threads), tokenizer, pooling=pooling, normalize=normalize)
        from flatout.models.bert import Bert

        return cls(Bert(model, as_served=True), tokenizer, pooling=pooling, normalize=normalize)

    @property
    def spec(self) -> EncoderSpec:
        return self.runner.spec

    def encode(self, texts: str | Sequence[str], batch_size: int = 32) -> np.ndarray:
        """float32 (n, D): the vector of each text, `batch_size` texts a call of the runner; (D,) for a single
        string.

        A text is cut to the model's max_seq_length tokens (256 for minilm), special tokens included. Raises
        ConfigError for no texts, or for what is not a string.
        """
        if isinstance(texts, str):
            vector: np.ndarray = self.encode([texts])[0]
            return vector
        return np.concatenate(
            [
                self.runner.forward(tokens, starts, self.pooling, self.normalize)
                for tokens, starts in self._batches(texts, batch_size)
            ]
        )

    def token_embeddings(self, texts: Sequence[str], batch_size: int = 32) -> list[np.ndarray]:
        """Of each text the float32 (tokens, D) states of its tokens, special ones included. Cut and refused
        as in `encode`."""
        states: list[np.ndarray] = []
        for tokens, starts in self._batches(texts, batch_size):
            states += np.split(self.runner.forward(tokens, starts, "none", False), starts[1:])
        return states

    def forward(self, tokens: np.ndarray | Sequence[int], starts: np.ndarray | Sequence[int]) -> np.ndarray:
        """float32 (T, D): the states of packed tokens (T,), of which sequence s begins at starts[s] and ends
        where the next begins.

        Nothing is added or cut. Raises ConfigError unless starts begin with 0 and increase, each sequence has
        1 to max_positions tokens, and ids lie inside the vocabulary.
        """
        return self.runner.forward(*self._checked(tokens, starts), "none", False)

    def pooled(self, tokens: np.ndarray | Sequence[int], starts: np.ndarray | Sequence[int]) -> np.ndarray:
        """float32 (S, D): the vector of each packed sequence. Arguments and errors as of `forward`."""
        return self.runner.forward(*self._checked(tokens, starts), self.pooling, self.normalize)

    def _batches(self, texts: Sequence[str], batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if batch_size < 1:
            raise ConfigError("a batch holds at least one text", str(batch_size), "batch_size=32")
        if len(texts) == 0:
            raise ConfigError("there must be a text to encode", "none", 'encode(["a text"])')
        for first in range(0, len(texts), batch_size):
            ids = self.tokenizer.encode_batch(texts[first : first + batch_size])
            lengths = np.array([len(i) for i in ids])
            starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int32)
            yield self._checked(np.concatenate([np.asarray(i, np.int32) for i in ids]), starts)

    def _checked(
        self, tokens: np.ndarray | Sequence[int], starts: np.ndarray | Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        ids, firsts = np.asarray(tokens), np.asarray(starts)
        for name, array in (("tokens", ids), ("starts", firsts)):
            if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
                raise ConfigError(
                    f"{name} is a list of integers, at least one", f"{array.dtype} {array.shape}", "[0]"
                )
        lengths = np.diff(firsts.astype(np.int64), append=len(ids))
        if firsts[0] != 0 or lengths.min() < 1:
            raise ConfigError(
                "starts begin with 0, increase, and leave each sequence a token",
                f"{firsts.tolist()[:8]} for {len(ids)} tokens",
                "the index of each sequence's first token",
            )
        if lengths.max() > self.spec.max_positions:
            raise ConfigError(
                f"a sequence has at most {self.spec.max_positions} tokens",
                f"{lengths.max()} in sequence {int(lengths.argmax())}",
                "cut it, or encode its parts",
            )
        if ids.min() < 0 or ids.max() >= self.spec.vocab_size:
            raise ConfigError(
                f"token ids lie between 0 and {self.spec.vocab_size - 1}",
                f"{ids.min()} to {ids.max()}",
                "the model's own tokenizer",
            )
        return np.ascontiguousarray(ids, np.int32), np.ascontiguousarray(firsts, np.int32)
