"""The error of this package, and what it shows of values that a file holds."""

import reprlib
from typing import Any

__all__ = ['CheckpointError', 'brief']

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxlong = _BRIEF.maxother = 100


class CheckpointError(ValueError):
    """A checkpoint that is none, is of no known dialect, or does not fit."""


def brief(value: Any) -> str:
    """A value of any size and depth, for a message."""
    return _BRIEF.repr(value)
