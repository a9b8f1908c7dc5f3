"""Candidate recipes of a model, and the grammar in which a recipe is named.

    BODY[/METHOD][,PLACE=FORMAT]...

BODY is a format for all layers or `native` (the blocks of a GGUF file as they are; `native-s8`: those of 4
bits with scales of 8 bits); METHOD makes the codes
(rtn if not given); PLACE is head, embedding, kv or an override such as layers.*.down. Every recipe that the
search prints can be given back to `--recipe`:

    native      w8a8-g64      w8a8/smooth,layers.*.down=w8a16      w4a8-g64/gptq,head=w8a8

Two kinds of changes take weights away, and are made before any is rounded: sparsity=METHOD-50% or -2:4
(core/sparsity.py), and the sizes of a smaller architecture, depth, ffn, groups and kv-heads
(core/structure.py):

    bf16,sparsity=sparsegpt-2:4      w8a8-g64,ffn=1024,depth=26
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flatout.core.formats import METHODS, Recipe, parse_format, with_short_scales
from flatout.core.fuse import Source, float_recipe, native_format, native_recipe
from flatout.core.spec import ModelSpec
from flatout.core.structure import SIZES
from flatout.engine.cpu import check_formats
from flatout.errors import ConfigError, nearest

ORIGINAL = float_recipe("bf16")
"""The model at original precision as the cpu runner holds it: bf16 weights and cache."""
_PLACES = ("head", "embedding", "kv", "sparsity", *SIZES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A recipe worth a look, with the reason it is one.

    relative: the recipe to look at first, if there is one, because it is at least as fast and its loss says
    what this one may lose: the same formats with codes that are quicker to make, or the same bits with one
    scale for twice the weights.
    """

    recipe: Recipe
    why: str
    relative: str | None = None


def eight_bit(width: int, group: int = 64) -> str:
    """The 8-bit format with groups of at most `group` that divides `width`."""
    for size in (group, 32):
        if width % size == 0:
            return f"w8a8-g{size}"
    return "w8a8"


def recipe_from_name(name: str, source: Source) -> Recipe:
    """The recipe called `name` in the grammar above. Raises ConfigError unless it fits the model."""
    body, *changes = [part.strip() for part in name.split(",")]
    body, _, method = body.partition("/")
    methods = [known for known in METHODS if known != "native"]
    if method not in ("", *methods):
        near = f"{body}/{nearest(method, methods, 'gptq')}"
        raise ConfigError(f"after the slash stands {', '.join(methods)}", repr(method), near)
    places = [change.partition("=")[0] for change in changes]
    for place in places:
        if places.count(place) > 1:
            twice = f"{place}, {places.count(place)} times"
            raise ConfigError("a recipe names each place once", twice, "one of them")
    if body in ("native", "native-s8"):
        native = _native(source)
        if body == "native-s8":
            native = _byte_scales(native)
        if native is None:
            blocks = "q4_0, q4_1 and q8_0" if body == "native" else "q4_0 and q4_1"
            raise ConfigError(
                f"{body} takes the blocks {blocks} of a GGUF file", "none in this model", "w8a8-g64"
            )
        recipe = native
    else:
        recipe = _uniform(body, source)
    if method:
        recipe = replace(recipe, method=method)
    if recipe.rotates:  # no blocks of the file are left
        table = eight_bit(source.spec.hidden_size)
        head, embedding = (
            table if parse_format(fmt).is_native else fmt for fmt in (recipe.head, recipe.embedding)
        )
        recipe = replace(recipe, head=head, embedding=embedding)
    for change in changes:
        recipe = _changed(recipe, change)
    if method:
        _check_method(recipe, name)
    recipe.check(source.spec)
    check_formats(recipe)
    return recipe.renamed(name)


def _check_method(recipe: Recipe, name: str) -> None:
    """Raise ConfigError for a recipe of which its method would change nothing."""
    formats = [
        parse_format(fmt)
        for fmt in (recipe.layers, recipe.head, recipe.embedding, *dict(recipe.overrides).values())
    ]
    if not any(fmt.is_integer for fmt in formats):
        raise ConfigError("a method chooses integer codes", name, f"w4a16-g64/{recipe.method}")
    if recipe.method == "smooth" and not any(fmt.scales_tokens for fmt in formats):
        raise ConfigError(
            "smoothing is for int8 activations that share one scale a token", name, "w8a8/smooth"
        )


def _changed(recipe: Recipe, change: str) -> Recipe:
    place, equals, value = change.partition("=")
    if not equals or not value:
        raise ConfigError("a change is PLACE=FORMAT", repr(change), "layers.*.down=w8a8-g32")
    if place not in _PLACES and not place.startswith("layers."):
        rule = f"a change is of {', '.join(_PLACES)}, layers.I or layers.*.LINEAR"
        raise ConfigError(rule, repr(place), f"{nearest(place, _PLACES, 'head')}={value}")
    if place == "sparsity":
        return replace(recipe, sparsity=value)
    if place in SIZES:
        if not value.isdecimal():
            raise ConfigError(f"{place} is a whole number", repr(value), f"{place}=1")
        return replace(recipe, structure=(*recipe.structure, (place, int(value))))
    if place == "kv":
        return replace(recipe, kv_cache=value)
    fmt = parse_format(value)
    if fmt.is_integer and not fmt.is_native and recipe.method == "native":
        recipe = replace(recipe, method="rtn")
    if place == "head":
        return replace(recipe, head=value)
    if place == "embedding":
        return replace(recipe, embedding=value)
    return replace(recipe, overrides=(*recipe.overrides, (place, value)))


def _uniform(body: str, source: Source) -> Recipe:
    """One format for all layers. Embedding and head keep the file's q8_0 blocks where it has them, and take
    15-bit activations where the layers' have one scale a token: outliers cost most there."""
    fmt = parse_format(body)
    if not fmt.is_integer:
        return float_recipe(body)
    head = body
    if fmt.bits < 8 and not fmt.is_native:
        head = eight_bit(source.spec.hidden_size) if fmt.group else "w8a16"
    elif fmt.scales_tokens:
        head = "w8a16"
    if not fmt.is_native and native_format(source, "head") == native_format(source, "embedding") == "q8_0":
        head = "q8_0"
    method = "native" if fmt.is_native else "rtn"
    return Recipe(name=body, layers=body, embedding=head, head=head, kv_cache="int8", method=method)


def _native(source: Source) -> Recipe | None:
    """The file's own blocks, and 8 bits for what is stored otherwise; None when no layer has blocks."""
    recipe = native_recipe(source, fallback=eight_bit(source.spec.hidden_size, group=32))
    formats = {
        recipe.format_of(i, linear) for i in range(source.spec.num_layers) for linear in source.spec.linears()
    }
    if not any(fmt.is_native for fmt in formats):
        return None
    places = {*formats, parse_format(recipe.head), parse_format(recipe.embedding)}
    return recipe if all(fmt.is_native for fmt in places) else replace(recipe, method="rtn")


def _byte_scales(native: Recipe | None) -> Recipe | None:
    """`native` with scales of 8 bits in layers of 4-bit blocks; None when no layer has them."""
    if native is None:
        return None
    layers = with_short_scales(native.layers)
    overrides = tuple((at, with_short_scales(name)) for at, name in native.overrides)
    if (layers, overrides) == (native.layers, native.overrides):
        return None
    return replace(native, name="native-s8", layers=layers, overrides=overrides)


_SMOOTH = "w8a8/smooth,layers.*.down=w8a16"
"""The input of down holds a gated model's massive activations (Sun et al. 2024), which smoothing alone does
not tame: 0.92 % loss with 8 bits there, 0.70 % with 15, on SmolLM2-135M (docs/log.md)."""


def candidates(source: Source) -> list[Candidate]:
    """Uniform and simple per-layer recipes that fit the model; the original is always the last."""
    found: list[Candidate] = []
    native = _native(source)
    shorter = _byte_scales(native)
    if shorter is not None:
        found.append(Candidate(recipe=shorter, why="the file's own codes, scales in 8 bits"))
    if native is not None:
        why = "the file's own blocks: no weight is rounded again"
        found.append(Candidate(recipe=native, why=why, relative=None if shorter is None else shorter.name))
    found += _fitting(
        source,
        ("w8a8-g64", "8-bit codes, a scale for 64 weights", None),
        ("w8a8-g32", "8-bit codes, a scale for 32 weights", "w8a8-g64"),
        ("w8a8", "8-bit codes, a scale a row", None),
        (
            _SMOOTH,
            "8-bit codes, a scale a row, outliers moved into the weights, 15 bits in down",
            "w8a8",
        ),
        ("w8a16", "8-bit codes, a scale a row, 15-bit activations", _SMOOTH),
        ("w4a8-g32", "4-bit codes rounded to nearest, a scale for 32 weights", "w4a8-g64"),
        ("w4a8-g64", "4-bit codes rounded to nearest, a scale for 64 weights", None),
        ("w4a8-g32/gptq", "4-bit codes, errors spread by GPTQ", "w4a8-g32"),
        ("w4a8-g64/gptq", "4-bit codes, errors spread by GPTQ", "w4a8-g64"),
    )
    found.append(Candidate(recipe=ORIGINAL, why="original precision"))
    return found


def calibrated_candidates(source: Source, method: str) -> list[Candidate]:
    """Uniform recipes made by `method` from what a search for mixed ones has calibrated, so known well before
    they are built."""
    return _fitting(
        source,
        (f"w6a16/{method}", "6-bit codes, a scale a row, errors spread by GPTQ", None),
        (f"w6a8-g64/{method}", "6-bit codes, a scale for 64 weights, errors spread by GPTQ", None),
    )


def _fitting(source: Source, *rows: tuple[str, str, str | None]) -> list[Candidate]:
    """Candidates of (name, why, relative), without those whose groups do not divide a width of the model."""
    found = []
    for name, why, relative in rows:
        try:
            recipe = recipe_from_name(name, source)
        except ConfigError:
            continue
        found.append(Candidate(recipe=recipe, why=why, relative=relative))
    return found


def layer_map(spec: ModelSpec, recipe: Recipe) -> dict[str, list[str]]:
    """Format name of every place, for reports: fused linear -> one name a layer, and the single places."""
    rows = {
        linear: [recipe.format_of(i, linear).name for i in range(spec.num_layers)]
        for linear in spec.linears()
    }
    return {"embedding": [recipe.embedding], **rows, "head": [recipe.head], "kv_cache": [recipe.kv_cache]}
