"""Makes a checkpoint fit a model: its names, its patch size, its grid, one bias table or one for each block."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from timm.layers import resample_patch_embed
from torch import Tensor, nn

from ..models.resample import resize_abs_pos_embed, resize_rel_pos_bias_table
from .convert import (
    SHARED_TABLE,
    CheckpointError,
    Detection,
    StateDict,
    detect,
    dropper,
    expand_shared_table,
    read_names,
    some,
    to_native,
)
from .grids import TABLE, noted_grid, stated_grid, table_grid
from .tables import DIALECTS, PARTS

__all__ = ['Fitted', 'accept_any_dialect', 'encoder_of', 'fit', 'own_names', 'part_of', 'resize']

_logger = logging.getLogger(__name__)
_NOTHING = dropper(())

_ENCODER = ('cls_token', 'pos_embed', 'patch_embed', 'rel_pos_bias', 'blocks')


class _Encoder(Protocol):
    """What is asked of an encoder."""

    window_size: tuple[int, int]
    rel_pos_resize: Any
    rel_pos_bias: nn.Module | None
    blocks: nn.ModuleList
    patch_embed: Any


class Fitted(NamedTuple):
    """A checkpoint by the names of a model, at its sizes."""

    state: StateDict  # what the model takes, by its names
    rest: StateDict  # what no table knows, by the names of the checkpoint
    fresh: tuple[str, ...]  # parameters of the model that the checkpoint does not have, by our names
    dropped: StateDict  # what was not wanted, or belongs to a part that the model does not have, by our names
    found: Detection
    own: dict[str, str]  # the names of the model, by ours
    leave_out: re.Pattern[str]  # the names that were not wanted

    @property
    def given(self) -> set[str]:
        """The parts of the model that the checkpoint has something of."""
        ours = {theirs: our for our, theirs in self.own.items()}
        return {part_of(ours.get(name, name)) for name in self.state}

    @property
    def complaints(self) -> list[str]:
        """Why it must not be loaded: names that do not match, parts that are not whole."""
        given, names = self.given, set(self.own.values())
        needed = {'encoder', *given, *(() if self._may_lack_norm(given) else ('norm',))}
        missing = [self.own[name] for name in self.fresh if part_of(name) in needed]
        found = {
            'no table knows': self.rest,
            'the model has no': [name for name in self.state if name not in names],
            'it lacks': missing,
        }
        return [f'{what} {some(wrong)}' for what, wrong in found.items() if wrong]

    def _may_lack_norm(self, given: set[str]) -> bool:
        """Whether the final norm may start anew: by request, or with the head after it where training had none."""
        heads = {part_of(name) for name in self.own} & {'head', 'lm_head', 'decode_head'}
        is_pooled = 'fc_norm' in given or 'fc_norm.weight' in self.dropped
        had_none = is_pooled or self.found.task in ('backbone', 'segmentor')
        return bool(self.leave_out.fullmatch('norm')) or (had_none and bool(heads) and not heads & given)


def part_of(name: str) -> str:
    """The part of a model that a parameter (our name) belongs to; ``other`` for what no table knows."""
    first = name.split('.')[0]
    return first if first in PARTS else 'encoder' if first in _ENCODER else 'other'


def encoder_of(model: nn.Module) -> _Encoder:
    """The BEiT encoder of this package in a model, the model itself included.

    Raises:
        CheckpointError: there is none.
    """
    for module in model.modules():
        if hasattr(module, 'rel_pos_resize') and hasattr(module, 'window_size'):
            return cast(_Encoder, module)
    raise CheckpointError(
        f'{type(model).__name__} holds no encoder of beit_plugin; for a model of another package use convert() and its '
        'own load_state_dict()'
    )


def own_names(model: nn.Module) -> dict[str, str]:
    """The names of a model's parameters and buffers, by our names; what no table knows stands for itself."""
    names = list(model.state_dict())
    targets = read_names(names, detect(names))
    return {targets.get(name) or name: name for name in names}


def _source_grid(
    what: str, size: int, size_of: Callable[[int, int], int], window: tuple[int, int], ask: bool
) -> tuple[int, int] | None:
    """The grid of something of this size where nothing is said: the model's, else a square one; None for neither."""
    side = next((n for n in range(1, 1 + size) if size_of(n, n) >= size), 0)
    square = (side, side) if side and size_of(side, side) == size else None
    if size_of(*window) != size:
        return square
    if square not in (None, window):
        message = f'{what} is as long at the {window[0]}x{window[1]} grid of the model as at {side}x{side} patches'
        if ask:
            raise CheckpointError(
                f'{message}; say which it was trained at: beit_plugin.checkpoints.load(model, source, grid=(h, w))'
            )
        _logger.warning("%s; taken for the model's", message)
    return window


def resize(native: StateDict, encoder: _Encoder, grid: tuple[int, int] | None = None, ask: bool = False) -> StateDict:
    """Resizes what depends on the grid to that of ``encoder``, always from the stored values.

    Args:
        native: parameters by our names.
        encoder: the encoder that they are for; only read.
        grid: (h, w) in patches that they were trained at; by default told from their shapes.
        ask: refuse what may be of the model's grid and of a square one as well; else it is taken for the model's.

    Raises:
        CheckpointError: the grid cannot be told.
    """
    window = encoder.window_size
    given = dict(native)
    if SHARED_TABLE in given and encoder.rel_pos_bias is None:
        given = expand_shared_table(given, len(encoder.blocks))
    kernel = given.get('patch_embed.proj.weight')
    patch = tuple(encoder.patch_embed.patch_size)
    if kernel is not None and kernel.ndim == 4 and tuple(kernel.shape[2:]) != patch:
        given['patch_embed.proj.weight'] = resample_patch_embed(kernel, list(patch))
    positions = given.get('pos_embed')
    if positions is not None and positions.ndim == 3:
        tokens = positions.shape[1]
        old = grid or _source_grid('pos_embed', tokens, lambda h, w: 1 + h * w, window, ask)
        if old is None or tokens != 1 + old[0] * old[1]:
            raise CheckpointError(
                f'pos_embed of {tokens} tokens is of no square grid and not of {grid or window}; give the grid that it '
                'was trained at as grid=(h, w)'
            )
        given['pos_embed'] = resize_abs_pos_embed(positions, old, window)
    for name, table in given.items():
        if name.endswith(TABLE) and table.ndim == 2:
            rows = table.shape[0]
            told = grid or _source_grid(name, rows, lambda h, w: (2 * h - 1) * (2 * w - 1) + 3, window, ask)
            source = table_grid(rows, grid, told or window)
            given[name] = resize_rel_pos_bias_table(table, source, window, encoder.rel_pos_resize)
    return given


def _check_pooling(native: Mapping[str, Tensor], own: Mapping[str, str], model: nn.Module) -> None:
    """A classifier that comes with the checkpoint needs the norm that it was trained behind."""
    if 'lm_head.weight' in native and 'lm_head.weight' in own:
        missing = [part for part in ('norm.weight', 'mask_token') if part in own and part not in native]
        if missing:
            raise CheckpointError(f'the head of the pre-training came without {some(missing)}, so it is not whole')
    head = native.get('head.weight')
    if head is None or 'head.weight' not in own or head.shape != model.state_dict()[own['head.weight']].shape:
        return
    for norm, pool in (('fc_norm', 'token'), ('norm', 'avg')):
        if f'{norm}.weight' in own and f'{norm}.weight' not in native:
            raise CheckpointError(
                f'the classifier of the checkpoint was trained without {norm}, which this model has; build it with '
                f'global_pool={pool!r}, or leave the classifier out (load(..., drop=("head",)))'
            )


def _check_kinds(native: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
    """What no resizing can mend: tensors without values, or with another number of dimensions than the model's."""
    for name, tensor in native.items():
        if tensor.is_meta or tensor.layout != torch.strided or not tensor.numel():
            kind = 'on the meta device' if tensor.is_meta else f'{tensor.layout} of shape {tuple(tensor.shape)}'
            raise CheckpointError(f'{name} must be a plain tensor with values, got one {kind}')
        if name in current and name != 'stages' and tensor.ndim != current[name].ndim:
            raise CheckpointError(f'{name} is {tuple(tensor.shape)} instead of {tuple(current[name].shape)}')


def _stages(found: Detection, model: Any, encoder: Any, out_indices: Sequence[int] | None) -> Sequence[int]:
    """What the backbone of a segmentor must return to be what its checkpoint was trained as."""
    offset = DIALECTS[found.dialect].tap_offset
    if out_indices is None:
        if offset != 1 and getattr(model, 'keep_stages', True):
            _logger.warning(
                'a segmentor of %s came without its configuration, so which blocks it reads is not known; the model '
                'goes on reading %s, counted from 0',
                found.dialect,
                tuple(stage - 1 for stage in encoder.stages),
            )
            return encoder.stages
        return [number + offset for number in encoder.out_indices]
    return [number + 1 for number in out_indices]


def fit(
    state_dict: Mapping[str, Tensor],
    model: nn.Module,
    grid: tuple[int, int] | None = None,
    out_indices: Sequence[int] | None = None,
    leave_out: re.Pattern[str] = _NOTHING,
    ask: bool = False,
) -> Fitted:
    """Takes a state dict of any dialect at any resolution to the names and sizes of ``model``.

    Args:
        state_dict: names to tensors; read only.
        model: one that holds an encoder of this package; read only.
        grid: (h, w) in patches that it was trained at; needed where it is neither stated, nor square, nor the model's.
        out_indices: 0-based blocks that a segmentor was trained on; by default those that its dialect means by the
            ``out_indices`` that the model was built with.
        leave_out: matches the names, ours or theirs, that are not wanted.
        ask: see ``resize``.

    Raises:
        CheckpointError: see ``to_native`` and ``resize``, or the classifier reads another pooling than the model has.
    """
    wanted = {name: tensor for name, tensor in state_dict.items() if not leave_out.fullmatch(name)}
    found = detect(wanted)
    native, rest = to_native(wanted)
    encoder = encoder_of(model)
    own = own_names(model)
    current = model.state_dict()
    _check_kinds(native, {name: current[theirs] for name, theirs in own.items()})
    native = resize(native, encoder, grid or stated_grid(wanted) or noted_grid(state_dict), ask)
    if found.task == 'segmentor' and 'stages' not in native and hasattr(encoder, 'stages'):
        native['stages'] = torch.tensor(_stages(found, model, encoder, out_indices))
    stages = native['stages'].flatten().tolist() if 'stages' in native else []
    if not all(0 <= stage <= len(encoder.blocks) for stage in stages):
        raise CheckpointError(
            f'the segmentor reads the outputs of blocks {tuple(stage - 1 for stage in stages)} (-1: the embeddings), '
            f'but the model has {len(encoder.blocks)}; build it with the out_indices that the checkpoint was trained on'
        )
    parts = {part_of(name) for name in own}
    dropped = {
        name: tensor
        for name, tensor in native.items()
        if leave_out.fullmatch(name) or (part_of(name) != 'encoder' and part_of(name) not in parts)
    }
    native = {name: tensor for name, tensor in native.items() if name not in dropped}
    _check_pooling(native, own, model)
    state = {own.get(name, name): tensor for name, tensor in native.items()}
    # what no table knows may be of the model all the same: the head of a detector
    state |= {name: rest.pop(name) for name in list(rest) if own.get(name) == name}
    fresh = tuple(name for name, theirs in own.items() if theirs not in state)
    return Fitted(state, rest, fresh, dropped, found, own, leave_out)


def _translate_in_place(
    model: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *_: Any
) -> None:
    """What ``load_state_dict`` calls before it reads ``state_dict``; at module level, so that models can be pickled."""
    part = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    if any('_fsdp_wrapped_module.' in name for name, _ in model.named_parameters()):
        return  # its weights have no shapes here; mm.sharded lets its own names in only
    try:
        detect(part)
    except CheckpointError:
        return  # not an encoder: leave it to load_state_dict to say what is missing
    current = model.state_dict()
    # what is the model's by every name and shape is loaded as it is, as PyTorch does, unless it states its grid
    is_own = part.keys() == current.keys() and all(part[name].shape == t.shape for name, t in current.items())
    fitted = fit(part, model, noted_grid(part, (local_metadata,)), ask=not is_own)
    if fitted.dropped:
        _logger.info('left out, for the model does not have them: %s', some(fitted.dropped))
    for name in part.keys() - fitted.rest.keys():
        del state_dict[prefix + name]
    state_dict.update({prefix + name: tensor for name, tensor in fitted.state.items()})
    if fitted.found.task == 'mim':  # it knows no classifier, pyramid or decoder: they are to be trained
        fresh = [fitted.own[name] for name in fitted.fresh if part_of(name) not in ('encoder', 'norm')]
        state_dict.update({prefix + name: current[name] for name in fresh})
        if fresh:
            _logger.info('left at their initial values, for the pre-training does not have them: %s', some(fresh))
    if 'stages' in fitted.fresh:  # an encoder, or a file from before the segmentor noted them
        state_dict[f'{prefix}_extra_state'] = model.get_extra_state()


def _translate_alone(model: Any, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    if not prefix:
        _translate_in_place(model, state_dict, prefix, *others)


def accept_any_dialect(model: nn.Module, nested: bool = True) -> None:
    """Lets ``model.load_state_dict`` take every dialect at every resolution, also as a part of a larger model.

    The timm entry points and ``BEiTBackbone`` have called this; a ``Beit`` that you build yourself has not. What no
    table knows stays in the state dict, so that the loader reports it.

    Args:
        model: one that holds an encoder of this package.
        nested: False for a part of a model that accepts any dialect itself: a state dict is resized once.
    """
    model.register_load_state_dict_pre_hook(_translate_in_place if nested else _translate_alone)
