"""A smaller vocabulary: the tokens that a text uses, and a tokenizer that still cuts that text as before.

BPE joins two pieces at a time, always by the first applicable merge of its list. If every piece that arises
on the way to a text's tokens is kept, with the merges that make it in their order, each step finds the same
first merge among fewer, so the text is cut the same. Kept are therefore, beside the tokens met, the special
tokens, all single characters and bytes (any text still round-trips), and, again and again, both parts of
every merge that makes a kept token. Text that uses a token which is gone is cut finer and means the same.

WordPiece takes the longest token that fits again and again, which finds the same tokens among fewer; single
characters stay, alone and as continuations, so that no more words become unknown than before.

Trade-off: embedding and head shrink in proportion (21 % of SmolLM2-135M's parameters are its embedding) and
nothing else changes; text in other languages or of other kinds than the one given takes more tokens.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from flatout.core.files import shown
from flatout.core.tokenizer import Tokenizer
from flatout.errors import ConfigError, UnsupportedModelError


def kept_tokens(
    tokenizer: Tokenizer, texts: Iterable[str], most: int | None = None, multiple: int = 64
) -> np.ndarray:
    """Ids to keep, rising, int64: what `texts` use and needs to be made, most frequent first up to `most`
    tokens, and then as many others, lowest ids first, as make the number a multiple of `multiple`.

    Raises ConfigError when `most` cannot hold what any text needs, and UnsupportedModelError for a tokenizer
    that is neither BPE nor WordPiece.
    """
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(tokenizer.encode(text))
    return kept_of(tokenizer.state()[0], counts, most, multiple)


def kept_of(
    contents: Mapping[str, Any], counts: Counter[int], most: int | None = None, multiple: int = 64
) -> np.ndarray:
    """As `kept_tokens`, from the contents of tokenizer.json and how often each token was met."""
    parts = _parts(contents)
    known = _ids(contents)
    unknown = contents["model"].get("unk_token")
    kept = {added["id"] for added in contents["added_tokens"]} | set(_around(contents))
    kept |= {i for token, i in known.items() if i not in parts or token == unknown}
    least = len(kept)
    limit = len(known) if most is None else most
    if limit < least:
        raise ConfigError(
            f"special tokens, characters and bytes are {least} tokens", f"at most {limit}", f"{least} or more"
        )
    for token, _ in counts.most_common():
        wanted = _closure(token, parts, kept)
        if len(kept) + len(wanted) <= limit:
            kept |= wanted
    room = min(limit, -(-len(kept) // multiple) * multiple)
    for token in sorted(set(known.values()) - kept):
        wanted = _closure(token, parts, kept)
        if len(kept) + len(wanted) <= room:
            kept |= wanted
    return np.array(sorted(kept), dtype=np.int64)


def _closure(token: int, parts: Mapping[int, set[int]], kept: set[int]) -> set[int]:
    """`token` and everything that it is made of which is not kept yet."""
    wanted: set[int] = set()
    queue = [token]
    while queue:
        one = queue.pop()
        if one not in kept and one not in wanted:
            wanted.add(one)
            queue += parts.get(one, ())
    return wanted


def _ids(contents: Mapping[str, Any]) -> dict[str, int]:
    """The id of every token, added ones included."""
    ids: dict[str, int] = dict(contents["model"]["vocab"])
    return ids | {token["content"]: token["id"] for token in contents["added_tokens"]}


def _parts(contents: Mapping[str, Any]) -> dict[int, set[int]]:
    """Tokens that may go, each with what it is made of: of BPE, the parts of all merges that make it; of
    WordPiece, nothing."""
    model = contents["model"]
    ids: dict[str, int] = model["vocab"]
    if model.get("type") == "WordPiece":
        prefix = model["continuing_subword_prefix"]
        return {i: set() for token, i in ids.items() if len(token.removeprefix(prefix)) > 1}
    if model.get("type") != "BPE":
        raise UnsupportedModelError(
            "a vocabulary is trimmed for BPE and WordPiece", shown(model.get("type")), "such a model"
        )
    parts: dict[int, set[int]] = {}
    for left, right in _pairs(model["merges"]):
        parts.setdefault(ids[left + right], set()).update((ids[left], ids[right]))
    return parts


def _pairs(merges: Iterable[Any]) -> list[tuple[str, str]]:
    """Merges as pairs; older files have them as "left right"."""
    return [(m[0], m[1]) for m in (m.split(" ", 1) if isinstance(m, str) else m for m in merges)]


def trimmed(tokenizer: Tokenizer, tokens: np.ndarray) -> Tokenizer:
    """The tokenizer of the tokens kept, whose new ids are their places in `tokens`; errors as of
    `trimmed_contents`."""
    contents, config = tokenizer.state()
    return Tokenizer.from_state(trimmed_contents(contents, tokens), config)


def trimmed_contents(contents: Mapping[str, Any], tokens: np.ndarray) -> dict[str, Any]:
    """The contents of tokenizer.json with the tokens kept only.

    Raises ConfigError for a set that is not closed: a special token, or a part of a kept token, is missing.
    """
    new = {int(old): i for i, old in enumerate(tokens)}
    small: dict[str, Any] = copy.deepcopy(dict(contents))
    missing = [added["content"] for added in small["added_tokens"] if added["id"] not in new]
    if missing:
        raise ConfigError("special tokens stay", shown(missing), "kept_tokens(tokenizer, texts)")
    model = small["model"]
    ids: dict[str, int] = model["vocab"]
    for token, made_of in _parts(contents).items():
        if token in new and not made_of <= set(new):
            name = next(name for name, i in ids.items() if i == token)
            raise ConfigError("the parts of a kept token stay", shown(name), "kept_tokens(tokenizer, texts)")
    model["vocab"] = {token: new[i] for token, i in ids.items() if i in new}
    if "merges" in model:
        model["merges"] = [
            [left, right]
            for left, right in _pairs(model["merges"])
            if all(ids[token] in new for token in (left, right, left + right))
        ]
    for added in small["added_tokens"]:
        added["id"] = new[added["id"]]
    _renumber(small.get("post_processor"), new)
    if small.get("padding"):
        small["padding"]["pad_id"] = new[small["padding"]["pad_id"]]
    return small


def _around(contents: Mapping[str, Any]) -> list[int]:
    """Ids that padding and post-processing put around a text."""
    found = [contents["padding"]["pad_id"]] if contents.get("padding") else []
    for step in _processors(contents.get("post_processor")):
        if step["type"] == "TemplateProcessing":
            found += [i for special in step["special_tokens"].values() for i in special["ids"]]
        if step["type"] in ("BertProcessing", "RobertaProcessing"):
            found += [step["sep"][1], step["cls"][1]]
    return found


def _processors(processor: Any) -> list[dict[str, Any]]:
    return processor.get("processors", [processor]) if isinstance(processor, dict) else []


def _renumber(processor: Any, new: Mapping[int, int]) -> None:
    """New ids where special tokens are put around a text."""
    for step in _processors(processor):
        if step["type"] == "TemplateProcessing":
            for special in step["special_tokens"].values():
                special["ids"] = [new[i] for i in special["ids"]]
        if step["type"] in ("BertProcessing", "RobertaProcessing"):
            for end in ("sep", "cls"):
                step[end] = [step[end][0], new[step[end][1]]]
