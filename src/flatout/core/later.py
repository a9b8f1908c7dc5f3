"""Later: a value that a thread works out while its owner does something else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Later(Generic[T]):
    """What `make` returns, or raises, when it is asked for. It runs from now on, in a thread of its own."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._value: T
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def get(self) -> T:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value

    def _run(self) -> None:
        try:
            self._value = self._make()
        except BaseException as error:
            self._error = error
