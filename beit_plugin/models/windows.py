"""Attention inside windows of the grid for most blocks, over the whole grid for a few, as ViTDet does.

Paper: ViTDet, Li, Mao, Girshick, He, https://arxiv.org/abs/2203.16527, section 3 ("backbone adaptation"); reference:
https://github.com/facebookresearch/detectron2, ``modeling/backbone/vit.py`` (Apache-2.0). Written anew. What differs:
    * no padding: where the window does not divide the grid, the last window of a row or column is moved back until it
      ends at the edge. What it shares with its neighbour is there to be looked at, and is read from the neighbour.
      ViTDet fills up with zeros instead, which its attention cannot tell from patches;
    * every window looks at [CLS], which ViTDet does not have, and [CLS] looks at each window: it is copied into all
      of them, and the mean of what comes out goes on;
    * the position bias is that of a small image: the table is read at the grid of the window by the same rule as at
      the grid of an image (``rel_pos_resize``). So a window of the native grid (14 for 224 pixels) reads the table as
      it was trained.

A window is thus nothing but an image of its size, and every attention backend computes it. Where it covers the grid,
the result is that of attention over everything. Information passes between windows in the global blocks and by [CLS].

Shapes: B batch, C channels, h w grid, N = 1 + h*w tokens.
"""

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernel_support import is_open

__all__ = ['Windows', 'cut_windows', 'resolve_global_blocks', 'resolve_window']

GLOBAL_BLOCKS = 4  # ViTDet, section 3: one in each quarter of the backbone


class Windows(NamedTuple):
    """How a grid is cut: ceil(h / wh) rows of ceil(w / ww) windows, none larger than the grid."""

    grid: tuple[int, int]  # h, w in patches
    size: tuple[int, int]  # wh, ww in patches

    # torch.compile of torch 2.6 takes methods of named tuples, but no properties
    def counts(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        (h, w), (wh, ww) = self.grid, self.size
        return (h + wh - 1) // wh, (w + ww - 1) // ww

    def total(self) -> int:
        """Windows of an image."""
        return self.counts()[0] * self.counts()[1]

    def split(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + h*w, C), [CLS] first, to those of windows (B * windows, 1 + wh*ww, C), image by image."""
        B, _, C = x.shape
        (rows, columns), (wh, ww) = self.counts(), self.size
        patches = x[:, 1:].unflatten(1, self.grid)  # B, h, w, C
        patches = _repeat_last(_repeat_last(patches, 1, rows, wh), 2, columns, ww)  # B, rows*wh, columns*ww, C
        patches = patches.reshape(B, rows, wh, columns, ww, C).transpose(2, 3).reshape(B, self.total(), wh * ww, C)
        cls_token = x[:, None, :1].expand(-1, self.total(), -1, -1)  # B, windows, 1, C
        return torch.cat((cls_token, patches), dim=2).flatten(0, 1)  # B*windows, 1+wh*ww, C

    def merge(self, x: Tensor) -> Tensor:
        """The inverse of ``split``: (B * windows, 1 + wh*ww, C) to (B, 1 + h*w, C); [CLS] is the mean of its copies."""
        (rows, columns), (wh, ww), C = self.counts(), self.size, x.shape[-1]
        x = x.unflatten(0, (-1, self.total()))  # B, windows, 1+wh*ww, C
        patches = x[:, :, 1:].reshape(-1, rows, columns, wh, ww, C).transpose(2, 3)  # B, rows, wh, columns, ww, C
        patches = patches.reshape(-1, rows * wh, columns * ww, C)
        patches = _drop_repeated(_drop_repeated(patches, 1, self.grid[0], wh), 2, self.grid[1], ww)  # B, h, w, C
        return torch.cat((x[:, :, 0].mean(1, keepdim=True), patches.flatten(1, 2)), dim=1)


def _repeat_last(x: Tensor, dim: int, count: int, size: int) -> Tensor:
    """Lengthens a dimension to ``count`` windows, of which the last one ends where the dimension ended."""
    length, before = x.shape[dim], (count - 1) * size
    if is_open(length):  # cutting it in two would make a program for each case: nothing left over, one row, more
        place = torch.arange(count * size, device=x.device)
        return x.index_select(dim, torch.where(place < before, place, place - (count * size - length)))
    if length == count * size:
        return x
    return torch.cat((x.narrow(dim, 0, before), x.narrow(dim, length - size, size)), dim)


def _drop_repeated(x: Tensor, dim: int, length: int, size: int) -> Tensor:
    """The inverse of ``_repeat_last``: back to ``length``."""
    extended = x.shape[dim]
    before = extended - size
    if is_open(length):
        place = torch.arange(length, device=x.device)
        return x.index_select(dim, torch.where(place < before, place, place + (extended - length)))
    if length == extended:
        return x
    own = length - before  # of the last window, the part that no other one has
    return torch.cat((x.narrow(dim, 0, before), x.narrow(dim, extended - own, own)), dim)


def cut_windows(grid: tuple[int, int], size: tuple[int, int] | None) -> Windows | None:
    """The windows of an (h, w) grid; None where one of them would cover it, or without a size.

    A grid that ``torch.export`` leaves open is taken to be larger than the window along both axes.
    """
    if size is None:
        return None
    if is_open(*grid):
        return Windows(grid, size)
    size = min(size[0], grid[0]), min(size[1], grid[1])
    return None if size == tuple(grid) else Windows(grid, size)


def resolve_window(window_size: Any) -> tuple[int, int] | None:
    """``window_size`` as (wh, ww) patches.

    Raises:
        ValueError: other than None, one or two whole numbers above 0.
    """
    if window_size is None:
        return None
    sides = tuple(window_size) if isinstance(window_size, Sequence) else (window_size, window_size)
    if len(sides) != 2 or not all(isinstance(n, Integral) and int(n) > 0 for n in sides):
        raise ValueError(
            f'window_size must be one or two whole numbers (h, w) of patches above 0, got {window_size!r}; '
            'use 14 for the tables of 224 pixels, or None for attention over the whole image'
        )
    return int(sides[0]), int(sides[1])


def resolve_global_blocks(
    global_blocks: Iterable[int] | None, depth: int, window: tuple[int, int] | None
) -> tuple[int, ...]:
    """The 0-based blocks that attend over the whole grid: all of them without a window.

    Args:
        global_blocks: 0-based, negative from the end; None for the last block of each quarter, as ViTDet: 2, 5, 8, 11
            of 12 and 5, 11, 17, 23 of 24.
        depth: blocks of the encoder.
        window: (wh, ww) in patches, or None.

    Raises:
        ValueError: blocks that do not exist, or blocks without a window.
    """
    if window is None:
        if global_blocks is not None:
            raise ValueError(
                f'got global_blocks={global_blocks!r} without a window_size, so all blocks are global; '
                'set window_size (14 for the tables of 224 pixels) or leave global_blocks out'
            )
        return tuple(range(depth))
    if global_blocks is None:
        return tuple(sorted({depth * i // GLOBAL_BLOCKS - 1 for i in range(1, GLOBAL_BLOCKS + 1)} - {-1}))
    indices = tuple(global_blocks) if isinstance(global_blocks, Iterable) else (global_blocks,)
    wrong = [i for i in indices if not isinstance(i, Integral) or not -depth <= i < depth]
    if wrong:
        raise ValueError(
            f'global_blocks {wrong} do not exist: the model has {depth} blocks, so give numbers from 0 to {depth - 1} '
            f'or -{depth} to -1'
        )
    return tuple(sorted({int(i) % depth for i in indices}))
