"""What a checkpoint may hold beside tensors, rebuilt by classes and functions that check every argument.

timm keeps its arguments (`argparse.Namespace`) in a checkpoint, mmengine its message hub: `HistoryBuffer` objects with
NumPy arrays, and methods of theirs as ``getattr(HistoryBuffer, name)``. PyTorch would need the real classes to be
allow-listed for that. These are not safe with arguments and states from a file: `numpy.ndarray` turns bytes into object
pointers, the state of a `numpy.dtype` sets its size and flags, the state of a `HistoryBuffer` replaces methods of the
class. So a stand-in takes the name of each.

A stand-in accepts only what the host itself writes. Two of them become the real thing once their state is checked.
"""

import argparse
import math
import sys
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

__all__ = ['BUILDABLE', 'STAND_INS', 'register_stand_ins']

_PLAIN_DTYPES = frozenset('b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8'.split())
_NO_FIELDS = (None, None, None, -1, -1, 0)  # of a dtype's state: no subarray, names, fields; size, alignment, flags
_HISTORY_BUFFER = 'mmengine.logging.history_buffer'
_STATISTICS = ('current', 'max', 'mean', 'min')  # methods of HistoryBuffer


def _refuse(what: str) -> UnpicklingError:
    return UnpicklingError(f'a checkpoint may not hold {what}')


class PlainDtype:
    """Stands for `numpy.dtype`: a boolean, an integer or a float."""

    def __init__(self, code: str | bytes = '', *_: Any) -> None:
        code = code.decode('ascii') if isinstance(code, bytes) else code
        if not isinstance(code, str) or code not in _PLAIN_DTYPES:
            raise _refuse(f'another NumPy dtype than {", ".join(sorted(_PLAIN_DTYPES))}')
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        version, order, *rest = state
        if version != 3 or tuple(rest) != _NO_FIELDS or order not in ('<', '>', '|', '='):
            raise _refuse('a NumPy dtype with such a state')
        self.dtype = self.dtype.newbyteorder(order)


def _real_dtype(dtype: Any) -> np.dtype:
    if isinstance(dtype, PlainDtype):
        return dtype.dtype
    if isinstance(dtype, np.dtype):  # of a process that allows NumPy's own
        return PlainDtype(dtype.str[1:]).dtype.newbyteorder(dtype.str[0])
    raise _refuse(f'{type(dtype).__name__} as a NumPy dtype')


class PlainArray(np.ndarray):
    """Stands for `numpy.ndarray`: numbers whose bytes are in the file."""

    _filled = False

    def __new__(cls, *args: Any) -> 'PlainArray':
        if args:
            raise _refuse('a NumPy array made by its constructor')
        return super().__new__(cls, (0,), np.int8)

    def __setstate__(self, state: Any) -> None:
        version, shape, dtype, is_fortran, data = state
        dtype = _real_dtype(dtype)
        is_shape = type(shape) is tuple and len(shape) <= 32 and all(type(n) is int and n >= 0 for n in shape)
        # a second state would free the memory that views of the first one read
        if self._filled or version != 1 or not is_shape or type(data) is not bytes:
            raise _refuse('a NumPy array with such a state')
        if math.prod(shape) * dtype.itemsize != len(data):
            raise _refuse(f'a NumPy array of shape {shape} and {dtype} in {len(data)} bytes')
        super().__setstate__((1, shape, dtype, bool(is_fortran), data))
        self._filled = True

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.view(np.ndarray).__reduce_ex__(protocol)  # other programs read it as the array that it is


class PlainNamespace(argparse.Namespace):
    """Stands for `argparse.Namespace`, and becomes one."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict or not all(type(name) is str for name in state):
            raise _refuse('an argparse.Namespace with such a state')
        self.__dict__.update(state)
        self.__class__ = argparse.Namespace  # type: ignore[assignment]


class PlainHistory:
    """Stands for mmengine's `HistoryBuffer`, and becomes one where mmengine is loaded, which resuming needs."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        values, counts, length = (state.get(name) for name in ('_log_history', '_count_history', 'max_length'))
        arrays = all(isinstance(array, np.ndarray) and array.ndim == 1 for array in (values, counts))
        if not arrays or len(values) != len(counts) or type(length) is not int:
            raise _refuse('a HistoryBuffer with such a state')
        module = sys.modules.get(_HISTORY_BUFFER)
        if module is not None:
            self._log_history, self._count_history, self.max_length = np.array(values), np.array(counts), length
            self.__class__ = module.HistoryBuffer
            self._set_default_statistics()  # type: ignore[attr-defined]


def _reconstruct(cls: Any, *_: Any) -> PlainArray:
    """Stands for NumPy's function of the same name, which makes the empty array that a state then fills."""
    if cls not in (PlainArray, np.ndarray):
        raise _refuse('a NumPy array of another class')
    return PlainArray()


def _scalar(dtype: Any, data: Any) -> np.generic:
    """Stands for NumPy's function of the same name: a number from its bytes."""
    dtype = _real_dtype(dtype)
    if type(data) is not bytes or len(data) != dtype.itemsize:
        raise _refuse('a NumPy number with such bytes')
    return np.frombuffer(data, dtype)[0]


def _statistics(owner: Any, name: Any) -> str:
    """Stands for `getattr`: the statistics of a HistoryBuffer, which has them anyway, by name only."""
    if owner is not PlainHistory or name not in _STATISTICS:
        raise _refuse('other attributes than the statistics of a HistoryBuffer')
    return str(name)


# by the names that files use; NumPy 2 and NumPy 1 have written them
STAND_INS: dict[str, Any] = {
    'argparse.Namespace': PlainNamespace,
    'builtins.getattr': _statistics,
    'numpy.dtype': PlainDtype,
    'numpy.ndarray': PlainArray,
    f'{_HISTORY_BUFFER}.HistoryBuffer': PlainHistory,
    **{f'numpy.{core}.multiarray._reconstruct': _reconstruct for core in ('_core', 'core')},
    **{f'numpy.{core}.multiarray.scalar': _scalar for core in ('_core', 'core')},
}
BUILDABLE = (PlainArray, PlainDtype, PlainHistory, PlainNamespace)  # those that take a state


def _process_dtype(code: Any = '', *flags: Any) -> Any:
    """Stands for `numpy.dtype` in `torch.load`, unless the process allows NumPy's own, as transformers' Trainer does.

    NumPy's own array, which the process then allows too, refuses a stand-in of its dtype.
    """
    return (np.dtype if np.dtype in torch.serialization.get_safe_globals() else PlainDtype)(code, *flags)


def register_stand_ins() -> None:
    """Let weights-only `torch.load` read the training files of timm and mmengine; calling it again changes nothing.

    timm and mmengine read files by themselves, so this is for the whole process. Names that the process allows already
    keep their meaning.
    """
    named = {**STAND_INS, 'numpy.dtype': _process_dtype}
    # a state is taken by an object whose class is allowed under some name: here also under its own, which stays in
    # place where others allow the real class for a while
    named |= {f'{cls.__module__}.{cls.__name__}': cls for cls in BUILDABLE}
    allowed = {
        entry[1] if isinstance(entry, tuple) else f'{entry.__module__}.{entry.__qualname__}'
        for entry in torch.serialization.get_safe_globals()
    }
    torch.serialization.add_safe_globals([(value, name) for name, value in named.items() if name not in allowed])
