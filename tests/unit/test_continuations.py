"""benchmarks/continuations.py: what a teacher writes comes from its own distribution."""

from __future__ import annotations

import numpy as np
import torch
from benchmarks.continuations import continuations, continued
from tests.tiny import tiny_source, tiny_spec

from flatout.train.data import Batch
from flatout.train.trainable import Trainable, make_trainable, source_weights

ROWS, LENGTH, PROMPT = 192, 20, 4


def teacher(family: str = "llama") -> Trainable:
    spec = tiny_spec(family)
    return make_trainable(spec, source_weights(tiny_source(spec)), frozen=True)


def log_p(model: Trainable, tokens: torch.Tensor) -> torch.Tensor:
    """(rows, length - 1, V) of each next token, by the forward pass of training."""
    batch = Batch(tokens=tokens, targets=tokens, documents=torch.zeros_like(tokens), mixed=0)
    logits = model.logits(model.hidden(batch)[0]).reshape(*tokens.shape, -1)
    logits[..., list(model.spec.eos_token_ids)] = -torch.inf
    return torch.log_softmax(logits, dim=-1)[:, :-1]


def test_drawn_tokens_are_as_likely_as_the_teacher_says() -> None:
    model = teacher()
    prompts = torch.randint(
        0, model.spec.vocab_size, (ROWS, PROMPT), generator=torch.Generator().manual_seed(1)
    )
    tokens = continued(model, prompts, LENGTH, seed=0)
    assert torch.equal(tokens[:, :PROMPT], prompts)
    said = log_p(model, tokens)[:, PROMPT - 1 :]
    drawn = said.gather(-1, tokens[:, PROMPT:, None])[..., 0]
    finite = said.clamp(min=-1e4)
    expected = (finite.exp() * finite).sum(dim=-1)
    spread = ((finite.exp() * finite.square()).sum(dim=-1) - expected.square()).mean().sqrt()
    error = spread / drawn.numel() ** 0.5
    assert abs(float((drawn - expected).mean())) < 5 * float(error) + 0.01  # bfloat16 keys, values, products


def test_no_row_ends_before_its_length() -> None:
    model = teacher()
    prompts = torch.zeros(8, 1, dtype=torch.int64) + 5
    tokens = continued(model, prompts, 40, seed=3)
    assert not np.isin(tokens[:, 1:].numpy(), model.spec.eos_token_ids).any()
    assert torch.equal(tokens, continued(model, prompts, 40, seed=3))
    assert not torch.equal(tokens, continued(model, prompts, 40, seed=4))


def test_rows_begin_in_the_text() -> None:
    model = teacher()
    text = np.arange(model.spec.vocab_size, dtype=np.int32)
    found = continuations(model, text, 0.0, length=9, prompt=PROMPT, rows=16)
    assert found.tokens.shape == (16, 10)
    assert (np.diff(found.tokens[:, :PROMPT], axis=1) == 1).all()
    assert not found.documents.any()
