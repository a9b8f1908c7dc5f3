"""tests/data/offgrid: the trained model is what its README says, runs everywhere and lies on no grid."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from flatout.compress.rtn import group_rows, make_grid
from flatout.core.checkpoint import Checkpoint, open_checkpoint
from flatout.core.formats import parse_format, uniform
from flatout.core.fuse import float_weight
from flatout.data.passages import load_passages
from flatout.models.llama import Llama

FOLDER = Path(__file__).parents[1] / "data" / "offgrid"


@pytest.fixture(scope="module")
def model() -> Checkpoint:
    return open_checkpoint(FOLDER)


def test_the_folder_is_the_one_that_is_described(model: Checkpoint) -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    digest = hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert re.search(rf"`{digest}`", readme)
    assert f"{model.spec.num_parameters():,} parameters" in readme
    assert model.tokenizer.eos == model.spec.eos_token_ids[0] == 0


@pytest.mark.parametrize("name", ["w4a8-g64", "w4a8-g128", "w8a8-g32", "w8a8", "w4a16-g64-asym"])
def test_weights_lie_on_no_grid(name: str, model: Checkpoint) -> None:
    """What rounding leaves is uniform inside a step, of deviation step / sqrt(12); on a grid it is zero."""
    uniform(name).check(model.spec)
    fmt = parse_format(name)
    for place in ("layers.0.qkv", "layers.5.down", "layers.9.gate_up"):
        grouped = group_rows(float_weight(model, place), fmt)
        grid = make_grid(grouped, fmt)
        steps = grouped / grid.scales[:, :, None]
        left = (steps - np.rint(steps))[np.abs(steps) < 0.9 * grid.high]
        assert left.std() * 12**0.5 == pytest.approx(1, abs=0.05)


def test_it_predicts_unseen_prose_and_agrees_with_transformers(model: Checkpoint) -> None:
    passage = next(p for p in load_passages("holdout") if p.book == "36")  # The War of the Worlds
    tokens = model.tokenizer.encode(passage.text)[:256]
    logits = Llama(model).forward(tokens)
    log_p = torch.log_softmax(logits[:-1], dim=-1)
    loss = -float(log_p[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].mean())
    assert loss < 5.2  # 4.2 on average, 9.0 without training
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0]
    # float32 sums in another order
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
