"""Which grid of patches a checkpoint was trained at."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from ..models.relative_position import GRID_NOTE, num_relative_distance, relative_position_index
from ..models.resample import NUM_CLS_ROWS
from .errors import CheckpointError

__all__ = ['INDEX', 'TABLE', 'metadata_of', 'noted_grid', 'stated_grid', 'table_grid', 'with_grid', 'with_metadata']

INDEX = 'relative_position_index'
TABLE = 'relative_position_bias_table'
_POSITIONS = ('pos_embed', 'position_embeddings')


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


def metadata_of(state_dict: Any) -> OrderedDict[str, dict[str, Any]]:
    """What `Module.state_dict` says of each module beside the tensors; empty where it says nothing."""
    metadata = getattr(state_dict, '_metadata', None)
    entries = metadata.items() if isinstance(metadata, Mapping) else ()
    return OrderedDict((name, dict(said)) for name, said in entries if isinstance(said, Mapping))


def with_metadata(state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    """A copy of a state dict that says this of its modules."""
    copied: OrderedDict[str, Tensor] = OrderedDict(state_dict)
    copied._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]
    return copied


def with_grid(state_dict: Mapping[str, Tensor], grid: tuple[int, int] | None, prefix: str = '') -> dict[str, Tensor]:
    """A copy of a state dict that notes the (h, w) grid of its encoder as our models do; None notes nothing."""
    modules = () if grid is None else ('', prefix.removesuffix('.'))
    return with_metadata(state_dict, {module: {GRID_NOTE: grid} for module in modules})


def noted_grid(state_dict: Mapping[str, Tensor], said: Iterable[Mapping[str, Any]] = ()) -> tuple[int, int] | None:
    """The (h, w) grid that our models note in the metadata of their state dict (see `note_grid`).

    None where nothing is noted, nothing depends on it, the notes differ, or the tables and positions have another
    length: then they were replaced after the note was made.

    Args:
        state_dict: names to tensors, of any dialect.
        said: more metadata of modules, such as the `local_metadata` that a hook gets.
    """
    notes = [entry[GRID_NOTE] for entry in (*said, *metadata_of(state_dict).values()) if GRID_NOTE in entry]
    grid = notes[0] if notes and all(note == notes[0] for note in notes) else None
    if not isinstance(grid, list | tuple) or len(grid) != 2 or not all(type(n) is int and n > 0 for n in grid):
        return None
    h, w = grid
    rows = {tensor.shape[0] for name, tensor in state_dict.items() if name.endswith(TABLE) and tensor.ndim == 2}
    tokens = {tensor.shape[1] for name, tensor in state_dict.items() if name.endswith(_POSITIONS) and tensor.ndim == 3}
    fits = rows <= {num_relative_distance((h, w))} and tokens <= {1 + h * w}
    return (h, w) if fits and (rows or tokens) else None


def stated_grid(state_dict: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """The (h, w) grid that the index buffers of a checkpoint are of; None where it has none.

    Raises:
        CheckpointError: an index buffer that is of no grid.
    """
    name = next((name for name in state_dict if name.endswith(INDEX)), None)
    if name is None:
        return None
    index = state_dict[name]
    is_plain = index.layout == torch.strided and index.is_contiguous()  # an expanded one may speak of any size
    if index.ndim == 2 and index.shape[0] == index.shape[1] > 1 and not index.is_floating_point() and is_plain:
        places = (index[1:, 1] - index[1, 1]).tolist()  # of each patch: row * (2w - 1) + column
        w = next((i for i, place in enumerate(places) if place != i), len(places))
        h = len(places) // w
        if len(places) == h * w and torch.equal(index.cpu().long(), relative_position_index(h, w)):
            return h, w
    raise CheckpointError(f'{name} of shape {tuple(index.shape)} is not the index of any grid; leave it out by drop=')
