"""Is the optimised model faster on this machine, and is its loss inside the budget?

The room is also a function: `flatout.verify(optimised, original)` is `flatout.verify.audit.audit`. A
package cannot have both a submodule tree and a function of its name, so the package object itself is
callable.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flatout.verify.audit import Audit


class _CallableRoom(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Audit:
        from flatout.verify.audit import audit

        return audit(*args, **options)


sys.modules[__name__].__class__ = _CallableRoom
