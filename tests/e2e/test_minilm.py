"""The built-in encoder against transformers: its vectors, and how far each format moves them."""

from __future__ import annotations

import numpy as np
import pytest

import flatout
from flatout.core.sources import resolve
from flatout.data.passages import load_passages
from flatout.engine.encoder import Encoder

TEXTS = [passage.text[: 40 + 90 * i] for i, passage in enumerate(load_passages("validation")[:16])]


@pytest.fixture(scope="module")
def theirs() -> np.ndarray:
    """The model card's own code: mean over tokens, then length 1."""
    import torch
    from transformers import AutoTokenizer, BertModel

    folder = resolve("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertModel.from_pretrained(folder, dtype=torch.float32).eval()
    vectors = []
    for text in TEXTS:
        batch = tokenizer([text], truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            mean = model(**batch).last_hidden_state[0].mean(0)
        vectors.append((mean / mean.norm()).numpy())
    return np.stack(vectors)


# Least cosine similarity with the original's vectors. fp32 keeps keys and values as bf16.
@pytest.mark.parametrize(
    ("name", "least"), [("fp32", 0.99999), ("bf16", 0.9998), ("w8a16", 0.997), ("w8a8", 0.99)]
)
def test_vectors_are_the_originals(name: str, least: float, theirs: np.ndarray) -> None:
    encoder = flatout.load("minilm", format=name)
    assert isinstance(encoder, Encoder)
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == theirs.shape == (len(TEXTS), 384)
    similarity = (vectors * theirs).sum(axis=1)
    assert similarity.min() > least
    if name.startswith("w8"):
        alone = np.stack([encoder.encode(text) for text in TEXTS])
        np.testing.assert_array_equal(vectors, alone)
    assert max(len(s) for s in encoder.token_embeddings(TEXTS)) == 256


def test_similar_sentences_are_closer() -> None:
    encoder = flatout.load("minilm", format="w8a8", threads=1)
    ships, boats, bread = encoder.encode(
        [
            "The ship left the harbour at dawn.",
            "A boat sailed out of port early.",
            "Bread needs flour and yeast.",
        ]
    )
    assert ships @ boats > 0.4 > ships @ bread
