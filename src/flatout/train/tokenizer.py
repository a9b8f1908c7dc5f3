"""A tokenizer of our own: byte-level BPE (Sennrich et al., 2016; Radford et al., 2019) learned from text."""

from __future__ import annotations

from collections.abc import Iterable

import tokenizers

from flatout.core.tokenizer import Tokenizer
from flatout.errors import ConfigError

END = "<|endoftext|>"
"""Stands after every document; id 0."""


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of `vocab_size` ids learned from `documents`: `END`, the 256 bytes and merges.

    Raises ConfigError when there are fewer ids than that, or too little text for so many.
    """
    if vocab_size < 257:
        raise ConfigError("a byte-level vocabulary has at least 257 ids", str(vocab_size), "vocab_size=8192")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(documents, trainer)
    found = inner.get_vocab_size()
    if found != vocab_size:
        raise ConfigError(
            f"the text must have enough words for {vocab_size} ids",
            str(found),
            f"vocab_size={found}, more text",
        )
    return Tokenizer(inner, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END})
