"""Checkpoints of BEiT: every dialect is read, every dialect is written, at any resolution."""

from .convert import CheckpointError, Detection, convert, detect
from .load import LoadReport, load, save

__all__ = ['CheckpointError', 'Detection', 'LoadReport', 'convert', 'detect', 'load', 'save']
