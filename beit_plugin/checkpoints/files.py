"""Reads and writes checkpoint files: nothing in a file is executed, and a write that fails leaves the old file.

Formats: safetensors, and torch's own with ``weights_only=True``.
"""

import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .convert import CheckpointError, StateDict

__all__ = ['open_wrappers', 'read_state_dict', 'write_state_dict']

# the names under which trainers store weights, in the order in which they are looked for
_WRAPPERS = ('state_dict', 'model', 'module')


def open_wrappers(loaded: Any, source: str) -> StateDict:
    """Takes what a trainer saved apart and returns the state dict in it.

    Args:
        loaded: a state dict, or a dict that holds one as ``state_dict``, ``model`` or ``module``, nested or not.
        source: name of the checkpoint, for the error.

    Raises:
        CheckpointError: there is no state dict in it.
    """
    while isinstance(loaded, Mapping):
        inner = next((loaded[name] for name in _WRAPPERS if isinstance(loaded.get(name), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f'{source} holds a {type(loaded).__name__}, not a state dict; save model.state_dict()')
    tensors = {name: value for name, value in loaded.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f'{source} holds no tensors by name, so it is no checkpoint of a model')
    return tensors


def read_state_dict(path: str | os.PathLike[str]) -> StateDict:
    """Reads a checkpoint file to the CPU, without executing anything in it.

    Args:
        path: a ``.safetensors`` file, or any file that ``torch.save`` wrote.

    Raises:
        CheckpointError: no such file, empty, cut off, of another kind, or a pickle that is more than weights.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f'{path} does not exist; give the path of a checkpoint file')
    if path.stat().st_size == 0:
        raise CheckpointError(f'{path} is empty; it was cut off or never written, so fetch or save it again')
    if path.suffix == '.safetensors':
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f'{path} is cut off or no safetensors file ({error}); fetch or save it again'
            ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)  # of foreign pickle protocols; what matters is raised below
            loaded = torch.load(path, map_location='cpu', weights_only=True)
    except UnpicklingError as error:
        if 'Unsupported global' in str(error) or 'Unsupported class' in str(error):
            name = str(error).split('GLOBAL ')[-1].split(' ')[0]
            raise CheckpointError(
                f'{path} would run code when loaded ({name}), so it was not; where you trust its origin, load it '
                'yourself and save its state_dict() as safetensors'
            ) from error
        raise CheckpointError(f'{path} is cut off or no checkpoint file; fetch or save it again') from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, IndexError) as error:
        raise CheckpointError(f'{path} is cut off or no checkpoint file; fetch or save it again') from error
    return open_wrappers(loaded, str(path))


def write_state_dict(state_dict: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Writes a checkpoint: safetensors by that suffix, else torch's format.

    The file appears whole or not at all: it is written beside its place, flushed to the disk and renamed.

    Raises:
        OSError: the folder cannot be written, or the disk is full; an old file is still there.
    """
    path = Path(path)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state_dict.items()}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    os.close(handle)
    try:
        if path.suffix == '.safetensors':
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, temporary, metadata={'format': 'pt'})
        else:
            torch.save(tensors, temporary)
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
