"""Triton's kernels, interpreted on the processor, against plain PyTorch.

The interpreter cuts a float32 to bfloat16 where hardware rounds, so results stored in bfloat16 may be off by
2^-7 of their value; what is stored in float32 differs only by the order of sums.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests.tiny import native_blocks, tiny_spec

from flatout.core.quantized import QuantizedTensor
from flatout.engine.cuda_weights import pack_codes
from flatout.engine.sampler import sample, uniform
from flatout.kernels import gpu, gpu_attention, gpu_linear
from flatout.kernels.gpu import Activations, Product
from flatout.kernels.gpu_attention import AttentionPlan, HeadWeights, LayerCache
from flatout.kernels.packed import PackedWeight, dequantize, pack_4bit, pack_bf16, pack_fp8, unpack_4bit
from flatout.kernels.sample import draw
from flatout.kernels.sample import uniform as uniform_of_tensors
from flatout.kernels.triton import elementwise
from flatout.models.llama import attention, rotate

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, inside the interpreter
BF16 = 2.0**-7
CPU = gpu.card(torch.device("cpu"))


def close(found: torch.Tensor, wanted: torch.Tensor, bound: float) -> bool:
    return bool((found.double() - wanted.double()).norm() <= bound * wanted.double().norm())


def weight(fmt: str, n: int, k: int, group: int, minima: bool) -> PackedWeight:
    if fmt == "bf16":
        return pack_bf16(torch.randn(n, k).bfloat16())
    if fmt == "fp8":
        return pack_fp8(torch.randn(n, k))
    shape = (n, k // group) if group else (n,)
    words = torch.randint(-(1 << 31), 1 << 31, (n, k * (4 if fmt == "int4" else 8) // 32), dtype=torch.int32)
    least = torch.randn(shape) if minima else None
    return PackedWeight(fmt, n, k, words, torch.rand(shape) + 0.5, least, group)


@pytest.mark.parametrize("route", [(4, 2, 4, 0), (32, 4, 4, 1)], ids=["tiles", "whole rows"])
@pytest.mark.parametrize(
    ("fmt", "n", "k", "group", "minima", "tokens"),
    [
        ("bf16", 7, 72, 0, False, 1),
        ("fp8", 6, 112, 0, False, 2),
        ("int8", 5, 64, 0, False, 1),
        ("int8", 6, 96, 32, True, 1),
        ("int4", 10, 192, 64, False, 4),
        ("int4", 6, 576, 32, True, 1),
    ],
)
def test_few_rows(
    fmt: str, n: int, k: int, group: int, minima: bool, tokens: int, route: gpu_linear.Route
) -> None:
    torch.manual_seed(n)
    w, x = weight(fmt, n, k, group, minima), torch.randn(tokens, k).bfloat16()
    gains, before = (1 + 0.1 * torch.randn(k)).bfloat16(), torch.randn(tokens, n)
    y, y_bf16 = torch.full((tokens, n), torch.nan), torch.full((tokens, n), torch.nan).bfloat16()
    product = x.double() @ dequantize(w).double().T
    gpu_linear.multiply_few(CPU, x, w, y, residual=before, out_bf16=y_bf16, route=route)
    assert close(y, product + before, 1e-5)
    assert close(y_bf16, product + before, BF16)

    normal = x.double() * torch.rsqrt(x.double().square().mean(1, keepdim=True) + 1e-5) * gains.double()
    product = normal @ dequantize(w).double().T
    y.fill_(torch.nan)
    gpu_linear.multiply_few(CPU, x, w, y, gains=gains, eps=1e-5, route=route)
    assert close(y, product, 1e-5)
    if n % 2 == 0:
        activated = torch.full((tokens, n // 2), torch.nan).bfloat16()
        gpu_linear.multiply_few(
            CPU, x, w, activated, gains=gains, eps=1e-5, epilogue=gpu_linear.SILU, route=route
        )
        wanted = torch.nn.functional.silu(product[:, 0::2]) * product[:, 1::2]
        assert close(activated, wanted, BF16)


@pytest.mark.parametrize("fmt", ["fp8", "int8", "int4"])
def test_unpacked(fmt: str) -> None:
    w = weight(fmt, 5, 96, 0 if fmt == "fp8" else 32, fmt != "fp8")
    assert close(gpu_linear.unpacked(CPU, w), dequantize(w), BF16)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q8_0"])
def test_packed_codes_mean_the_same(name: str) -> None:
    blocks = native_blocks(name, 6, 64, seed=1)
    packed = pack_codes(blocks, torch.device("cpu"))
    np.testing.assert_allclose(dequantize(packed).numpy(), blocks.dequantize(), rtol=1e-6, atol=1e-7)


def test_packed_zeros_mean_the_same() -> None:
    from flatout.core.formats import parse_format

    draws = np.random.default_rng(0)
    for name, top in (("w4a16-g32-asym", 16), ("w8a16-g32-asym", 256)):
        tensor = QuantizedTensor(
            format=parse_format(name),
            codes=draws.integers(0, top, (3, 64)).astype(np.uint8),
            scales=draws.uniform(0.5, 1, (3, 2)).astype(np.float32),
            zeros=draws.integers(0, top, (3, 2)).astype(np.uint8),
        )
        packed = pack_codes(tensor, torch.device("cpu"))
        np.testing.assert_allclose(dequantize(packed).numpy(), tensor.dequantize(), rtol=1e-5, atol=1e-4)


def test_four_bits_come_back() -> None:
    codes = torch.randint(0, 16, (3, 96)).to(torch.uint8)
    assert torch.equal(unpack_4bit(pack_4bit(codes)), codes)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("window", [None, 20])
def test_decode_attention(splits: int, window: int | None) -> None:
    torch.manual_seed(splits)
    spec = tiny_spec("llama", sliding_window=window)
    heads, kv_heads, size, page = 4, 2, 16, 16
    cache = LayerCache(*(torch.zeros(8, kv_heads, page, size).bfloat16() for _ in range(2)))
    pages = torch.tensor([[3, 1, 4], [0, 0, 0], [6, 7, 0], [2, 0, 0]], dtype=torch.int32)
    positions = torch.tensor([40, -1, 17, 0], dtype=torch.int32)
    angles = torch.arange(64).float()[:, None] * torch.rand(8)[None, :]
    qkv = torch.randn(4, (heads + 2 * kv_heads) * size)
    keys, values = (torch.randn(4, 64, kv_heads, size).bfloat16() for _ in range(2))
    for s, position in enumerate(positions.tolist()):
        for p in range(max(0, position)):
            cache.keys[pages[s, p // page], :, p % page] = keys[s, p]
            cache.values[pages[s, p // page], :, p % page] = values[s, p]
    out = torch.full((4, heads * size), torch.nan).bfloat16()
    count = 4 * kv_heads * splits * 2
    plan = AttentionPlan(
        splits,
        torch.full((count * size,), torch.nan),
        torch.full((count * 2,), torch.nan),
        torch.zeros(4 * kv_heads, dtype=torch.int32),
    )
    turns = angles.cos(), angles.sin()
    gpu_attention.decode_attention(
        CPU, spec, Product(qkv), HeadWeights(), turns, cache, pages, positions, plan, Activations(out)
    )
    assert not plan.counters.any()
    assert out[1].isnan().all()  # a row that is not used
    for s in (0, 2, 3):
        p = int(positions[s])
        q, k, v = qkv[s].view(1, -1, size).split([heads, kv_heads, kv_heads], 1)
        turn = angles[p].cos()[None, None], angles[p].sin()[None, None]
        q, k = rotate(q, turn), rotate(k, turn)
        slot = pages[s, p // page], slice(None), p % page
        assert close(cache.keys[slot], k[0], BF16)
        assert close(cache.values[slot], v[0], BF16)
        k, v = torch.cat([keys[s, :p].float(), k]), torch.cat([values[s, :p].float(), v])
        assert close(out[s], attention(q, k, v, torch.tensor([p]), window)[0], 2 * BF16)
    eight = torch.full((4, heads * size), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.full((4, kv_heads), torch.nan)
    gpu_attention.decode_attention(
        CPU,
        spec,
        Product(qkv),
        HeadWeights(),
        turns,
        cache,
        pages,
        positions,
        plan,
        Activations(eight, scales),
    )
    assert scales[1].isnan().all()
    for s in (0, 2, 3):
        grouped = eight[s].float().view(kv_heads, -1)
        assert (grouped.abs().amax(1) >= 416.0).all()  # each group uses the whole range
        assert close(grouped * scales[s][:, None], out[s].view(kv_heads, -1), 2.0**-3)


def test_norms_and_activations() -> None:
    torch.manual_seed(0)
    x, more, gains = torch.randn(3, 96), torch.randn(3, 96).bfloat16(), torch.randn(96).bfloat16()
    wanted = x + more.float()
    stream = x.clone()
    out = gpu.add_norm(CPU, stream, Product(more), gains, 1e-5, fp8=False).values
    assert close(stream, wanted, 1e-6)
    normal = wanted * torch.rsqrt(wanted.square().mean(1, keepdim=True) + 1e-5) * gains.float()
    assert close(out, normal, BF16)
    token_scales, row_scales = torch.rand(3), torch.rand(96)
    gate_up = more.float() * token_scales[:, None] * row_scales[None, :]
    for gelu in (False, True):
        found = gpu.activate(CPU, Product(more, token_scales, row_scales), gelu, fp8=False).values
        gate = gate_up[:, 0::2]
        activated = (
            torch.nn.functional.gelu(gate, approximate="tanh") if gelu else torch.nn.functional.silu(gate)
        )
        assert close(found, activated * gate_up[:, 1::2], BF16)
    eight = gpu.quantize(CPU, more)
    assert eight.scales is not None
    assert close(eight.values.float() * eight.scales[:, None], more, 2.0**-3)  # three bits of mantissa, cut


def test_embedding_of_a_token_that_could_not_be_chosen() -> None:
    table = torch.randn(5, 8).bfloat16()
    x, x_bf16 = torch.empty(3, 8), torch.empty(3, 8).bfloat16()
    gpu.embed(CPU, torch.tensor([4, -1, 2], dtype=torch.int32), table, 2.0, x, x_bf16)
    assert torch.equal(x, 2.0 * table[[4, 0, 2]].float())
    assert elementwise.embed is not None


def test_greedy_choice() -> None:
    logits = torch.randn(6, 70)
    logits[1, 3] = logits[1, 60] = 9.0  # the lower id of equals
    logits[2] = -torch.inf
    logits[3, 5] = torch.nan
    logits[4, 7] = torch.inf
    logits[5] = -logits[5].abs()
    keys = torch.full((6,), -(1 << 63), dtype=torch.int64)
    tokens, positions = (
        torch.zeros(6, dtype=torch.int32),
        torch.tensor([4, 0, 1, -1, 7, 8], dtype=torch.int32),
    )
    gpu.argmax_keys(CPU, logits, keys)
    results, turn = torch.full((2, 8), 7, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    gpu.advance(CPU, keys, None, torch.zeros(6), tokens, positions, results, turn)
    assert results.tolist() == [[*tokens.tolist(), 7, 7], [7] * 8]
    assert turn.tolist() == [0]
    assert tokens.tolist() == [int(logits[0].argmax()), 3, -1, -1, -1, int(logits[5].argmax())]
    assert positions.tolist() == [5, 1, 2, -1, 8, 9]
    assert (keys == -(1 << 63)).all()


def test_random_numbers_are_the_samplers() -> None:
    seeds, positions = [0, 1, (1 << 64) - 1, 1 << 63], [0, 5, 131071, 17]
    bits = torch.from_numpy(np.array(seeds, dtype=np.uint64).view(np.int64))
    found = uniform_of_tensors(bits, torch.tensor(positions)).tolist()
    assert found == [uniform(s, p) for s, p in zip(seeds, positions, strict=True)]


def test_draws_are_the_samplers() -> None:
    draws = np.random.default_rng(3)
    rows, size = 64, 90
    logits = np.round(draws.standard_normal((rows, size)) * 3, 1).astype(np.float32)  # with ties
    temperature = draws.choice([0.3, 1.0, 2.0], rows).astype(np.float32)
    top_k = draws.choice([0, 1, 5, size, size + 9], rows).astype(np.int32)
    top_p = draws.choice([0.05, 0.5, 0.9, 1.0], rows).astype(np.float32)
    seeds = draws.integers(0, 1 << 63, rows, dtype=np.uint64)
    positions = draws.integers(0, 4096, rows)
    wanted = sample(logits, positions, temperature, top_k, top_p, seeds)
    parts = (logits, positions, temperature, top_k, top_p, seeds.view(np.int64))
    found = draw(*(torch.from_numpy(part) for part in parts))
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("tokens", [3, 70])
@pytest.mark.parametrize(
    ("fmt", "n", "k", "units", "programs"),
    [("bf16", 80, 200, 1, 1), ("bf16", 100, 96, 7, 1), ("fp8", 80, 208, 5, 1), ("bf16", 72, 64, 3, 0)],
    ids=["one program", "parts", "parts, fp8", "whole tiles"],
)
def test_tiles(fmt: str, n: int, k: int, units: int, programs: int, tokens: int) -> None:
    """Whatever the number of programs, and however the edges lie, the parts add up to the product."""
    torch.manual_seed(n + k)
    card = dataclasses.replace(CPU, units=units)
    w = weight(fmt, n, k, 0, False)
    x = Activations(torch.randn(tokens, k).bfloat16())
    if fmt == "fp8":
        x = gpu.quantize(CPU, x.values)
    route = gpu_linear.TileRoute(32, 16, 4, 3, programs, 0)
    cut = gpu_linear.cut_of(n, k, route, units)
    assert programs == 0 or cut[3] == units
    out = torch.full((cut[0], tokens, n), torch.nan).bfloat16()
    gpu_linear.multiply_tiles(card, x, w, out, route, cut)
    values = x.values.double() if x.scales is None else x.values.double() * x.scales.double()[:, None]
    wanted = values @ dequantize(w).double().T
    # Joined by whoever reads it: here the residual stream, added to nothing and normalised.
    stream = torch.zeros(tokens, n)
    gpu.add_norm(CPU, stream, Product(out, cut=cut), torch.ones(n).bfloat16(), 1e-5, fp8=False)
    assert close(stream, wanted, BF16)
    if programs == 0:
        activated = torch.full((tokens, n // 2), torch.nan).bfloat16()
        gpu_linear.multiply_tiles(card, x, w, activated, route, cut, gpu_linear.gemm.SILU)
        assert close(activated, torch.nn.functional.silu(wanted[:, 0::2]) * wanted[:, 1::2], BF16)


@pytest.mark.parametrize("units", [1, 5])
def test_tiles_of_activations_in_groups(units: int) -> None:
    """A scale for each 48 columns of a token, which blocks of 16 meet one after another."""
    torch.manual_seed(units)
    card = dataclasses.replace(CPU, units=units)
    n, k, group, tokens = 80, 192, 48, 5
    w = weight("fp8", n, k, 0, False)
    values = torch.randn(tokens, k // group, group) * torch.logspace(-2, 2, k // group)[None, :, None]
    scales = values.abs().amax(2) / 448.0
    codes = (values / scales[:, :, None]).to(torch.float8_e4m3fn)
    x = Activations(codes.view(torch.uint8).view(tokens, k).view(torch.float8_e4m3fn), scales)
    route = gpu_linear.TileRoute(32, 16, 4, 3, 1, 0)
    cut = gpu_linear.cut_of(n, k, route, units)
    out = torch.full((cut[0], tokens, n), torch.nan).bfloat16()
    gpu_linear.multiply_tiles(card, x, w, out, route, cut)
    wanted = (codes.double() * scales.double()[:, :, None]).view(tokens, k) @ dequantize(w).double().T
    stream = torch.zeros(tokens, n)
    gpu.add_norm(CPU, stream, Product(out, cut=cut), torch.ones(n).bfloat16(), 1e-5, fp8=False)
    assert close(stream, wanted, BF16)


def test_every_block_has_one_owner() -> None:
    """The consumer's arithmetic gives each tile the parts that programs write."""
    for n, k, units in (
        (6144, 4096, 132),
        (28672, 4096, 132),
        (4096, 14336, 114),
        (100, 64, 9),
        (40, 640, 7),
    ):
        for programs in (1, 2):
            parts, rows, k_blocks, count, blocks = gpu_linear.cut_of(
                n, k, gpu_linear.TileRoute(32, 64, 4, 3, programs, 0), units
            )
            owners = np.repeat(np.arange(count), np.diff(np.arange(count + 1) * blocks // count))
            tiles = owners.reshape(-1, k_blocks)
            assert tiles.shape[0] == -(-n // rows)
            first = ((np.arange(len(tiles)) * k_blocks + 1) * count - 1) // blocks
            assert (tiles[:, 0] == first).all()
            assert (tiles[:, -1] - tiles[:, 0] + 1).max() == parts


def test_greedy_choice_inside_the_head() -> None:
    """The head's product and the choice in one kernel; equal logits, and rows and columns beyond the edge."""
    w = weight("bf16", 70, 64, 0, False)
    w.words[50] = w.words[7]
    x = Activations(torch.randn(5, 64).bfloat16())
    x.values[3] = w.words.view(torch.bfloat16)[7] * 8
    keys = torch.full((5,), -(1 << 63), dtype=torch.int64)
    route = gpu_linear.TileRoute(32, 16, 4, 3, 0, 0)
    gpu_linear.multiply_tiles(
        CPU, x, w, keys, route, gpu_linear.cut_of(70, 64, route, 1), gpu_linear.gemm.ARGMAX
    )
    wanted = (x.values.float() @ dequantize(w).T).argmax(dim=1)
    assert (0xFFFFFFFF - (keys & 0xFFFFFFFF)).tolist() == wanted.tolist()
    assert wanted[3] == 7
