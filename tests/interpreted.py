"""Triton's kernels on the processor: import this before anything of flatout.kernels.triton.

Triton decides when a kernel is defined whether it will be compiled or interpreted, so one process does one of
the two; tests that compile do so in a process of their own.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

from triton.runtime import interpreter


def _patched(original: Any) -> Any:
    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        # Triton 3.6 calls int() on an array of one element, which numpy 2.4 no longer converts.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch


interpreter._patch_lang_tensor = _patched(interpreter._patch_lang_tensor)
