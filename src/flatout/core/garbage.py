"""A pause of Python's garbage collector, which would hit one side of a comparison, or go again and again
through what is being loaded to stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_garbage_collection(collect: bool = False) -> Iterator[None]:
    """For as long as a `with` block or a decorated function runs, in all threads; what is garbage by then can
    be collected afterwards. collect: what is garbage now goes first."""
    enabled = gc.isenabled()
    if collect:
        gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
