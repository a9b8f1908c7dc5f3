"""Losses of single blocks: which were harmed, by how much, and scales that were moved without harm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import TinySource, tiny_source, tiny_spec

from flatout.compress.apply import compress
from flatout.core.formats import uniform
from flatout.core.fuse import assemble, float_recipe
from flatout.errors import EvidenceError
from flatout.models.llama import Llama, attention, rms_norm, rope_turns, rotate
from flatout.verify.layers import block_losses, conspicuous

TOKENS = [(7 * i * i + 3) % 320 for i in range(40)]
FP32 = replace(float_recipe("fp32"), kv_cache="bf16")


def changed(source: TinySource, changes: dict[str, Any]) -> TinySource:
    return replace(
        source, tensors=dict(source.tensors) | {k: f(source.tensors[k]) for k, f in changes.items()}
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma", "mistral"])
def test_a_model_loses_nothing_against_itself(family: str) -> None:
    source = tiny_source(tiny_spec(family))
    losses = block_losses(source, assemble(source, FP32), TOKENS)
    assert [loss.name for loss in losses] == [
        "layers.0 attention",
        "layers.0 mlp",
        "layers.1 attention",
        "layers.1 mlp",
        "head",
    ]
    for loss in losses:
        assert loss.weight_error == 0
        # The cache of keys and values rounds to bfloat16, 8 bits: half a step is 2^-9 of each number.
        assert loss.output_error < (2**-8 if loss.block == "attention" else 1e-6)


def test_the_harmed_block_is_named_and_no_other() -> None:
    source = tiny_source(tiny_spec(num_layers=6))
    rng = np.random.default_rng(0)
    name = "model.layers.3.mlp.down_proj.weight"
    noise = rng.standard_normal(source.tensors[name].shape).astype(np.float32)
    noise *= 0.3 * np.linalg.norm(source.tensors[name]) / np.linalg.norm(noise)
    model = compress(changed(source, {name: lambda w: w + noise}), uniform("w8a16"))
    losses = block_losses(source, model, TOKENS)
    (worst,) = conspicuous(losses)
    assert worst.name == "layers.3 mlp"
    assert worst.formats == ("w8a16", "w8a16")
    # 0.3 of one of two weights whose squared norms are 128 x 64 and 2 x 64 x 128 of about 1 / width each.
    sizes = {k: np.square(v).sum() for k, v in source.tensors.items() if ".3.mlp." in k}
    assert worst.weight_error == pytest.approx(0.3 * np.sqrt(sizes[name] / sum(sizes.values())), rel=0.05)
    assert worst.output_error == pytest.approx(0.3, rel=0.3)
    assert max(loss.output_error for loss in losses if loss is not worst) < 0.05


def test_output_errors_equal_a_plain_computation() -> None:
    """One attention block, written out here with both models' weights."""
    source = tiny_source(tiny_spec())
    spec, name = source.spec, "model.layers.0.self_attn.k_proj.weight"
    other = changed(source, {name: lambda w: np.round(w * 16) / 16})

    def added(tensors: Any, kv: str) -> torch.Tensor:
        t = {k.removeprefix("model.layers.0."): torch.from_numpy(v) for k, v in tensors.items()}
        x = Llama(source).embed(torch.tensor(TOKENS))
        h = rms_norm(x, t["input_layernorm.weight"], spec.rms_norm_eps)
        q, k, v = ((h @ t[f"self_attn.{p}_proj.weight"].T).reshape(40, -1, 16) for p in "qkv")
        turns = rope_turns(spec, torch.arange(40))
        q, k = rotate(q, turns), rotate(k, turns)
        if kv == "bf16":
            k, v = k.bfloat16().float(), v.bfloat16().float()
        return attention(q, k, v, torch.arange(40), None) @ t["self_attn.o_proj.weight"].T

    exact, served = added(source.tensors, "fp32"), added(other.tensors, "bf16")
    expected = float((served - exact).norm() / exact.norm())
    found = block_losses(source, assemble(other, FP32), TOKENS)[0]
    assert found.output_error == pytest.approx(expected, rel=1e-3)
    assert expected > 0.002


def test_scales_that_moved_are_no_loss() -> None:
    """As AWQ does: what the norm is divided by, the weights behind it are multiplied by."""
    source = tiny_source(tiny_spec())
    factors = np.random.default_rng(1).uniform(0.3, 3, 64).astype(np.float32)
    moved = changed(
        source,
        {"model.layers.1.post_attention_layernorm.weight": lambda w: w / factors}
        | {f"model.layers.1.mlp.{p}_proj.weight": lambda w: w * factors for p in ("gate", "up")},
    )
    losses = block_losses(source, assemble(moved, FP32), TOKENS)
    assert losses[3].name == "layers.1 mlp"
    assert losses[3].weight_error is None
    assert losses[3].output_error < 1e-5
    assert all(loss.weight_error == 0 for loss in losses if loss is not losses[3])


def test_other_shapes_and_no_tokens_are_refused() -> None:
    source = tiny_source(tiny_spec())
    with pytest.raises(EvidenceError, match="models of one shape"):
        block_losses(source, assemble(tiny_source(tiny_spec(num_layers=3)), FP32), TOKENS)
    with pytest.raises(EvidenceError, match="needs tokens"):
        block_losses(source, assemble(source, FP32), [])
