"""What a checkpoint holds, told from its names and shapes: task, sizes, resolution, heads, blocks that are read."""

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .convert import SHARED_TABLE, CheckpointError, Detection, depth_of, detect, read_names, to_native
from .fit import part_of
from .grids import TABLE, noted_grid, stated_grid, table_grid
from .hf_config import HFConfig
from .hf_options import ENCODER
from .tables import DIALECTS, PARTS

__all__ = ['Description', 'all_arguments', 'describe', 'tap_rule', 'taps_in', 'taps_of']

_MODELS = {
    'mim': 'BeitForMaskedImageModeling',
    'backbone': 'BeitBackbone',
    'segmentor': 'build_segmentor',
}
_POOLS = 4  # of UPerNet in every release: 1, 2, 3, 6


class Description(NamedTuple):
    """A checkpoint of a BEiT.

    Attributes:
        dialect, task, prefix: see ``Detection``.
        unknown: names that no table knows.
        grid: (h, w) in patches that it was trained at; None where nothing in it depends on the grid.
        model: what builds ours: ``Beit``, ``BeitForMaskedImageModeling``, ``BeitV2ForMaskedImageModeling``,
            ``build_segmentor``, or ``BeitBackbone`` for an encoder with a pyramid or without any norm at its end.
        arguments: its keyword arguments, as far as they can be told.
        untold: those that neither the weights tell nor a default can replace: ``num_heads`` without a bias table.
        parts: what is in it beside the encoder, with the number of tensors.
        parameters: number of values in it.
        taps: blocks whose outputs a segmentor reads, from 0, -1 for the embeddings; None where the weights do not say.
    """

    dialect: str
    task: str
    prefix: str
    unknown: tuple[str, ...]
    grid: tuple[int, int] | None
    model: str
    arguments: dict[str, Any]
    untold: tuple[str, ...]
    parts: dict[str, int]
    parameters: int
    taps: tuple[int, ...] | None


def describe(state_dict: Mapping[str, Tensor], grid: tuple[int, int] | None = None) -> Description:
    """Tells what a checkpoint holds.

    Args:
        state_dict: names to tensors, of any dialect.
        grid: (h, w) in patches that it was trained at; needed where it was not square and it does not say so.

    Raises:
        CheckpointError: no BEiT, something that tells a size is missing or of another shape, or the grid cannot be
            told.
    """
    found = detect(state_dict)
    native, _ = to_native(state_dict)
    dim, channels, patch_h, patch_w = _shape(native, 'patch_embed.proj.weight', 4)
    own = [name for name in native if name.endswith(TABLE) and name.startswith('blocks.')]
    tables = [_shape(native, name, 2) for name in (*own, *([SHARED_TABLE] if SHARED_TABLE in native else []))]
    grid = _grid(native, tables, grid or stated_grid(state_dict) or noted_grid(state_dict))
    arguments: dict[str, Any] = {
        'embed_dim': dim,
        'depth': depth_of(native),
        'mlp_ratio': _shape(native, 'blocks.0.mlp.fc1.weight', 2)[0] / dim,
        'patch_size': (patch_h, patch_w),
        'in_chans': channels,
        'use_mask_token': 'mask_token' in native,
        'use_abs_pos_emb': 'pos_embed' in native,
        'use_rel_pos_bias': bool(own),
        'use_shared_rel_pos_bias': SHARED_TABLE in native,
        'qkv_bias': 'blocks.0.attn.q_bias' in native,
        'patch_norm': 'patch_embed.norm.weight' in native,
        'init_values': _layer_scale(native, 'blocks.0.gamma_1'),
    }
    if tables:
        arguments['num_heads'] = tables[0][1]
    if grid is not None:
        arguments['img_size'] = grid[0] * patch_h, grid[1] * patch_w
    taps = taps_of(state_dict, found)
    parts = {part: sum(part_of(name) == part for name in native) for part in PARTS}
    parts = {part: count for part, count in parts.items() if count}
    model = _MODELS.get(found.task, 'Beit' if {'norm', 'fc_norm', 'head'} & parts.keys() else 'BeitBackbone')
    model = model.replace('BeitFor', 'BeitV2For') if 'cls_pt_layers' in parts else model
    arguments |= _of_model(native, model, taps)
    untold = [] if tables else ['num_heads']
    if model == 'build_segmentor' and len(_numbers(native, 'decode_head.psp_modules.')) != _POOLS:
        untold.append('pool_scales')
    return Description(
        found.dialect,
        found.task,
        found.prefix,
        found.unknown,
        grid,
        model,
        arguments,
        tuple(untold),
        parts,
        sum(tensor.numel() for tensor in native.values()),
        taps,
    )


def _shape(native: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    tensor = native.get(name)
    if tensor is None or tensor.ndim != ndim or not all(tensor.shape):
        got = 'nothing' if tensor is None else f'shape {tuple(tensor.shape)}'
        plural = 's, none of them 0' if ndim > 1 else ', not 0'
        raise CheckpointError(f'expected {name} with {ndim} dimension{plural}, got {got}; the checkpoint is not whole')
    return tuple(tensor.shape)


def _layer_scale(native: Mapping[str, Tensor], name: str) -> float | None:
    if name not in native:
        return None
    _shape(native, name, 1)
    gamma = native[name]
    if not gamma.is_floating_point() or gamma.is_meta or gamma.layout != torch.strided:
        kind = f'{gamma.dtype}, {gamma.layout}, on {gamma.device}'
        raise CheckpointError(f'expected {name} as a plain tensor of floating point numbers, got one of {kind}')
    return float(gamma.float().abs().mean()) or 1e-5  # 0 would build a model without


def _numbers(native: Mapping[str, Tensor], prefix: str) -> set[str]:
    return {name.removeprefix(prefix).split('.')[0] for name in native if name.startswith(prefix)}


def _grid(
    native: Mapping[str, Tensor], tables: Sequence[tuple[int, ...]], grid: tuple[int, int] | None
) -> tuple[int, int] | None:
    if grid is not None and (len(grid) != 2 or min(grid) < 1):
        raise CheckpointError(f'grid must be the (h, w) number of patches, each at least 1, got {grid}')
    if tables:
        grid = table_grid(tables[0][0], grid)
    if 'pos_embed' not in native:
        return grid
    tokens = _shape(native, 'pos_embed', 3)[1]
    side = isqrt(tokens - 1)
    h, w = grid = (side, side) if grid is None else grid
    if tokens != 1 + h * w or not side:
        where = f'a {h}x{w} grid' if tables else f'the {h}x{w} grid that was given'
        raise CheckpointError(
            f'expected pos_embed with 1 + h * w tokens, got shape {tuple(native["pos_embed"].shape)}, which is not of '
            f'{"a square grid" if side == h == w else where}; give the grid that it was trained at as grid=(h, w)'
        )
    return grid


def _of_model(native: Mapping[str, Tensor], model: str, taps: tuple[int, ...] | None) -> dict[str, Any]:
    """The arguments that only this model has."""
    if model == 'build_segmentor':
        classes, channels, *_ = _shape(native, 'decode_head.conv_seg.weight', 4)
        has_auxiliary = any(name.startswith('auxiliary_head.') for name in native)
        head = {'num_classes': classes, 'channels': channels, 'use_auxiliary_head': has_auxiliary}
        if taps is not None:
            names = {'out_features': tuple(f'stage{tap + 1}' if tap >= 0 else 'stem' for tap in taps)}
            head |= names if -1 in taps else {'out_indices': taps}
        if has_auxiliary:
            head |= {
                'auxiliary_channels': _shape(native, 'auxiliary_head.conv_seg.weight', 4)[1],
                'auxiliary_num_convs': len(_numbers(native, 'auxiliary_head.convs.')),
                'auxiliary_concat_input': 'auxiliary_head.conv_cat.conv.weight' in native,
            }
        return head
    if model == 'BeitBackbone':
        return {'add_fpn': any(name.startswith('pyramid.') for name in native), 'final_norm': 'norm.weight' in native}
    if model != 'Beit':
        branch = _numbers(native, 'cls_pt_layers.')
        return {
            'vocab_size': _shape(native, 'lm_head.weight', 2)[0],
            **({'head_layers': len(branch)} if branch else {}),
        }
    pooled = 'fc_norm.weight' in native or 'norm.weight' not in native
    classes = _shape(native, 'head.weight', 2)[0] if 'head.weight' in native else 0
    return {'num_classes': classes, 'global_pool': 'avg' if pooled else 'token'}


def all_arguments(what: Description, config: HFConfig | None) -> dict[str, Any]:
    """The arguments of ``what.model`` that the weights tell, and those that a configuration beside them tells."""
    if config is None:
        return dict(what.arguments)
    encoder = {'mlp_ratio', 'img_size', *(name for row in ENCODER for name in row.ours.split())}
    is_same = config.task == what.task or (config.task, what.model) == ('backbone', 'BeitBackbone')
    foreign = {'num_classes', 'global_pool'} if what.model == 'BeitBackbone' else set()
    told = {name: value for name, value in config.arguments.items() if is_same or name in encoder}
    return what.arguments | {name: value for name, value in told.items() if name not in foreign}


def taps_of(state_dict: Mapping[str, Tensor], found: Detection) -> tuple[int, ...] | None:
    """The blocks that a segmentor of ours notes, from 0, -1 for the embeddings; None where nothing is noted.

    Args:
        state_dict: names to tensors, of any dialect.
        found: what ``detect`` says of it.

    Raises:
        CheckpointError: the note is not one of four blocks that the checkpoint has.
    """
    ours = read_names(state_dict, found)
    name = next((name for name, target in ours.items() if target == 'stages'), None)
    if name is None:
        return None
    stages, depth = state_dict[name], depth_of(target for target in ours.values() if target is not None)
    if stages.is_meta or stages.is_floating_point() or tuple(stages.shape) != (4,):
        got = f'{stages.dtype} of shape {tuple(stages.shape)} on {stages.device}'
    elif not all(0 <= stage <= depth for stage in stages.tolist()):
        got = f'{stages.tolist()}'
    else:
        return tuple(int(stage) - 1 for stage in stages.tolist())
    raise CheckpointError(f'expected {name} as four numbers of blocks run, from 0 to {depth}, got {got}')


def taps_in(taps: Sequence[int], depth: int, dialect: str) -> list[int] | None:
    """The ``out_indices`` by which a segmentor of a dialect reads these blocks; None where it cannot.

    Args:
        taps: blocks, from 0, -1 for the embeddings.
        depth: number of blocks that there are.
        dialect: one of ``tables.DIALECTS``.
    """
    offset = DIALECTS[dialect].tap_offset
    numbers = [tap + 1 - offset for tap in taps]
    return numbers if all(0 <= number <= depth - (offset == 1) for number in numbers) else None


def tap_rule(dialect: str) -> str:
    """How a dialect counts the blocks that a segmentor reads, for files that do not say which."""
    blocks = (3, 5, 7, 11) if DIALECTS[dialect].tap_offset == 1 else (1, 3, 5, 9)
    return f'out_indices={taps_in(blocks, 12, dialect)} of {dialect} are blocks {blocks}, counted from 0'
