"""Formats and recipes: how numbers are stored and multiplied, layer by layer.

Grammar of a format name (docs/formats.md has the table):

    fp32 | bf16                              floats, multiplied as floats
    fp8                                      e4m3 with a scale a row, times bf16 or e4m3 with a scale a token
    w{8,6,5,4,3}a8[-g{32,64,128}][-asym]     integer codes times int8 activations, exact int32 sums
    w{8,6,5,4,3}a16[-g{32,64,128}][-asym]    integer codes times 15-bit activations, exact int32 sums
    q4_0 | q4_1 | q8_0                       the GGUF blocks as stored (32 wide), times int8 activations
    q4_0-s8 | q4_1-s8                        the same codes, scales and minima rounded to 8 bits

Every integer weight is   w[n, k] = scale[n, k // group] * (code[n, k] - zero[n, k // group])
or, for q4_1,             w[n, k] = scale[n, k // group] * code[n, k] + minimum[n, k // group].
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from flatout.core.sparsity import parse_sparsity
from flatout.core.spec import ModelSpec
from flatout.core.structure import Structure
from flatout.errors import ConfigError, nearest

_GRAMMAR = re.compile(r"w(?P<bits>[34568])a(?P<act>8|16)(-g(?P<group>\d+))?(?P<asym>-asym)?")
METHODS = (
    "rtn", "gptq", "tune",
    "smooth", "smooth-gptq",
    "awq", "awq-gptq", "awq-tune",
    "rotate", "rotate-gptq", "rotate-tune", "rotate-smooth-gptq",
    "native",
)  # fmt: skip
"""How codes are made: to nearest, by GPTQ, by tuning whole layers, each also behind a change of the model
(compress/apply.py), or as the file has."""
KV_FORMATS = ("int8", "bf16", "fp32", "fp8", "int4")
_NATIVE = {"q4_0": (4, "symmetric"), "q4_1": (4, "minimum"), "q8_0": (8, "symmetric")}
_BYTE_SCALES = "-s8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One number format.

    bits: 3, 4, 5, 6 or 8 for integer codes, 16 or 32 for floats. group: weights sharing a scale along K, 0 =
    the whole row. zero: "symmetric" (codes are signed around zero), "asymmetric" (integer zero point a group)
    or "minimum" (float minimum a group). activation: "int8" (dynamic), "bf16" or "fp32". activation_group:
    activations sharing one dynamic scale along K, 0 = the whole token. scale_bits: 16, or 8 for scales and
    minima of -127 to 127 times a power of two of their row (core/byte_scales.py).
    """

    name: str
    bits: int
    group: int = 0
    zero: str = "symmetric"
    activation: str = "int8"
    activation_group: int = 0
    scale_bits: int = 16

    @property
    def is_integer(self) -> bool:
        return self.bits <= 8 and self.name != "fp8"

    @property
    def is_native(self) -> bool:
        """Taken from the GGUF file, codes without re-rounding."""
        return self.blocks in _NATIVE

    @property
    def blocks(self) -> str:
        """Name of the format whose codes, and for scales of 16 bits also scales, these are."""
        return self.name.removesuffix(_BYTE_SCALES)

    @property
    def scales_tokens(self) -> bool:
        """Whether activations are int8 with one scale a token: what smoothing is for."""
        return self.is_integer and self.activation == "int8" and not self.activation_group

    def groups(self, k: int) -> int:
        """Scales a row of length k holds."""
        return k // self.group if self.group else 1

    def weight_bytes(self, n: int, k: int) -> int:
        """Bytes streamed to multiply by an (n, k) weight once: codes (of 3 bits in 4, as every runner holds
        them), scales and minima of 16 bits, or of 8 and two exponents a row."""
        codes = n * k * max(self.bits, 4) // 8
        if not self.is_integer:
            return codes
        values = 1 if self.zero == "symmetric" else 2
        if self.scale_bits == 8:
            return codes + n * (values * self.groups(k) + 2)
        return codes + n * values * self.groups(k) * 2


def with_short_scales(name: str) -> str:
    """Name of the format with the same codes and scales of 8 bits, where there is one; otherwise `name`."""
    return name + _BYTE_SCALES if _NATIVE.get(name, (0, ""))[0] == 4 else name


def _known_formats() -> Iterator[str]:
    yield from ("fp32", "bf16", "fp8", *_NATIVE, "q4_0-s8", "q4_1-s8")
    for bits, activation in itertools.product("86543", ("8", "16")):
        for group, zero in itertools.product(("", "-g32", "-g64", "-g128"), ("", "-asym")):
            if group or bits not in "34":
                yield f"w{bits}a{activation}{group}{zero}"


def parse_format(name: str) -> Format:
    """The format called `name`. Raises ConfigError with the grammar for anything else."""
    if name == "fp32":
        return Format(name=name, bits=32, activation="fp32")
    if name == "bf16":
        return Format(name=name, bits=16, activation="bf16")
    if name == "fp8":
        return Format(name=name, bits=8, activation="bf16")
    blocks = name.removesuffix(_BYTE_SCALES)
    if blocks in _NATIVE and name in (blocks, with_short_scales(blocks)):
        bits, zero = _NATIVE[blocks]
        scale_bits = 16 if blocks == name else 8
        return Format(name=name, bits=bits, group=32, zero=zero, activation_group=32, scale_bits=scale_bits)
    match = _GRAMMAR.fullmatch(name)
    if match is None:
        raise ConfigError(
            "a format is fp32, bf16, fp8, q4_{0,1}[-s8], q8_0 or w{8,6,5,4,3}a{8,16}[-g{32,64,128}][-asym]",
            repr(name),
            nearest(name, _known_formats(), "w8a8-g64"),
        )
    group = int(match["group"]) if match["group"] else 0
    if match["group"] not in (None, "32", "64", "128") or (match["bits"] in "34" and group == 0):
        raise ConfigError(
            "groups are 32, 64 or 128 wide, and weights of 3 or 4 bits need one",
            repr(name),
            f"w{match['bits']}a{match['act']}-g64{match['asym'] or ''}",
        )
    integer_activation = match["act"] == "8"
    return Format(
        name=name,
        bits=int(match["bits"]),
        group=group,
        zero="asymmetric" if match["asym"] else "symmetric",
        activation="int8" if integer_activation else "int16",
        activation_group=group if integer_activation else 0,
    )


def overridden(usual: str, overrides: Sequence[tuple[str, str]], layer: int, linear: str) -> str:
    """Name of the format of fused linear `linear` of layer `layer`: that of the last of `overrides`, pairs of
    a pattern and a name, that is of it, `usual` where none is."""
    chosen = usual
    for pattern, name in overrides:
        _, which, *rest = pattern.split(".")
        if which in ("*", str(layer)) and (not rest or rest[0] == linear):
            chosen = name
    return chosen


def compact(kinds: Mapping[str, Sequence[str]]) -> tuple[str, tuple[tuple[str, str], ...]]:
    """(usual format, overrides) that give linear `kind` of layer i the format kinds[kind][i], with as few
    overrides as say it: the commonest format, then whole kinds that differ, then single layers."""
    usual = Counter(name for each in kinds.values() for name in each).most_common(1)[0][0]
    overrides = []
    for kind, each in kinds.items():
        common = Counter(each).most_common(1)[0][0]
        if common != usual:
            overrides.append((f"layers.*.{kind}", common))
        overrides += [(f"layers.{i}.{kind}", name) for i, name in enumerate(each) if name != common]
    return usual, tuple(overrides)


def check_pattern(pattern: str, linears: Sequence[str]) -> None:
    """Raise ConfigError for an override that does not name a layer or one of its `linears`."""
    if not re.fullmatch(rf"layers\.(\*|\d+)(\.({'|'.join(linears)}))?", pattern):
        rule = f"an override names layers.I, layers.I.{{{','.join(linears)}}} or layers.*.{{...}}"
        raise ConfigError(rule, repr(pattern), "layers.0.down")


def check_layer(pattern: str, layers: int) -> None:
    """Raise ConfigError for an override, checked already, of a layer that a model of `layers` has not."""
    layer = pattern.split(".")[1]
    if layer != "*" and int(layer) >= layers:
        raise ConfigError(f"layers are 0..{layers - 1}", pattern, f"layers.{layers - 1}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A format for every fused linear, the embedding, the head and the KV cache.

    `layers` applies to every fused linear of every layer unless `overrides` names it:
    "layers.7.down" (one), "layers.*.down" (that linear everywhere) or "layers.7" (the whole layer);
    the last matching override wins. method: one of METHODS.
    kv_cache: "int8", "bf16", "fp32" (not on the GPU), "fp8" (e4m3, on the GPU) or "int4" (reference runner
    only). A tied head is stored once for look-up and once for multiplication, so `embedding` and `head` may
    differ. sparsity: which weights of the linears are zero (core/sparsity.py), "" for none. structure: sizes
    of a smaller architecture, as (name, size) pairs (core/structure.py); both are made before weights are
    rounded.
    """

    name: str
    layers: str = "bf16"
    embedding: str = "bf16"
    head: str = "bf16"
    kv_cache: str = "bf16"
    method: str = "rtn"
    overrides: tuple[tuple[str, str], ...] = ()
    sparsity: str = ""
    structure: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        Structure.of(self.structure)
        if self.sparsity:
            parse_sparsity(self.sparsity)
        for name in (self.layers, self.embedding, self.head, *(f for _, f in self.overrides)):
            parse_format(name)
        for pattern, _ in self.overrides:
            check_pattern(pattern, ("qkv", "o", "gate_up", "down"))
        if self.kv_cache not in KV_FORMATS:
            known = ", ".join(KV_FORMATS)
            raise ConfigError(f"the KV cache is one of {known}", repr(self.kv_cache), "int8")
        if self.method not in METHODS:
            raise ConfigError(f"the method is one of {', '.join(METHODS)}", repr(self.method), "rtn")

    @property
    def needs_calibration(self) -> bool:
        """Whether the weights depend on calibration text."""
        cuts = any(name != "kv-heads" for name, _ in self.structure)
        scored = bool(self.sparsity) and parse_sparsity(self.sparsity).needs_calibration
        return self.method not in ("rtn", "rotate", "native") or cuts or scored

    @property
    def rotates(self) -> bool:
        """Whether the model is turned before it is rounded (compress/rotate.py)."""
        return self.method.startswith("rotate")

    @property
    def by_library(self) -> bool:
        """Whether linears are rounded apart from each other, by what compress/library.py keeps of a model."""
        return self.method.endswith("smooth-gptq")

    @property
    def reduces(self) -> bool:
        """Whether weights are taken away before any is rounded."""
        return bool(self.sparsity or self.structure)

    def child(self, spec: ModelSpec) -> ModelSpec:
        """The spec of what the recipe makes of a model of `spec`: its structure's."""
        return Structure.of(self.structure).child(spec) if self.structure else spec

    def format_of(self, layer: int, linear: str) -> Format:
        """Format of fused linear `linear` (qkv, o, gate_up, down) of layer `layer`."""
        return parse_format(overridden(self.layers, self.overrides, layer, linear))

    def check(self, spec: ModelSpec) -> None:
        """Raise ConfigError for a structure or a layer that a model of `spec` does not have, for groups that
        do not divide a width, listing every place, and for blocks of the file, which rotation gives up."""
        spec = self.child(spec)
        if self.rotates:
            names = {self.layers, self.embedding, self.head, *(fmt for _, fmt in self.overrides)}
            native = sorted(name for name in names if parse_format(name).is_native)
            if native:
                raise ConfigError(
                    "a rotated model has no blocks of the file left", ", ".join(native), "w8a8-g64"
                )
        for pattern, _ in self.overrides:
            check_layer(pattern, spec.num_layers)
        if self.sparsity:
            for linear, (_, k) in spec.linears().items():
                parse_sparsity(self.sparsity).check(linear, k)
        wrong = []
        for i in range(spec.num_layers):
            for linear, (_, k) in spec.linears().items():
                fmt = self.format_of(i, linear)
                if fmt.group and k % fmt.group:
                    wrong.append(f"layers.{i}.{linear}: {fmt.name} on width {k}")
        for place, name in (("embedding", self.embedding), ("head", self.head)):
            fmt = parse_format(name)
            if fmt.group and spec.hidden_size % fmt.group:
                wrong.append(f"{place}: {fmt.name} on width {spec.hidden_size}")
        if wrong:
            shown = ", ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
            raise ConfigError("groups must divide the width", shown, "a group of 32 or 64")

    def renamed(self, name: str) -> Recipe:
        return replace(self, name=name)


def uniform(name: str, kv_cache: str = "int8", head: str | None = None, method: str = "rtn") -> Recipe:
    """The recipe that uses one format everywhere; head and embedding stay at 8 bits where it has fewer."""
    fmt = parse_format(name)
    head = head or ("w8a8-g64" if fmt.bits < 8 and not fmt.is_native else name)
    return Recipe(name=name, layers=name, embedding=head, head=head, kv_cache=kv_cache, method=method)
