"""Loads a checkpoint of any dialect into a model, all of it or nothing, and saves a model in any dialect."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from .convert import CheckpointError, StateDict, check_drop, detect, dropper, from_native, some, task_of
from .files import SUFFIXES, is_file_name, write_atomically, write_state_dict
from .fit import encoder_of, fit, own_names, part_of
from .grids import with_grid
from .hf_config import write_config
from .sources import read_source
from .tables import DIALECTS

__all__ = ['LoadReport', 'load', 'save']


class LoadReport(NamedTuple):
    """What ``load`` did."""

    source: str
    dialect: str
    task: str  # what the checkpoint was made for
    loaded: int  # parameters and buffers that were set
    fresh: tuple[str, ...]  # parts of the model that the checkpoint does not have; they keep their values
    dropped: tuple[str, ...]  # parts of the checkpoint that the model does not have, or that were to be left out
    out_indices: tuple[int, ...] | None  # 0-based blocks that a segmentor reads, as its dialect counts them

    def __str__(self) -> str:
        lines = [f'{self.source}: a {self.task} of {self.dialect}, {self.loaded} tensors loaded']
        for what, parts in (('not in the checkpoint', self.fresh), ('left out', self.dropped)):
            if parts:
                lines.append(f'{what}: {", ".join(parts)}')
        if self.out_indices is not None:
            lines.append(f'reads the outputs of blocks {self.out_indices}, counted from 0')
        return '; '.join(lines)


def _values(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model that has values.

    Raises:
        CheckpointError: it is on the meta device.
    """
    current = model.state_dict()
    empty = [name for name, tensor in current.items() if tensor.is_meta]
    if empty:
        raise CheckpointError(f"{some(empty)} of the model have no values yet; call model.to_empty(device='cpu') first")
    return current


def _parts(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part_of(name) for name in names if name != 'stages'))


def _misfits(state: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the shapes and types of the tensors."""
    wrong = []
    for name, tensor in state.items():
        if tensor.shape != current[name].shape:
            hint = ' (another classifier: leave it out by drop)' if 'head.' in name or 'conv_seg' in name else ''
            wrong.append(f'{name} is {tuple(tensor.shape)} instead of {tuple(current[name].shape)}{hint}')
        elif tensor.is_floating_point() != current[name].is_floating_point():
            wrong.append(f'{name} is {tensor.dtype} instead of {current[name].dtype}')
    return wrong


def load(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    drop: Sequence[str] = (),
    grid: tuple[int, int] | None = None,
) -> LoadReport:
    """Loads a checkpoint of any dialect, at any resolution, into a model of this package.

    Every tensor of the checkpoint is loaded, or belongs to a part that the model does not have as a whole (the head of
    the pre-training, a decode head, ...), or is named by ``drop``; every parameter of the encoder is set. Parts of the
    model that the checkpoint does not have as a whole keep their values. Anything else is an error, and then the model
    is as it was.

    Args:
        model: a ``Beit`` or what holds one: a backbone, a segmentor, mmsegmentation's ``EncoderDecoder`` with our
            parts.
        source: see ``read_source``.
        drop: names to leave out, by our names or by those of the source; ``'head'`` stands for all that begins with
            ``head.``, such as the classifier of another number of classes.
        grid: (h, w) in patches that it was trained at, where the source does not state it and it is not square, or
            where its tables have the length of the model's grid and of a square one.

    Raises:
        CheckpointError: nothing was loaded, and why.
    """
    read = read_source(source)
    try:
        return _load(model, read.name, read.state_dict, drop, grid or read.grid, read.config)
    except CheckpointError as error:
        raise CheckpointError(f'{read.name}: {error}') from error


def _load(
    model: nn.Module, name: str, state_dict: StateDict, drop: Sequence[str], grid: tuple[int, int] | None, config: Any
) -> LoadReport:
    leave_out = dropper(drop)
    if grid is not None and (len(grid) != 2 or not all(isinstance(n, int) and n > 0 for n in grid)):
        raise CheckpointError(f'grid must be two whole numbers of patches (h, w), got {grid!r}')
    out_indices = None if config is None else config.taps
    fitted = fit(state_dict, model, grid, out_indices, leave_out, ask=True)
    current, given = _values(model), fitted.given
    check_drop(drop, (*state_dict, *fitted.dropped))
    problems = fitted.complaints
    if problems:
        raise CheckpointError('; '.join(problems) + '; name what to leave out by drop=, or build the model to fit')
    wrong = _misfits(fitted.state, current)
    if wrong:
        raise CheckpointError(some(wrong))
    encoder: Any = encoder_of(model)
    if 'decode_head' in given and 'stages' in fitted.dropped and not leave_out.fullmatch('stages'):
        reads = tuple(fitted.dropped['stages'].tolist())
        if reads != encoder.stages:
            raise CheckpointError(
                f'a segmentor of {fitted.found.dialect} reads the outputs of blocks {_blocks(reads)}, this model those '
                f'of {_blocks(encoder.stages)}; build it with out_indices={_blocks(reads)}, or keep its own by '
                'drop=("stages",)'
            )
    current.update(fitted.state)  # its metadata notes the grid of the model
    model.load_state_dict(current, strict=True)
    return LoadReport(
        name,
        fitted.found.dialect,
        fitted.found.task,
        len(fitted.state),
        _parts(fitted.fresh),
        _parts(fitted.dropped),
        _blocks(encoder.stages) if 'decode_head' in given else None,
    )


def _blocks(stages: Sequence[int]) -> tuple[int, ...]:
    return tuple(stage - 1 for stage in stages)


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    dialect: str = 'native',
    drop: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> None:
    """Saves the parameters of a model in any dialect; each file appears whole or not at all.

    Args:
        model: as for ``load``.
        path: a file (``files.SUFFIXES``), safetensors by that suffix, else torch's format. For ``transformers`` any
            other path is a folder, which its ``from_pretrained`` reads: it gets the configuration too.
        dialect: one of ``tables.DIALECTS``; ``native`` keeps the names of the model.
        config: configuration of transformers that the model was made from; what a model does not know (names of labels,
            options of other tasks) is taken from it.
        drop: our names to leave out, such as ``('mask_token', 'lm_head')`` for dialects that have no place for them.

    Raises:
        CheckpointError: the dialect has no place for a parameter or an option; nothing was written.
        OSError: the place cannot be written; an old file is still there.
    """
    path = Path(path)
    leave_out = dropper(drop)
    encoder: Any = encoder_of(model)
    current = _values(model)
    own = {ours: name for ours, name in own_names(model).items() if not leave_out.fullmatch(ours)}
    h, w = encoder.window_size
    if dialect == 'native':
        state = {name: current[name] for name in own.values()}
    else:
        is_backbone = hasattr(encoder, 'stages') and task_of(own) == 'encoder'  # also where it has no pyramid
        task = 'backbone' if is_backbone and 'backbone' in getattr(DIALECTS.get(dialect), 'layouts', ()) else None
        state = from_native({ours: current[name] for ours, name in own.items()}, dialect, task, (h, w))
    state = with_grid(state, (h, w), detect(state).prefix)
    metadata = {'grid': f'{h}x{w}', 'dialect': dialect}
    if is_file_name(path):
        write_state_dict(state, path, metadata)
        return
    if dialect != 'transformers':
        raise CheckpointError(f'{path} is no name of a checkpoint file; end it in one of {", ".join(SUFFIXES)}')
    text = json.dumps(write_config(model, config), indent=2, sort_keys=True) + '\n'
    path.mkdir(parents=True, exist_ok=True)
    write_state_dict(state, path / 'model.safetensors', metadata)
    write_atomically(path / 'config.json', lambda temporary: Path(temporary).write_text(text))
