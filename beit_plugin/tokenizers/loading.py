"""Tokenizers from checkpoints and back; nothing in a file is executed."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import sources as checkpoint_sources
from ..checkpoints.convert import CheckpointError, some
from ..checkpoints.files import SUFFIXES, write_atomically, write_state_dict
from ..checkpoints.grids import with_grid
from .base import Tokenizer
from .dalle import DalleDecoder, DalleEncoder, DalleTokenizer
from .dialects import (
    VQKD_DIALECTS,
    VQKD_SIGNATURE,
    dalle_parts,
    find_prefix,
    read_dalle,
    read_vqkd,
    vqkd_arguments,
    write_vqkd,
)
from .pickled import MODULE_STAND_INS
from .vqkd import VQKD

__all__ = ['PUBLISHED', 'load_tokenizer', 'save_tokenizer']

_VQKD_FILES = 'https://github.com/addf400/files/releases/download/BEiT-v2/'
# names to files: openai/DALL-E notebooks/usage.ipynb, unilm beit2/TOKENIZER.md, and mmpretrain 1.2.0 configs/beitv2
PUBLISHED: dict[str, tuple[str, ...]] = {
    'dalle': ('https://cdn.openai.com/dall-e/encoder.pkl', 'https://cdn.openai.com/dall-e/decoder.pkl'),
    'vqkd_encoder_base_decoder_1x768x12_clip': (f'{_VQKD_FILES}vqkd_encoder_base_decoder_1x768x12_clip-d93179da.pth',),
    'vqkd_encoder_base_decoder_3x768x12_clip': (f'{_VQKD_FILES}vqkd_encoder_base_decoder_3x768x12_clip-d5036aa7.pth',),
    'vqkd_encoder_base_decoder_1x768x12_dino': (f'{_VQKD_FILES}vqkd_encoder_base_decoder_1x768x12_dino-663c55d7.pth',),
    'vqkd_encoder_mmpretrain': ('https://download.openmmlab.com/mmselfsup/1.x/target_generator_ckpt/vqkd_encoder.pth',),
}
_PARTS = ('encoder', 'decoder')  # file names in unilm's --discrete_vae_weight_path
Source = str | os.PathLike[str] | Mapping[str, Any]


def load_tokenizer(
    source: Source | Sequence[Source],
    *,
    grid: tuple[int, int] | None = None,
    num_heads: int | None = None,
    **options: Any,
) -> Tokenizer:
    """Loads a tokenizer, whatever it is, frozen and in evaluation mode.

    Args:
        source: a key of ``PUBLISHED``; a file, folder, URL, hub id or state dict as in ``checkpoints.load``; several of
            them whose tensors belong together, such as encoder and decoder of a dVAE; or a folder with ``encoder.pkl``
            and ``decoder.pkl`` (or another suffix). OpenAI's published pickles of whole modules are read too.
        grid: (h, w) patches of a VQ-KD's native size, where that is not square and the file does not state it.
        num_heads: of a VQ-KD, where the file does not say so and it is not width / 64.
        options: ``input_size`` and ``compute_dtype`` for a dVAE; those of ``VQKD`` that are no sizes for a VQ-KD, such
            as ``attn_backend``.

    Raises:
        CheckpointError: an unknown name, nothing there, no tokenizer, or one that is not whole.
        ValueError: options that do not fit.
    """
    state_dict, name, stated = _read(source)
    parts = dalle_parts(state_dict)
    prefix = find_prefix(state_dict, VQKD_SIGNATURE)
    if 'encoder' in parts:
        tokenizer: Tokenizer = _dalle(parts, name, **options)
    elif prefix is not None:
        tokenizer = _vqkd(read_vqkd(state_dict, prefix), name, grid or stated, num_heads, **options)
    elif 'decoder' in parts:
        raise CheckpointError(f'{name} holds the decoder of a dVAE alone; give the encoder too, as [encoder, decoder]')
    else:
        raise CheckpointError(
            f'expected the dVAE of DALL-E or a VQ-KD, got {name} with the names {some(state_dict)}; give a checkpoint '
            f'of a tokenizer, or one of the names {", ".join(PUBLISHED)}'
        )
    return tokenizer.eval().requires_grad_(False)


def _read(source: Source | Sequence[Source]) -> tuple[dict[str, Tensor], str, tuple[int, int] | None]:
    """All tensors of the source, what to call it in messages, and the grid that the last file states."""
    if isinstance(source, str) and source in PUBLISHED:
        source = PUBLISHED[source]
    elif isinstance(source, (str, os.PathLike)) and Path(source).is_dir():
        files = [next(iter(sorted(Path(source).glob(f'{part}.*'))), None) for part in _PARTS]
        source = [file for file in files if file is not None] if files[0] else source
    elif isinstance(source, str) and not Path(source).exists() and not set(source) & set('/.:'):
        raise CheckpointError(
            f'unknown tokenizer {source!r}: no file of that name is here, and known names are {", ".join(PUBLISHED)}'
        )
    sources = source if isinstance(source, Sequence) and not isinstance(source, str) else [source]
    state_dict: dict[str, Tensor] = {}
    names, grid = [], None
    for i, one in enumerate(sources):
        read = checkpoint_sources.read_source(one, MODULE_STAND_INS)
        names.append(read.name)
        grid = read.grid
        # the two halves of a dVAE have the same names
        state_dict |= {f'{i}.{n}' if len(sources) > 1 else n: t for n, t in read.state_dict.items()}
    return state_dict, ' and '.join(names), grid


def _dalle(
    parts: dict[str, dict[str, Tensor]], name: str, compute_dtype: torch.dtype | None = None, **options: Any
) -> DalleTokenizer:
    built: dict[str, Any] = {}
    for part, state in parts.items():
        model = {'encoder': DalleEncoder, 'decoder': DalleDecoder}[part](
            **read_dalle(part, state), compute_dtype=compute_dtype
        )
        _fill(model, state, f'{part} of {name}')
        built[part] = model
    return DalleTokenizer(**built, **options)


def _vqkd(
    state: dict[str, Tensor], name: str, grid: tuple[int, int] | None, num_heads: int | None, **options: Any
) -> VQKD:
    tokenizer = VQKD(**{**vqkd_arguments(state, grid, num_heads), **options})
    own = tokenizer.state_dict()
    # other dialects do not have these
    fresh = {key: own[key] for key in ('quantize.cluster_size', 'quantize.unused_steps')}
    state = {**fresh, **state, 'geometry': own['geometry']}
    _fill(tokenizer, state, name)
    return tokenizer


def _fill(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Loads every tensor into its place.

    Raises:
        CheckpointError: a tensor without a place, a place without a tensor, or another shape.
    """
    own = model.state_dict()
    wrong = [
        f'{key} has shape {tuple(state[key].shape)} instead of {tuple(own[key].shape)}'
        for key in own.keys() & state.keys()
        if state[key].shape != own[key].shape
    ]
    problems = [
        f'{what} {some(sorted(keys))}'
        for what, keys in (('lacks', own.keys() - state.keys()), ('has no place for', state.keys() - own.keys()))
        if keys
    ]
    if problems or wrong:
        raise CheckpointError(
            f'the {type(model).__name__} of {name} does not fit: {"; ".join([*problems, *wrong[:3]])}; fetch or save '
            'the checkpoint again, or give the options that it was built with'
        )
    model.load_state_dict(state)


def save_tokenizer(tokenizer: Tokenizer, path: str | os.PathLike[str], dialect: str = 'native') -> None:
    """Saves a tokenizer; the file appears whole or not at all.

    Args:
        tokenizer: to save; ``load_tokenizer`` reads all that this writes.
        path: a file (``.safetensors``, or torch's format by another suffix).
        dialect: ``native``; a VQ-KD also for ``unilm`` (``modeling_vqkd.py``) and ``mmpretrain`` (``VQKD``, which has
            no place for the decoder).

    Raises:
        CheckpointError: an unknown dialect, one that has no such tokenizer, or no name of a checkpoint file.
        OSError: the place cannot be written; an old file is still there.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f'{path} is no name of a checkpoint file; end it in one of {", ".join(SUFFIXES)}')
    known = VQKD_DIALECTS if isinstance(tokenizer, VQKD) else ('native',)
    if dialect not in known:
        raise CheckpointError(
            f'{type(tokenizer).__name__} can be saved as {", ".join(known)}, got the dialect {dialect!r}; choose one'
        )
    state, metadata = dict(tokenizer.state_dict()), {'dialect': dialect}
    if dialect != 'native' and isinstance(tokenizer, VQKD):
        h, w = tokenizer.encoder.window_size
        state = with_grid(write_vqkd(state, dialect, (h, w)), (h, w))
        metadata['grid'] = f'{h}x{w}'
    if dialect == 'unilm' and path.suffix != '.safetensors':
        write_atomically(path, lambda temporary: torch.save({'model': state}, temporary))  # where its loader looks
    else:
        write_state_dict(state, path, metadata)
