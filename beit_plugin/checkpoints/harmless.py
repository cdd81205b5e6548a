"""What trainers store beside the weights, so that weights-only `torch.load` reads their files without executing them.

timm keeps its arguments (`argparse.Namespace`), mmengine its message hub: `HistoryBuffer` objects with NumPy arrays,
and methods of theirs as ``getattr(HistoryBuffer, name)``. Here an inert object stands for `HistoryBuffer`: nothing of
mmengine is needed or run. `timm_models` allows all of it for good, since timm reads files itself; `mm/safe_load.py`
puts the real ones in its place, which resuming needs.
"""

import argparse
from typing import Any

import numpy as np
import torch

__all__ = ['harmless_globals', 'name_of', 'plain_globals']


class _Inert:
    """Takes any state and does nothing with it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _no_attribute(owner: Any, name: str) -> None:
    """The `getattr` of such files: gives nothing, of the inert class only."""
    if owner is not _Inert:
        raise PermissionError(f'a checkpoint may not look up the attribute {name!r} of {owner!r}')


def plain_globals() -> dict[str, Any]:
    """What stands for itself, by its name in the file: arguments, and NumPy's arrays and scalars of plain dtypes.

    Structured and object dtypes stay out: no trainer stores them.
    """
    array, scalar = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    named: dict[str, Any] = {
        'argparse.Namespace': argparse.Namespace,
        'numpy.ndarray': np.ndarray,
        'numpy.dtype': np.dtype,
        **{f'numpy.dtypes.{type(np.dtype(c)).__name__}': type(np.dtype(c)) for c in '?bBhHiIlLqQefdU'},
    }
    for package in ('numpy._core', 'numpy.core'):  # NumPy 2 and 1; either may have written the file
        named |= {f'{package}.multiarray._reconstruct': array, f'{package}.multiarray.scalar': scalar}
    return named


def harmless_globals() -> list[Any]:
    """For `torch.serialization.safe_globals`; what the process already allows keeps its meaning."""
    named = {
        **plain_globals(),
        'mmengine.logging.history_buffer.HistoryBuffer': _Inert,
        'builtins.getattr': _no_attribute,
    }
    allowed = {name_of(entry) for entry in torch.serialization.get_safe_globals()}
    return [(value, name) for name, value in named.items() if name not in allowed]


def name_of(entry: Any) -> str:
    """The name in a file of one of ``torch.serialization.get_safe_globals()``."""
    return entry[1] if isinstance(entry, tuple) else f'{entry.__module__}.{entry.__name__}'
