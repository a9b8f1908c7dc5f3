"""A tokenizer as GGUF metadata: the inverse of core/gguf_tokenizer.py.

Byte-level BPE is written when its way of cutting text is one that GGUF has a name for; SentencePiece BPE with
scores in place of merges, minus the rank of the merge that makes a token. Whoever writes a file reads the
tokenizer back and compares (export/gguf.py), so one that this cannot say is refused instead of changed.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from flatout.core.files import shown
from flatout.core.gguf_tokenizer import PRE, pre_tokenizer_of
from flatout.core.gguf_write import Value
from flatout.core.tokenizer import Tokenizer
from flatout.errors import UnsupportedModelError

_SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_REMEDY = "--to folder"


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Value]:
    """tokenizer.* keys for a model of `vocab_size` tokens; ids without a token become unused ones.

    Raises UnsupportedModelError for a tokenizer that GGUF has no name for.
    """
    contents, config = tokenizer.state()
    model = contents["model"]
    if model.get("type") != "BPE":
        raise UnsupportedModelError("GGUF export writes BPE tokenizers", shown(model.get("type")), _REMEDY)
    known = tokenizer.vocabulary()
    tokens = [known.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    types = np.full(vocab_size, _NORMAL, np.int32)
    types[[i for i in range(vocab_size) if i not in known]] = _UNUSED
    for added in contents["added_tokens"]:
        types[added["id"]] = _CONTROL if added["special"] else _USER
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if _is_byte_level(contents["pre_tokenizer"]):
        metadata: dict[str, Value] = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _pre_name(contents),
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": merges,
        }
    else:
        if not model.get("byte_fallback"):
            raise UnsupportedModelError(
                "GGUF export writes byte-level BPE, and SentencePiece BPE with byte fallback",
                shown(contents["pre_tokenizer"]),
                _REMEDY,
            )
        for i, token in known.items():
            if token.startswith("<0x") and token.endswith(">") and len(token) == 6:
                types[i] = _BYTE
        unknown = model.get("unk_token")
        types[[i for i, token in known.items() if token == unknown]] = _UNKNOWN
        prefix = known[tokenizer.encode("a")[0]].startswith(_SPACE)
        metadata = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": _scores(tokens, merges),
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.add_space_prefix": prefix,
        }
    ids = {token: i for i, token in known.items()}
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        content = config.get(f"{key}_token")
        content = content.get("content") if isinstance(content, dict) else content
        if content in ids:
            metadata[f"tokenizer.ggml.{name}_token_id"] = ids[content]
    metadata["tokenizer.ggml.add_bos_token"] = tokenizer.adds_bos
    if tokenizer.chat_template:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def _steps(state: Any) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, without what leaves ids alone."""
    if not isinstance(state, dict):
        return []
    steps = state["pretokenizers"] if state.get("type") == "Sequence" else [state]
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


def _is_byte_level(state: Any) -> bool:
    return any(step.get("type") == "ByteLevel" for step in _steps(state))


def _pre_name(contents: dict[str, Any]) -> str:
    """tokenizer.ggml.pre of a byte-level tokenizer."""
    found = _steps(contents["pre_tokenizer"])
    for name in PRE:
        if found == _steps(json.loads(pre_tokenizer_of(name).__getstate__())):
            return name
    raise UnsupportedModelError(
        f"GGUF export knows how {', '.join(PRE)} cut text",
        shown(contents["pre_tokenizer"], 200),
        _REMEDY,
    )


def _scores(tokens: list[str], merges: list[str]) -> np.ndarray:
    """Minus the rank of the first merge that makes each token; tokens that no merge makes come last."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), i)
    return np.array([-float(rank.get(token, len(merges))) for token in tokens], np.float32)
