"""Artifacts read back by transformers with compressed-tensors, by open_checkpoint and by ourselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny import tiny_model, tiny_spec, write_tokenizer

from flatout.compress.apply import compress
from flatout.core.artifact import load_artifact, save_artifact
from flatout.core.checkpoint import open_checkpoint
from flatout.core.formats import Recipe, parse_format, uniform
from flatout.core.fuse import float_weight
from flatout.core.model import Model, expected_weights
from flatout.core.quantized import QuantizedTensor
from flatout.core.tokenizer import Tokenizer
from flatout.models.llama import Cache, Llama

MIXED = Recipe(
    name="mixed",
    layers="w8a8-g64",
    embedding="w8a8-g32",
    head="w4a16-g32",
    overrides=(("layers.0.down", "w4a16-g64-asym"), ("layers.1.o", "bf16"), ("layers.1.qkv", "w4a8-g32")),
)
WEIGHT_ONLY = ["bf16", "w4a16-g64", "w4a16-g32-asym", "w8a16", "w8a16-g32-asym"]
ACTIVATIONS = ["w8a8", "w8a8-g64", "w8a8-g64-asym", "w4a8-g32", "w6a8", "w5a8-g64", "q4_0", "q8_0"]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def theirs(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def their_logits(model: torch.nn.Module, tokens: np.ndarray) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor(tokens)[None]).logits[0]
    return logits


def greedy(model: Llama, prompt: list[int], count: int) -> list[int]:
    cache, tokens, new = Cache(), list(prompt), []
    for _ in range(count):
        new.append(int(model.forward(tokens, cache, last_only=True)[0].argmax()))
        tokens = new[-1:]
    return new


def save(model: Model, folder: Path) -> Path:
    folder.mkdir()
    write_tokenizer(folder, model.spec.vocab_size)
    return save_artifact(model, Tokenizer.from_folder(folder), folder / "artifact", {})


@pytest.mark.parametrize("name", [*WEIGHT_ONLY, *ACTIVATIONS, "mixed"])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_transformers_loads(name: str, family: str, tmp_path: Path) -> None:
    recipe = MIXED if name == "mixed" else uniform(name, head=name)
    model = tiny_model(tiny_spec(family), recipe)
    tokens = np.random.default_rng(0).integers(0, 320, 40)
    read = their_logits(theirs(save(model, tmp_path / "m")), tokens)
    exact = Llama(model).forward(tokens)
    if name in WEIGHT_ONLY and name != "bf16":
        # The same dequantised numbers in float32: only the order of sums differs, and with float16 scales
        # transformers multiplies in float32 too.
        assert relative(read, exact) < 1e-5
        return
    # Both round activations (or, for bf16, we round weights in the kernel), each in its own way:
    # transformers spans 127.5 steps where we span 127. Two independent roundings differ by at most their
    # sum.
    served = Llama(model, as_served=True)
    served.kv_cache = "fp32"
    ours = served.forward(tokens)
    assert relative(read, exact) < 1.5 * relative(ours, exact)
    assert relative(read, ours) < 2.5 * relative(ours, exact)


@pytest.mark.parametrize("name", ["bf16", "w8a8", "w8a8-g64-asym", "w4a16-g32-asym", "q8_0", "mixed"])
@pytest.mark.parametrize("tied", [False, True])
def test_an_artifact_is_a_checkpoint(name: str, tied: bool, tmp_path: Path) -> None:
    """open_checkpoint reads the numbers that the model stands for, and quantised weights as codes."""
    recipe = MIXED if name == "mixed" else uniform(name, head=name)
    model = tiny_model(tiny_spec("llama", tie_embeddings=tied), recipe)
    checkpoint = open_checkpoint(save(model, tmp_path / "m"))
    for fused, _, fmt in expected_weights(model.spec, recipe):
        weight = model.weights[fused]
        values = float_weight(checkpoint, fused)
        if isinstance(weight, QuantizedTensor):
            np.testing.assert_array_equal(values, weight.dequantize())
        else:
            np.testing.assert_allclose(values, weight, rtol=2**-8 if fmt.name == "bf16" else 0)
    codes = checkpoint.native("model.layers.0.mlp.up_proj.weight")
    assert (codes is not None) == parse_format(recipe.layers).is_integer


def test_the_real_model_generates_the_same_text(tmp_path: Path) -> None:
    """4-bit weights of the built-in model: transformers and our reference choose the same 32 tokens."""
    checkpoint = open_checkpoint("smollm2-135m")
    model = compress(checkpoint, uniform("w4a16-g32-asym", head="w8a16-g32"))
    folder = save_artifact(model, checkpoint.tokenizer, tmp_path / "artifact", {"note": "e2e"})
    prompt = checkpoint.tokenizer.encode("The lighthouse keeper looked out over the sea and")
    loaded, tokenizer, _ = load_artifact(folder)
    ours = greedy(Llama(loaded), prompt, 32)
    with torch.no_grad():
        generated = theirs(folder).generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=None,
        )
    assert generated[0, len(prompt) :].tolist() == ours
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(folder).decode(ours) == tokenizer.decode(ours)
