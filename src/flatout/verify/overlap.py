"""Does judged text also stand in text that was used before? N-gram overlap of words.

Two unrelated English books share almost no eight consecutive words; a copied passage shares nearly all of
them, and still about a fifth when every tenth word was changed. (Contamination checks of large models use 8
to 13 words: Brown et al. 2020, appendix C; Chowdhery et al. 2022, section 8.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from flatout.data.passages import Passage
from flatout.errors import EvidenceError

WORDS = 8
LIMIT = 0.1
"""Largest share of a passage's n-grams that may stand elsewhere: a quotation passes, a copy does not."""

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(f"[{_IDEOGRAPHS}]|[^\\W_{_IDEOGRAPHS}]+")


def ngrams(text: str, words: int = WORDS) -> set[str]:
    """The n-grams of lower-cased words (ideographs count one each); a shorter text is one n-gram."""
    found = _WORD.findall(text.lower())
    if not found:
        return set()
    return {" ".join(found[i : i + words]) for i in range(max(1, len(found) - words + 1))}


def overlaps(judged: Sequence[str], used: Iterable[str], words: int = WORDS) -> list[float]:
    """For each judged text, the share of its n-grams that stand in any used text."""
    grams = [ngrams(text, words) for text in judged]
    wanted = set().union(*grams)
    seen: set[str] = set()
    for text in used:
        seen |= ngrams(text, words) & wanted
    return [len(own & seen) / len(own) if own else 0.0 for own in grams]


def refuse_leaks(holdout: Sequence[Passage], used: Sequence[Passage]) -> None:
    """Raise EvidenceError if a hold-out passage also stands in the calibration or validation text."""
    shares = overlaps([p.text for p in holdout], (p.text for p in used))
    leaked = [(share, p.id) for share, p in zip(shares, holdout, strict=True) if share > LIMIT]
    if leaked:
        share, worst = max(leaked)
        raise EvidenceError(
            "no hold-out passage may stand in calibration or validation text",
            f"{len(leaked)} of {len(holdout)} do, {worst} with {share:.0%} of its {WORDS}-word sequences",
            "disjoint text",
        )
