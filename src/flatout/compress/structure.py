"""Cutting a smaller architecture out of a model: layers, feed-forward channels, heads by key/value group,
vocabulary; and grouped-query conversion.

    channels C of a layer    y = down[:, C] (act(gate[C] x) * up[C] x)      exactly the sum over C alone
    groups                   q rows of their query heads, k and v rows, o columns: the sum over those heads
    layers                   a residual layer left out adds nothing
    kv-heads                 k and v of neighbouring groups replaced by their mean; training repairs the rest
                             (Ainslie et al., "GQA", 2023, arXiv 2305.13245)

What to cut follows Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation"
(Minitron), 2024, arXiv 2407.14679: rank by activations (compress/importance.py), cut, distil. Trade-off:
every kernel and every other program runs the child as it is and gains in full, but a child that was not
trained again has lost far more than number formats lose.

All layers keep the same sizes, as an ordinary config.json says it; which channels and groups stay differs by
layer. Legend as in core/spec.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from flatout.compress.importance import Importance, measure
from flatout.core.fuse import Source
from flatout.core.quantized import QuantizedTensor
from flatout.core.spec import ModelSpec
from flatout.core.structure import Structure
from flatout.errors import ConfigError
from flatout.models.llama import gather_rows

_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Child:
    """A Source cut out of `original`.

    layers: the parent's number of each layer. channels, groups: what each of these layers keeps, int64 arrays
    in rising order. pooled: key/value heads averaged into one. tokens: the parent's id of each token, None
    for all.
    """

    spec: ModelSpec
    original: Source = field(repr=False)
    layers: tuple[int, ...]
    channels: tuple[np.ndarray, ...]
    groups: tuple[np.ndarray, ...]
    pooled: int = 1
    tokens: np.ndarray | None = None

    def array(self, name: str) -> np.ndarray:
        parent, rows, columns = self._cut(name)
        array = self.original.array(parent)
        if rows is not None:
            array = array[rows]
        if columns is not None:
            array = array[:, columns]
        if self.pooled > 1 and (".k_proj." in name or ".v_proj." in name):
            heads = array.reshape(-1, self.pooled, self.spec.head_dim, *array.shape[1:])
            array = heads.mean(axis=1).reshape(-1, *array.shape[1:])
        return np.ascontiguousarray(array)

    def native(self, name: str) -> QuantizedTensor | None:
        """As stored in the parent's file where only whole rows go: those are the same numbers."""
        parent, rows, columns = self._cut(name)
        pooled = self.pooled > 1 and (".k_proj." in name or ".v_proj." in name)
        found = None if columns is not None or pooled else self.original.native(parent)
        return found if found is None or rows is None else gather_rows(found, rows)

    def _cut(self, name: str) -> tuple[str, np.ndarray | None, np.ndarray | None]:
        """(the parent's name, rows, columns) of the child's weight; None keeps all."""
        if name in _EMBEDDINGS:
            return name, self.tokens, None
        if ".layers." not in name:
            return name, None, None
        number, rest = name.removeprefix("model.layers.").split(".", 1)
        index = int(number)
        parent = f"model.layers.{self.layers[index]}.{rest}"
        if rest.startswith(("mlp.gate_proj", "mlp.up_proj")):
            return parent, self._some_channels(index), None
        if rest.startswith("mlp.down_proj"):
            return parent, None, self._some_channels(index)
        if rest.startswith("self_attn.q_proj"):
            return parent, self._of_groups(index, self._queries), None
        if rest.startswith("self_attn.o_proj"):
            return parent, None, self._of_groups(index, self._queries)
        if rest.startswith(("self_attn.k_proj", "self_attn.v_proj")):
            return parent, self._of_groups(index, 1), None
        return parent, None, None

    @property
    def _queries(self) -> int:
        """Query heads of a group of the parent."""
        return self.original.spec.num_heads // self.original.spec.num_kv_heads

    def _some_channels(self, index: int) -> np.ndarray | None:
        kept = self.channels[index]
        return None if len(kept) == self.original.spec.intermediate_size else kept

    def _of_groups(self, index: int, heads: int) -> np.ndarray | None:
        """Rows of `heads` heads of each group that stays."""
        kept = self.groups[index]
        if len(kept) == self.original.spec.num_kv_heads:
            return None
        width = heads * self.spec.head_dim
        rows: np.ndarray = (kept[:, None] * width + np.arange(width)).reshape(-1)
        return rows


def cut(source: Source, structure: Structure, importance: Importance) -> Child:
    """The child of `source`: its most important layers, channels and groups. Raises ConfigError for sizes
    that the model does not have, and for an importance that is another model's."""
    spec = source.spec
    child = structure.child(spec)
    if importance.channels.shape != (spec.num_layers, spec.intermediate_size):
        raise ConfigError(
            "importance is measured on the model that is cut",
            str(importance.channels.shape),
            "measure(source)",
        )
    layers = most(importance.layers, child.num_layers)
    groups = structure.groups or spec.num_kv_heads
    return Child(
        spec=child,
        original=source,
        layers=tuple(int(i) for i in layers),
        channels=tuple(most(importance.channels[i], child.intermediate_size) for i in layers),
        groups=tuple(most(importance.groups[i], groups) for i in layers),
        pooled=groups // child.num_kv_heads,
    )


def restructured(source: Source, structure: Structure, documents: Sequence[np.ndarray]) -> Child:
    """`cut` by an importance measured on `documents`: token ids, each a sequence of its own. A structure that
    only averages heads needs none."""
    structure.child(source.spec)  # refuses before the text passes through
    if structure.depth is None and structure.ffn is None and structure.groups is None:
        return cut(source, structure, Importance.equal(source.spec))
    return cut(source, structure, measure(source, documents))


def with_tokens(source: Source, tokens: np.ndarray) -> Child:
    """`source` with the embedding and head rows of `tokens`, in that order (compress/vocabulary.py chooses
    them and trims the tokenizer to match). Begin and end of text keep their meaning; ends that are gone are
    dropped.

    Raises ConfigError for ids that are not the model's or are given twice, and when begin of text is gone.
    """
    spec = source.spec
    ids = np.asarray(tokens, dtype=np.int64)
    if not len(ids) or len(np.unique(ids)) != len(ids) or not 0 <= ids.min() <= ids.max() < spec.vocab_size:
        raise ConfigError(
            "tokens are ids of the model, each once", str(ids[:8]), "kept_tokens(tokenizer, texts)"
        )
    new = {int(old): i for i, old in enumerate(ids)}
    ends = tuple(new[i] for i in spec.eos_token_ids if i in new)
    begin = spec.bos_token_id
    if (begin is not None and begin < spec.vocab_size and begin not in new) or (
        spec.eos_token_ids and not ends
    ):
        raise ConfigError("begin and end of text stay", "not among the tokens kept", "keep special tokens")
    child = replace(
        spec,
        vocab_size=len(ids),
        bos_token_id=None if begin is None else new.get(begin),
        eos_token_ids=ends,
    )
    every = Importance.equal(spec)
    whole = cut(source, Structure(), every)
    return replace(whole, spec=child, tokens=ids)


def most(values: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` largest of (n,) are, in rising order; of equals the first."""
    return np.sort(np.argsort(-values, kind="stable")[:count])
