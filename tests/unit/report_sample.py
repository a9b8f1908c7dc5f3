"""A complete result of a search, as `flatout optimize --json` prints it, with made-up numbers."""

from __future__ import annotations

from typing import Any

LAYERS = 30
_SHARES = {
    "qkv": 0.13,
    "attention": 0.1,
    "o": 0.09,
    "gate_up": 0.3,
    "down": 0.16,
    "head": 0.18,
    "embedding": 0.002,
}
_WEIGHTS = {"qkv": 16.6e6, "attention": 3.3e6, "o": 10e6, "gate_up": 53e6, "down": 26.5e6, "head": 28.3e6}


def _ops(
    total_s: float, tokens: int, bytes_each: float, rate: float, arithmetic: float
) -> list[dict[str, Any]]:
    rows = []
    for op, share in _SHARES.items():
        weights = _WEIGHTS.get(op, 576)
        flops = 2 * weights * (1 if op == "head" else tokens) if op != "embedding" else 0.0
        moved = weights * bytes_each
        memory_s, compute_s = moved / rate, flops / arithmetic
        seconds = total_s * share
        floor_s = min(max(memory_s, compute_s), 0.97 * seconds)
        rows.append(
            {
                "op": op,
                "seconds": seconds,
                "floor_s": floor_s,
                "fraction": floor_s / seconds,
                "bound": "memory" if memory_s > compute_s else "compute",
                "bytes": moved,
                "flops": flops,
            }
        )
    other = {"op": "other", "seconds": 0.04 * total_s, "floor_s": None, "fraction": None, "bound": ""}
    return [*rows, {**other, "bytes": 0.0, "flops": 0.0}]


def _column(
    name: str, recipe: str, prefill: float, decode: float, memory: float, **more: Any
) -> dict[str, Any]:
    return {
        "name": name,
        "recipe": recipe,
        "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": decode,
        "memory_bytes": memory,
        "perplexity": None,
        "loss": None,
        "loss_upper_bound": None,
        "floor_fraction": {"prefill": None, "decode": None},
        **more,
    }


def _candidate(name: str, status: str, mid: float, **more: Any) -> dict[str, Any]:
    time = {"low": 0.85 * mid, "mid": mid, "high": 1.2 * mid, "unit": "s", "tier": "calibrated"}
    return {
        "name": name,
        "why": "",
        "status": status,
        "reason": "",
        "weight_bytes": 1.4e8,
        "predicted": {"workload_s": time, "prefill_s": time, "decode_s": time},
        "measured": None,
        "loss": None,
        "predicted_loss": None,
        **more,
    }


def _loss(value: float, tokens: int = 8120) -> dict[str, Any]:
    return {"value": value, "low": 0.8 * value, "high": 1.2 * value, "tokens": tokens}


def _times(workload_s: float) -> dict[str, float]:
    return {"workload_s": workload_s, "prefill_s": workload_s / 2, "decode_s": workload_s / 128}


def sample() -> dict[str, Any]:
    """A fresh copy each call, so that tests may change it."""
    return {
        "command": "optimize",
        "flatout": "0.1.0",
        "date": "2026-01-31 12:00 UTC",
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "path": "/models/smollm2.gguf",
            "sha256": "4c1a" * 16,
            "family": "llama",
            "parameters": 134_515_008,
            "layers": LAYERS,
        },
        "verdict": "Decodes 18.2 times and prefills 3.9 times as fast as transformers bf16 at +0.31 % "
        "perplexity (at most +0.48 %, budget 1.0 %).",
        "passed": True,
        "fallback": False,
        "threads": 2,
        "request": {
            "max_loss": 0.01,
            "recipe": None,
            "workload": {"batch": 1, "prompt": 512, "output": 64, "objective": "latency"},
            "text": None,
            "trace": None,
        },
        "traffic": None,
        "energy": None,
        "money": None,
        "hardware": {
            "name": "AMD EPYC 9B45",
            "cores": 2,
            "features": ["avx2", "avx512_vnni", "avx512_bf16"],
            "ceilings": [],
        },
        "roofs": {"read": 9.4e10, "int8": 2.1e12, "bf16": 1.05e12},
        "baseline": _column(
            "transformers bf16", "bf16", 1578, 43.2, 2.9e8, floor_fraction={"prefill": 0.31, "decode": 0.12}
        ),
        "engine_original": _column(
            "engine, original precision",
            "bf16",
            3310,
            331,
            3.4e8,
            perplexity=20.367,
            loss=0.0002,
            floor_fraction={"prefill": 0.62, "decode": 0.91},
        ),
        "optimized": _column(
            "engine, optimised",
            "native",
            6154,
            786,
            1.3e8,
            perplexity=20.426,
            loss=0.0031,
            loss_upper_bound=0.0048,
            floor_fraction={"prefill": 0.58, "decode": 0.83},
        ),
        "speedup": {"decode": 18.2, "prefill": 3.9, "workload": 11.3},
        "speedup_interval": {"decode": [17.6, 18.9], "prefill": [3.82, 3.97], "workload": [11, 11.6]},
        "speedup_by_compression": {"decode": 2.37, "prefill": 1.86, "workload": 2.1},
        "speedup_by_compression_interval": {
            "decode": [2.3, 2.41],
            "prefill": [1.84, 1.9],
            "workload": [2.05, 2.2],
        },
        "quality": {
            "baseline": 20.363,
            "optimized": 20.426,
            "loss": 0.0031,
            "upper_bound": 0.0048,
            "margin": 0.01,
            "passed": True,
            "verdict": "passed",
            "clusters": 64,
            "tokens": 28_416,
            "delta": 0.00312,
            "k": 1,
            "alpha_k": 0.025,
            "method": "bootstrap-t",
            "text_sha256": "9f3c" * 16,
        },
        "floor_fraction": {"decode": 0.83, "prefill": 0.58},
        "ops": {
            "prefill": {
                "before": _ops(0.155, 512, 2.0, 9.4e10, 1.05e12),
                "after": _ops(0.083, 512, 0.7, 9.4e10, 2.1e12),
            },
            "decode": {
                "before": _ops(0.00302, 1, 2.0, 9.4e10, 1.05e12),
                "after": _ops(0.00127, 1, 0.72, 9.4e10, 2.1e12),
            },
        },
        "recipe_map": {
            "embedding": ["q8_0"],
            "qkv": ["q4_1"] * LAYERS,
            "o": ["q4_1"] * LAYERS,
            "gate_up": ["q4_1"] * LAYERS,
            "down": ["q4_1"] * 28 + ["w8a8-g32"] * 2,
            "head": ["q8_0"],
            "kv_cache": ["int8"],
        },
        "frontier": [{"workload_s": 0.9 - 0.05 * i, "loss": 0.002 * 1.6**i} for i in range(8)],
        "candidates": [
            _candidate("native", "chosen", 0.155, measured=_times(0.164), loss=_loss(0.0029)),
            _candidate("w8a8-g64", "passed", 0.172, measured=_times(0.181), loss=_loss(0.0018)),
            _candidate("w8a8-g32", "slower", 0.181, reason="predicted no faster than native"),
            _candidate("w8a8", "slower", 0.169, reason="predicted no faster than native"),
            _candidate(
                "w8a8,layers.*.down=w8a8-g32", "failed", 0.171, measured=_times(0.176), loss=_loss(0.014)
            ),
            _candidate(
                "w4a8-g64",
                "rejected",
                0.142,
                measured=_times(0.151),
                loss=_loss(0.51, 1804),
                reason="loss 51 % on 1,804 tokens",
            ),
            _candidate("w4a8-g32", "rejected", 0.149, measured=_times(0.156), loss=_loss(0.34, 1804)),
            _candidate(
                "w4a8-g32/gptq",
                "rejected",
                0.149,
                predicted_loss={"low": 0.07, "mid": 0.15, "high": 0.3},
                reason="expected loss at least 7 %",
            ),
            _candidate("bf16", "original", 0.36, measured=_times(0.349), loss=_loss(0.0002)),
        ],
        "timings": [
            {"stage": "measure the machine", "seconds": 14.2},
            {"stage": "screen candidates", "seconds": 41.0},
            {"stage": "race the fastest", "seconds": 22.5},
            {"stage": "certify on sealed text", "seconds": 52.1},
            {"stage": "compare with transformers", "seconds": 38.4},
            {"stage": "profile operators", "seconds": 6.0},
        ],
        "trials": {"folder": "/cache/trials", "reused": 3},
        "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0"},
        "artifact": "demo/artifact",
        "report": "demo/artifact/report.html",
    }
