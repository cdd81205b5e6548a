"""Lets `torch.load` read mmengine's checkpoints while it stays weights-only.

mmengine 0.10.7 stores its message hub in every checkpoint: `HistoryBuffer` objects with NumPy arrays, and the four
statistics methods of the class, which pickle writes as ``getattr(HistoryBuffer, name)``. torch refuses all of these
by default since 2.6. `torch.load` accepts exactly what is listed here in addition, so a hostile file still cannot
reach any other function.
"""

from collections.abc import Callable
from typing import Any

import torch
from mmengine.logging import HistoryBuffer

from ..checkpoints.harmless import name_of, plain_globals

_STATISTICS_METHODS = ('current', 'max', 'mean', 'min')


def _history_buffer_method(owner: object, name: str) -> Callable[..., object]:
    """The `getattr` of checkpoints: only for the statistics methods of `HistoryBuffer`.

    Raises:
        PermissionError: any other object or attribute.
    """
    if owner is not HistoryBuffer or name not in _STATISTICS_METHODS:
        raise PermissionError(f'a checkpoint may not look up the attribute {name!r} of {owner!r}')
    return getattr(HistoryBuffer, name)


def allow_mmengine_checkpoints() -> None:
    """Allow what mmengine's own checkpoints hold in weights-only `torch.load`; calling it again changes nothing."""
    safe: list[Any] = [HistoryBuffer, (_history_buffer_method, 'builtins.getattr')]
    safe += [(value, name) for name, value in plain_globals().items()]
    names = {name_of(entry) for entry in safe}
    others = [entry for entry in torch.serialization.get_safe_globals() if name_of(entry) not in names]
    torch.serialization.clear_safe_globals()  # no other way to take the stand-ins of ``harmless`` out
    torch.serialization.add_safe_globals(others + safe)
