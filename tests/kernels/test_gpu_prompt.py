"""Attention of prompts in CUDA C++: which prompts go through it, what it refuses, and that it compiles. What
it computes is compared with float64 on the card (benchmarks/gpu_checks.py:check_prompts)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from flatout.engine.cuda_attend import gathered
from flatout.errors import BackendError
from flatout.kernels import gpu, gpu_attention, gpu_cuda, gpu_prompt

CPU = gpu.card(torch.device("cpu"))
HOPPER = dataclasses.replace(CPU, wgmma=True)


def parts(
    tokens: int, seen: int, heads: int, kv_heads: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values as they lie beside each other."""
    qkv = torch.randn(seen, heads + 2 * kv_heads, head_dim).bfloat16()
    return qkv[seen - tokens :, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]


def test_hopper_cards_have_a_kernel_for_some_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int | None]] = []

    def attend(
        card: gpu.Card, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        asked.append((q.shape[2], len(k), window))
        return torch.zeros(len(q), q[0].numel()).bfloat16()

    monkeypatch.setattr(gpu_prompt, "attend", attend)
    few = parts(2, 1000, 4, 2, 64)
    gpu_attention.causal_attention(dataclasses.replace(HOPPER, units=132), *few, 300)
    assert asked.pop() == (64, 1000, 300), "a window makes rows short"
    for card in (CPU, HOPPER):
        for head_dim, window in ((64, None), (96, None), (128, 3)):
            found = gpu_attention.causal_attention(card, *parts(5, 9, 4, 2, head_dim), window)
            assert found.shape == (5, 4 * head_dim)
            assert bool(found.any()) == (card is CPU or head_dim == 96)
    assert asked == [(64, 9, None), (128, 9, 3)]


def test_few_queries_over_many_keys_go_to_pytorch() -> None:
    card = dataclasses.replace(HOPPER, units=132)
    asked = [(128, 512), (128, 1024), (129, 1024), (4096, 4096), (128, 8192)]
    found = [gpu_prompt.serves(card, *lengths, 32, 128) for lengths in asked]
    assert found == [True, False, True, True, False]
    assert not gpu_prompt.serves(dataclasses.replace(card, wgmma=False), 128, 128, 32, 128)


@pytest.mark.parametrize(
    "shape",
    [(5, 9, 4, 2, 96), (5, 9, 4, 3, 64), (9, 5, 4, 2, 64), (0, 5, 4, 2, 64)],
    ids=["heads", "groups", "more queries than keys", "nothing"],
)
def test_it_refuses_what_it_does_not_cover(shape: tuple[int, int, int, int, int]) -> None:
    tokens, seen, heads, kv_heads, head_dim = shape
    q = torch.zeros(tokens, heads, head_dim).bfloat16()
    k = torch.zeros(seen, kv_heads, head_dim).bfloat16()
    with pytest.raises(BackendError, match="heads of 64 or 128 numbers"):
        gpu_prompt.attend(HOPPER, q, k, k, None)


@pytest.mark.parametrize("pages", [[2], [3, 0]])
def test_keys_from_pages_lie_as_it_takes_them(pages: list[int]) -> None:
    cache = torch.randn(4, 2, 16, 64).bfloat16()
    found = gathered(cache, torch.tensor(pages), 16 * len(pages) - 3)
    assert found.stride() == (128, 64, 1)
    for token in (0, len(found) - 1):
        assert torch.equal(found[token], cache[pages[token // 16], :, token % 16])


def test_it_refuses_other_layouts() -> None:
    q, k, v = parts(4, 4, 4, 2, 64)
    for wrong in (k.float(), k.transpose(0, 1).contiguous().transpose(0, 1)):
        with pytest.raises(BackendError, match="in one piece"):
            gpu_prompt.attend(HOPPER, q, wrong, v, None)


@pytest.mark.parametrize("head_dim", gpu_prompt.HEAD_DIMS)
@pytest.mark.parametrize("repeat", [1, 2])
def test_it_compiles(head_dim: int, repeat: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the compiler is installed, as a dry card has it; and what is asked for fits a multiprocessor."""
    monkeypatch.setenv("FLATOUT_CACHE", str(tmp_path))
    kernel = gpu_prompt.kernel_of(head_dim, repeat)
    assert kernel.shared <= gpu_cuda.SHARED_BYTES
    dry = dataclasses.replace(HOPPER, dry=True)
    try:
        found = gpu_attention.causal_attention(dry, *parts(300, 300, 2 * repeat, 2, head_dim), None)
    except BackendError as error:
        pytest.skip(str(error))
    assert found.shape == (300, 2 * repeat * head_dim)
    assert [path.read_bytes()[:4] for path in tmp_path.glob("prompt-*.cubin")] == [b"\x7fELF"]
