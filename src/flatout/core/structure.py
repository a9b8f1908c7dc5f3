"""Structure: a smaller architecture cut out of a larger one, said as the sizes that change.

    depth      layers that stay
    ffn        channels of the feed-forward network, in every layer
    groups     key/value heads that stay, each with the query heads that read it
    kv-heads   key/value heads that are left when neighbours are averaged into one (grouped-query conversion)

The child is an ordinary model of the same family. Which layers, channels and groups stay is measured
(compress/importance.py); what a cut computes is compress/structure.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flatout.core.spec import ModelSpec
from flatout.errors import ConfigError

SIZES = ("depth", "ffn", "groups", "kv-heads")


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """Sizes of the child; None leaves the parent's."""

    depth: int | None = None
    ffn: int | None = None
    groups: int | None = None
    kv_heads: int | None = None

    @classmethod
    def of(cls, sizes: tuple[tuple[str, int], ...]) -> Structure:
        """From (name, size) pairs. Raises ConfigError for a name that is none of SIZES, or given twice."""
        names = [name for name, _ in sizes]
        for name in names:
            if name not in SIZES or names.count(name) > 1:
                raise ConfigError(f"a structure gives each of {', '.join(SIZES)} once", name, "ffn=1024")
        return cls(**{name.replace("-", "_"): size for name, size in sizes})

    def child(self, spec: ModelSpec) -> ModelSpec:
        """The spec of the child of a model `spec`. Raises ConfigError for sizes it does not have."""
        for what, size, most in (
            ("depth", self.depth, spec.num_layers),
            ("ffn", self.ffn, spec.intermediate_size),
            ("groups", self.groups, spec.num_kv_heads),
            ("kv-heads", self.kv_heads, self.groups or spec.num_kv_heads),
        ):
            if size is not None and not 1 <= size <= most:
                raise ConfigError(
                    f"{what} lies between 1 and the model's {most}", str(size), f"{what}={most}"
                )
        groups = self.groups or spec.num_kv_heads
        kv_heads = self.kv_heads or groups
        if groups % kv_heads:
            raise ConfigError(
                "as many key/value heads are averaged into each", f"{kv_heads} of {groups}", "1"
            )
        return replace(
            spec,
            num_layers=self.depth or spec.num_layers,
            intermediate_size=self.ffn or spec.intermediate_size,
            num_heads=spec.num_heads // spec.num_kv_heads * groups,
            num_kv_heads=kv_heads,
        )
