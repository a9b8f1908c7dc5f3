"""Which programs load a recipe, besides flatout: what flatout.json says under "loads_in", and what
`--portable` restricts a search to.

Every rule is tried, format by format: folders by benchmarks/compatibility.py, which writes
docs/compatibility.md, GGUF files by benchmarks/export.py. A program or a format that was not tried there does
not count as loading.
"""

from __future__ import annotations

from flatout.core.formats import Format, Recipe
from flatout.core.quantization_config import EMBEDDING, HEAD, cannot_express, module_formats
from flatout.core.spec import ModelSpec

ENGINES = ("transformers", "vllm", "llama.cpp", "openvino")
TO_GGUF = "flatout export FOLDER --to gguf --out FILE.gguf"


def loads_in(spec: ModelSpec, recipe: Recipe) -> dict[str, str]:
    """Program -> "yes", what to do before, or "no" with the reason."""
    answers = {"flatout": "yes"}
    for engine in ENGINES:
        why = why_not(engine, spec, recipe)
        after = f"after {TO_GGUF}" if engine == "llama.cpp" else "yes"
        answers[engine] = f"no: {why}" if why else after
    return answers


def why_not(engine: str, spec: ModelSpec, recipe: Recipe) -> str:
    """Why `engine`, one of ENGINES, does not load `recipe`: its folder, or llama.cpp what TO_GGUF makes of
    the folder; "" if it does."""
    if engine == "llama.cpp":
        return _why_not_gguf(module_formats(spec, recipe))
    if engine == "openvino":
        return "it reads its own files, whose converter has no form for these weights"
    cannot = cannot_express(spec, recipe)
    if cannot:
        return f"compressed-tensors has no form for {', '.join(cannot)}"
    if engine == "transformers":
        return ""
    return _why_not_vllm(module_formats(spec, recipe))


def _why_not_vllm(formats: dict[str, Format]) -> str:
    """vLLM has floats for embedding and head, 8 bits with a scale a row and a token, and symmetric 4 bits in
    groups, of whose activations it takes no notice."""
    for name, fmt in formats.items():
        if fmt.is_integer and name in (EMBEDDING, HEAD):
            return f"it has no integer weights for {name}"
        if fmt.is_integer and fmt.name != "w8a8" and (fmt.bits != 4 or fmt.zero != "symmetric"):
            return f"it has no kernel for {fmt.name}"
    return ""


def _why_not_gguf(formats: dict[str, Format]) -> str:
    """Blocks of 32 values: 4 and 5 bits with a minimum or without, and 8 without, which hold 3 and 6, too."""
    for fmt in formats.values():
        if fmt.name == "fp8" or (fmt.zero == "asymmetric" and fmt.bits not in (4, 5)):
            return f"GGUF has no blocks for {fmt.name}"
        if fmt.group % 32:
            return f"GGUF's blocks are 32 weights long, the groups of {fmt.name} {fmt.group}"
    return ""
