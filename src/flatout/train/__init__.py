"""Training on one device: from scratch, from a checkpoint, or from a teacher, always the same loop.

The room is also a function, as `flatout.verify` is: `flatout.train(training, out)` is
`flatout.train.recipe.run`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flatout.train.recipe import Json


class _CallableRoom(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Json:
        from flatout.train.recipe import run

        return run(*args, **options)


sys.modules[__name__].__class__ = _CallableRoom
