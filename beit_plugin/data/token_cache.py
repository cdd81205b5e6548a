"""The tokens of fixed views of images in one safetensors file, for trainings that need not run the tokenizer.

``tokens`` (images, views, h, w), uint16 where the vocabulary allows, else int32; ``present`` (images,) uint8, 0 where
an image could not be read. What they are of stands in the metadata, as JSON: the number and a digest of the names of
the images, the arguments of the views, their number and seed, the vocabulary, and the tokenizer in words.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoints.files import write_atomically

__all__ = ['TokenCache', 'write_token_cache']

_KEY = 'beit_plugin_tokens'  # in the metadata
_AGAIN = 'make the file anew with tools/cache_tokens.py, or give what it was made of'


class TokenCache:
    """Reads a file of tokens; each process maps it into its memory when it first needs it.

    Args:
        path: of the file.

    Raises:
        ValueError: no such file, cut off, or of another kind.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._slices: Any = None
        with self._open() as file:
            said = (file.metadata() or {}).get(_KEY)
            if said is None or not {'tokens', 'present'} <= set(file.keys()):
                raise ValueError(f'{self.path} is no file of tokens: give one that tools/cache_tokens.py made')
            self._present: Tensor = file.get_tensor('present')
            tokens = file.get_slice('tokens')
            shape, dtype = tokens.get_shape(), tokens.get_dtype()
        self.about: dict[str, Any] = self._read(said)
        self.num_views: int = self.about['num_views']
        self.seed: int = self.about['seed']
        self.vocab_size: int = self.about['vocab_size']
        self.tokenizer: str = self.about['tokenizer']
        if len(shape) != 4 or shape[:2] != [*self._present.shape, self.num_views] or dtype not in ('U16', 'I32'):
            raise ValueError(
                f'{self.path} has tokens of shape {shape} and dtype {dtype}, expected ({len(self._present)} images, '
                f'{self.num_views} views, h, w) of U16 or I32, as the rest of it says: {_AGAIN}'
            )

    def _read(self, said: str) -> dict[str, Any]:
        """What the file says of its tokens."""
        try:
            about = json.loads(said)
        except (ValueError, RecursionError) as error:
            raise ValueError(f'{self.path} says what it holds in broken JSON ({error}): {_AGAIN}') from error
        kinds = {'num_views': int, 'seed': int, 'vocab_size': int, 'tokenizer': str}
        wrong = [n for n, kind in kinds.items() if not isinstance(about, dict) or type(about.get(n)) is not kind]
        if wrong:
            raise ValueError(f'{self.path} does not say {", ".join(wrong)} of its tokens: {_AGAIN}')
        return about

    def _open(self) -> Any:
        if not Path(self.path).is_file():
            raise ValueError(f'the file of tokens {self.path} does not exist: make it with tools/cache_tokens.py')
        try:
            return safe_open(self.path, 'pt')
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f'{self.path} is cut off or no safetensors file ({error}): make it anew with tools/cache_tokens.py'
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), '_slices': None}  # a map of the file does not go to another process

    def tokens(self, index: int, view: int) -> Tensor | None:
        """Those of a view of an image, (h, w) int64; None where the image could not be read.

        Raises:
            ValueError: numbers that are no tokens of the vocabulary.
        """
        if not self._present[index]:
            return None
        if self._slices is None:
            self._slices = self._open().get_slice('tokens')
        tokens = self._slices[index : index + 1, view : view + 1][0, 0].long()
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise ValueError(f'{self.path} has tokens that are none of its {self.vocab_size}: {_AGAIN}')
        return tokens

    def check(self, about: Mapping[str, Any]) -> None:
        """Raises ValueError unless the tokens are of these images and views, as ``ImageFiles.about_tokens`` says."""
        for name, what in (('images', 'number of images'), ('names', 'digest of the names of the images')):
            if about[name] != self.about.get(name):
                raise ValueError(
                    f'{self.path} holds tokens of other images, the {what} is {self.about.get(name)} there and '
                    f'{about[name]} in the data set: {_AGAIN}'
                )
        other = [name for name in about if about[name] != self.about.get(name)]
        if other:
            theirs, ours = (', '.join(f'{name}={said.get(name)}' for name in other) for said in (self.about, about))
            raise ValueError(
                f'{self.path} holds tokens of other views, {theirs}, and the data set has {ours}: {_AGAIN}'
            )


def write_token_cache(
    path: str | os.PathLike[str], batches: Iterable[tuple[Tensor, Tensor]], grid: tuple[int, int], about: dict[str, Any]
) -> None:
    """Writes tokens as they come, so that they need not fit into memory; the file appears whole or not at all.

    Args:
        path: file to write.
        batches: tokens (B, views, h, w) of one image after the other, and (B,) bool, False where they are of none.
        grid: (h, w).
        about: ``ImageFiles.about_tokens``, ``vocab_size`` and ``tokenizer``.

    Raises:
        OSError: see ``write_atomically``.
    """
    is_small = about['vocab_size'] <= 1 << 16
    dtype = torch.uint16 if is_small else torch.int32
    shape = (about['images'], about['num_views'], *grid)
    length = torch.Size(shape).numel() * dtype.itemsize
    # https://github.com/huggingface/safetensors, "Format": length of the header, header, values
    entries = {
        '__metadata__': {'format': 'pt', _KEY: json.dumps(about)},
        'tokens': {'dtype': 'U16' if is_small else 'I32', 'shape': shape, 'data_offsets': (0, length)},
        'present': {'dtype': 'U8', 'shape': shape[:1], 'data_offsets': (length, length + shape[0])},
    }
    header = json.dumps(entries).encode()
    header += b' ' * (-len(header) % 8)

    def write(temporary: str) -> None:
        present = []
        with open(temporary, 'wb') as file:
            file.write(len(header).to_bytes(8, 'little') + header)
            for tokens, are_there in batches:
                file.write(tokens.cpu().to(dtype).numpy().tobytes())
                present.append(are_there.to(torch.uint8))
            file.write(torch.cat(present).numpy().tobytes())

    write_atomically(Path(path), write)
