"""Every error a user can meet. Each message states the rule, the value and the remedy.

FlatoutError                exit code 2
  ModelFileError            a model file or folder cannot be used (missing, corrupt, hostile)
  UnsupportedModelError     readable, but an architecture or format flatout does not run
  ConfigError               an option or a combination of options makes no sense
  ResourceError             not enough memory, disk or time, found out before the work starts
  BackendError              a runner, compiler or library that was asked for is not available
  EvidenceError             a certificate or measurement cannot be formed from what was given
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FlatoutError(Exception):
    """Base of all user errors. `rule` says what must hold, `value` what was found, `remedy` what to do."""

    exit_code = 2

    def __init__(self, rule: str, value: str = "", remedy: str = "") -> None:
        self.rule, self.value, self.remedy = rule, value, remedy
        parts = [rule]
        if value:
            parts.append(f"found: {value}")
        if remedy:
            parts.append(f"try: {remedy}")
        super().__init__("; ".join(parts))


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """The one of `known` that `name` was probably meant to be, for a remedy."""
    close = difflib.get_close_matches(name.lower(), list(known), n=1)
    return close[0] if close else otherwise


class ModelFileError(FlatoutError):
    """A model file or folder is missing, truncated, corrupt or hostile."""


class UnsupportedModelError(FlatoutError):
    """The file is sound, but its architecture or number format has no runner here."""


class ConfigError(FlatoutError):
    """An option, or a combination of options, makes no sense."""


class ResourceError(FlatoutError):
    """Memory, disk or time would not suffice; raised before the expensive part."""


class BackendError(FlatoutError):
    """A runner, library or instruction set that was asked for by name is not available."""


class EvidenceError(FlatoutError):
    """The text or the measurements given cannot support the claim that was asked for."""
