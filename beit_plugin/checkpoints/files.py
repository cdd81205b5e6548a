"""Reads and writes checkpoint files: nothing in a file is executed, and a write that fails leaves the old file.

Formats: safetensors, and torch's own (see ``torch_files``).
"""

import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .convert import CheckpointError, StateDict
from .grids import metadata_of, noted_grid, with_grid, with_metadata
from .torch_files import has_checksums, read_torch_file
from .unpickle import UnknownName

__all__ = [
    'SUFFIXES',
    'is_damaged',
    'is_file_name',
    'open_wrappers',
    'read_file',
    'read_metadata',
    'read_state_dict',
    'remove_leftovers',
    'write_atomically',
    'write_state_dict',
]

# the names under which trainers store weights, in the order in which they are looked for: averages first, as in timm
_WRAPPERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model', 'module')
_DEPTH = 8  # of wrappers; a file whose wrapper holds itself has no end
SUFFIXES = ('.safetensors', '.pth', '.pt', '.bin', '.ckpt')
_PREFIXES = ('module.', '_orig_mod.')  # of DistributedDataParallel and torch.compile


def open_wrappers(loaded: Any, source: str) -> StateDict:
    """Takes what a trainer saved apart and returns the state dict in it.

    Args:
        loaded: a state dict, or a dict that holds one under one of the names that trainers use, nested or not.
        source: name of the checkpoint, for the error.

    Raises:
        CheckpointError: there is no state dict in it.
    """
    for _ in range(_DEPTH):
        if not isinstance(loaded, Mapping):
            break
        # an average that was never taken is empty
        inner = next((loaded[n] for n in _WRAPPERS if isinstance(loaded.get(n), Mapping) and loaded[n]), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f'{source} holds a {type(loaded).__name__}, not a state dict; save model.state_dict()')
    tensors = {name: value for name, value in loaded.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f'{source} holds no tensors by name, so it is no checkpoint of a model')
    for _ in range(_DEPTH):
        prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in tensors)), None)
        if prefix is None:
            break
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return with_grid(tensors, noted_grid(tensors, metadata_of(loaded).values()))


def read_state_dict(path: str | os.PathLike[str], stand_ins: Mapping[str, type] | None = None) -> StateDict:
    """Read the weights of a checkpoint file to the CPU, without executing anything in it.

    Args:
        path, stand_ins: see ``read_file``.

    Raises:
        CheckpointError: see ``read_file``, or there is no state dict in it.
    """
    return open_wrappers(read_file(path, stand_ins=stand_ins), str(path))


def read_file(
    path: str | os.PathLike[str], with_values: bool = True, stand_ins: Mapping[str, type] | None = None
) -> Any:
    """Read all that a checkpoint file holds, without executing anything in it.

    Args:
        path: a ``.safetensors`` file, or any file that ``torch.save`` wrote, whose checksums are compared.
        with_values: False leaves the values of torch's files in the file: meta tensors.
        stand_ins: see ``read_torch_file``.

    Raises:
        CheckpointError: no such file, empty, damaged, of another kind, or a pickle that is more than weights.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f'{path} does not exist; give the path of a checkpoint file')
    if path.stat().st_size == 0:
        raise CheckpointError(f'{path} is empty; it was cut off or never written, so fetch or save it again')
    try:
        return load_file(path) if path.suffix == '.safetensors' else read_torch_file(path, with_values, stand_ins)
    except UnknownName as error:
        if str(error) == 'TorchScript':
            raise CheckpointError(f'{path} is a TorchScript program; save the state_dict() of the module') from error
        raise CheckpointError(
            f'{path} holds {error}, which is neither a tensor nor plain data, so nothing was loaded; where you trust '
            'its origin, load it yourself and save its state_dict() as safetensors'
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # safetensors fails in several ways on a damaged header
        kind = 'safetensors' if path.suffix == '.safetensors' else 'checkpoint'
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f'{path} is cut off, damaged or no {kind} file ({reason}); fetch or save it again'
        ) from error


def is_damaged(path: Path) -> bool:
    """Whether a file that ``torch.save`` wrote fails its checksums, which ``torch.load`` does not look at."""
    try:
        if not zipfile.is_zipfile(path):  # torch's old format has none
            return False
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type for entry in archive.infolist()):  # torch writes none
                return True
            return has_checksums(archive) and archive.testzip() is not None
    except Exception:  # zipfile fails in every way on an archive that is damaged
        return True


def is_file_name(path: Path) -> bool:
    """Whether a path names a checkpoint file; a folder may have a dot in its name too."""
    return path.suffix in SUFFIXES


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself; empty for other files."""
    if path.suffix != '.safetensors':
        return {}
    with safe_open(path, 'pt') as file:
        return file.metadata() or {}


def write_state_dict(
    state_dict: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a checkpoint, whole or not at all (see ``write_atomically``): safetensors by that suffix, else torch's.

    Args:
        state_dict: names to tensors.
        path: file to write.
        metadata: what a safetensors file says of itself; torch's keep the metadata of the state dict, see `with_grid`.

    Raises:
        OSError: see ``write_atomically``.
    """
    path = Path(path)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state_dict.items()}
    try:
        if path.suffix == '.safetensors':
            said = {'format': 'pt', **(metadata or {})}
            whole = {name: tensor.clone() for name, tensor in tensors.items()}  # it refuses tensors that share memory
            write_atomically(path, lambda temporary: save_file(whole, temporary, metadata=said))
        else:
            noted = with_metadata(tensors, metadata_of(state_dict))
            write_atomically(path, lambda temporary: torch.save(noted, temporary))
    except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
        raise OSError(f'{path} cannot be written: {error}') from error


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Lets ``write`` fill a temporary file, flushes it to the disk and puts it in the place of ``path``.

    Raises:
        OSError: the folder cannot be written, or the disk is full; an old file is still there.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    try:
        # mkstemp makes files that only their owner reads; a checkpoint is like any other file
        mask = os.umask(0)
        os.umask(mask)
        os.fchmod(handle, 0o666 & ~mask)
        os.close(handle)
        write(temporary)
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name too must survive a power cut
        finally:
            os.close(folder)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path, names: str) -> None:
    """Removes what ``write_atomically`` left behind where it was killed.

    Args:
        folder: of the files.
        names: a pattern as in ``Path.glob`` for the files that were being written.
    """
    for leftover in folder.glob(f'.{names}.{"?" * 8}'):
        leftover.unlink(missing_ok=True)
