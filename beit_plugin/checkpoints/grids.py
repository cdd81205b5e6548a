"""Which grid of patches a checkpoint was trained at."""

from collections.abc import Mapping
from math import isqrt

import torch
from torch import Tensor

from ..models.relative_position import relative_position_index
from ..models.resample import NUM_CLS_ROWS
from .errors import CheckpointError

__all__ = ['INDEX', 'stated_grid', 'table_grid']

INDEX = 'relative_position_index'


def table_grid(rows: int, grid: tuple[int, int] | None = None, model: tuple[int, int] | None = None) -> tuple[int, int]:
    """The (h, w) grid that a bias table of so many rows belongs to.

    Args:
        rows: length of the table.
        grid: what it is said to be.
        model: what it may be when nothing is said: rows alone do not tell which of two grids that are not square.

    Raises:
        CheckpointError: it is not what it is said to be, or neither the model's nor square.
    """
    for candidate in (model,) if grid is None else (grid,):
        if candidate is not None and rows == (2 * candidate[0] - 1) * (2 * candidate[1] - 1) + NUM_CLS_ROWS:
            return candidate
    if grid is not None:
        raise CheckpointError(f'a bias table of {rows} rows is not of a {grid[0]}x{grid[1]} grid; check grid=(h, w)')
    side = isqrt(max(rows - NUM_CLS_ROWS, 0))
    if side % 2 == 0 or side * side != rows - NUM_CLS_ROWS:
        other = f' and not of the {model[0]}x{model[1]} grid of the model' if model is not None else ''
        raise CheckpointError(
            f'a bias table of {rows} rows is of no square grid{other}; give the grid that it was trained at as '
            'grid=(h, w), or build the model at that size, load, and call set_input_size'
        )
    return (side + 1) // 2, (side + 1) // 2


def stated_grid(state_dict: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """The (h, w) grid that the index buffers of a checkpoint are of; None where it has none.

    Raises:
        CheckpointError: an index buffer that is of no grid.
    """
    name = next((name for name in state_dict if name.endswith(INDEX)), None)
    if name is None:
        return None
    index = state_dict[name]
    if index.ndim == 2 and index.shape[0] == index.shape[1] > 1 and not index.is_floating_point():
        places = (index[1:, 1] - index[1, 1]).tolist()  # of each patch: row * (2w - 1) + column
        w = next((i for i, place in enumerate(places) if place != i), len(places))
        h = len(places) // w
        if len(places) == h * w and torch.equal(index.cpu().long(), relative_position_index(h, w)):
            return h, w
    raise CheckpointError(f'{name} of shape {tuple(index.shape)} is not the index of any grid; leave it out by drop=')
