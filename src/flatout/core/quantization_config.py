"""quantization_config of config.json <-> Recipe, in the form of the compressed-tensors library.

A recipe becomes config groups: the commonest format of the linears for the class "Linear", the modules that
differ by name. Read back, anyone's config gives a Scheme for every quantised module. The tensors themselves
are in core/compressed_tensors.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flatout.core.formats import Format, Recipe, parse_format
from flatout.core.spec import FUSED, ModelSpec
from flatout.errors import ModelFileError, UnsupportedModelError

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
MINIMUM = "flatout_minimum"
"""Weight argument of formats with a float minimum. The library accepts no argument it does not know, so
other tools refuse the folder; a quant_method of our own would make transformers skip quantisation and run
on random weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How one module is quantised. group 0 is one scale a row; activation is "int8" (dynamic) or
    "float"."""

    bits: int
    group: int
    symmetric: bool
    activation: str = "float"

    @property
    def format(self) -> Format:
        """The Format of this scheme. Raises ConfigError for one that flatout does not run."""
        group = f"-g{self.group}" if self.group else ""
        activation = "8" if self.activation == "int8" else "16"
        return parse_format(f"w{self.bits}a{activation}{group}{'' if self.symmetric else '-asym'}")


def module_formats(spec: ModelSpec, recipe: Recipe) -> dict[str, Format]:
    """Format of every module a recipe decides on, by Hugging Face name."""
    formats = {EMBEDDING: parse_format(recipe.embedding), HEAD: parse_format(recipe.head)}
    for i in range(spec.num_layers):
        for linear, parts in FUSED.items():
            for part in parts:
                formats[f"model.layers.{i}.{part}"] = recipe.format_of(i, linear)
    return formats


def cannot_express(spec: ModelSpec, recipe: Recipe) -> list[str]:
    """Names of the recipe's formats that compressed-tensors has no form for."""
    formats = module_formats(spec, recipe).values()
    return sorted({fmt.name for fmt in formats if fmt.zero == "minimum"})


def to_config(spec: ModelSpec, recipe: Recipe) -> dict[str, Any] | None:
    """`quantization_config` for config.json; None when every weight is a float.

    The commonest format of the linears is said once, for the class "Linear"; modules that differ are named.
    """
    formats = module_formats(spec, recipe)
    linears = {name: fmt for name, fmt in formats.items() if name != EMBEDDING}
    counts = Counter(fmt for fmt in linears.values() if fmt.is_integer)
    usual = counts.most_common(1)[0][0] if counts else None
    targets: dict[tuple[Format, bool], list[str]] = {}
    for name, fmt in formats.items():
        if fmt.is_integer:
            target = "Linear" if fmt == usual and name != EMBEDDING else name
            found = targets.setdefault((fmt, name == EMBEDDING), [])
            if target not in found:
                found.append(target)
    if not targets:
        return None
    # Named modules come before the class, so that readers that take the first match see the name first.
    ordered = sorted(targets.items(), key=lambda item: "Linear" in item[1])
    groups = {
        f"group_{i}": _group(fmt, names, is_table) for i, ((fmt, is_table), names) in enumerate(ordered)
    }
    stored = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": stored.pop() if len(stored) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name, fmt in linears.items() if not fmt.is_integer] if usual else [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(fmt: Format, targets: list[str], is_table: bool) -> dict[str, Any]:
    """One entry of config_groups. A table is looked up, not multiplied, so it has no activations."""
    strategy: dict[str, Any] = {"strategy": "group", "group_size": fmt.group}
    weights = {
        "num_bits": fmt.bits,
        "type": "int",
        "symmetric": fmt.zero == "symmetric",
        "dynamic": False,
        **(strategy if fmt.group else {"strategy": "channel"}),
        **({MINIMUM: True} if fmt.zero == "minimum" else {}),
    }
    activations = None
    if fmt.activation == "int8" and not is_table:
        grouped = {"strategy": "group", "group_size": fmt.activation_group}
        activations = {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "dynamic": True,
            **(grouped if fmt.activation_group else {"strategy": "token"}),
        }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": "pack-quantized" if is_packed(fmt, is_table) else "int-quantized",
    }


def is_packed(fmt: Format, is_table: bool) -> bool:
    """Whether a module of this format is stored pack-quantized, otherwise int-quantized (a byte a weight).

    transformers 5 creates modules without data and then loads neither a packed embedding nor packed zero
    points, so both are stored unpacked. Float minima only flatout reads, so they stay packed.
    """
    if fmt.zero == "minimum":
        return True
    return fmt.zero == "symmetric" and not is_table and (fmt.bits < 8 or fmt.activation != "int8")


def read_schemes(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, Scheme]:
    """The scheme of every quantised module among `modules` under a `quantization_config` of anyone's making.

    Raises UnsupportedModelError for schemes other than integer weights of 3, 4, 5, 6 or 8 bits by channel or
    group.
    """
    method = config.get("quant_method")
    if method != "compressed-tensors":
        raise UnsupportedModelError(
            "quantised folders are read in compressed-tensors form, as GPTQ or as AWQ",
            f"quant_method {method!r}",
            "the float model",
        )
    groups, ignore = config.get("config_groups"), config.get("ignore") or []
    if not isinstance(groups, dict) or not isinstance(ignore, list):
        raise ModelFileError(
            "config_groups is an object and ignore a list", type(groups).__name__, "check config.json"
        )
    by_target: dict[str, Any] = {}
    for group in groups.values():
        if not isinstance(group, dict) or not isinstance(group.get("targets"), list):
            raise ModelFileError(
                "every config group is an object with targets", str(group)[:80], "check config.json"
            )
        by_target |= {str(target): group for target in group["targets"]}
    schemes = {}
    for module in modules:
        if _best_match(module, [str(name) for name in ignore]) is None:
            target = _best_match(module, list(by_target))
            if target is not None:
                schemes[module] = _scheme(by_target[target], module)
    return schemes


def _best_match(module: str, targets: list[str]) -> str | None:
    """The most specific target that names `module`: its name, then a regular expression, then its class."""
    if module in targets:
        return module
    for target in sorted(targets):
        if target.startswith("re:"):
            try:
                if re.match(target[3:], module):
                    return target
            except re.error as error:
                raise ModelFileError(
                    "targets are names or regular expressions", target, str(error)
                ) from error
    kind = "Embedding" if module == EMBEDDING else "Linear"
    return kind if kind in targets else None


def _scheme(group: Mapping[str, Any], module: str) -> Scheme:
    weights, activations = group.get("weights"), group.get("input_activations")
    known = (
        isinstance(weights, dict)
        and weights.get("type", "int") == "int"
        and weights.get("num_bits") in (3, 4, 5, 6, 8)
        and weights.get("strategy") in ("channel", "group", None)
        and weights.get("actorder") in (None, "weight", "static")
        and not weights.get("dynamic")
        and (activations is None or (isinstance(activations, dict) and activations.get("dynamic") is True))
        and not group.get("output_activations")
    )
    if isinstance(weights, dict) and MINIMUM in weights:
        raise UnsupportedModelError(
            "weights with a float minimum are read from the model they were taken from", module, "that model"
        )
    if not known or not isinstance(weights, dict):
        raise UnsupportedModelError(
            "weights are integers of 3, 4, 5, 6 or 8 bits by channel or group, activations dynamic",
            f"{module}: {str(weights)[:120]}, {str(activations)[:120]}",
            "the float model",
        )
    size = weights.get("group_size")
    group_size = size if isinstance(size, int) and size > 0 and weights.get("strategy") != "channel" else 0
    return Scheme(
        bits=weights["num_bits"],
        group=group_size,
        symmetric=weights.get("symmetric", True) is True,
        activation="float" if activations is None else "int8",
    )
