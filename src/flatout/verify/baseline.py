"""The baseline: the same weights in transformers, bfloat16, eager mode, all cores. What a user has today.

Built in memory from a Checkpoint, so that a GGUF file has a baseline too. transformers' defaults otherwise:
its own attention choice (sdpa) and its ordinary growing cache.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flatout.core.checkpoint import Checkpoint
from flatout.core.config import spec_to_config
from flatout.errors import BackendError, ConfigError
from flatout.hardware.detect import available_cores

if TYPE_CHECKING:
    import torch


class TransformersBaseline:
    """A `drivers.Driver` over transformers. Sets PyTorch's thread count while it runs, and puts it back.

    Raises BackendError when transformers is not installed.
    """

    def __init__(self, checkpoint: Checkpoint, threads: int | None = None) -> None:

        try:
            import transformers
        except ImportError as error:
            raise BackendError(
                "the baseline needs transformers", "not installed", "pip install 'flatout[baselines]'"
            ) from error
        self._threads = threads or available_cores()
        self.name = f"transformers {transformers.__version__} bf16 ({self._threads} threads)"
        self._model = _build(checkpoint)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> float:
        """Seconds to take in all prompts, logits for the last token only."""
        with _Inference(self._threads):
            ids = _ids(prompts)
            start = time.perf_counter()
            self._model(ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)
            return time.perf_counter() - start

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        """Seconds to generate `tokens` tokens for each prompt, after an untimed prefill."""
        with _Inference(self._threads):
            return self._generate(self._model(_ids(prompts), use_cache=True, logits_to_keep=1), tokens)

    def decoder(self, prompts: Sequence[Sequence[int]], tokens: int) -> Callable[[], float]:
        """See `drivers.Driver`. The cache grows in place, so every call decodes into a copy of it."""
        with _Inference(self._threads):
            output = self._model(_ids(prompts), use_cache=True, logits_to_keep=1)

        def run() -> float:
            with _Inference(self._threads):
                self._generate(copy.deepcopy(output), 1)
                return self._generate(copy.deepcopy(output), tokens)

        return run

    def _generate(self, output: Any, tokens: int) -> float:
        """Seconds of `tokens` steps after the model's output for the prompts, whose cache they extend."""
        start = time.perf_counter()
        for _ in range(tokens):
            following = output.logits[:, -1:].argmax(-1)
            output = self._model(
                following, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1
            )
        return time.perf_counter() - start

    def score(self, document: Sequence[int]) -> list[float]:
        """log p of tokens 1.. of one document, in nats, from logits widened to float32."""
        import torch

        with _Inference(self._threads):
            ids = _ids([document])
            log_p = torch.log_softmax(self._model(ids).logits[0, :-1].float(), dim=-1)
            return list(log_p.gather(1, ids[0, 1:, None])[:, 0].tolist())


class _Inference:
    """No autograd, and the baseline's thread count, for the length of a `with` block."""

    def __init__(self, threads: int) -> None:
        import torch

        self._torch, self._threads = torch, threads
        self._mode = torch.inference_mode()

    def __enter__(self) -> None:
        self._before = self._torch.get_num_threads()
        self._torch.set_num_threads(self._threads)
        self._mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)
        self._torch.set_num_threads(self._before)


def _ids(prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    import torch

    if not prompts or len({len(prompt) for prompt in prompts}) != 1:
        raise ConfigError(
            "a batch needs prompts of one length", str([len(p) for p in prompts]), "equal lengths"
        )
    return torch.tensor([list(prompt) for prompt in prompts], dtype=torch.int64)


def _build(checkpoint: Checkpoint) -> Any:
    """The transformers model with the checkpoint's weights rounded to bfloat16."""
    import torch
    import transformers

    values = spec_to_config(checkpoint.spec, "bfloat16")
    kind = getattr(transformers, values["architectures"][0])
    state = {name: torch.from_numpy(checkpoint.array(name)).bfloat16() for name in checkpoint.names}
    with _quiet():
        model, report = kind.from_pretrained(
            None,
            config=transformers.AutoConfig.for_model(**values),
            state_dict=state,
            dtype=torch.bfloat16,
            output_loading_info=True,
        )
    wrong = sorted(
        [*report["missing_keys"], *report["unexpected_keys"], *map(str, report["mismatched_keys"])]
    )
    if wrong:
        raise BackendError(
            "transformers must take every weight", ", ".join(wrong)[:120], "another version of it"
        )
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its progress bar and its remarks on weights that are not used."""
    from transformers.utils import logging

    shows_progress, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()


class BertBaseline:
    """An encoder's folder in transformers, float32, eager mode: what sentence-transformers runs on a
    processor. Raises BackendError when transformers is not installed."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch

        try:
            import transformers
        except ImportError as error:
            raise BackendError(
                "the baseline needs transformers", "not installed", "pip install 'flatout[baselines]'"
            ) from error
        self._threads = threads
        with _quiet():
            self._model = transformers.BertModel.from_pretrained(
                folder, dtype=torch.float32, add_pooling_layer=False
            ).eval()

    def seconds(self, batch: np.ndarray) -> float:
        """Of one batch of token ids (B, T), none padded, up to the pooled vectors."""
        import torch

        with _Inference(self._threads):
            ids = torch.from_numpy(batch.astype(np.int64))
            start = time.perf_counter()
            mean = self._model(ids).last_hidden_state.mean(1)
            torch.nn.functional.normalize(mean, dim=1)
            return time.perf_counter() - start
