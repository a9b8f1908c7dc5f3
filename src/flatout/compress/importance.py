"""What each layer, feed-forward channel and head group adds, measured on text.

    channel f      mean over tokens of x[f]^2 * |down[:, f]|^2: the squared size of what it adds to a token
    group g        mean over tokens of |o[:, g] x[g]|^2, over the columns of its query heads
    layer          1 - mean cosine between what enters and what leaves it (block influence; Men et al.,
                   "ShortGPT", 2024, arXiv 2403.03853)

Scores rank units of one kind; they do not compare kinds, which compress/choice.py does.

Trade-off: one pass of the text and no gradients; each unit is judged as if all others stayed, so two that do
the same both count, although one could go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flatout.compress.inputs import linear_inputs
from flatout.compress.prune import check_text
from flatout.core.fuse import Source
from flatout.core.spec import ModelSpec
from flatout.kernels.linear import as_tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Importance:
    """float64 arrays: channels (L, F), groups (L, G), layers (L,); comparable within a row of the first two
    and within the last."""

    channels: np.ndarray
    groups: np.ndarray
    layers: np.ndarray

    @classmethod
    def equal(cls, spec: ModelSpec) -> Importance:
        """Everything alike, for cuts that leave nothing out."""
        return cls(
            channels=np.ones((spec.num_layers, spec.intermediate_size)),
            groups=np.ones((spec.num_layers, spec.num_kv_heads)),
            layers=np.ones(spec.num_layers),
        )


def measure(source: Source, documents: Sequence[np.ndarray]) -> Importance:
    """The Importance of `source` on `documents`: token ids, each a sequence of its own. Memory as of
    `linear_inputs`. Errors as of `prune.check_text`."""
    documents = [document for document in documents if len(document)]
    check_text(source, documents)
    spec = source.spec
    found = Importance(
        channels=np.empty((spec.num_layers, spec.intermediate_size)),
        groups=np.empty((spec.num_layers, spec.num_kv_heads)),
        layers=np.empty(spec.num_layers),
    )
    entered: list[Tensor] = []  # the state before the layer that runs

    def see(name: str, inputs: Tensor, hidden: Tensor, weight: np.ndarray) -> None:
        starts_layer = name == "head" or name.endswith(".qkv")
        if starts_layer and entered:
            layer = spec.num_layers - 1 if name == "head" else int(name.split(".")[1]) - 1
            cosine = torch.nn.functional.cosine_similarity(entered[0], hidden, dim=1)
            found.layers[layer] = 1 - float(cosine.double().mean())
        if starts_layer:
            entered[:] = [hidden]
        if name.endswith(".down"):
            energy = inputs.square().mean(dim=0).double().numpy()
            found.channels[int(name.split(".")[1])] = energy * (weight.astype(np.float64) ** 2).sum(axis=0)
        if name.endswith(".o"):
            read = inputs.reshape(len(inputs), spec.num_kv_heads, -1)
            columns = as_tensor(weight).reshape(len(weight), spec.num_kv_heads, -1)
            for group in range(spec.num_kv_heads):
                added = read[:, group] @ columns[:, group].T
                size = float(added.square().sum(dim=1).double().mean())
                found.groups[int(name.split(".")[1]), group] = size

    linear_inputs(source, documents, see)
    return found
