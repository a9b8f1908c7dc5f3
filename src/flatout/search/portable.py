"""What is left of a search's choices where another program has to load the result too (core/portable.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flatout.core.formats import Recipe
from flatout.core.fuse import Source
from flatout.core.portable import why_not
from flatout.core.spec import ModelSpec
from flatout.errors import ConfigError
from flatout.search.joint import Space
from flatout.search.recipes import ORIGINAL, Candidate, recipe_from_name

_FLOAT_ENDS = ",head=bf16,embedding=bf16"


def restrict(candidates: Sequence[Candidate], engine: str, source: Source) -> list[Candidate]:
    """Those of `candidates` that `engine` loads, with embedding and head in bf16 where that is what it takes,
    and 4-bit formats of its own; the original stays the last.

    Raises ConfigError when it loads none but the original, or not even that.
    """
    listed = [candidate for candidate in candidates if candidate.recipe != ORIGINAL]
    for name in _four_bits(engine, source.spec):
        recipe = recipe_from_name(f"{name}/gptq", source)
        listed.append(Candidate(recipe=recipe, why=f"4-bit codes that {engine} loads"))
    found: dict[str, Candidate] = {}
    for candidate in listed:
        for variant in (candidate, _with_float_ends(candidate, source)):
            if not why_not(engine, source.spec, variant.recipe):
                found.setdefault(variant.recipe.name, variant)
                break
    why = why_not(engine, source.spec, ORIGINAL)
    if why or not found:
        raise ConfigError(
            f"{engine} must load the result", why or "it loads no candidate but the original", "no --portable"
        )
    return [*found.values(), *(candidate for candidate in candidates if candidate.recipe == ORIGINAL)]


def check_portable(recipe: Recipe, engine: str, source: Source) -> None:
    """Raise ConfigError unless `engine` loads a folder of `recipe`."""
    why = why_not(engine, source.spec, recipe)
    if why:
        raise ConfigError(f"{engine} must load the result", f"{recipe.name}: {why}", "no --portable")


def _with_float_ends(candidate: Candidate, source: Source) -> Candidate:
    name, relative = candidate.recipe.name, candidate.relative
    return replace(
        candidate,
        recipe=recipe_from_name(name + _FLOAT_ENDS, source),
        relative=None if relative is None else relative + _FLOAT_ENDS,
    )


def restrict_space(space: Space, engine: str) -> Space | None:
    """The formats of `space` that `engine` loads; None where a place is left without any."""
    spec = space.spec
    more = _four_bits(engine, spec)
    linears = {
        linear: tuple(name for name in (*formats, *more) if _loads(engine, spec, name, "bf16"))
        for linear, formats in space.linears.items()
    }
    heads = tuple(name for name in (*space.heads, "bf16") if _loads(engine, spec, "bf16", name))
    return replace(space, linears=linears, heads=heads) if heads and all(linears.values()) else None


def _four_bits(engine: str, spec: ModelSpec) -> list[str]:
    """4-bit formats with float activations, for an engine that loads none with 8-bit ones."""
    if _loads(engine, spec, "w4a8-g32", "bf16"):
        return []
    widths = [width for _, width in spec.linears().values()]
    return [f"w4a16-g{group}" for group in (32, 64, 128) if not any(width % group for width in widths)]


def _loads(engine: str, spec: ModelSpec, layers: str, head: str) -> bool:
    return not why_not(engine, spec, Recipe(name="", layers=layers, embedding=head, head=head))
