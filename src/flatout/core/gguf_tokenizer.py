"""The tokenizer in a GGUF file's metadata, rebuilt as a `tokenizers` pipeline.

tokenizer.ggml.model "gpt2" is byte-level BPE: tokenizer.ggml.pre names how text is cut before merging
(`PRE`). "llama" is SentencePiece BPE: scores stand in for merges, spaces are U+2581, unknown characters fall
back to bytes. Token types: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from flatout.core.files import corrupt, shown
from flatout.core.gguf import GgufFile, Strings
from flatout.errors import UnsupportedModelError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

PRE = ("gpt-2", "smollm", "llama-bpe", "qwen2")
_SAME_AS = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}

_MAX_TOKEN = 1024
_SPACE = "\u2581"


def build_from_gguf(file: GgufFile) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The tokenizer and the matching tokenizer_config.json.

    Raises ModelFileError when the file has none or it is inconsistent, UnsupportedModelError for other kinds.
    """
    metadata, where = file.metadata, shown(str(file.path), 300)
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _strings(file, "tokenizer.ggml.tokens")
    if any(len(token) > _MAX_TOKEN for token in tokens):
        raise corrupt(file.path, f"tokens have at most {_MAX_TOKEN} characters", max(tokens, key=len))
    types = _types(file, len(tokens))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise corrupt(file.path, "tokens must differ", twice)
    if not isinstance(kind, str) or kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(
            "tokenizer.ggml.model must be gpt2 or llama",
            f"{shown(kind)} in {where}",
            "the safetensors folder",
        )
    if kind == "gpt2":
        inner = _byte_level(file, vocabulary)
    else:
        inner = _sentence_piece(file, tokens, types, vocabulary)
    for flag, special in ((3, True), (2, True), (4, False)):
        # The vocabulary holds them already: adding only stops the text from being cut inside them.
        added = [
            tokenizers.AddedToken(tokens[i], special=special, normalized=False)
            for i in np.flatnonzero(types == flag)
            if tokens[i]
        ]
        inner.add_special_tokens(added) if special else inner.add_tokens(added)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        i = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(i) is int and 0 <= i < len(tokens):
            config[f"{name}_token"] = tokens[i]
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if type(length) is int:
        config["model_max_length"] = length
    if _adds_bos(metadata, kind) and "bos_token" in config:
        bos = config["bos_token"]
        inner.post_processor = _bos_in_front(file, bos, vocabulary[bos])
    return inner, config


def _strings(file: GgufFile, key: str) -> list[str]:
    value = file.metadata.get(key)
    if value is None:
        raise corrupt(
            file.path, f"the file must hold a tokenizer ({key})", "none", "a GGUF file with its tokenizer"
        )
    if not isinstance(value, Strings):
        raise corrupt(file.path, f"{key} must be strings", value)
    return list(value)


def _types(file: GgufFile, count: int) -> np.ndarray:
    types = file.metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return np.ones(count, np.int32)
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or types.size != count:
        raise corrupt(file.path, f"tokenizer.ggml.token_type must be {count} integers", types)
    return types


def pre_tokenizer_of(name: str) -> pre_tokenizers.PreTokenizer:
    """How the byte-level tokenizer called `name` (one of PRE) cuts text before merging."""
    if name == "smollm":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if name == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    pattern = tokenizers.Regex(_LLAMA3 if name == "llama-bpe" else _QWEN2)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_level(file: GgufFile, vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    pre = file.metadata.get("tokenizer.ggml.pre")
    name = _SAME_AS.get(pre, pre) if isinstance(pre, str) else None
    if name not in PRE:
        raise UnsupportedModelError(
            f"tokenizer.ggml.pre must be one of {', '.join((*PRE, *_SAME_AS))}",
            f"{shown(pre)} in {shown(str(file.path), 300)}",
            "the safetensors folder of this model",
        )
    # "Ġ t": neither part holds a space, because byte-level BPE writes it as Ġ.
    merges = [merge.partition(" ")[::2] for merge in _strings(file, "tokenizer.ggml.merges")]
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=name == "llama-bpe")
    except Exception as error:  # it has no kinds; looking at each merge first takes as long as this
        for left, right in merges:
            if not (left in vocabulary and right in vocabulary and left + right in vocabulary):
                raise corrupt(
                    file.path, "a merge joins two tokens into a third", f"{left} {right}"
                ) from error
        raise
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizer_of(name)
    if name == "qwen2":
        inner.normalizer = normalizers.NFC()
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentence_piece(
    file: GgufFile, tokens: list[str], types: np.ndarray, vocabulary: dict[str, int]
) -> tokenizers.Tokenizer:
    scores = file.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or scores.dtype.kind != "f" or scores.size != len(tokens):
        raise corrupt(file.path, f"tokenizer.ggml.scores must be {len(tokens)} floats", scores)
    unknown = [tokens[i] for i in np.flatnonzero(types == 2)]
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges_from_scores(tokens, types, scores, vocabulary),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True) is True
    replace = normalizers.Replace(" ", _SPACE)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return inner


def _merges_from_scores(
    tokens: list[str], types: np.ndarray, scores: np.ndarray, vocabulary: dict[str, int]
) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, best score of the result first, then lowest ids of the
    parts."""
    merges: list[tuple[str, str]] = []
    normal = np.flatnonzero((types == 1) | (types == 4))
    for i in normal[np.argsort(-scores[normal], kind="stable")]:
        token = tokens[i]
        parts = [
            (vocabulary[token[:cut]], vocabulary[token[cut:]])
            for cut in range(1, len(token))
            if token[:cut] in vocabulary and token[cut:] in vocabulary
        ]
        merges += [(tokens[left], tokens[right]) for left, right in sorted(parts)]
    return merges


def _adds_bos(metadata: dict[str, Any], kind: str) -> bool:
    stated = metadata.get("tokenizer.ggml.add_bos_token")
    if isinstance(stated, bool):
        return stated
    pre = metadata.get("tokenizer.ggml.pre")
    return kind == "llama" or (isinstance(pre, str) and _SAME_AS.get(pre, pre) == "llama-bpe")


def _bos_in_front(file: GgufFile, bos: str, i: int) -> Any:
    """Post-processing that puts `bos` in front of every text, for those who load the saved tokenizer."""
    if any(character.isspace() or character in "$:" for character in bos):
        raise corrupt(file.path, "the begin-of-text token must not hold spaces, $ or colons", bos)
    return processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, i)]
    )
