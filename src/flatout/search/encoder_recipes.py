"""The grammar in which a recipe of an encoder is named, and the encoder that it makes.

    FORMAT[/METHOD][,layers.I|*[.LINEAR]=FORMAT][,sparsity=METHOD-P%|METHOD-N:M][,depth=N][,ffn=N]

FORMAT is that of the linears but for those of layers that are named, METHOD rtn (to
nearest), gptq or smooth. The changes take weights away before any is rounded, layers and channels first
(compress/encoder_reduce.py); what needs text for it has the shipped calibration passages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from flatout.compress.encoder import EncoderSource, compress_encoder
from flatout.compress.encoder_gptq import gptq_encoder
from flatout.compress.encoder_reduce import cut_encoder, prune_encoder, whole
from flatout.compress.encoder_smooth import smooth_encoder, smoothing_factors
from flatout.core.encoder import EncoderModel, EncoderSpec, check_encoder_formats, parse_encoder_formats
from flatout.core.encoder_folder import EncoderCheckpoint
from flatout.core.sparsity import parse_sparsity
from flatout.data.passages import load_passages
from flatout.errors import ConfigError, nearest
from flatout.verify.vectors import pieces_of

_METHODS = ("rtn", "gptq", "smooth")
_CHANGES = ("sparsity", "depth", "ffn")
_CALIBRATION = 64  # passages


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderRecipe:
    """format: of the linears, as core.encoder.parse_encoder_formats reads it. method: one of _METHODS.
    sparsity: "" for none (core/sparsity.py). depth, ffn: layers and feed-forward channels that stay, None for
    all."""

    format: str
    method: str = "rtn"
    sparsity: str = ""
    depth: int | None = None
    ffn: int | None = None

    @property
    def reduces(self) -> bool:
        """Whether weights are taken away."""
        return bool(self.sparsity or self.depth or self.ffn)


def parse_encoder_recipe(name: str, spec: EncoderSpec) -> EncoderRecipe:
    """The recipe called `name`. Raises ConfigError unless it fits an encoder of `spec`."""
    body, *changes = [part.strip() for part in name.split(",")]
    fmt, slash, method = body.partition("/")
    if slash and method not in _METHODS:
        rule = f"after the slash of an encoder stands {', '.join(_METHODS)}"
        raise ConfigError(rule, repr(method), f"{fmt}/{nearest(method, _METHODS, 'gptq')}")
    named = [change.partition("=")[0] for change in changes]
    if len(set(named)) < len(named):
        raise ConfigError("a recipe names each change once", ", ".join(named), "one of them")
    layers = [change for change in changes if change.startswith("layers.")]
    recipe = EncoderRecipe(
        format=parse_encoder_formats(",".join((fmt, *layers))).name, method=method or "rtn"
    )
    for change in changes:
        if change in layers:
            continue
        place, equals, value = change.partition("=")
        if place not in _CHANGES or not equals:
            rule = f"a change of an encoder is {'=, '.join(_CHANGES)}= or layers.I.LINEAR="
            raise ConfigError(rule, repr(change), f"{nearest(place, _CHANGES, 'ffn')}={value or 1}")
        if place == "sparsity":
            recipe = replace(recipe, sparsity=value)
        elif not value.isdecimal():
            raise ConfigError(f"{place} is a whole number", repr(value), f"{place}=1")
        elif place == "depth":
            recipe = replace(recipe, depth=int(value))
        else:
            recipe = replace(recipe, ffn=int(value))
    _check(recipe, spec)
    return recipe


def _check(recipe: EncoderRecipe, spec: EncoderSpec) -> None:
    most = {"depth": spec.num_layers, "ffn": spec.intermediate_size}
    for what, limit in most.items():
        size = getattr(recipe, what)
        if size is not None and not 1 <= size <= limit:
            raise ConfigError(f"{what} lies between 1 and the model's {limit}", str(size), f"{what}={limit}")
    child = replace(
        spec,
        num_layers=recipe.depth or spec.num_layers,
        intermediate_size=recipe.ffn or spec.intermediate_size,
    )
    check_encoder_formats(child, parse_encoder_formats(recipe.format))
    if recipe.sparsity:
        for linear, (_, k) in child.linears().items():
            parse_sparsity(recipe.sparsity).check(linear, k)


def calibration_texts(source: EncoderCheckpoint) -> list[list[int]]:
    """Token ids of the shipped passages that calibrate an encoder, every other one cut into pieces of a
    sentence or two: the special tokens at the ends of a text, whose states are unlike all others, are as
    frequent then as in what encoders are given."""
    passages = load_passages("calibration")[:_CALIBRATION]
    texts = [passage.text for passage in passages[::2]] + [text for _, text in pieces_of(passages[1::2])]
    return source.tokenizer().encode_batch(texts)


def reduced_encoder(source: EncoderCheckpoint, recipe: EncoderRecipe) -> EncoderSource:
    """`source` without what the recipe takes away; `source` itself where that is nothing. Raises what
    compress/encoder_reduce.py does."""
    if not recipe.reduces:
        return source
    texts = calibration_texts(source)
    found = whole(source)
    if recipe.depth or recipe.ffn:
        found = cut_encoder(found, texts, recipe.depth, recipe.ffn)
    return prune_encoder(found, parse_sparsity(recipe.sparsity), texts) if recipe.sparsity else found


def encoder_of(
    source: EncoderSource, recipe: EncoderRecipe, texts: Callable[[], list[list[int]]]
) -> EncoderModel:
    """`source`, from which everything is taken away already, in the recipe's numbers; texts() calibrate."""
    if recipe.method == "gptq":
        return gptq_encoder(source, recipe.format, texts())
    if recipe.method == "smooth":
        return smooth_encoder(source, recipe.format, smoothing_factors(source, texts()))
    return compress_encoder(source, recipe.format)


def encoder_from_name(source: EncoderCheckpoint, name: str) -> EncoderModel:
    """The encoder by the recipe called `name`. Raises ConfigError for what the grammar does not have, and
    what the methods raise."""
    recipe = parse_encoder_recipe(name, source.spec)
    return encoder_of(reduced_encoder(source, recipe), recipe, lambda: calibration_texts(source))
