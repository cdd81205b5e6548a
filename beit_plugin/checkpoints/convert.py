"""Recognises the dialect of a BEiT state dict and takes it to our names and back."""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from .tables import DIALECTS, Dialect, Row

__all__ = ['CheckpointError', 'detect', 'from_native', 'to_native']

StateDict = dict[str, Tensor]
_PLACEHOLDERS = {'{i}': r'(?P<i>\d+)', '{p}': r'(?P<p>weight|bias)'}
_PARTS = 'qkv'


class CheckpointError(ValueError):
    """A checkpoint that is none, is of no known dialect, or does not fit."""


@lru_cache
def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for placeholder, group in _PLACEHOLDERS.items():
        pattern = pattern.replace(re.escape(placeholder), group)
    return re.compile(pattern)


@lru_cache
def _compiled(rows: tuple[Row, ...], reverse: bool) -> tuple[tuple[re.Pattern[str], str | None], ...]:
    if not reverse:
        return tuple((_pattern(theirs), ours) for theirs, ours in rows)
    return tuple((_pattern(ours), theirs) for theirs, ours in rows if ours is not None)


def _rename(name: str, rows: tuple[Row, ...], reverse: bool = False) -> tuple[bool, str | None]:
    """Whether the table knows the name, and the other side of its row."""
    for pattern, target in _compiled(rows, reverse):
        match = pattern.fullmatch(name)
        if match:
            return True, target.format(**match.groupdict()) if target is not None else None
    return False, None


def detect(names: Iterable[str]) -> tuple[Dialect, str]:
    """The dialect of the names in a state dict, and the prefix of its encoder (``backbone.``, ``beit.``, or nothing).

    Raises:
        CheckpointError: no BEiT encoder is in it.
    """
    names = list(names)
    for dialect in DIALECTS.values():
        pattern = re.compile(r'(?P<prefix>(?:\w+\.)*?)' + _pattern(dialect.signature).pattern)
        for name in names:
            match = pattern.fullmatch(name)
            if match:
                return dialect, match['prefix']
    shown = ', '.join(names[:3]) or 'nothing'
    raise CheckpointError(
        f'no BEiT encoder of a known dialect ({", ".join(DIALECTS)}) in this state dict; its names begin with {shown}'
    )


def to_native(state_dict: Mapping[str, Tensor]) -> tuple[StateDict, StateDict]:
    """Takes the encoder of any dialect to our names.

    Returns:
        The parameters of encoder and classifier by our names (without prefix), and everything that no row of the table
        matches, by its own name.

    Raises:
        CheckpointError: no BEiT encoder, a key bias that is not zero, or a part of q, k, v that is missing.
    """
    dialect, prefix = detect(state_dict)
    native: StateDict = {}
    rest: StateDict = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state_dict.items():
        known, target = _rename(name.removeprefix(prefix), dialect.rows) if name.startswith(prefix) else (False, None)
        if not known and prefix:
            known, target = _rename(name, dialect.task_rows)
        if not known:
            rest[name] = tensor
        elif target is not None and target.endswith('.k_bias'):
            if tensor.any():
                raise CheckpointError(f'{name} is not zero; BEiT has no key bias, so this is another model')
        elif target is not None and '#' in target:
            whole, part = target.split('#')
            parts.setdefault(whole, {})[part] = tensor
        elif target is not None:
            native[target] = tensor
    for whole, found in parts.items():
        missing = [part for part in _PARTS if part not in found]
        if missing:
            raise CheckpointError(f'{whole} needs q, k and v, but {", ".join(missing)} is missing')
        native[whole] = torch.cat([found[part] for part in _PARTS])
    return native, rest


def from_native(native: Mapping[str, Tensor], dialect: str, prefix: str = '') -> StateDict:
    """Takes an encoder by our names to another dialect.

    Raises:
        CheckpointError: an unknown dialect, or a parameter that the dialect cannot hold.
    """
    if dialect not in DIALECTS:
        raise CheckpointError(f'unknown dialect {dialect!r}; known are {", ".join(DIALECTS)}')
    rows = DIALECTS[dialect].rows
    result: StateDict = {}
    for name, tensor in native.items():
        known, target = _rename(name, rows, reverse=True)
        thirds = [_rename(f'{name}#{part}', rows, reverse=True) for part in _PARTS]
        if known and target is not None:
            result[prefix + target] = tensor
        elif all(found for found, _ in thirds):
            for (_, target), third in zip(thirds, tensor.chunk(3), strict=True):
                result[f'{prefix}{target}'] = third.clone()
        else:
            raise CheckpointError(f'{dialect} has no place for {name}')
    return result
