"""Whether a configuration of transformers and the tensors beside it are of one model; nothing is built."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..models.relative_position import num_relative_distance
from .convert import SHARED_TABLE, CheckpointError, depth_of, detect, read_names
from .grids import INDEX, TABLE, noted_grid, stated_grid
from .hf_config import HFConfig

__all__ = ['check_agreement', 'grid_of']

_Shapes = Mapping[str, tuple[int, ...]]


def grid_of(config: HFConfig) -> tuple[int, int]:
    """The (h, w) grid in patches that a configuration says."""
    (height, width), (patch_h, patch_w) = config.arguments['img_size'], config.arguments['patch_size']
    return height // patch_h, width // patch_w


def check_agreement(config: HFConfig, state_dict: Mapping[str, Tensor], path: Path) -> None:
    """Compares every number of a configuration that the tensors show; parts that are missing show nothing.

    Args:
        config: of the file at `path`, for the message.
        state_dict: the tensors beside it, of any dialect; weights that are not a BEiT are not compared.

    Raises:
        CheckpointError: they contradict each other.
    """
    try:
        targets = read_names(state_dict, detect(state_dict))
    except CheckpointError:
        return
    shapes = {ours: tuple(state_dict[name].shape) for name, ours in targets.items() if ours is not None}
    for option, said, shown, name in (*_sizes(config, shapes), *_grids(config, shapes, state_dict)):
        if said != shown:
            raise CheckpointError(
                f'{path} says {option} {said}, but the weights beside it say {shown} ({name}); the two are not of one '
                'model: fetch or save both again'
            )


def _sizes(config: HFConfig, shapes: _Shapes) -> Iterator[tuple[str, Any, Any, str]]:
    """Option, what the configuration says, what the weights say, and which of them."""
    said = config.arguments
    width = said['embed_dim']
    labels = said['num_classes'] if config.task in ('classifier', 'segmentor') else None
    yield 'num_hidden_layers', said['depth'], depth_of(shapes), 'blocks'
    # dimensions of tensors: name, number of dimensions, which of them, option, and its value
    heads = 'auxiliary_head.conv_seg.weight'
    rows: list[tuple[str, int, int, str, Any]] = [
        ('patch_embed.proj.weight', 4, 0, 'hidden_size', width),
        ('patch_embed.proj.weight', 4, 1, 'num_channels', said['in_chans']),
        ('patch_embed.proj.weight', 4, 2, 'patch_size (height)', said['patch_size'][0]),
        ('patch_embed.proj.weight', 4, 3, 'patch_size (width)', said['patch_size'][1]),
        ('blocks.0.mlp.fc1.weight', 2, 0, 'intermediate_size', round(said['mlp_ratio'] * width)),
        ('lm_head.weight', 2, 0, 'vocab_size', said.get('vocab_size')),
        ('head.weight', 2, 0, 'num_labels', labels),
        ('decode_head.conv_seg.weight', 4, 0, 'num_labels', labels),
        (heads, 4, 1, 'auxiliary_channels', said.get('auxiliary_channels')),
    ]
    rows += [(name, 2, 1, 'num_attention_heads', said['num_heads']) for name in shapes if name.endswith(TABLE)]
    for name, ndim, dimension, option, value in rows:
        if value is not None and len(shapes.get(name, ())) == ndim:
            yield option, value, shapes[name][dimension], name
    flags = {
        'use_relative_position_bias': (said['use_rel_pos_bias'], f'blocks.0.attn.{TABLE}'),
        'use_shared_relative_position_bias': (said['use_shared_rel_pos_bias'], SHARED_TABLE),
        'use_absolute_position_embeddings': (said['use_abs_pos_emb'], 'pos_embed'),
        'layer_scale_init_value > 0:': (said['init_values'] > 0, 'blocks.0.gamma_1'),
    }
    for option, (value, name) in flags.items():
        yield option, value, name in shapes, name
    norms = {'norm.weight', 'fc_norm.weight'} & shapes.keys()  # after the encoder, or after the mean of the patches
    if config.task in ('encoder', 'classifier') and len(norms) == 1:
        yield 'use_mean_pooling', said['global_pool'] == 'avg', 'fc_norm.weight' in norms, norms.pop()
    if 'decode_head.conv_seg.weight' in shapes and config.task == 'segmentor':
        pools = 'decode_head.psp_modules.'
        yield 'a number of pool_scales of', len(said['pool_scales']), _count(shapes, pools), pools
        if heads in shapes:
            yield 'use_auxiliary_head', said['use_auxiliary_head'], True, heads
            convs = 'auxiliary_head.convs.'
            yield 'auxiliary_num_convs', said['auxiliary_num_convs'], _count(shapes, convs), convs
            cat = 'auxiliary_head.conv_cat.conv.weight'
            yield 'auxiliary_concat_input', said['auxiliary_concat_input'], cat in shapes, cat


def _grids(config: HFConfig, shapes: _Shapes, state_dict: Mapping[str, Tensor]) -> Iterator[tuple[str, Any, Any, str]]:
    h, w = grid_of(config)
    said = f'image_size / patch_size = {h}x{w} patches and so'
    for name, shape in shapes.items():
        if name.endswith(TABLE) and len(shape) == 2:
            yield f'{said} tables of', num_relative_distance((h, w)), shape[0], name
        elif name == 'pos_embed' and len(shape) == 3:
            yield f'{said} positions of', 1 + h * w, shape[1], name
    for stated, name in ((stated_grid(state_dict), INDEX), (noted_grid(state_dict), 'the note of its grid')):
        if stated is not None:
            yield 'image_size / patch_size =', (h, w), stated, name


def _count(shapes: _Shapes, prefix: str) -> int:
    return len({name.removeprefix(prefix).split('.')[0] for name in shapes if name.startswith(prefix)})
