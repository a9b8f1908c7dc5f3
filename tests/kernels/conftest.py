"""Triton's kernels are interpreted in these tests, which has to be settled before any of them is imported."""

from importlib.util import find_spec

if find_spec("triton") is not None:
    import tests.interpreted  # noqa: F401
