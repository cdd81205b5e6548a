"""Where a checkpoint comes from: a file, a folder of transformers, a URL, a hub id, or a state dict in memory."""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch

from .convert import StateDict
from .errors import CheckpointError, brief
from .files import is_file_name, open_wrappers, read_metadata, read_state_dict
from .grids import noted_grid, with_grid
from .hf_agreement import check_agreement, grid_of
from .hf_config import HFConfig, read_config, read_json

__all__ = ['Source', 'config_beside', 'read_source']

# in the order in which they are looked for; the indices list the files of a checkpoint that is cut into several
_WEIGHTS = ('model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin', 'pytorch_model.bin.index.json')
# not a date, which is all digits
_SHA256 = re.compile(
    r'-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.[a-z]+$'
)  # OpenMMLab and PyTorch put the beginning of it into file names
_HUB_ID = re.compile(r'(?:hf-hub:)?([\w.-]+/[\w.-]+)')


class Source(NamedTuple):
    """A checkpoint and what was said about it."""

    name: str  # for messages
    state_dict: StateDict
    config: HFConfig | None  # of transformers, if one lies beside the weights
    grid: tuple[int, int] | None  # (h, w) in patches that it was trained at, where that is known


def read_source(
    source: str | os.PathLike[str] | Mapping[str, Any], stand_ins: Mapping[str, type] | None = None
) -> Source:
    """Reads a checkpoint to the CPU, without executing anything in it.

    Args:
        source: a state dict; a file (.safetensors, or what ``torch.save`` wrote); a folder that transformers'
            ``save_pretrained`` wrote; an http(s) URL, checked against the sha256 in its file name where there is one;
            or a hub id (``microsoft/beit-base-patch16-224``), also with ``hf-hub:`` before it as timm writes it.
        stand_ins: see ``files.read_file``.

    Raises:
        CheckpointError: it does not exist, cannot be fetched, or is no checkpoint.
    """
    if not isinstance(source, (str, os.PathLike, Mapping)):
        raise CheckpointError(f'expected a path, URL, hub id or state dict as a checkpoint, got {source!r}')
    if isinstance(source, Mapping):
        state_dict = open_wrappers(source, 'the state dict')
        return Source('the state dict', state_dict, None, noted_grid(state_dict))
    text = os.fspath(source)
    path = Path(text)
    if urlparse(text).scheme in ('http', 'https'):
        path = _download(text)
    elif path.is_dir():
        path = _weights_in(path)
    elif not path.exists() and _HUB_ID.fullmatch(text) and not is_file_name(path):
        path = _from_hub(text)
    if path.name.endswith('.index.json'):
        state_dict = _read_shards(path)
    else:
        state_dict = read_state_dict(path, stand_ins)
    stated = _grid_in(path) or noted_grid(state_dict)
    config = config_beside(path, with_grid(state_dict, stated))
    grid = stated if config is None else grid_of(config)
    return Source(text, with_grid(state_dict, grid), config, grid)


def _weights_in(folder: Path) -> Path:
    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f'the folder {folder} holds none of {", ".join(_WEIGHTS)}; give the file itself')
    return found


def _read_shards(index: Path) -> StateDict:
    weight_map = read_json(index).get('weight_map')
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index} is no list of checkpoint files, for it has no weight_map; fetch it again')
    state_dict: StateDict = {}
    for name in {brief(name): name for name in weight_map.values()}.values():
        if not _is_beside(name):
            raise CheckpointError(f'{index} names {brief(name)}, which is no checkpoint file beside it; fetch it again')
        state_dict.update(read_state_dict(index.with_name(name)))
    return state_dict


def _is_beside(name: Any) -> bool:
    """Whether this can be the name of a checkpoint file in the same folder."""
    return isinstance(name, str) and len(name) < 256 and Path(name).name == name and is_file_name(Path(name))


def _download(url: str) -> Path:
    parts = urlparse(url)
    name = Path(parts.path).name
    # many files on the web are called model.safetensors; what stands behind the ? is a key or a date
    place = hashlib.sha256(f'{parts.netloc}{parts.path}'.encode()).hexdigest()[:16]
    target = Path(torch.hub.get_dir(), 'checkpoints', 'beit_plugin', place, name)
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        sha256 = _SHA256.search(name)
        try:  # writes to a temporary file, checks it, and renames
            torch.hub.download_url_to_file(url, str(target), sha256[1] if sha256 else None)
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(f'{url} cannot be fetched: {error}') from error
    return target


def _from_hub(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    match = _HUB_ID.fullmatch(hub_id)
    repository = match[1] if match else hub_id
    error: Exception | None = None
    try:
        try:
            hf_hub_download(repository, 'config.json')
        except EntryNotFoundError:
            pass  # weights alone will do
        for name in (name for name in _WEIGHTS if not name.endswith('.index.json')):  # no BEiT is cut into several
            try:
                return Path(hf_hub_download(repository, name))
            except EntryNotFoundError as missing:
                error = missing
    except (OSError, ValueError) as failed:  # the library's errors are of these kinds
        error = failed
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    raise CheckpointError(
        f'{hub_id} is no file or folder here, and the hub did not give it ({reason}); check the path or the id'
    ) from error


def config_beside(path: Path, state_dict: Mapping[str, Any]) -> HFConfig | None:
    """The configuration of transformers beside a file of weights; None where there is none of BEiT.

    Args:
        path: of the weights.
        state_dict: the weights.

    Raises:
        CheckpointError: it cannot be read, or contradicts the weights.
    """
    place = path.with_name('config.json')
    if not path.name.startswith(('model', 'pytorch_model')) or not place.is_file():
        return None
    loaded = read_json(place)
    if loaded.get('model_type') != 'beit':  # timm's repositories have a config.json of another kind
        return None
    try:
        config = read_config(loaded, strict=False)
    except CheckpointError as error:
        raise CheckpointError(f'{place}: {error}') from error
    check_agreement(config, state_dict, place)
    return config


def _grid_in(path: Path) -> tuple[int, int] | None:
    """What ``save`` notes in a safetensors file."""
    match = re.fullmatch(r'(\d{1,4})x(\d{1,4})', read_metadata(path).get('grid', ''))
    return (int(match[1]), int(match[2])) if match else None
