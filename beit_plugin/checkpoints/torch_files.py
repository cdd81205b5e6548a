"""Reads the files of `torch.save` as data: no name in them is imported, and no memory is filled on their word.

`torch.load(weights_only=True)` imports nothing either, but what it allows can still allocate any amount of memory,
return memory that nobody has written, and make tensors of any size from a small file. It does not look at the
checksums of the archive. This reader calls the functions of the table below, and stops where a file becomes far larger
than it is.

Formats: the zip archives of torch 1.6 and later, and the pickles before it. Source of both: torch 2.14,
``torch/serialization.py`` and ``torch/_utils.py``.
"""

import math
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from .stand_ins import BUILDABLE, STAND_INS
from .unpickle import DataUnpickler, UnknownName

__all__ = ['has_checksums', 'read_torch_file']

_MOST_DIMENSIONS = 64  # of a tensor in PyTorch
_GROWTH, _FREE = 4, 64 << 20  # a file may become so many times its size, and so many bytes more
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001  # torch.serialization.MAGIC_NUMBER, PROTOCOL_VERSION
_STORAGES = {
    'Double': torch.float64, 'Float': torch.float32, 'Half': torch.float16, 'BFloat16': torch.bfloat16,
    'Long': torch.int64, 'Int': torch.int32, 'Short': torch.int16, 'Char': torch.int8, 'Byte': torch.uint8,
    'Bool': torch.bool, 'ComplexDouble': torch.complex128, 'ComplexFloat': torch.complex64,
}  # fmt: skip


class _Storage:
    """The bytes of tensors, as a buffer that may be filled later, or None on the meta device."""

    def __init__(self, nbytes: int, buffer: bytearray | None, dtype: torch.dtype) -> None:
        self.nbytes, self.buffer, self.dtype = nbytes, buffer, dtype


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    """Stands for `torch._utils._rebuild_tensor` and its later versions."""
    dtypes = [value for value in rest if isinstance(value, torch.dtype)]  # of version 3, whose storage has none
    if any(type(value) is dict and value for value in rest):
        raise UnpicklingError('a conjugated or negated view of a tensor; save it by .resolve_conj() or .resolve_neg()')
    numbers = (offset, *size, *stride)
    if (
        not isinstance(storage, _Storage)
        or not len(size) == len(stride) <= _MOST_DIMENSIONS
        or not all(type(n) is int for n in numbers)
    ):
        raise UnpicklingError('a tensor without a storage, a size and a stride')
    dtype = dtypes[0] if dtypes else storage.dtype
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min(numbers) < 0 or (math.prod(size) and (last + 1) * dtype.itemsize > storage.nbytes):
        raise UnpicklingError(f'a tensor of shape {tuple(size)} goes beyond its storage of {storage.nbytes} bytes')
    if storage.buffer is None:
        return torch.empty_strided(tuple(size), tuple(stride), dtype=dtype, device='meta')
    if not math.prod(size):
        return torch.empty(tuple(size), dtype=dtype)
    flat = torch.frombuffer(storage.buffer, dtype=dtype, count=last + 1)
    return flat.as_strided(tuple(size), tuple(stride), offset)


def _parameter(tensor: Any, *_: Any) -> Tensor:
    """Stands for `torch._utils._rebuild_parameter`; the file of a state dict has the tensor alone."""
    if not isinstance(tensor, Tensor):
        raise UnpicklingError('a parameter without a tensor')
    return tensor


def _subclass(rebuild: Any, _: Any, args: Any, *__: Any) -> Tensor:
    """Stands for `torch._tensor._rebuild_from_type_v2`: a tensor with attributes of its own, which are left out."""
    if rebuild not in (_tensor, _parameter):
        raise UnpicklingError('a tensor that is rebuilt by something else')
    return rebuild(*args)


def _encode(text: Any, encoding: Any) -> bytes:
    """Stands for `_codecs.encode`: how protocol 2 writes bytes."""
    if type(text) is not str or encoding != 'latin1':
        raise UnpicklingError('text in another encoding than latin1')
    return text.encode('latin1')


# what a file may call or name, by the name in the file
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    '_codecs.encode': _encode,
    'builtins.set': set,
    'collections.Counter': Counter,
    'collections.OrderedDict': OrderedDict,
    'torch.Size': torch.Size,
    'torch.device': torch.device,
    'torch._tensor._rebuild_from_type_v2': _subclass,
    **{f'torch._utils._rebuild_tensor{version}': _tensor for version in ('', '_v2', '_v3')},
    **{f'torch._utils._rebuild_parameter{form}': _parameter for form in ('', '_with_state')},
    **STAND_INS,
}
_VALUES: dict[str, Any] = {
    **{f'torch.{name}Storage': dtype for name, dtype in _STORAGES.items()},
    'torch.storage.UntypedStorage': torch.uint8,
    # types of tensors with attributes
    'torch.Tensor': None,
    'torch.nn.parameter.Parameter': None,
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
}


def has_checksums(archive: zipfile.ZipFile) -> bool:
    """False for archives written after `torch.serialization.set_crc32_options(False)`, which hold zeros instead."""
    return any(entry.CRC for entry in archive.infolist())


class _Archive:
    """A zip archive of `torch.save`, whose checksums are compared as it is read."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > size or any(entry.compress_type for entry in entries):
            raise UnpicklingError('it is a compressed archive, which torch does not write')
        checked = has_checksums(archive)
        for entry in entries:
            entry.CRC = entry.CRC if checked else None  # type: ignore[assignment]  # zipfile's word for not known
        self.archive = archive
        # every name has the name of the file, as it was when it was saved, in front
        self.entries = {entry.filename.partition('/')[2]: entry for entry in entries}

    def read(self, name: str) -> bytearray:
        if name not in self.entries:
            raise UnpicklingError(f'it has no {name}')
        entry = self.entries.pop(name)
        data, at = memoryview(bytearray(entry.file_size)), 0
        with self.archive.open(entry) as file:
            while chunk := file.read(1 << 20):  # the last read compares the checksum
                data[at : at + len(chunk)] = chunk
                at += len(chunk)
        return data.obj  # type: ignore[return-value]


def _storage_id(pid: Any) -> tuple[torch.dtype, str, int]:
    kind, dtype, key, _, numel, *view = pid
    known = kind == 'storage' and isinstance(dtype, torch.dtype) and type(key) is str and type(numel) is int
    if not known or numel < 0 or view not in ([], [None]):
        raise UnpicklingError('a persistent id that is no storage')
    return dtype, key, numel * dtype.itemsize


def _read_archive(path: Path, known: Any, with_values: bool, budget: int) -> Any:
    with zipfile.ZipFile(path) as opened:
        if any(name.endswith('/constants.pkl') for name in opened.namelist()):
            raise UnknownName('TorchScript')
        archive = _Archive(opened, path.stat().st_size)
        if 'byteorder' in archive.entries and archive.read('byteorder').decode() != sys.byteorder:
            raise UnpicklingError('it was written on a machine of another byte order')
        storages: dict[str, _Storage] = {}

        def storage(pid: Any) -> _Storage:
            dtype, key, nbytes = _storage_id(pid)
            if key not in storages:
                name = f'data/{key}'
                if name not in archive.entries or archive.entries[name].file_size != nbytes:
                    raise UnpicklingError(f'{name} does not have {nbytes} bytes')
                storages[key] = _Storage(nbytes, archive.read(name) if with_values else None, dtype)
            return storages[key]

        loaded = DataUnpickler(*known, storage, budget).load(BytesIO(archive.read('data.pkl')))
        for name in list(archive.entries) if with_values else ():
            archive.read(name)  # what no tensor reads may be damaged too
        return loaded


def _read_legacy(path: Path, known: Any, with_values: bool, budget: int) -> Any:
    storages: dict[str, _Storage] = {}

    def storage(pid: Any) -> Any:
        if pid[0] == 'module':  # (..., class, its file, its source code): the class is one of the stand-ins
            return pid[1]
        dtype, key, nbytes = _storage_id(pid)
        if key not in storages:
            unpickler.charge(nbytes)
            storages[key] = _Storage(nbytes, bytearray(nbytes) if with_values else None, dtype)
        return storages[key]

    unpickler = DataUnpickler(*known, storage, budget)
    with path.open('rb') as stream:
        magic, version, system = (unpickler.load(stream) for _ in range(3))
        if magic != _LEGACY_MAGIC or version != _LEGACY_VERSION:
            raise UnpicklingError('it was not written by torch.save')
        if system['little_endian'] != (sys.byteorder == 'little'):
            raise UnpicklingError('it was written on a machine of another byte order')
        loaded, keys = unpickler.load(stream), unpickler.load(stream)
        for key in keys if with_values else ():  # each begins with its number of elements
            buffer, count = storages[key].buffer, int.from_bytes(stream.read(8), 'little')
            nbytes = storages[key].nbytes
            if count * storages[key].dtype.itemsize != nbytes or stream.readinto(buffer) != nbytes:  # type: ignore
                raise UnpicklingError(f'storage {key} does not have {nbytes} bytes')
    return loaded


def read_torch_file(path: Path, with_values: bool = True, stand_ins: Mapping[str, type] | None = None) -> Any:
    """Read what `torch.save` wrote.

    Args:
        path: the file.
        with_values: False leaves the values of tensors, and the checksums of them, in the file: meta tensors.
        stand_ins: further classes by their names in the file; each takes a state by `__setstate__`.

    Raises:
        UnknownName: the file holds something that no table knows.
        UnpicklingError: it is damaged, or not of `torch.save`.
    """
    more = stand_ins or {}
    known = {**_FUNCTIONS, **more}, _VALUES, (*BUILDABLE, *more.values())
    budget = _GROWTH * path.stat().st_size + _FREE
    try:
        read = _read_archive if zipfile.is_zipfile(path) else _read_legacy
        return read(path, known, with_values, budget)
    except (UnknownName, MemoryError):
        raise
    except Exception as error:  # a damaged file fails in every way
        ours = isinstance(error, UnpicklingError | zipfile.BadZipFile)
        raise UnpicklingError(str(error) if ours else 'it cannot be unpickled') from error
