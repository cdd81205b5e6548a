"""The options of transformers' BEiT as a table: their name, our arguments, and where a model shows the value.

Source: transformers 5.24, ``models/beit/configuration_beit.py``. Only modules are looked at, no model class is needed.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from timm.layers import get_act_layer
from torch import nn

from .convert import CheckpointError

__all__ = ['ENCODER', 'OF_TASK', 'ROWS', 'Row', 'Task', 'is_whole', 'stage_names']

Task = Literal['encoder', 'classifier', 'mim', 'segmentor', 'backbone']

# theirs -> timm's; where several of theirs are one function, the first is what we write. Their documentation has selu
# and a configuration may say it, though the models of 5.24 do not know it
ACTIVATIONS = {
    'gelu': 'gelu', 'gelu_python': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh',
    'gelu_python_tanh': 'gelu_tanh', 'gelu_accurate': 'gelu_tanh', 'gelu_fast': 'gelu_tanh', 'quick_gelu': 'quick_gelu',
    'relu': 'relu', 'relu6': 'relu6', 'leaky_relu': 'leaky_relu', 'selu': 'selu', 'silu': 'silu', 'swish': 'silu',
    'mish': 'mish', 'hardswish': 'hardswish', 'sigmoid': 'sigmoid', 'tanh': 'tanh', 'linear': 'identity',
}  # fmt: skip


LARGEST = 1 << 20  # of all whole numbers in a file, far above any model
DEEPEST = 1000  # blocks: their names are listed before the weights are compared


class Row(NamedTuple):
    """An option.

    Attributes:
        theirs, default: its name and its default in transformers.
        read: makes our value of theirs; raises ValueError with what it expected.
        ours: our arguments of that value, by spaces; empty where other options take part.
        get: their value, from each place in a model that has it, for these may differ; empty where it shows nowhere.
    """

    theirs: str
    default: Any
    read: Callable[[Any], Any]
    ours: str
    get: Callable[[Any], Iterable[Any]]


# --- values ---------------------------------------------------------------------------------------------------------


def _kind(words: str, fits: Callable[[Any], bool], convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not fits(value):
            raise ValueError(words)
        return convert(value)

    return read


def is_whole(value: Any, least: float = -LARGEST, most: float = LARGEST) -> bool:
    """True for an int (not a bool) from `least` to `most`."""
    return type(value) is int and least <= value <= most


def _all(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(fits(item) for item in value)


def _between(value: Any, end: float) -> bool:
    return type(value) in (int, float) and 0 <= value < end


def _positive(value: Any) -> bool:
    return is_whole(value, 1)


def _single(rate: float) -> float:
    """The shortest decimal for the same number in single precision, in which models compute drop path rates."""
    return float(str(np.float32(rate)))


_count = _kind(f'a whole number from 1 to {LARGEST}', _positive, int)
_depth = _kind(f'a whole number from 1 to {DEEPEST}', lambda v: is_whole(v, 1, DEEPEST), int)
_number_of_convs = _kind(f'a whole number from 0 to {DEEPEST}', lambda v: is_whole(v, 0, DEEPEST), int)
_label = _kind(f'a whole number from {-LARGEST} to {LARGEST}', is_whole, int)
_number = _kind('a number of at least 0 that float32 can hold', lambda v: _between(v, 3e38), float)
_rate = _kind('a number of at least 0 and below 1', lambda v: _between(v, 1), float)
_path_rate = _kind('a number of at least 0 and below 1', lambda v: _between(v, 1), _single)
_flag = _kind('true or false', lambda v: isinstance(v, bool), bool)
_pool = _kind('true or false', lambda v: isinstance(v, bool), {True: 'avg', False: 'token'}.__getitem__)
_act = _kind(f'one of {", ".join(ACTIVATIONS)}', lambda v: isinstance(v, str) and v in ACTIVATIONS, ACTIVATIONS.get)
_size = _kind(
    f'a whole number from 1 to {LARGEST}, or two of them (height, width)',
    lambda v: _positive(v) or (_all(v, _positive) and len(v) == 2),
    lambda v: (v, v) if isinstance(v, int) else tuple(v),
)
_scales = _kind(
    f'a list of whole numbers from 1 to {DEEPEST}',
    lambda v: _all(v, lambda item: is_whole(item, 1, DEEPEST)) and 0 < len(v) <= DEEPEST,
    tuple,
)
_names = _kind('a list of names', lambda v: v is None or _all(v, lambda item: isinstance(item, str)), lambda v: v)
_indices = _kind('a list of whole numbers', lambda v: v is None or _all(v, is_whole), lambda v: v)


# --- where a model shows them ---------------------------------------------------------------------------------------


def _spell(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _hidden_act(encoder: Any) -> Iterator[str]:
    x = torch.linspace(-20, 20, 401, dtype=torch.float64)
    known = {theirs: get_act_layer(timm)()(x.clone()) for theirs, timm in ACTIVATIONS.items()}  # type: ignore
    for act in (block.mlp.act for block in encoder.blocks):
        # told by what it does, for it may be made by a class, a function or a partial of either
        y = None if any(True for _ in act.parameters()) else act(x.clone())
        name = next((n for n in known if y is not None and torch.allclose(y, known[n], 1e-6, 1e-7)), None)
        if name is None:
            raise CheckpointError(f'transformers has no hidden_act for {act}; it has {", ".join(ACTIVATIONS)}')
        yield name


def _drop_path(encoder: Any) -> list[float]:
    rates = [[getattr(p, 'drop_prob', 0.0) for p in (b.drop_path1, b.drop_path2)] for b in encoder.blocks]
    last = rates[-1][0]
    if not np.allclose(rates, np.linspace(0, [last, last], len(rates)), 1e-5, 1e-30):
        raise CheckpointError(f'drop_path_rate grows linearly from 0 in transformers, but the blocks have {rates}')
    return [_single(last)] if len(rates) > 1 else []  # a lone block keeps every sample, at any rate


def _mean_pooling(encoder: Any) -> list[bool]:
    norm, fc_norm = (not isinstance(norm, nn.Identity) for norm in (encoder.norm, encoder.fc_norm))
    form = (encoder.global_pool, norm, fc_norm)
    known = {('avg', False, True): True, ('token', True, False): False}
    if not encoder.num_classes:
        known['', True, False] = False  # the same tokens, without a pooled one
    if form not in known:
        raise CheckpointError(
            'transformers takes the mean of the patches and normalises it, or normalises the tokens and takes [CLS]; '
            'this model has global_pool={!r}, norm: {}, fc_norm: {}'.format(*form)
        )
    return [known[form]]


def _eps(encoder: Any) -> list[float]:
    norms = [norm for block in encoder.blocks for norm in (block.norm1, block.norm2)]
    return [norm.eps for norm in (*norms, encoder.norm, encoder.fc_norm) if not isinstance(norm, nn.Identity)]


def _dropout(encoder: Any) -> list[float]:
    return [encoder.pos_drop.p, *(drop.p for b in encoder.blocks for drop in (b.attn.proj_drop, b.mlp.drop2))]


def stage_names(depth: int) -> list[str]:
    """What transformers calls the embeddings and the output of each block."""
    return ['stem', *(f'stage{i}' for i in range(1, depth + 1))]


def _stage_numbers(model: Any) -> list[int]:
    if not hasattr(model, 'decode_head'):
        return list(model.stages)
    # their segmentor counts one further than their backbone, and wraps around; see hf_config
    return [(stage + 1) % (len(model.backbone.blocks) + 1) for stage in model.backbone.stages]


def _named_stages(model: Any) -> list[str]:
    names = stage_names(len(getattr(model, 'backbone', model).blocks))
    return [names[i] for i in _stage_numbers(model)]


# --- the table ------------------------------------------------------------------------------------------------------

ENCODER = (
    Row('hidden_size', 768, _count, 'embed_dim', lambda e: [e.embed_dim]),
    Row('num_hidden_layers', 12, _depth, 'depth', lambda e: [len(e.blocks)]),
    Row('num_attention_heads', 12, _count, 'num_heads', lambda e: [b.attn.num_heads for b in e.blocks]),
    Row('intermediate_size', 3072, _count, 'mlp_ratio', lambda e: [b.mlp.fc1.out_features for b in e.blocks]),
    Row('hidden_act', 'gelu', _act, 'act_layer', _hidden_act),
    Row('hidden_dropout_prob', 0.0, _rate, 'pos_drop_rate proj_drop_rate', _dropout),
    Row('attention_probs_dropout_prob', 0.0, _rate, 'attn_drop_rate', lambda e: [b.attn.attn_drop.p for b in e.blocks]),
    Row('initializer_range', 0.02, _number, 'init_std', lambda e: [e.init_std]),
    Row('layer_norm_eps', 1e-12, _number, 'norm_eps', _eps),
    Row('image_size', 224, _size, 'img_size', lambda e: [_spell(e.patch_embed.img_size)]),
    Row('patch_size', 16, _size, 'patch_size', lambda e: [_spell(e.patch_embed.patch_size)]),
    Row('num_channels', 3, _count, 'in_chans', lambda e: [e.in_chans]),
    Row('use_mask_token', False, _flag, 'use_mask_token', lambda e: [e.mask_token is not None]),
    Row('use_absolute_position_embeddings', False, _flag, 'use_abs_pos_emb', lambda e: [e.pos_embed is not None]),
    Row('use_relative_position_bias', False, _flag, 'use_rel_pos_bias',
        lambda e: [b.attn.relative_position_bias_table is not None for b in e.blocks]),
    Row('use_shared_relative_position_bias', False, _flag, 'use_shared_rel_pos_bias',
        lambda e: [e.rel_pos_bias is not None]),
    Row('layer_scale_init_value', 0.1, _number, 'init_values', lambda e: [b.init_values or 0 for b in e.blocks]),
    Row('drop_path_rate', 0.1, _path_rate, 'drop_path_rate', _drop_path),
)  # fmt: skip
_POOLED = (Row('use_mean_pooling', True, _pool, 'global_pool', _mean_pooling),)
_TOKENS = (Row('vocab_size', 8192, _count, 'vocab_size', lambda m: [m.num_classes]),)
_TAPS = (
    Row('out_features', None, _names, '', lambda m: [_named_stages(m)]),
    Row('out_indices', None, _indices, '', lambda m: [_stage_numbers(m)]),
)
_MAPS = (
    Row('add_fpn', False, _flag, 'add_fpn', lambda m: [m.fpn is not None]),
    Row('reshape_hidden_states', True, _flag, 'reshape_hidden_states', lambda m: [m.reshape_hidden_states]),
)
_HEADS = (
    Row('pool_scales', [1, 2, 3, 6], _scales, 'pool_scales',
        lambda m: [[pool[0].output_size for pool in m.decode_head.psp_modules]]),
    Row('use_auxiliary_head', True, _flag, 'use_auxiliary_head', lambda m: [m.auxiliary_head is not None]),
    Row('auxiliary_loss_weight', 0.4, _number, 'auxiliary_loss_weight', lambda m: [m.loss.aux_weight]),
    Row('auxiliary_channels', 256, _count, 'auxiliary_channels',
        lambda m: [m.auxiliary_head.conv_seg.in_channels] if m.auxiliary_head else []),
    Row('auxiliary_num_convs', 1, _number_of_convs, 'auxiliary_num_convs',
        lambda m: [len(m.auxiliary_head.convs)] if m.auxiliary_head else []),
    Row('auxiliary_concat_input', False, _flag, 'auxiliary_concat_input',
        lambda m: [m.auxiliary_head.conv_cat is not None] if m.auxiliary_head else []),
    Row('semantic_loss_ignore_index', 255, _label, 'semantic_loss_ignore_index', lambda m: [m.loss.ignore_index]),
)  # fmt: skip

ROWS = {row.theirs: row for row in ENCODER + _POOLED + _TOKENS + _TAPS + _MAPS + _HEADS}
# the options of each task beside ENCODER; its models have no place for the others
OF_TASK: dict[Task, tuple[Row, ...]] = {
    'encoder': _POOLED,
    'classifier': _POOLED,
    'mim': _TOKENS,
    'segmentor': _TAPS + _HEADS,
    'backbone': _TAPS + _MAPS,
}
