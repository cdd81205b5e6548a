"""Lets mmengine read segmentors of every dialect: ``load_from``, ``init_model``, the inferencers, ``test.py``.

These set a whole model by its own names, and the parts that come by other names elsewhere (``beit.encoder...``,
``backbone.fpn1``) belong to several modules here, so no module could translate its own. mmengine lets a loader be
registered for a kind of path; ours reads as mmengine's does and then takes a BEiT segmentor of a foreign dialect to the
names of mmsegmentation. The checkpoints of a training in mmengine and all other files come out as they are.
"""

import logging
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader, load_from_http, load_from_local
from torch import Tensor

from ..checkpoints import CheckpointError, convert, detect
from ..checkpoints.convert import Detection, read_names
from ..checkpoints.files import is_damaged, open_wrappers
from ..checkpoints.grids import metadata_of, noted_grid, with_grid
from ..checkpoints.hf_agreement import grid_of
from ..checkpoints.hf_config import HFConfig
from ..checkpoints.sources import config_beside, read_source
from ..checkpoints.tables import DIALECTS

_OURS = ('mmseg', 'openmmlab')
_TRAINING = 'message_hub'  # only mmengine writes it: who resumes needs all of it by the names of that very model
_OUTER = re.compile(r'(?:model\.|module\.|_orig_mod\.)+')  # of Lightning, DistributedDataParallel and torch.compile
NECK = 'beit_plugin.neck'  # metadata of ``backbone``: the pyramid, for a BEiTBackbone that has it inside


def _warn(message: str) -> None:
    print_log(message, logger='current', level=logging.WARNING)


def to_openmmlab(checkpoint: Any, path: Path | None = None) -> Any:
    """A BEiT segmentor of a foreign dialect by the names of mmsegmentation; anything else as it is.

    What else the checkpoint holds stays. A plain state dict of a BEiT gets the ``meta`` that mmsegmentation asks for.

    Args:
        checkpoint: what a file held.
        path: that file or its folder, for the configuration of transformers beside it.

    Raises:
        CheckpointError: a segmentor of BEiT that cannot be translated, or a configuration that cannot be read.
    """
    try:
        state_dict = open_wrappers(checkpoint, 'the checkpoint')
        found = detect(state_dict)
    except CheckpointError:
        return checkpoint
    ours, segmentor = found.dialect in _OURS, found.task == 'segmentor'
    outer = found.prefix.removesuffix(found.layout.prefix)
    seen = checkpoint.get('state_dict', checkpoint)  # what mmengine looks at
    if _TRAINING in checkpoint:
        if ours and segmentor and isinstance(seen, OrderedDict):
            _offer_pyramid(seen)
        return checkpoint
    if ours and segmentor and _OUTER.fullmatch(outer) and all(name.startswith(outer) for name in state_dict):
        state_dict, outer = {name.removeprefix(outer): tensor for name, tensor in state_dict.items()}, ''
    if outer:  # a part of another model
        return checkpoint
    if not segmentor:
        if found.unknown:  # such as a ViT of timm, whose blocks have the same names
            return checkpoint
        if not ours:
            _warn(
                f'this is a {found.task} of {found.dialect}. Where a whole model is loaded (load_from), nothing of it '
                "will be found; dict(type='Pretrained', checkpoint=...) as init_cfg of BEiTBackbone takes it"
            )
        is_plain = all(isinstance(value, Tensor) for value in checkpoint.values())
        return {'state_dict': checkpoint, 'meta': {}} if is_plain else checkpoint
    if ours:  # mmengine takes off module. itself
        same = state_dict.keys() <= {str(name).removeprefix('module.') for name in seen}
        return _complete(checkpoint, seen if same else state_dict)
    strange = [name for name in found.unknown if name.startswith(found.prefix)]
    if strange:
        _warn(f'the encoder of this segmentor has {strange[0]}, so it is no BEiT, and is left as it is')
        return checkpoint
    is_hf = DIALECTS[found.dialect].tap_offset != 1 and path is not None
    config = config_beside(path / 'model' if path.is_dir() else path, state_dict) if is_hf else None
    grid = None if config is None else grid_of(config)
    try:
        converted = convert(state_dict, to='mmseg', grid=grid)
    except CheckpointError:  # what only our backbone has: absolute positions, a grid that is not square
        converted = convert(state_dict, to='openmmlab', grid=grid)
    _warn(f'read a segmentor of {found.dialect}{_trained_on(state_dict, found, config)}')
    return _complete(checkpoint, converted)


def _trained_on(state_dict: Mapping[str, Tensor], found: Detection, config: HFConfig | None) -> str:
    """What is known of the blocks that a segmentor reads, for the message."""
    stages = next((state_dict[n] for n, ours in read_names(state_dict, found).items() if ours == 'stages'), None)
    if stages is not None:
        taps = [int(stage) - 1 for stage in stages.flatten().tolist()]
    elif config is not None and config.taps is not None:
        taps = list(config.taps)
    elif DIALECTS[found.dialect].tap_offset != 1:
        return '; what its configuration calls out_indices=[3, 5, 7, 11] is out_indices=[1, 3, 5, 9] here'
    else:
        return '; the out_indices of its configuration are the same here'
    if min(taps, default=0) >= 0:
        return f', trained on out_indices={taps} of the backbone; set out_indices so'
    names = ['stem' if tap < 0 else f'stage{tap + 1}' for tap in taps]
    return f', trained on out_features={names} of the backbone; set out_features so'


def _complete(checkpoint: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The checkpoint with this state dict; ``init_model`` reads a ``meta`` that not every file has."""
    others = {name: value for name, value in checkpoint.items() if not isinstance(value, Tensor)}
    ordered = OrderedDict(state_dict)
    ordered._metadata = metadata_of(state_dict)  # type: ignore[attr-defined]
    _offer_pyramid(ordered)
    return {'meta': {}, **others, 'state_dict': ordered}


def _offer_pyramid(state_dict: OrderedDict[str, Any]) -> None:
    """Shows the backbone the pyramid of the neck and its grid: of the names it sees its own only, but its metadata."""
    pyramid = {name: tensor for name, tensor in state_dict.items() if name.startswith('neck.upsample_')}
    metadata = metadata_of(state_dict)
    noted = metadata_of(with_grid(state_dict, noted_grid(state_dict), 'backbone'))
    metadata['backbone'] = {**metadata.get('backbone', {}), **noted.get('backbone', {}), NECK: pyramid}
    state_dict._metadata = metadata  # type: ignore[attr-defined]


def _local(filename: str, map_location: Any = None) -> Any:
    path = Path(os.path.expanduser(filename))
    if path.is_dir() or path.suffix == '.safetensors':
        return to_openmmlab({'state_dict': read_source(path).state_dict, 'meta': {}}, path)
    if is_damaged(path):  # mmengine reads without comparing
        raise CheckpointError(f'{path} is damaged: its checksums do not fit; fetch or save it again')
    return to_openmmlab(load_from_local(filename, map_location), path)


def _http(filename: str, map_location: Any = None, **kwargs: Any) -> Any:
    return to_openmmlab(load_from_http(filename, map_location, **kwargs))


def read_every_dialect() -> None:
    """Registers the loaders; calling it again changes nothing."""
    CheckpointLoader.register_scheme('', _local, force=True)
    CheckpointLoader.register_scheme(('http://', 'https://'), _http, force=True)
