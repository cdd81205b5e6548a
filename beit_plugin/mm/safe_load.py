"""Lets `torch.load` read mmengine's checkpoints while it stays weights-only.

mmengine 0.10.7 stores its message hub in every checkpoint: `HistoryBuffer` objects with NumPy arrays, and the four
statistics methods of the class, which pickle writes as ``getattr(HistoryBuffer, name)``. torch refuses all of these
by default since 2.6. `torch.load` accepts exactly what is listed here in addition, so a hostile file still cannot
reach any other function.
"""

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

_STATISTICS_METHODS = ('current', 'max', 'mean', 'min')
# structured and object dtypes stay out: the hub never holds them
_DTYPES = ('?', 'b', 'B', 'h', 'H', 'i', 'I', 'l', 'L', 'q', 'Q', 'e', 'f', 'd', 'U')


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
    safe: list[Any] = [
        HistoryBuffer,
        argparse.Namespace,  # tools store their arguments
        np.ndarray,
        np.dtype,
        *{type(np.dtype(code)) for code in _DTYPES},
        (_history_buffer_method, 'builtins.getattr'),
    ]
    reconstruct_array = np.empty(0).__reduce__()[0]
    reconstruct_scalar = np.float64(0).__reduce__()[0]
    for package in ('numpy._core', 'numpy.core'):  # NumPy 2 and 1; either may have written the file
        safe.append((reconstruct_array, f'{package}.multiarray._reconstruct'))
        safe.append((reconstruct_scalar, f'{package}.multiarray.scalar'))
    torch.serialization.add_safe_globals(safe)
