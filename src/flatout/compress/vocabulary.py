"""A smaller vocabulary: the tokens that a text uses, and a tokenizer that still cuts that text as before.

BPE joins two pieces at a time, always by the first applicable merge of its list. If every piece that arises
on the way to a text's tokens is kept, with the merges that make it in their order, each step finds the same
first merge among fewer, so the text is cut the same. Kept are therefore, beside the tokens met, the special
tokens, all single characters and bytes (any text still round-trips), and, again and again, both parts of
every merge that makes a kept token. Text that uses a token which is gone is cut finer and means the same.

WordPiece takes the longest token that fits, so that keeping the tokens met and single characters suffices.

Trade-off: embedding and head shrink in proportion (21 % of SmolLM2-135M's parameters are its embedding) and
nothing else changes; text in other languages or of other kinds than the one given takes more tokens.
"""

from __future__ import annotations

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
    that is not BPE.
    """
    contents, _ = tokenizer.state()
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(tokenizer.encode(text))
    parts = _parts(contents)
    known = tokenizer.vocabulary()
    kept = {added["id"] for added in contents["added_tokens"]}
    kept |= {i for i, token in known.items() if i not in parts or token == contents["model"].get("unk_token")}
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
    for token in sorted(set(known) - kept):
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


def _parts(contents: Mapping[str, Any]) -> dict[int, set[int]]:
    """For each token that merges make, the parts of all of them."""
    model = contents["model"]
    if model.get("type") != "BPE":
        raise UnsupportedModelError(
            "a vocabulary is trimmed for BPE", shown(model.get("type")), "a BPE model"
        )
    ids: dict[str, int] = model["vocab"]
    parts: dict[int, set[int]] = {}
    for left, right in _pairs(model["merges"]):
        parts.setdefault(ids[left + right], set()).update((ids[left], ids[right]))
    return parts


def _pairs(merges: Iterable[Any]) -> list[tuple[str, str]]:
    """Merges as pairs; older files have them as "left right"."""
    return [(m[0], m[1]) for m in (m.split(" ", 1) if isinstance(m, str) else m for m in merges)]


def trimmed(tokenizer: Tokenizer, tokens: np.ndarray) -> Tokenizer:
    """The tokenizer of the tokens kept, whose new ids are their places in `tokens`.

    Raises ConfigError for a set that is not closed: a special token, or a part of a kept token, is missing.
    """
    contents, config = tokenizer.state()
    new = {int(old): i for i, old in enumerate(tokens)}
    model = contents["model"]
    missing = [added["content"] for added in contents["added_tokens"] if added["id"] not in new]
    if missing:
        raise ConfigError("special tokens stay", shown(missing), "kept_tokens(tokenizer, texts)")
    for token, made_of in _parts(contents).items():
        if token in new and not made_of <= set(new):
            raise ConfigError(
                "the parts of a kept token stay",
                tokenizer.vocabulary()[token],
                "kept_tokens(tokenizer, texts)",
            )
    ids: dict[str, int] = model["vocab"]
    model["vocab"] = {token: new[i] for token, i in ids.items() if i in new}
    model["merges"] = [
        [left, right]
        for left, right in _pairs(model["merges"])
        if all(ids[token] in new for token in (left, right, left + right))
    ]
    for added in contents["added_tokens"]:
        added["id"] = new[added["id"]]
    _renumber(contents.get("post_processor"), new)
    return Tokenizer.from_state(contents, config)


def _renumber(processor: Any, new: Mapping[int, int]) -> None:
    """New ids in the templates that put special tokens around a text."""
    if not isinstance(processor, dict):
        return
    for step in processor.get("processors", [processor]):
        for special in (
            (step.get("special_tokens") or {}).values() if step.get("type") == "TemplateProcessing" else ()
        ):
            special["ids"] = [new[i] for i in special["ids"]]
