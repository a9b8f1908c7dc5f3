"""Compile every Triton kernel ahead of time, without a GPU: python tests/aot.py cuda:90 hip:gfx942 ...

Prints one JSON line a kernel: target, name, bytes of machine code and, for Nvidia, whether the asked-for
instructions are in it. tests/kernels/test_triton_compiles.py runs it in a process of its own, because a
process either compiles kernels or interprets them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flatout.kernels.triton import attention, elementwise, exchange, gemm, gemv, sample, words

F32, BF16, FP8, I32, I64 = "*fp32", "*bf16", "*fp8e4nv", "*i32", "*i64"


def kernels(
    asm: bool, pdl: bool, fp8: bool
) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """(name, kernel, types of its pointers and numbers, constants, warps)."""
    few = dict.fromkeys(("x", "gains", "w"), I32) | {
        "residual": F32,
        "y_bf16": BF16,
        "N": "i32",
        "eps": "fp32",
        "rooms": I64,
        "state": I32,
        "index": "i32",
    }
    packed = ((words.BF16, 0, False), (words.FP8, 0, False), (words.INT8, 64, True), (words.INT4, 128, False))
    for fmt, group, minima in packed:
        scales = {"scales": "*fp16" if group else F32, "minima": F32}
        if fmt.value in (words.FP8.value, words.INT8.value):
            scales |= {"x": I64, "gains": I64}
        for rows, norm, epilogue in ((1, True, gemv.PLAIN), (2, False, gemv.RESIDUAL), (1, True, gemv.SILU)):
            constants = {
                "K": 4096, "M": rows, "TILE": 128, "ROWS": 4, "FORMAT": fmt, "GROUP": group, "MINIMA": minima,
                "NORM": norm, "EPILOGUE": epilogue, "RANK": 0, "ASM": asm, "PDL": pdl,
                "RANKS": 2 if epilogue.value == gemv.RESIDUAL.value else 1, "CAPACITY": 8192,
            }  # fmt: skip
            out = BF16 if epilogue.value == gemv.SILU.value else F32
            name = f"gemv {fmt.value} {rows} {epilogue.value}"
            yield name, gemv.gemv, few | scales | {"y": out}, constants, 4
        if fmt.value != words.BF16.value:
            types = scales | {"w": I32, "out": BF16, "n": "i32"}
            constants = {"K": 4096, "FORMAT": fmt, "GROUP": group, "MINIMA": minima, "BLOCK": 512}
            yield f"unpack {fmt.value}", gemv.unpack, types, constants, 4
    heads = {"token_scales": F32, "row_scales": F32, "bias": F32, "q_gains": BF16, "k_gains": BF16}
    heads |= {"cos": F32, "sin": F32, "positions": I32, "eps": "fp32", "out": BF16, "part_size": "i32"}
    heads |= {"out_scales": F32}
    for cache in (BF16, FP8) if fp8 else (BF16,):
        types = heads | {"qkv": F32, "keys": cache, "values": cache}
        constants = {
            "G": 8,
            "R": 4,
            "E": 128,
            "PAGE": 64,
            "CUT": (6, 128, 64, 264, 3072),
            "SCALED": False,
            "BIAS": False,
            "NORM": False,
        }
        more = {"pages": I32, "parts": F32, "peaks": F32, "counters": I32}
        more |= {"page_stride": "i32", "scale": "fp32", "window": "i32"}
        compute = tl.float16 if cache == FP8 else tl.bfloat16
        for splits in (1, 16):
            split = {"ROWS": 16, "BLOCK": 64, "SPLITS": splits, "COMPUTE": compute, "PDL": pdl}
            yield (
                f"attention {cache} {splits}",
                attention.decode_attention,
                types | more | ({"out": FP8} if cache == FP8 else {}),
                constants | split,
                4,
            )
        scaled = constants | {"SCALED": True, "BIAS": True, "NORM": True, "PDL": pdl, "ROWS": 4}
        types |= {"qkv": BF16}
        yield f"rotate {cache}", attention.rotate_and_store, types | {"slots": I64}, scaled, 1
    places = {"x": F32, "linear": BF16, "token_scales": F32, "row_scales": F32, "gains": BF16}
    places |= {"out_scales": F32, "part_size": "i32"}
    for eight in (False, True) if fp8 else (False,):
        out = {"out": FP8 if eight else BF16}
        flags = {
            "SCALED": eight,
            "FP8": eight,
            "PDL": pdl,
            "CUT": (1, 1, 1, 1, 1) if eight else (3, 128, 64, 132, 9632),
        }
        types = places | out | {"D": "i32", "eps": "fp32"}
        constants = flags | {"ADD": True, "BLOCK": 4096}
        yield f"add_norm {eight}", elementwise.add_norm, types, constants, 8
        constants = flags | {
            "GELU": False,
            "BLOCK": 2048,
            "CHUNKS": 7 if eight else 1,
        }
        yield f"activate {eight}", elementwise.activate, places | out | {"F": "i32"}, constants, 8
        kind, size = ("fp8e4nv", FP8) if eight else ("bf16", BF16)
        parts, whole = (6, 128, 64, 264, 3072), (1, 128, 64, 48, 3072)
        for tokens, cut, epilogue in (
            (64, parts, gemm.PLAIN),
            (128, whole, gemm.SILU),
            (256, whole, gemm.ARGMAX),
        ):
            types = {"x": f"tensordesc<{kind}[{tokens}, 64]>", "w": f"tensordesc<{kind}[128, 64]>"}
            types |= {"w_values": size, "token_scales": F32, "row_scales": F32, "T": "i32", "N": "i32"}
            types["out_scales"] = F32
            types["out"] = I64 if epilogue.value == gemm.ARGMAX.value else BF16
            if eight and epilogue.value == gemm.SILU.value:
                types["out"] = FP8
            constants = {
                "K": 4096, "BLOCK_T": tokens, "BLOCK_N": 128, "BLOCK_K": 64, "CUT": cut, "SCALED": eight,
                "X_GROUP": 512 if eight and tokens == 64 else 0, "EPILOGUE": epilogue, "FETCH": 4, "PDL": pdl,
                "COMPUTE": tl.float8e4nv if eight else tl.bfloat16,
            }  # fmt: skip
            yield f"gemm {eight} {tokens}", gemm.gemm, types, constants, 4 if tokens == 64 else 8
    if fp8:
        types = places | {"x": BF16, "out": FP8, "D": "i32"}
        yield "quantize", elementwise.quantize, types, {"BLOCK": 4096, "PDL": pdl}, 8
    meeting = {"rooms": I64, "state": I32, "index": "i32", "size": "i32"}
    ranks = {"RANK": 0, "RANKS": 2, "CAPACITY": 8192, "PDL": pdl}
    types = meeting | {"part": F32, "x": F32, "x_bf16": BF16}
    yield "exchange add", exchange.add, types, ranks | {"BLOCK": 128, "TWICE": True}, 1
    types = meeting | {"keys": I64, "stalled": I32}
    yield "exchange greatest", exchange.greatest, types, ranks | {"BLOCK": 32}, 1
    types = {"tokens": I32, "table": BF16, "x": F32, "x_bf16": BF16, "D": "i32", "factor": "fp32"}
    yield "embed", elementwise.embed, types, {"BLOCK": 1024, "PDL": pdl}, 4
    types = {"logits": F32, "keys": I64, "V": "i32"}
    yield "argmax", sample.argmax, types, {"BLOCK": 4096, "PDL": pdl}, 8
    types = {"keys": I64, "drawn": I32, "temperature": F32, "tokens": I32, "positions": I32, "rows": "i32"}
    types |= {"results": I32, "turn": I32, "capacity": "i32"}
    yield "advance", sample.advance, types, {"DRAWN": True, "ROWS": 64, "PDL": pdl}, 4


def compile_for(target: str) -> Iterator[dict[str, Any]]:
    """Every kernel for "cuda:90" or "hip:gfx942"."""
    backend, _, arch = target.partition(":")
    nvidia = backend == "cuda"
    gpu = GPUTarget(backend, int(arch) if nvidia else arch, 32 if nvidia else 64)
    version = int(arch) if nvidia else 0
    for name, kernel, types, constants, warps in kernels(version >= 89, version >= 90, version >= 89):
        signature = {arg: "constexpr" if arg in constants else types[arg] for arg in kernel.arg_names}
        at = {arg: i for i, arg in enumerate(kernel.arg_names)}
        aligned = {(at[arg],): [["tt.divisibility", 16]] for arg, kind in signature.items() if kind[0] == "*"}
        source = ASTSource(
            kernel, signature, {(at[arg],): value for arg, value in constants.items()}, aligned
        )
        options = {"num_warps": warps} | ({"launch_pdl": True} if version >= 90 else {})
        made = triton.compile(source, target=gpu, options=options)
        code = made.asm["cubin" if nvidia else "hsaco"]
        text = made.asm["ptx" if nvidia else "amdgcn"]
        yield {
            "target": target,
            "kernel": name,
            "bytes": len(code),
            "shared": made.metadata.shared,
            "waits": "griddepcontrol.wait" in text,
            "matrix": "mma." in text or "v_mfma" in text,
        }


if __name__ == "__main__":
    for target in sys.argv[1:]:
        for row in compile_for(target):
            print(json.dumps(row), flush=True)
