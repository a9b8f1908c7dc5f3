"""Which programs load a folder of a recipe, besides flatout: what flatout.json says under "loads_in", and
what `--portable` restricts a search to.

Every rule is tried, format by format, by benchmarks/compatibility.py, which writes docs/compatibility.md. A
program or a format that was not tried there does not count as loading.
"""

from __future__ import annotations

from flatout.core.formats import Format, Recipe
from flatout.core.quantization_config import EMBEDDING, HEAD, cannot_express, module_formats
from flatout.core.spec import ModelSpec

ENGINES = ("transformers", "vllm", "llama.cpp", "openvino")


def loads_in(spec: ModelSpec, recipe: Recipe) -> dict[str, str]:
    """Program -> "yes", or "no" with the reason."""
    reasons = {engine: why_not(engine, spec, recipe) for engine in ENGINES}
    return {"flatout": "yes", **{name: f"no: {why}" if why else "yes" for name, why in reasons.items()}}


def why_not(engine: str, spec: ModelSpec, recipe: Recipe) -> str:
    """Why `engine`, one of ENGINES, does not load a folder of `recipe`; "" if it does."""
    if engine == "llama.cpp":
        return "it reads GGUF files, and this folder holds safetensors"
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
