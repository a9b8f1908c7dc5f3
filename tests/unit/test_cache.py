"""The page pool: every page in one place, holders counted, contents taken over only while they are there."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flatout.engine.cache import PagePool, extend_digests
from flatout.errors import ConfigError


def digests(tokens: list[int], page_size: int = 2) -> list[bytes]:
    found: list[bytes] = []
    extend_digests(found, tokens, page_size)
    return found


def test_digest_names_the_whole_prefix() -> None:
    a, b = digests([1, 2, 3, 4, 5]), digests([9, 2, 3, 4])
    assert len(a) == 2
    assert len(b) == 2
    assert a[1] != b[1], "page 1 has the same tokens but another prefix"
    assert digests([1, 2, 3, 4])[1] == a[1]
    assert digests([1, 2]) == a[:1]


def test_digests_extend_what_is_known() -> None:
    known = digests([1, 2, 3, 4])
    extend_digests(known, [1, 2, 3, 4, 5, 6, 7], 2)
    assert known == digests([1, 2, 3, 4, 5, 6])


def test_large_ids_do_not_wrap_into_the_same_digest() -> None:
    assert digests([1, 2]) != digests([1 + (1 << 20), 2])


def test_released_pages_are_found_again_until_they_are_needed() -> None:
    pool = PagePool(4)
    names = digests([1, 2, 3, 4, 5, 6])
    pages = [pool.take() for _ in names]
    for page, name in zip(pages, names, strict=True):
        pool.name(page, name)
    pool.release(pages)
    assert pool.held == 0
    assert pool.free == 4
    assert pool.match(names) == pages
    pool.take()  # the blank page goes first
    assert pool.match(names) == pages
    assert pool.take() == pages[2], "the page at the end of the prefix is evicted before its beginning"
    assert pool.match(names) == pages[:2]
    pool.check()


def test_least_recently_released_prefix_is_evicted_first() -> None:
    pool = PagePool(2)
    (old,), (new,) = digests([1, 1]), digests([2, 2])
    first, second = pool.take(), pool.take()
    pool.name(first, old)
    pool.name(second, new)
    pool.release([second])
    pool.release([first])
    pool.hold(pool.match([new]))  # used again, so now `old` was used longest ago
    pool.release([second])
    assert pool.take() == first
    assert pool.match([new]) == [second]
    assert pool.match([old]) == []


def test_shared_pages_stay_until_the_last_holder_leaves() -> None:
    pool = PagePool(1)
    (name,) = digests([1, 2])
    page = pool.take()
    pool.name(page, name)
    assert pool.idle([page]) == 0
    pool.hold([page])
    pool.release([page])
    assert pool.free == 0
    pool.release([page])
    assert pool.free == 1
    assert pool.idle([page]) == 1


def test_same_contents_twice_keep_the_first_name() -> None:
    pool = PagePool(2)
    (name,) = digests([1, 2])
    first, second = pool.take(), pool.take()
    pool.name(first, name)
    pool.name(second, name)
    assert pool.match([name]) == [first]
    pool.release([second])
    pool.release([first])
    pool.check()
    assert pool.take() == second, "the unnamed copy is blank, so it goes first"


def test_forget_drops_contents_and_keeps_holders() -> None:
    pool = PagePool(3)
    names = digests([1, 2, 3, 4])
    pages = [pool.take(), pool.take()]
    for page, name in zip(pages, names, strict=True):
        pool.name(page, name)
    pool.release(pages[1:])
    pool.forget()
    pool.check()
    assert pool.match(names) == []
    assert pool.held == 1
    assert pool.free == 2


def test_a_pool_has_pages() -> None:
    with pytest.raises(ConfigError, match="at least one page; found: 0"):
        PagePool(0)


class PoolMachine(RuleBasedStateMachine):
    """Random holders of random prefixes against a model that is a dict of page -> number of holders."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(6)
        self.held: list[list[int]] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=8))
    def start(self, tokens: list[int]) -> None:
        names = digests(tokens)
        matched = self.pool.match(names)
        missing = len(names) - len(matched)
        if missing > self.pool.free - self.pool.idle(matched):
            return
        self.pool.hold(matched)
        pages = matched + [self.pool.take() for _ in range(missing)]
        for page, name in zip(pages, names, strict=True):
            self.pool.name(page, name)
        self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule()
    def forget(self) -> None:
        self.pool.forget()

    @invariant()
    def holders_are_counted(self) -> None:
        self.pool.check()
        everyone = [page for pages in self.held for page in pages]
        assert self.pool.held == len(set(everyone))
        for page in range(6):
            assert self.pool._holders[page] == everyone.count(page)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(deadline=None, derandomize=True, max_examples=60, stateful_step_count=30)
