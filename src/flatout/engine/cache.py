"""Pages of the KV cache: who holds which page, and which pages can be taken over by a sequence with the same
prefix.

A page is in exactly one of three places: *held* by one or more sequences (a count of holders), *cached* (no
holder, but its contents are known and can be taken over until the page is needed), or *blank* (no holder, no
known contents). Blank pages are handed out first, the one freed last before others; then cached pages, the
least recently used first.

Only full pages are ever shared, and a full page is never written again, so sharing needs no copying. Contents
are named by a chained digest: digest(page j) = blake2b(digest(page j - 1), tokens of page j), 128 bits, so
that equal names mean equal prefixes even for inputs chosen by an attacker.
"""

from __future__ import annotations

import hashlib

import numpy as np

from flatout.errors import ConfigError

_ROOT = b"\0" * 16


def extend_digests(digests: list[bytes], tokens: list[int], page_size: int) -> None:
    """Append to `digests`, which names the first full pages of `tokens`, the digests of the full pages still
    missing."""
    for j in range(len(digests), len(tokens) // page_size):
        parent = digests[-1] if digests else _ROOT
        page = np.array(tokens[j * page_size : (j + 1) * page_size], dtype=np.int32)
        digests.append(hashlib.blake2b(parent + page.tobytes(), digest_size=16).digest())


class PagePool:
    """Counts holders of num_pages pages. Not thread-safe; one scheduler owns it."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ConfigError("the KV cache needs at least one page", str(num_pages), "a larger cache")
        self.num_pages = num_pages
        self._holders = [0] * num_pages
        self._digest: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._blank = list(range(num_pages - 1, -1, -1))
        self._cached: dict[int, None] = {}  # insertion order is the order of eviction

    @property
    def free(self) -> int:
        """Pages that `take` could hand out."""
        return len(self._blank) + len(self._cached)

    @property
    def held(self) -> int:
        return self.num_pages - self.free

    def take(self) -> int:
        """A page with one holder and undefined contents. Call only while `free` is positive."""
        if self._blank:
            page = self._blank.pop()
        else:
            page = next(iter(self._cached))
            del self._cached[page]
            self._unname(page)
        self._holders[page] = 1
        return page

    def match(self, digests: list[bytes]) -> list[int]:
        """The longest run of pages, from the first, whose contents are `digests`. Takes no hold on them."""
        pages = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def idle(self, pages: list[int]) -> int:
        """How many of `pages` have no holder, so that `hold` lowers `free` by as many."""
        return sum(self._holders[page] == 0 for page in pages)

    def hold(self, pages: list[int]) -> None:
        """Add a holder to matched pages."""
        for page in pages:
            if self._holders[page] == 0:
                del self._cached[page]
            self._holders[page] += 1

    def name(self, page: int, digest: bytes) -> None:
        """Declare the contents of a full, written page. The first page of some contents keeps the name."""
        if digest not in self._page_of and self._digest[page] is None:
            self._page_of[digest] = page
            self._digest[page] = digest

    def release(self, pages: list[int]) -> None:
        """Drop one holder from each of a sequence's pages, given in order; later pages are evicted first,
        because a page is of use only while every page before it is still there."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if self._digest[page] is None:
                    self._blank.append(page)
                else:
                    self._cached[page] = None

    def forget(self) -> None:
        """Drop all known contents, as when something else wrote to the pages. Holders keep theirs."""
        for page in range(self.num_pages):
            self._unname(page)
        self._blank.extend(self._cached)
        self._cached.clear()

    def _unname(self, page: int) -> None:
        digest = self._digest[page]
        if digest is not None:
            del self._page_of[digest]
            self._digest[page] = None

    def check(self) -> None:
        """Assert the pool's own invariants; used by tests and cheap enough for debugging a server."""
        blank, cached = set(self._blank), set(self._cached)
        assert len(blank) == len(self._blank)
        assert not blank & cached
        for page, holders in enumerate(self._holders):
            assert holders >= 0
            assert (holders == 0) == (page in blank or page in cached)
            assert (page in cached) == (holders == 0 and self._digest[page] is not None)
        assert self._page_of == {d: p for p, d in enumerate(self._digest) if d is not None}
