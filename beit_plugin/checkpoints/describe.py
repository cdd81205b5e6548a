"""What a checkpoint holds, told from its names and shapes: task, sizes, resolution, heads."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .convert import SHARED_TABLE, TABLE, CheckpointError, depth_of, detect, table_grid, to_native
from .fit import PARTS, part_of

__all__ = ['Description', 'describe']


class Description(NamedTuple):
    """A checkpoint of a BEiT.

    Attributes:
        dialect, task, prefix: see ``Detection``.
        unknown: names that no table knows.
        grid: (h, w) in patches that it was trained at; None where nothing in it depends on the grid.
        arguments: keyword arguments of our model of that task, as far as they can be told: ``Beit`` (encoder,
            classifier), ``BeitForMaskedImageModeling`` or its v2 (mim), ``BeitBackbone`` (backbone),
            ``build_segmentor`` (segmentor). ``num_heads`` is missing where there is no bias table to tell it.
        parts: what is in it beside the encoder, with the number of tensors.
        parameters: number of values in it.
    """

    dialect: str
    task: str
    prefix: str
    unknown: tuple[str, ...]
    grid: tuple[int, int] | None
    arguments: dict[str, Any]
    parts: dict[str, int]
    parameters: int


def _shape(native: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    tensor = native.get(name)
    if tensor is None or tensor.ndim != ndim:
        got = 'nothing' if tensor is None else f'shape {tuple(tensor.shape)}'
        raise CheckpointError(f'expected {name} with {ndim} dimensions, got {got}; the checkpoint is not whole')
    return tuple(tensor.shape)


def describe(state_dict: Mapping[str, Tensor], grid: tuple[int, int] | None = None) -> Description:
    """Tells what a checkpoint holds.

    Args:
        state_dict: names to tensors, of any dialect.
        grid: (h, w) in patches that it was trained at; needed where it was not square.

    Raises:
        CheckpointError: no BEiT, the stem or a block is missing, or the grid cannot be told.
    """
    found = detect(state_dict)
    native, _ = to_native(state_dict)
    dim, channels, patch_h, patch_w = _shape(native, 'patch_embed.proj.weight', 4)
    own = {name: tensor for name, tensor in native.items() if name.endswith(TABLE) and name.startswith('blocks.')}
    table = native.get(SHARED_TABLE, next(iter(own.values()), None))
    if table is not None:
        grid = table_grid(table.shape[0], grid)
    elif 'pos_embed' in native and grid is None:
        side = round((native['pos_embed'].shape[1] - 1) ** 0.5)
        grid = side, side
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
        'init_values': float(native['blocks.0.gamma_1'].abs().mean()) if 'blocks.0.gamma_1' in native else None,
    }
    if table is not None:
        arguments['num_heads'] = table.shape[1]
    if grid is not None:
        arguments['img_size'] = grid[0] * patch_h, grid[1] * patch_w
    arguments |= _of_task(native, found.task)
    parts = {part: sum(part_of(name) == part for name in native) for part in PARTS}
    return Description(
        found.dialect,
        found.task,
        found.prefix,
        found.unknown,
        grid,
        arguments,
        {part: count for part, count in parts.items() if count},
        sum(tensor.numel() for tensor in native.values()),
    )


def _of_task(native: Mapping[str, Tensor], task: str) -> dict[str, Any]:
    if task == 'segmentor':
        auxiliary = native.get('auxiliary_head.conv_seg.weight')
        head = {
            'num_classes': _shape(native, 'decode_head.conv_seg.weight', 4)[0],
            'channels': _shape(native, 'decode_head.conv_seg.weight', 4)[1],
            'use_auxiliary_head': auxiliary is not None,
        }
        if auxiliary is not None:
            convs = {name.split('.')[2] for name in native if name.startswith('auxiliary_head.convs.')}
            head |= {
                'auxiliary_channels': auxiliary.shape[1],
                'auxiliary_num_convs': len(convs),
                'auxiliary_concat_input': 'auxiliary_head.conv_cat.conv.weight' in native,
            }
        return head
    if task == 'mim':
        return {'vocab_size': _shape(native, 'lm_head.weight', 2)[0]}
    if task == 'backbone':
        return {'add_fpn': True}
    pooled = 'fc_norm.weight' in native or 'norm.weight' not in native
    classes = native['head.weight'].shape[0] if 'head.weight' in native else 0
    return {'num_classes': classes, 'global_pool': 'avg' if pooled else 'token'}
