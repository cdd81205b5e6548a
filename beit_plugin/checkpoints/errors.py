"""The error of this package."""

__all__ = ['CheckpointError']


class CheckpointError(ValueError):
    """A checkpoint that is none, is of no known dialect, or does not fit."""
