"""Makes an encoder's parameters fit a model of another size: patch kernel, positions, bias tables, shared tables."""

from collections.abc import Mapping
from math import isqrt
from typing import Any, Protocol

from timm.layers import resample_patch_embed
from torch import Tensor, nn

from ..models.resample import NUM_CLS_ROWS, resize_abs_pos_embed, resize_rel_pos_bias_table
from .convert import CheckpointError, StateDict, detect, to_native

__all__ = ['accept_any_dialect', 'fit', 'strip_encoder_prefix', 'translate']

_TABLE = 'relative_position_bias_table'
_SHARED = f'rel_pos_bias.{_TABLE}'
# what an encoder may leave behind: parts for other tasks
_OPTIONAL = ('mask_token', 'norm.', 'fc_norm.', 'head.', 'lm_head.')


class _Encoder(Protocol):
    """What ``fit`` asks of a model."""

    window_size: tuple[int, int]
    rel_pos_resize: Any
    rel_pos_bias: nn.Module | None
    blocks: nn.ModuleList
    patch_embed: Any


def _table_grid(rows: int, window_size: tuple[int, int]) -> tuple[int, int]:
    h, w = window_size
    if rows == (2 * h - 1) * (2 * w - 1) + NUM_CLS_ROWS:
        return window_size  # also for a non-square window: its rows alone do not tell which of two it is
    side = isqrt(rows - NUM_CLS_ROWS) if rows > NUM_CLS_ROWS else 0
    if side % 2 == 0 or side * side != rows - NUM_CLS_ROWS:
        raise CheckpointError(
            f'a bias table of {rows} rows is of no square grid and not of the {h}x{w} grid of the model; '
            'build the model at the size that the checkpoint was trained at and call set_input_size'
        )
    return (side + 1) // 2, (side + 1) // 2


def fit(native: StateDict, model: _Encoder) -> StateDict:
    """Resizes what depends on the grid to the model's, always from the stored values.

    A shared bias table is given to each block when the model has one in each (fine-tuning starts so).

    Args:
        native: encoder parameters by our names.
        model: the model that they are for; only read.

    Raises:
        CheckpointError: a table whose grid cannot be told.
    """
    fitted = dict(native)
    depth = len(model.blocks)
    first_table = getattr(model.blocks[0].attn, _TABLE, None) if depth else None
    if _SHARED in fitted and isinstance(first_table, Tensor) and f'blocks.0.attn.{_TABLE}' not in fitted:
        shared = fitted[_SHARED] if model.rel_pos_bias is not None else fitted.pop(_SHARED)
        for i in range(depth):
            fitted[f'blocks.{i}.attn.{_TABLE}'] = shared.clone()

    kernel = fitted.get('patch_embed.proj.weight')
    patch = tuple(model.patch_embed.patch_size)
    if kernel is not None and kernel.ndim == 4 and tuple(kernel.shape[2:]) != patch:
        fitted['patch_embed.proj.weight'] = resample_patch_embed(kernel, list(patch))
    positions = fitted.get('pos_embed')
    window = model.window_size
    if positions is not None and positions.ndim == 3 and positions.shape[1] != 1 + window[0] * window[1]:
        side = isqrt(positions.shape[1] - 1)
        if side * side != positions.shape[1] - 1:
            raise CheckpointError(f'pos_embed of {positions.shape[1]} tokens is of no square grid and not of {window}')
        fitted['pos_embed'] = resize_abs_pos_embed(positions, (side, side), window)
    for name, table in fitted.items():
        if name.endswith(_TABLE) and table.ndim == 2:
            source = _table_grid(table.shape[0], model.window_size)
            fitted[name] = resize_rel_pos_bias_table(table, source, model.window_size, model.rel_pos_resize)
    return fitted


def translate(state_dict: Mapping[str, Tensor], model: Any) -> tuple[StateDict, StateDict]:
    """Takes a state dict of any dialect at any resolution to what ``model`` holds.

    What an encoder checkpoint may have for other tasks (classifier, mask token, MIM head, final norms) is dropped where
    the model lacks that part.

    Returns:
        The parameters by our names, and what no table knows, by its own name.
    """
    native, rest = to_native(state_dict)
    fitted = fit(native, model)
    own = model.state_dict().keys()
    return {name: tensor for name, tensor in fitted.items() if name in own or not name.startswith(_OPTIONAL)}, rest


def _translate_in_place(model: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """What ``load_state_dict`` calls before it reads ``state_dict``; at module level, so that models can be pickled."""
    part = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    try:
        detect(part)
    except CheckpointError:
        return  # not an encoder: leave it to load_state_dict to say what is missing
    fitted, rest = translate(part, model)
    for name in part.keys() - rest.keys():
        del state_dict[prefix + name]
    blocks = 'layers.' if 'layers' in dict(model.named_children()) else 'blocks.'
    for name, tensor in fitted.items():
        state_dict[prefix + (blocks + name.removeprefix('blocks.') if name.startswith('blocks.') else name)] = tensor


def accept_any_dialect(model: nn.Module) -> None:
    """Lets ``model.load_state_dict`` take every dialect at every resolution, also as a part of a larger model.

    The timm entry points and ``BEiTBackbone`` have called this; a ``Beit`` that you build yourself has not. What no
    table knows stays in the state dict, so that the loader reports it.
    """
    model.register_load_state_dict_pre_hook(_translate_in_place)


def strip_encoder_prefix(state_dict: Mapping[str, Tensor]) -> StateDict:
    """The entries of the encoder alone, without its prefix (``backbone.``, ``beit.``, ``module.``)."""
    _, prefix = detect(state_dict)
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
