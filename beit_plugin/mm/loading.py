"""Lets mmengine read segmentors of every dialect: ``load_from``, ``init_model``, the inferencers, ``test.py``.

These set a whole model by its own names, and the parts that come by other names elsewhere (``beit.encoder...``,
``backbone.fpn1``) belong to several modules here, so no module could translate its own. mmengine lets a loader be
registered for a kind of path; ours reads as mmengine's does and then takes a BEiT segmentor of a foreign dialect to the
names of mmsegmentation. All other files come out as they are.
"""

import logging
import os
from typing import Any

from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader, load_from_http, load_from_local

from ..checkpoints import CheckpointError, convert, detect
from ..checkpoints.files import open_wrappers
from ..checkpoints.sources import read_source
from ..checkpoints.tables import DIALECTS

_OURS = ('mmseg', 'openmmlab')


def to_openmmlab(checkpoint: Any, out_indices: tuple[int, ...] | None = None) -> Any:
    """A BEiT segmentor of a foreign dialect by the names of mmsegmentation; anything else as it is.

    Args:
        checkpoint: what a file held.
        out_indices: 0-based blocks that the segmentor was trained on, where that is known.
    """
    try:
        state_dict = open_wrappers(checkpoint, 'the checkpoint')
        found = detect(state_dict)
    except CheckpointError:
        return checkpoint
    if found.task != 'segmentor':
        if found.dialect not in _OURS and not found.prefix.startswith('backbone.'):
            print_log(
                f'this is a {found.task} of {found.dialect}. Where a whole model is loaded (load_from), nothing of it '
                "will be found; dict(type='Pretrained', checkpoint=...) as init_cfg of BEiTBackbone takes it",
                logger='current',
                level=logging.WARNING,
            )
        return checkpoint
    if found.dialect in _OURS:
        return checkpoint
    try:
        converted = convert(state_dict, to='mmseg')
    except CheckpointError:  # what only our backbone has: absolute positions, a grid that is not square
        converted = convert(state_dict, to='openmmlab')
    message = f'read a segmentor of {found.dialect}'
    if out_indices is not None:
        message += f', trained on out_indices={list(out_indices)} of the backbone'
    elif DIALECTS[found.dialect].tap_offset != 1:
        message += '; what its configuration calls out_indices=[3, 5, 7, 11] is out_indices=[1, 3, 5, 9] here'
    print_log(message, logger='current', level=logging.WARNING)
    meta = checkpoint.get('meta', {}) if isinstance(checkpoint, dict) else {}
    return {'state_dict': converted, 'meta': meta}


def _local(filename: str, map_location: Any = None) -> Any:
    if os.path.isdir(filename) or filename.endswith('.safetensors'):
        source = read_source(filename)
        taps = None if source.config is None else source.config.taps
        return to_openmmlab({'state_dict': source.state_dict, 'meta': {}}, taps)
    return to_openmmlab(load_from_local(filename, map_location))


def _http(filename: str, map_location: Any = None, **kwargs: Any) -> Any:
    return to_openmmlab(load_from_http(filename, map_location, **kwargs))


def read_every_dialect() -> None:
    """Registers the loaders; calling it again changes nothing."""
    CheckpointLoader.register_scheme('', _local, force=True)
    CheckpointLoader.register_scheme(('http://', 'https://'), _http, force=True)
