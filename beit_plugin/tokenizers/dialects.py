"""The names that tokenizers have in published checkpoints, and ours.

dVAE of DALL-E: OpenAI's modules (openai/DALL-E at 5be4b23, also unilm ``beit/dall_e`` and mmpretrain's
``DALLEEncoder``) and transformers' ``FlavaImageCodebook``. VQ-KD: unilm ``beit2/modeling_vqkd.py`` at 80d673a and
mmpretrain 1.2.0's ``VQKD``; their encoders and decoders are read by the tables of ``checkpoints``.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.convert import CheckpointError, from_native, some, to_native
from ..checkpoints.describe import describe
from .dalle import GROUPS

__all__ = ['VQKD_DIALECTS', 'dalle_parts', 'find_prefix', 'read_dalle', 'read_vqkd', 'vqkd_arguments', 'write_vqkd']

State = dict[str, Tensor]
VQKD_DIALECTS = ('native', 'unilm', 'mmpretrain')
VQKD_SIGNATURE = 'encode_task_layer.0.weight'
_DALLE_SIGNATURE = re.compile(r'(.*?)blocks\.input\.(?:w|weight)')
_DALLE_RENAMES = ((r'\.w$', '.weight'), (r'\.b$', '.bias'), (r'\.group\.', '.'), (r'\.res_path\.path\.', '.res_path.'))
# of unilm's and mmpretrain's quantizers, to ours; None: made anew or of no effect (embed_avg and its sizes)
_QUANTIZE = {
    'embedding.weight': 'weight',
    'embedding.initted': 'initialized',
    'embedding.cluster_size': None,
    'embedding.embed_avg': None,
    'cluster_size': 'cluster_size',
}
_OURS = ('weight', 'initialized', 'cluster_size', 'unused_steps')
_TASK_LAYERS = ('encode_task_layer', 'decode_task_layer')
# of the training, which unilm's own loader leaves out too
_DROPPED = ('teacher_model', 'scaling_layer', 'loss')


def find_prefix(state_dict: Mapping[str, Tensor], signature: str) -> str | None:
    """What stands before the name that every such tokenizer has; None where no name ends so."""
    return next((name.removesuffix(signature) for name in state_dict if name.endswith(signature)), None)


# --- the dVAE of DALL-E -----------------------------------------------------------------------------------------------


def dalle_parts(state_dict: Mapping[str, Tensor]) -> dict[str, State]:
    """The encoder and decoder of a dVAE in a checkpoint, by these words, under our names; empty where there is none.

    Names that do not belong to them, such as the rest of a FLAVA model, are left out.
    """
    parts: dict[str, State] = {}
    for name, tensor in state_dict.items():
        match = _DALLE_SIGNATURE.fullmatch(name)
        if match is None or tensor.ndim != 4:
            continue
        part = 'encoder' if max(tensor.shape[2:]) > 1 else 'decoder'  # 7x7 pixels, or one token
        prefix = match[1]
        if part in parts:
            raise CheckpointError(f'{name} belongs to a second {part} of a dVAE; give a state dict with one')
        parts[part] = {
            _dalle_name(name.removeprefix(prefix)): tensor
            for name, tensor in state_dict.items()
            if name.startswith(f'{prefix}blocks.')
        }
    return parts


def _dalle_name(name: str) -> str:
    for pattern, ours in _DALLE_RENAMES:
        name = re.sub(pattern, ours, name)
    return name


def read_dalle(part: str, state: State) -> dict[str, Any]:
    """The sizes of an encoder or decoder, as arguments of its class.

    Raises:
        CheckpointError: a tensor that tells a size is missing or has another number of dimensions.
    """
    first, last = (_shape(state, f'blocks.{name}.weight', 4) for name in ('input', 'output.conv'))
    pattern = re.compile(rf'blocks\.group_{GROUPS}\.block_\d+\.res_path\.conv_4\.weight')
    sizes: dict[str, Any] = {'blocks_per_group': sum(bool(pattern.fullmatch(name)) for name in state)}
    if part == 'encoder':
        return {**sizes, 'in_chans': first[1], 'width': first[0], 'vocab_size': last[0]}
    return {
        **sizes, 'vocab_size': first[1], 'stem_width': first[0], 'width': last[1], 'out_chans': last[0] // 2,
    }  # fmt: skip


# --- VQ-KD ------------------------------------------------------------------------------------------------------------


def read_vqkd(state_dict: Mapping[str, Tensor], prefix: str) -> State:
    """A VQ-KD of any dialect under our names.

    Raises:
        CheckpointError: a name that no table knows, or what ``checkpoints`` finds wrong with encoder or decoder.
    """
    ours: State = {}
    towers: dict[str, State] = {}
    unknown: list[str] = []
    has_decoder = f'{prefix}decode_task_layer.0.weight' in state_dict
    for name, tensor in state_dict.items():
        if not name.startswith(prefix):
            continue
        part, _, rest = name.removeprefix(prefix).partition('.')
        if part == 'encoder' or (part == 'decoder' and has_decoder):
            towers.setdefault(part, {})[rest] = tensor
        elif part == 'quantize' and (rest in _QUANTIZE or rest in _OURS):
            target = _QUANTIZE.get(rest, rest)
            if target is not None:
                ours[f'quantize.{target}'] = tensor
        elif part in _TASK_LAYERS or (part, rest) == ('geometry', ''):
            ours[name.removeprefix(prefix)] = tensor
        elif part not in _DROPPED and part != 'decoder':  # without its task layer a decoder gives nothing
            unknown.append(name)
    for part, tower in towers.items():
        native, rest = to_native(tower)
        unknown += [f'{prefix}{part}.{name}' for name in rest]
        # unilm normalises where it would pool, mmpretrain and ours at the end of the encoder: the same function
        ours |= {f'{part}.{re.sub(r"^fc_norm", "norm", name)}': tensor for name, tensor in native.items()}
    if unknown:
        raise CheckpointError(f'no table knows {some(unknown)} of this VQ-KD; remove them if they are not needed')
    if 'quantize.initialized' in ours:
        ours['quantize.initialized'] = ours['quantize.initialized'].reshape(-1)[:1].ne(0).squeeze()
    return ours


def vqkd_arguments(ours: State, grid: tuple[int, int] | None = None, num_heads: int | None = None) -> dict[str, Any]:
    """The sizes of a VQ-KD under our names, as arguments of ``VQKD``.

    Args:
        ours: what ``read_vqkd`` gives.
        grid: (h, w) of its native size in patches; needed where it is not square and the checkpoint does not say so.
        num_heads: attention heads; by default those that the checkpoint states, or width / 64 as in the published ones.

    Raises:
        CheckpointError: something that tells a size is missing, or nothing tells the heads.
    """
    stated = ours.get('geometry')
    if stated is not None:
        if stated.shape != (3,) or stated.is_floating_point() or int(stated.min()) < 1:
            raise CheckpointError(f'geometry must be three whole numbers (h, w, heads) of at least 1, got {stated}')
        h, w, heads = stated.tolist()
        grid, num_heads = (h, w) if grid is None else grid, heads if num_heads is None else num_heads
    encoder = _describe(ours, 'encoder', grid)
    dim = encoder.pop('embed_dim')
    known = encoder.pop('num_heads', num_heads)
    if num_heads not in (None, known) or (num_heads and dim % num_heads):
        of = f'width {dim}' if num_heads == known else f'width {dim} and bias tables of {known} heads'
        raise CheckpointError(f'{num_heads} attention heads do not fit a VQ-KD of {of}; give num_heads=...')
    num_heads = known
    if num_heads is None and dim % 64:
        raise CheckpointError(f'nothing tells the attention heads of this VQ-KD of width {dim}; give num_heads=...')
    num_heads = num_heads or dim // 64
    vocab_size, code_dim = _shape(ours, 'quantize.weight', 2)
    arguments = {**encoder, 'embed_dim': dim, 'num_heads': num_heads, 'vocab_size': vocab_size, 'code_dim': code_dim}
    if 'decode_task_layer.0.weight' not in ours:
        return {**arguments, 'decoder_depth': 0}
    decoder = _describe(ours, 'decoder', grid)
    same = ('embed_dim', 'mlp_ratio', 'qkv_bias', 'use_abs_pos_emb', 'use_rel_pos_bias')
    if any(decoder[name] != arguments[name] for name in same) or decoder['patch_size'] != (1, 1):
        raise CheckpointError(
            'expected the decoder of a VQ-KD to be like its encoder but for the depth, with patches of one token, got '
            f'{ {name: decoder[name] for name in (*same, "patch_size")} }; load the encoder alone'
        )
    target_dim, _ = _shape(ours, 'decode_task_layer.2.weight', 2)
    return {**arguments, 'decoder_depth': decoder['depth'], 'target_dim': target_dim}


def _describe(ours: State, part: str, grid: tuple[int, int] | None) -> dict[str, Any]:
    tower = {name.removeprefix(f'{part}.'): tensor for name, tensor in ours.items() if name.startswith(f'{part}.')}
    found = describe(tower, grid).arguments
    return {name: value for name, value in found.items() if name not in ('num_classes', 'global_pool')}


def write_vqkd(ours: State, dialect: str, grid: tuple[int, int]) -> State:
    """A VQ-KD under the names of another dialect; mmpretrain's has no decoder.

    Args:
        ours: a state dict of ``VQKD``.
        dialect: ``unilm`` or ``mmpretrain``.
        grid: (h, w) of its native size in patches.
    """
    theirs: State = {}
    for part, size in (('encoder', grid), ('decoder', grid)):
        tower = {name.removeprefix(f'{part}.'): tensor for name, tensor in ours.items() if name.startswith(f'{part}.')}
        if not tower or (part == 'decoder' and dialect == 'mmpretrain'):
            continue
        if dialect == 'unilm':
            tower = {re.sub(r'^norm\.', 'fc_norm.', name): tensor for name, tensor in tower.items()}
        named = from_native(tower, dialect, 'encoder' if dialect == 'mmpretrain' else None, size)
        theirs |= {f'{part}.{name}': tensor for name, tensor in named.items()}
    layers = _TASK_LAYERS if dialect == 'unilm' else _TASK_LAYERS[:1]
    theirs |= {name: tensor for name, tensor in ours.items() if name.startswith(layers)}
    weight, sizes = ours['quantize.weight'], ours['quantize.cluster_size']
    quantize = {
        'embedding.weight': weight,
        'embedding.initted': ours['quantize.initialized'].to(torch.float32).reshape(1),
        'cluster_size': sizes,
    }
    if dialect == 'unilm':
        quantize |= {'embedding.cluster_size': sizes, 'embedding.embed_avg': weight}
    return theirs | {f'quantize.{name}': tensor for name, tensor in quantize.items()}


def _shape(state: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    tensor = state.get(name)
    if tensor is None or tensor.ndim != ndim:
        got = 'nothing' if tensor is None else f'shape {tuple(tensor.shape)}'
        raise CheckpointError(f'expected {name} with {ndim} dimensions, got {got}; the checkpoint is not whole')
    return tuple(tensor.shape)
