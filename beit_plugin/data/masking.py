"""Which patches a masked image model does not see: blocks by BEiT's rule, or single patches at random.

Paper: BEiT, https://arxiv.org/abs/2106.08254, algorithm 1.
Reference: https://github.com/microsoft/unilm (MIT licence), ``beit/masking_generator.py`` at 2312c6f and
``beit2/masking_generator.py`` at 80d673a. Written anew, for many images at once: the same distribution, but not the
same masks for the same seed. The rule ends when ten blocks in a row do not fit, which may be before the asked number of
patches is hidden: on 14 x 14 patches a third of the images get fewer than 75, two thirds of these 74. Then:

==============================  ====================================================================================
v1, ``beit``                    the mask stays short; ``BlockMasking.blocks`` gives these masks
v2, ``beit2``, and we           the missing patches are drawn among all visible ones with equal chance
mmpretrain 1.2.0                further blocks are tried until the number is reached; also, its last row and column are
                                never hidden, because ``numpy.random.randint`` leaves out the upper end
==============================  ====================================================================================

Random numbers come from the generator that is given and from nowhere else, and the same state gives the same masks.
``numpy.random.default_rng((seed, rank, worker, step))`` is a stream of its own for each place and step: nothing needs
to be stored to go on after an interruption. ``torch.default_generator`` is the one that a DataLoader seeds for each
worker. One that runs on through the training is stored as ``get_state()``, or ``bit_generator.state`` in NumPy.

A call takes a fifth of a millisecond even for one image: ask for the masks of a whole batch.

Shapes: B images, h w grid in patches, n images that still get blocks, t attempts at a block, u words of a row.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ['AnyGenerator', 'BlockMasking', 'RandomMasking']

AnyGenerator = torch.Generator | np.random.Generator

_ATTEMPTS = 10  # at one block, in the reference; after as many failures in a row an image gets no further block
_CANDIDATES = 384  # attempts of all images in a round; with few images one costs as much as with many; measured
_BITS = 16  # of a word, which holds that many patches of one row
_BIT_COUNT = np.unpackbits(np.arange(2**_BITS, dtype='<u2').view(np.uint8)).reshape(-1, _BITS).sum(1, dtype=np.int32)


class RandomMasking:
    """Hides single patches, all with equal chance (SimMIM at patch size, MAE).

    Args:
        grid: patches of an image, (h, w) or one number for both.
        num_masking_patches: how many of them are hidden in every image, from 0 to all.

    Raises:
        ValueError: a grid that is none, or more patches to hide than there are.
    """

    def __init__(self, grid: int | tuple[int, int], num_masking_patches: int) -> None:
        self.grid = _grid(grid)
        self.num_masking_patches = _whole(
            'num_masking_patches', num_masking_patches, 0, ' (a number of patches, not their share)'
        )
        if num_masking_patches > math.prod(self.grid):
            raise ValueError(
                f'num_masking_patches must be at most the {math.prod(self.grid)} patches of a grid of {self._size}, '
                f'got {num_masking_patches}; hide fewer, or give the grid as (image height, width) // patch size'
            )

    def __call__(self, num_images: int, generator: AnyGenerator) -> Tensor:
        """Draws masks.

        Args:
            num_images: B, also 0.
            generator: where all random numbers come from; it runs on.

        Returns:
            (B, h, w) bool on the CPU, True where a patch is hidden; exactly ``num_masking_patches`` in every image.

        Raises:
            ValueError: a number of images below 0, or no generator of random numbers on the CPU.
        """
        _check_call(num_images, generator)
        masks = np.zeros((num_images, math.prod(self.grid)), bool)  # B, h*w
        _hide_singles(masks, np.full(num_images, self.num_masking_patches), generator)
        return torch.from_numpy(masks).unflatten(1, self.grid)

    @property
    def _size(self) -> str:
        return '{} x {}'.format(*self.grid)


class BlockMasking(RandomMasking):
    """Hides blocks by BEiT's rule, then single patches until their number is exact, as BEiT v2 does.

    A block's area is uniform from ``min_num_patches`` to what is still to be hidden, its aspect (height over width) is
    log-uniform, its place uniform. It counts if it hides a patch that was visible and not more of them than are
    missing, and is lower and narrower than the grid. Once fewer than ``min_num_patches`` are missing, areas are uniform
    from there to ``min_num_patches``, as in the reference: such blocks fit only over others.

    Args:
        grid: patches of an image, (h, w) or one number for both.
        num_masking_patches: how many of them are hidden in every image. BEiT: 75 of 14 x 14.
        min_num_patches: smallest area of a block that does not complete the mask, in patches. BEiT: 16.
        max_num_patches: largest area of a block; as many as are missing if None.
        min_aspect: lowest height over width of a block, above 0. BEiT: 0.3.
        max_aspect: highest; 1 / min_aspect if None.

    Raises:
        ValueError: what ``RandomMasking`` raises; fewer patches to hide than the smallest block has; a largest area or
            aspect below the smallest; or a grid that the smallest block does not fit in.
    """

    def __init__(
        self,
        grid: int | tuple[int, int],
        num_masking_patches: int,
        *,
        min_num_patches: int = 16,
        max_num_patches: int | None = None,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
    ) -> None:
        super().__init__(grid, num_masking_patches)
        self.min_num_patches = _whole('min_num_patches', min_num_patches, 1)
        self.max_num_patches = num_masking_patches
        if num_masking_patches < min_num_patches:
            raise ValueError(
                f'num_masking_patches must be at least min_num_patches, which is {min_num_patches}, got '
                f'{num_masking_patches}; hide more, allow smaller blocks, or use RandomMasking'
            )
        if max_num_patches is not None:
            self.max_num_patches = _whole(
                'max_num_patches', max_num_patches, min_num_patches, ' (min_num_patches), or None'
            )
        low, high = self._check_aspect(min_aspect, max_aspect)
        # to get the sides of a block, the root of its area is multiplied, and divided, by the root of its aspect
        self._log_low = np.array([low, -low]).reshape(2, 1, 1) / 2
        self._log_span = np.array([high - low, low - high]).reshape(2, 1, 1) / 2
        self._sides = np.array(self.grid, float).reshape(2, 1, 1)
        self._sides_and_1 = self._sides + 1
        # runs of rows and of columns, at start * (side + 1) + length: all bits of a row's word, or some bits of each
        self._rows = np.ascontiguousarray((_runs(self.grid[0]) * np.uint16(2**_BITS - 1)).T)  # h, (h+1)^2
        bits = np.pad(_runs(self.grid[1]), ((0, 0), (0, -self.grid[1] % _BITS)))  # (w+1)^2, 16*u
        octets = np.packbits(bits, axis=1, bitorder='little')  # (w+1)^2, 2*u
        self._columns = np.ascontiguousarray(octets.view('<u2').astype(np.uint16).T)  # u, (w+1)^2

    def _check_aspect(self, low: float, high: float | None) -> tuple[float, float]:
        """Logarithms of the lowest and highest aspect."""
        if not isinstance(low, Real) or not 0 < low < math.inf:
            raise ValueError(f'min_aspect must be a number above 0 (height over width of a block), got {low!r}')
        top = 1 / low if high is None else high
        if not isinstance(top, Real) or not low <= top < math.inf:
            got = f'{high!r}' if high is not None else f'None, which stands for 1 / min_aspect, {top:.3g}'
            raise ValueError(f'max_aspect must be a number of at least {low:.3g} (min_aspect), got {got}')
        h, w = self.grid
        area = self.min_num_patches
        # sides are rounded and must be below the grid's: height = sqrt(area * aspect), width = sqrt(area / aspect)
        if max(low, area / (w - 0.5) ** 2) > min(top, (h - 0.5) ** 2 / area):
            raise ValueError(
                f'a block of min_num_patches {area} patches with an aspect from {low:.3g} to {top:.3g} must be lower '
                f'and narrower than the grid, got a grid of {self._size}; allow smaller blocks or other aspects, or '
                'use RandomMasking'
            )
        return math.log(low), math.log(top)

    def __call__(self, num_images: int, generator: AnyGenerator) -> Tensor:
        """Draws masks; see ``RandomMasking.__call__``."""
        masks, missing, _ = self._blocks(num_images, generator)
        _hide_singles(masks, missing, generator)
        return torch.from_numpy(masks).unflatten(1, self.grid)

    def blocks(self, num_images: int, generator: AnyGenerator) -> tuple[Tensor, Tensor]:
        """Draws the blocks alone: the masks of BEiT v1's released code.

        Args:
            num_images, generator: as in a call, which draws the same blocks from the same state.

        Returns:
            Masks (B, h, w) bool with up to ``num_masking_patches`` hidden, and the numbers of blocks (B,) int64.

        Raises:
            ValueError: as in a call.
        """
        masks, _, num_blocks = self._blocks(num_images, generator)
        return torch.from_numpy(masks).unflatten(1, self.grid), torch.from_numpy(num_blocks)

    def _blocks(self, num_images: int, generator: AnyGenerator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks (B, h*w) bool, numbers of patches that are missing (B,) int64, numbers of blocks (B,) int64.

        In a round every image that still gets blocks makes several attempts at one, all with the same mask before
        their eyes; the first that fits counts and the others are forgotten, as if they had never been made.
        """
        _check_call(num_images, generator)
        h, w = self.grid
        words = np.zeros((h, len(self._columns), num_images), np.uint16)  # h, u, B: a patch is a bit, a row u words
        missing = np.full(num_images, float(self.num_masking_patches))  # B
        images = place = np.arange(num_images)  # n
        attempts = np.full(num_images, _ATTEMPTS)  # n, those that are left
        hits = [images[:0]]  # the images that got a block, round by round
        while n := len(images):
            t = min(max(_CANDIDATES // n, 2), _ATTEMPTS)
            lacking = missing.take(images)  # n
            limit = np.minimum(lacking, self.max_num_patches)  # n
            rows, columns, area = self._attempts(_uniform(generator, 4, t, n), limit)  # t, n each
            blocks = self._rows.take(rows, 1)[:, None] & self._columns.take(columns, 1)  # h, u, t, n
            before = words.take(images, 2)  # h, u, n
            new = area - _BIT_COUNT.take(blocks & before[:, :, None]).reshape(-1, t, n).sum(0, dtype=np.int32)  # t, n
            fits = (new > 0) & (new <= limit)  # t, n
            first = fits.argmax(0)  # n
            chosen = first * n + place[:n]  # n, counted in t*n
            hit = fits.take(chosen) & (first < attempts)  # n
            words[:, :, images] = before | blocks.reshape(h, -1, t * n).take(chosen, 2) * hit
            lacking -= new.take(chosen) * hit
            missing[images] = lacking
            hits.append(images[hit])
            attempts = np.where(hit, _ATTEMPTS, attempts - t)
            on = (lacking > 0) & (attempts > 0)
            images, attempts = images[on], attempts[on]
        num_blocks = np.bincount(np.concatenate(hits), minlength=num_images)  # B
        octets = np.ascontiguousarray(words.transpose(2, 0, 1).astype('<u2')).view(np.uint8)  # B, h, 2*u
        masks = np.unpackbits(octets, axis=2, count=w, bitorder='little').view(bool)  # B, h, w
        return masks.reshape(num_images, h * w), missing.astype(np.int64), num_blocks

    def _attempts(self, uniform: np.ndarray, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Blocks from numbers (4, t, n) in [0, 1) and the largest areas (n,).

        Returns:
            Columns of the tables ``_rows`` and ``_columns``, int64, and areas, float64; (t, n) each. The area of a
            block that is not lower and narrower than the grid is 0.
        """
        area = self.min_num_patches + (limit - self.min_num_patches) * uniform[0]  # t, n
        sides = np.rint(np.sqrt(area) * np.exp(self._log_span * uniform[1] + self._log_low))  # 2, t, n
        lower, narrower = sides < self._sides  # t, n each
        sides *= lower & narrower
        start = np.floor(uniform[2:] * (self._sides_and_1 - sides))  # 2, t, n
        rows, columns = (start * self._sides_and_1 + sides).astype(np.int64)
        return rows, columns, sides[0] * sides[1]


def _runs(size: int) -> np.ndarray:
    """Which of ``size`` places are in a run, by its start and length: ((size + 1)^2, size) bool."""
    start, length, place = np.ogrid[: size + 1, : size + 1, :size]
    return ((place >= start) & (place < start + length)).reshape(-1, size)


def _hide_singles(masks: np.ndarray, missing: np.ndarray, generator: AnyGenerator) -> None:
    """Hides ``missing`` (B,) more patches of the masks (B, h*w), in place, all visible ones with equal chance."""
    images = np.flatnonzero(missing)
    patches = masks.shape[1]
    # with the patch in its last digits a key is drawn only once, so that exactly as many as asked are up to the last
    keys = np.floor(_uniform(generator, len(images), patches) * 2.0**32) * patches + np.arange(patches)
    np.copyto(keys, np.inf, where=masks[images])
    last = np.sort(keys, axis=1)[np.arange(len(images)), missing[images] - 1]
    masks[images] |= keys <= last[:, None]


def _uniform(generator: AnyGenerator, *shape: int) -> np.ndarray:
    """Float64 in [0, 1)."""
    if isinstance(generator, np.random.Generator):
        return generator.random(shape)
    # the CPU by name, for the default may be another
    return torch.rand(shape, dtype=torch.float64, generator=generator, device='cpu').numpy()


def _check_call(num_images: int, generator: Any) -> None:
    _whole('num_images', num_images, 0)
    kind = f'{type(generator).__module__}.{type(generator).__name__}'
    if isinstance(generator, torch.Generator):
        kind += f' on {generator.device}'
        if generator.device.type == 'cpu':
            return
    elif isinstance(generator, np.random.Generator):
        return
    raise ValueError(
        f'generator must be a torch.Generator on the CPU or a numpy.random.Generator, got {kind}; '
        'numpy.random.default_rng((seed, rank, step)) makes one'
    )


def _grid(value: Any) -> tuple[int, int]:
    sides = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(sides) != 2 or not all(isinstance(side, Integral) and int(side) > 0 for side in sides):
        raise ValueError(f'grid must be one or two whole numbers (h, w) of patches above 0, got {value!r}')
    return int(sides[0]), int(sides[1])


def _whole(name: str, value: Any, low: int, hint: str = '') -> int:
    if not isinstance(value, Integral) or int(value) < low:
        raise ValueError(f'{name} must be a whole number of at least {low}{hint}, got {value!r}')
    return int(value)
