"""Recognises the dialect of a BEiT state dict and takes it to our names and back."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.relative_position import relative_position_index
from .errors import CheckpointError
from .grids import INDEX, TABLE, noted_grid, stated_grid, table_grid, with_grid
from .tables import DIALECTS, PARTS, TASKS, Dialect, Layout, Row

__all__ = ['CheckpointError', 'Detection', 'convert', 'detect', 'from_native', 'read_names', 'task_of', 'to_native']

StateDict = dict[str, Tensor]
SHARED_TABLE = f'rel_pos_bias.{TABLE}'
_VALUES = {
    '{p}': ('weight', 'bias'),
    '{b}': ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'),
    '{n}': ('bn', 'gn', 'in', 'ln'),
}
_PARTS = 'qkv'
_SHOWN = 6  # names in an error message
_AN = {'encoder': 'an'}


class Detection(NamedTuple):
    """What a state dict is."""

    dialect: str  # a key of DIALECTS
    task: str  # one of TASKS, by what is in it
    prefix: str  # what stands before the names of the encoder
    layout: Layout  # the arrangement that its names follow
    unknown: tuple[str, ...]  # names that no row of the tables matches


def some(names: Iterable[str]) -> str:
    """The first of the names, for a message."""
    names = list(names)
    more = f', ... ({len(names)} in all)' if len(names) > _SHOWN else ''
    return ', '.join(names[:_SHOWN]) + more


@lru_cache
def _lookup(rows: tuple[Row, ...], reverse: bool = False) -> dict[str, str | None]:
    """The rows as a dict with only ``{i}`` left open; of several rows with the same left side the first counts."""
    table: dict[str, str | None] = {}
    for theirs, ours in rows:
        used = [placeholder for placeholder in _VALUES if placeholder in theirs]
        for values in product(*(_VALUES[placeholder] for placeholder in used)):
            left, right = theirs, ours
            for placeholder, value in zip(used, values, strict=True):
                left = left.replace(placeholder, value)
                right = None if right is None else right.replace(placeholder, value)
            if not reverse:
                table.setdefault(left, right)
            elif right is not None:
                table.setdefault(right, left)
    return table


def _rename(name: str, table: Mapping[str, str | None]) -> tuple[bool, str | None]:
    """Whether the table knows the name, and the other side of its row."""
    if name in table:
        return True, table[name]
    parts = name.split('.')
    for k, part in enumerate(parts):
        if part.isdecimal() and part.isascii():
            template = '.'.join((*parts[:k], '{i}', *parts[k + 1 :]))
            if template in table:
                target = table[template]
                return True, None if target is None else target.replace('{i}', part)
    return False, None


def _read(names: Sequence[str], dialect: Dialect, layout: Layout, prefix: str) -> dict[str, str | None]:
    """Our name, or None where it is dropped, of each name that dialect and layout know."""
    encoder, outside = _lookup(dialect.rows + dialect.leftovers), _lookup(layout.rows)
    outer = prefix.removesuffix(layout.prefix)
    targets = {}
    for name in names:
        if not name.startswith(outer):
            continue
        known, target = _rename(name[len(outer) :], outside)
        if not known and name.startswith(prefix):
            known, target = _rename(name[len(prefix) :], encoder)
        if known or name[len(outer) :].startswith(layout.dropped or '\0'):
            targets[name] = target
    return targets


def task_of(names: Iterable[str]) -> str:
    """The task, one of ``TASKS``, that a model with parameters of these names (ours) is for."""
    parts = {name.split('.')[0] for name in names}
    by_part = {'decode_head': 'segmentor', 'lm_head': 'mim', 'head': 'classifier', 'pyramid': 'backbone'}
    return next((task for part, task in by_part.items() if part in parts), 'encoder')


def detect(state_dict: Mapping[str, Tensor] | Iterable[str]) -> Detection:
    """Recognises dialect and task of a state dict by its names.

    Dialects that name an encoder alike (timm's, unilm's and ours) are told apart by what else is there; where nothing
    else is, it is called timm's.

    Args:
        state_dict: names to tensors, or the names alone.

    Raises:
        CheckpointError: no BEiT encoder is in it.
    """
    names = [name for name in state_dict if isinstance(name, str)]
    best: tuple[int, Detection] | None = None
    for dialect in DIALECTS.values():
        pattern = re.compile(r'((?:\w+\.)*?)' + re.escape(dialect.signature).replace(r'\{i\}', r'\d+'))
        prefixes = dict.fromkeys(match[1] for match in map(pattern.fullmatch, names) if match)
        for prefix in list(prefixes)[:4]:  # more encoders than that in one file are somebody's joke
            for layout in dialect.layouts.values():
                if not prefix.endswith(layout.prefix):
                    continue
                targets = _read(names, dialect, layout, prefix)
                missed = len(names) - len(targets)
                if best is None or missed < best[0]:
                    task = task_of(target for target in targets.values() if target is not None)
                    unknown = tuple(name for name in names if name not in targets)
                    best = missed, Detection(dialect.name, task, prefix, layout, unknown)
    if best is None:
        shown = ', '.join(names[:3]) or 'nothing'
        raise CheckpointError(
            f'no BEiT encoder of a known dialect ({", ".join(DIALECTS)}) in this state dict; its names begin with '
            f'{shown}'
        )
    return best[1]


def read_names(names: Iterable[str], found: Detection) -> dict[str, str | None]:
    """Our name of each known name of what ``detect`` found; None for those that are dropped on purpose."""
    return _read(list(names), DIALECTS[found.dialect], found.layout, found.prefix)


def to_native(state_dict: Mapping[str, Tensor]) -> tuple[StateDict, StateDict]:
    """Takes a checkpoint of any dialect to our names.

    Returns:
        The parameters by our names (see ``tables``), and everything that no row matches, by its own name.

    Raises:
        CheckpointError: no BEiT encoder, a key bias that is not zero, two entries for one parameter, or a part of
            q, k, v that is missing or of another shape.
    """
    targets = read_names(state_dict, detect(state_dict))
    native: StateDict = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, target in targets.items():
        tensor = state_dict[name]
        if target is None:
            continue
        if target.endswith('.k_bias'):
            if tensor.any():
                raise CheckpointError(f'{name} is not zero; BEiT has no key bias, so this is another model')
            continue
        whole, _, part = target.partition('#')
        place = parts.setdefault(whole, {}) if part else native
        if (part or target) in place:
            raise CheckpointError(f'{name} is a second entry for {target}; one of the two must go')
        place[part or target] = tensor
    _check_depth(native)
    for whole, found in parts.items():
        missing = [part for part in _PARTS if part not in found]
        if missing:
            raise CheckpointError(f'{whole} needs q, k and v, but {", ".join(missing)} is missing')
        kinds = {f'{tensor.dtype} {tuple(tensor.shape)}' for tensor in found.values()}
        if len(kinds) > 1 or any(tensor.ndim not in (1, 2) for tensor in found.values()):
            raise CheckpointError(
                f'q, k and v of {whole} must have one shape and dtype, got {", ".join(sorted(kinds))}'
            )
        if whole in native:
            raise CheckpointError(f'{whole} is there whole and in parts; one of the two must go')
        native[whole] = torch.cat([found[part] for part in _PARTS])
    return native, {name: tensor for name, tensor in state_dict.items() if name not in targets}


def _check_depth(native: Iterable[str]) -> None:
    numbers = {name.split('.')[1] for name in native if name.startswith('blocks.')}
    if numbers and numbers != {str(i) for i in range(len(numbers))}:
        gap = next(i for i in range(len(numbers) + 1) if str(i) not in numbers)
        raise CheckpointError(f'blocks are numbered from 0 without a gap, but there is no block {gap}')


def expand_shared_table(native: Mapping[str, Tensor], depth: int) -> StateDict:
    """Gives the shared bias table to each of ``depth`` blocks, on top of what a block has; as fine-tuning starts."""
    expanded = dict(native)
    shared = expanded.pop(SHARED_TABLE, None)
    for i in range(depth if shared is not None else 0):
        name = f'blocks.{i}.attn.{TABLE}'
        if name in native and native[name].shape != shared.shape:  # type: ignore[union-attr]
            raise CheckpointError(f'{name} and the shared bias table have different shapes, so one of them is wrong')
        expanded[name] = shared.clone() if name not in native else native[name] + shared  # type: ignore[union-attr]
    return expanded


def depth_of(native: Iterable[str]) -> int:
    """Number of encoder blocks that the names (ours) speak of."""
    return len({name.split('.')[1] for name in native if name.startswith('blocks.')})


def from_native(
    native: Mapping[str, Tensor], dialect: str, task: str | None = None, grid: tuple[int, int] | None = None
) -> StateDict:
    """Takes parameters by our names to another dialect.

    Where the dialect has no shared bias table, each block gets it, which is the same function.

    Args:
        native: parameters by our names.
        dialect: one of ``tables.DIALECTS``.
        task: arrange them as the model of this task; by default the one that they are for.
        grid: (h, w) in patches of the bias tables, for the index that some hosts want; needed where it is not square.

    Raises:
        CheckpointError: an unknown dialect or task, or parameters that the dialect has no place for.
    """
    if dialect not in DIALECTS:
        raise CheckpointError(f'unknown dialect {dialect!r}; known are {", ".join(DIALECTS)}')
    host = DIALECTS[dialect]
    task = task_of(native) if task is None else task
    if task not in host.layouts:
        known = ', '.join(host.layouts if task in TASKS else TASKS)
        raise CheckpointError(f'{dialect} has no {task}, only {known}; name what to leave out by drop=')
    has_branch = any(name.startswith('cls_pt_layers.') for name in native)
    layout = host.layouts.get(f'{task} v2', host.layouts[task]) if has_branch else host.layouts[task]
    encoder, outside = _lookup(host.rows, reverse=True), _lookup(layout.rows, reverse=True)
    if SHARED_TABLE in native and SHARED_TABLE not in encoder:
        native = expand_shared_table(native, depth_of(native))
    result: StateDict = {}
    homeless = []
    for name, tensor in native.items():
        known, target = _rename(name, outside)
        if not known:
            known, target = _rename(name, encoder)
            target = f'{layout.prefix}{target}'
        thirds = [_rename(f'{name}#{part}', encoder) for part in _PARTS]
        if known:
            result[str(target)] = tensor
        elif all(found for found, _ in thirds):
            if not tensor.ndim or tensor.shape[0] % 3:
                raise CheckpointError(f'{name} must hold q, k and v one below the other, got {tuple(tensor.shape)}')
            for (_, third), part in zip(thirds, tensor.chunk(3), strict=True):
                result[f'{layout.prefix}{third}'] = part.clone()
        elif name != 'stages':  # which blocks a segmentor reads is a matter of configuration everywhere else
            homeless.append(name)
    if homeless:
        whose = f'{_AN.get(task, "a")} {task} of {dialect}'
        raise CheckpointError(f'{whose} has no place for {some(homeless)}; name what to leave out by drop=')
    if host.index:
        for name in [name for name in result if name.endswith(TABLE)]:
            if result[name].ndim != 2:
                raise CheckpointError(f'{name} must have two dimensions, got shape {tuple(result[name].shape)}')
            h, w = table_grid(result[name].shape[0], grid)
            result[name.replace(TABLE, INDEX)] = relative_position_index(h, w)
    return result


def dropper(drop: Sequence[str]) -> re.Pattern[str]:
    """Matches the names that ``drop`` lists: each a name, or a beginning up to a dot.

    Raises:
        CheckpointError: a single string instead of a sequence of them.
    """
    if isinstance(drop, str):
        raise CheckpointError(f'drop must be a sequence of names, got the string {drop!r}; write drop=({drop!r},)')
    return re.compile('|'.join(rf'{re.escape(name.rstrip("."))}(?:\..*)?' for name in drop) or r'(?!)', re.DOTALL)


def check_drop(drop: Sequence[str], names: Iterable[str]) -> None:
    """Raises CheckpointError when an entry of ``drop`` is neither a part that there may be nor one of the names."""
    names = [str(name) for name in names]
    unusual = [entry for entry in drop if entry.rstrip('.') not in PARTS]  # a typo would go unnoticed
    idle = [entry for entry in unusual if not any(map(dropper((entry,)).fullmatch, names))]
    if idle:
        raise CheckpointError(f'drop names {some(idle)}, which the checkpoint does not have')


def convert(
    state_dict: Mapping[str, Tensor],
    *,
    to: str,
    drop: Sequence[str] = (),
    task: str | None = None,
    grid: tuple[int, int] | None = None,
) -> StateDict:
    """Takes a checkpoint of any dialect to another.

    Args:
        state_dict: names to tensors.
        to: one of ``tables.DIALECTS``.
        drop: names to leave out, by our names or by those of the source; ``'head'`` stands for all that begins with
            ``head.``.
        task: see ``from_native``; needed for the ``backbone`` of transformers in memory where it has no pyramid.
        grid: see ``from_native``; by default the one that the source states; see ``load``.

    Raises:
        CheckpointError: a name that no table knows and ``drop`` does not list, one in ``drop`` that is not there, or
            see ``to_native``, ``from_native``.
    """
    leave_out = dropper(drop)
    wanted = {name: t for name, t in state_dict.items() if isinstance(name, str) and not leave_out.fullmatch(name)}
    native, rest = to_native(wanted)
    check_drop(drop, (*state_dict, *native))
    if rest:
        raise CheckpointError(f'no table knows {some(rest)}; name what to leave out by drop=')
    native = {name: t for name, t in native.items() if not leave_out.fullmatch(name)}
    grid = grid or stated_grid(wanted) or noted_grid(state_dict)
    converted = from_native(native, to, task, grid)
    return with_grid(converted, grid, DIALECTS[to].layouts[task or task_of(native)].prefix)
