"""Wide tiles: which products go through them, how their parts are read, and that the kernel compiles. What it
computes is compared with float64 on the card (benchmarks/gpu_checks.py:check_wide)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from flatout.errors import BackendError
from flatout.kernels import gpu, gpu_cuda, gpu_linear, gpu_wide
from flatout.kernels.gpu import Activations, Product
from flatout.kernels.packed import PackedWeight, dequantize, pack_bf16

H100 = "NVIDIA H100 80GB HBM3"
CPU = gpu.card(torch.device("cpu"))
VARIANTS = [
    gpu_wide.Variant(224, 3, False, 1),
    gpu_wide.Variant(224, 3, True, 2),
    gpu_wide.Variant(128, 4, False, 0),
]


def reference(
    card: gpu.Card, x: Activations, weight: PackedWeight, out: torch.Tensor, n_tile: int, stages: int,
    parts: int, gate: int,
) -> None:  # fmt: skip
    """What `multiply_wide` says, in float64."""
    for part, columns in enumerate(torch.arange(weight.k).chunk(parts)):
        product = x.values.double()[:, columns] @ dequantize(weight).double()[:, columns].T
        if gate:
            out.copy_(torch.nn.functional.silu(product[:, 0::2]) * product[:, 1::2])
        else:
            out[part] = product


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    monkeypatch.setattr(gpu_linear, "measured_routes", lambda name: found)
    monkeypatch.setattr(gpu_wide, "multiply_wide", reference)
    for cached in (gpu_linear.gemm_route, gpu_linear.prompt_route):
        cached.cache_clear()
    return found


@pytest.mark.parametrize("tokens", [130, 2050])
def test_products_go_where_the_table_says(routes: dict[str, list[int]], tokens: int) -> None:
    torch.manual_seed(tokens)
    size = 256 if tokens <= 256 else gpu_linear.PROMPT_TOKENS
    routes[f"bf16 96x256 tile {size}"] = [32, 64, 8, 3, 0, 0, 1]
    routes[f"bf16 64x256 tile {size}"] = [32, 64, 8, 2, 0, 0, 2]
    gate_up, down = (pack_bf16(torch.randn(n, 256).bfloat16()) for n in (96, 64))
    x = Activations(torch.randn(tokens, 256).bfloat16())
    product = x.values.double() @ dequantize(gate_up).double().T
    wanted = torch.nn.functional.silu(product[:, 0::2]) * product[:, 1::2]
    found = gpu_linear.multiply_gated(CPU, x, gate_up, gelu=False, fp8=False, following=down)
    assert (found.values.double() - wanted).norm() < 4e-3 * wanted.norm()
    parts = gpu_linear.multiply(CPU, x, down)
    assert parts.values.shape == (2, tokens, 64)
    stream = torch.zeros(tokens, 64)
    gpu.add_norm(
        CPU, stream, Product(parts.values, cut=parts.cut), torch.ones(64).bfloat16(), 1e-5, fp8=False
    )
    wanted = x.values.double() @ dequantize(down).double().T
    assert (stream.double() - wanted).norm() < 4e-3 * wanted.norm()


def test_the_table_s_settings_cut_evenly() -> None:
    """And fit a multiprocessor's 227 KB."""
    entries = {key: s for key, s in gpu.measured_routes(H100).items() if len(s) == 7 and s[6]}
    assert entries
    for key, settings in entries.items():
        fmt, shape, _, _ = key.split()
        n, k = map(int, shape.split("x"))
        route = gpu_linear.TileRoute(*settings)
        assert route.block_k == (64 if fmt == "bf16" else 128)
        assert n % (2 * route.block_n) == 0
        assert k % (route.block_k * route.wide) == 0
        kernel = gpu_wide.kernel_of(gpu_wide.Variant(route.block_n, route.stages, fmt == "fp8", 1))
        assert kernel.shared <= gpu_cuda.SHARED_BYTES
        assert route.stages <= gpu_wide.most_stages(route.block_n)


def test_settings_that_do_not_cut_evenly_are_refused() -> None:
    weight = pack_bf16(torch.zeros(64, 320).bfloat16())
    x, out = Activations(torch.zeros(130, 320).bfloat16()), torch.zeros(2, 130, 64).bfloat16()
    with pytest.raises(BackendError, match="2 equal parts"):
        gpu_wide.multiply_wide(CPU, x, weight, out, 32, 2, 2, 0)


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLATOUT_CACHE", str(tmp_path))
    monkeypatch.setattr(gpu_cuda.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_cuda.torch.version, "cuda", "99.0")
    gpu_cuda._nvrtc.cache_clear()
    with pytest.raises(BackendError, match=r"libnvrtc.so.99 not found"):
        gpu_cuda.compiled(gpu_wide.kernel_of(VARIANTS[0]))
    gpu_cuda._nvrtc.cache_clear()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_it_compiles(variant: gpu_wide.Variant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the compiler is installed; a dry card does the same, and the second time it is read back."""
    monkeypatch.setenv("FLATOUT_CACHE", str(tmp_path))
    try:
        code = gpu_cuda.compiled(gpu_wide.kernel_of(variant))
    except BackendError as error:
        pytest.skip(str(error))
    assert code[:4] == b"\x7fELF"
    assert [path.read_bytes() for path in tmp_path.glob("wide-*.cubin")] == [code]
    weight = pack_bf16(torch.zeros(448, 1024).bfloat16())
    dry = dataclasses.replace(CPU, dry=True)
    x = Activations(torch.zeros(130, 1024).bfloat16())
    gpu_wide.multiply_wide(dry, x, weight, torch.zeros(1, 130, 448).bfloat16(), 224, 3, 1, 0)
