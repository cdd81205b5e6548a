"""Learned relative position bias of BEiT (arXiv:2106.08254), after T5 (arXiv:1910.10683): the one copy of it.

A table holds one value per head for each offset between two patches and three for pairs that involve [CLS]; the bias of
a grid reads the table through an index. Row layout and offsets (query minus key) are those of unilm
``beit/modeling_finetune.py``, so its tables, timm's, transformers' and mmsegmentation's can be read as they are.

Shapes: h, w grid in patches; N = 1 + h*w tokens; K heads.
"""

from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernel_support import can_cache_tensors, plain_tensors
from .resample import NUM_CLS_ROWS, apply_resize, resize_matrices

__all__ = [
    'BiasGeometry',
    'RelativePositionBias',
    'bias_geometry',
    'bias_of',
    'gather_bias',
    'note_grid',
    'num_relative_distance',
    'relative_position_index',
    'table_at',
]

GRID_NOTE = 'beit_plugin.grid'  # in the metadata of a state dict
ALIGNMENT = 8  # SDPA's CUDA kernels read a bias in place only when its rows start at multiples of 8 elements
CACHED_TOKENS = 2048  # an index of this many tokens takes 32 MiB; larger ones are made anew each time
CACHED_BYTES = 64 * 2**20  # largest bias that is kept for the next inference on the CPU: 12 heads at 512 pixels
# what the last bias of a module was made of, and that bias; apart from the modules, so not copied or pickled with them
_BIAS_CACHE: WeakKeyDictionary[nn.Module, tuple[tuple, Tensor, Tensor]] = WeakKeyDictionary()


class BiasGeometry(NamedTuple):
    """All that a bias needs to know of the grid; prepared once per forward and shared by all layers."""

    grid: tuple[int, int]  # h, w
    index: Tensor | None  # N, N (or N, N padded to a multiple of ALIGNMENT): row of the grid's table; None: not needed
    matrices: tuple[Tensor, Tensor] | None  # from the stored table's grid to this one; None when they are the same
    resize: tuple[tuple[int, int], str]  # what the matrices are made by: the stored table's grid, and the rule


def num_relative_distance(window_size: tuple[int, int]) -> int:
    """Rows of the table of an (h, w) grid."""
    return (2 * window_size[0] - 1) * (2 * window_size[1] - 1) + NUM_CLS_ROWS


def note_grid(model: Any, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """Post-hook of ``state_dict()``: notes the (h, w) grid of the tables, which their length does not always tell.

    It stands beside the version of the module, where `torch.save` keeps it and other loaders ignore it.
    """
    local_metadata[GRID_NOTE] = tuple(getattr(model, 'backbone', model).window_size)


def relative_position_index(h: int, w: int, device: torch.device | None = None, pad: int = 0) -> Tensor:
    """Row of the bias table for each pair of tokens (query, key), [CLS] first.

    Args:
        h, w: grid in patches.
        pad: columns to append (they point at row 0 and are never read).

    Returns:
        (1 + h*w, 1 + h*w + pad) int64.
    """
    rows = torch.arange(h, device=device) * (2 * w - 1)
    place = (rows[:, None] + torch.arange(w, device=device)).flatten()  # h*w
    index = place[:, None] - place[None, :] + ((h - 1) * (2 * w - 1) + w - 1)  # h*w, h*w
    last = (2 * h - 1) * (2 * w - 1) + 2  # written out for TorchScript, which compiles this too
    cls_to_token = torch.full_like(index[:1], last - 2)  # 1, h*w
    token_to_cls = torch.full_like(index[:, :1], last - 1)  # h*w, 1
    top = torch.cat((torch.full_like(index[:1, :1], last), cls_to_token), 1)
    index = torch.cat((top, torch.cat((token_to_cls, index), 1)))  # N, N
    return F.pad(index, (0, pad)) if pad else index


@lru_cache(maxsize=32)
def _cached_index(h: int, w: int, device: torch.device, pad: int) -> Tensor:
    with plain_tensors():
        return relative_position_index(h, w, device, pad)


def bias_geometry(
    window_size: tuple[int, int], grid: tuple[int, int], rule: str, device: torch.device, with_index: bool = True
) -> BiasGeometry:
    """Prepares the bias of tables stored for ``window_size`` at the (h, w) grid of an input.

    Args:
        window_size: (h, w) in patches that the tables belong to.
        grid: (h, w) of the input.
        rule: how tables are resized, one of ``resample.RESIZE_RULES``.
        with_index: whether the bias will be gathered; the fused kernels read the table itself.
    """
    h, w = grid
    matrices = resize_matrices(window_size, grid, rule, device)
    if not with_index:
        return BiasGeometry(grid, None, matrices, (window_size, rule))
    num_tokens = 1 + h * w
    symbolic = isinstance(num_tokens, torch.SymInt)
    pad = 0 if symbolic or device.type != 'cuda' else -num_tokens % ALIGNMENT
    cacheable = not symbolic and can_cache_tensors() and num_tokens <= CACHED_TOKENS
    index = (_cached_index if cacheable else relative_position_index)(h, w, device, pad)
    return BiasGeometry(grid, index, matrices, (window_size, rule))


def table_at(table: Tensor, geometry: BiasGeometry) -> Tensor:
    """The table ((2h-1)*(2w-1)+3, K) of the grid, differentiable in the stored one."""
    return table if geometry.matrices is None else apply_resize(table, geometry.matrices)


@torch.fx.wrap
def gather_bias(table: Tensor, geometry: BiasGeometry, dtype: torch.dtype | None = None) -> Tensor:
    """The bias of every pair of tokens, differentiable in the stored table.

    Args:
        table: the stored one, ((2h-1)*(2w-1)+3, K).
        geometry: with an index.
        dtype: of the bias; by default the table's.

    Returns:
        (K, N, N), its rows as far apart as those of the index: cast it here, a copy made later would close the gaps.
    """
    index, dtype = geometry.index, dtype or table.dtype
    assert index is not None  # whoever asks for the bias has prepared it
    # a trace is checked against a second one without gradients
    learns = (torch.is_grad_enabled() and table.requires_grad) or torch.jit.is_tracing()
    table = table_at(table, geometry)
    if not learns:  # writes less; a gradient is to be summed over the pairs in the dtype of the table
        table = table.to(dtype)
    # picking columns of the transposed table gives the heads first without a transpose of the large result
    bias = table.t().contiguous().index_select(1, index.reshape(-1))  # K, N*N
    return bias.reshape(-1, index.shape[0], index.shape[1]).to(dtype)[..., : index.shape[0]]


def bias_of(owner: nn.Module, table: Tensor, geometry: BiasGeometry, dtype: torch.dtype | None) -> Tensor:
    """``gather_bias`` for a module; in inference on the CPU once for each table, grid and dtype.

    Elsewhere it is gathered each time. Comparing the table with that of the last forward would wait for the device; its
    identity and version do not tell, as they stay the same when a trainer swaps averaged weights through ``.data``.
    """
    index = geometry.index
    fixed = not torch.is_grad_enabled() and not torch.jit.is_tracing() and can_cache_tensors()
    plain = fixed and type(table) in (Tensor, nn.Parameter) and table.is_cpu  # subclasses may have no values
    if not plain or index is None or table.shape[1] * index.numel() * table.element_size() > CACHED_BYTES:
        return gather_bias(table, geometry, dtype)
    key = (geometry.grid, geometry.resize, table.dtype, dtype)
    known_key, known_table, bias = _BIAS_CACHE.get(owner, (None, None, None))
    if bias is None or known_table is None or known_key != key or not known_table.equal(table):
        with plain_tensors():
            known_table, bias = table.detach().clone(), gather_bias(table, geometry, dtype)
        _BIAS_CACHE[owner] = key, known_table, bias
    return bias


class RelativePositionBias(nn.Module):
    """One table for all layers, the form that pre-training uses.

    Args:
        window_size: (h, w) grid in patches of the stored table.
        num_heads: K.
    """

    def __init__(
        self,
        window_size: tuple[int, int],
        num_heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros(num_relative_distance(window_size), num_heads, device=device, dtype=dtype)
        )

    def forward(self, geometry: BiasGeometry, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the bias (K, N, N), or where it is not to be gathered the table of the grid ((2h-1)*(2w-1)+3, K).

        Args:
            geometry: how the table is read; without an index the bias is not gathered.
            dtype: of the bias; by default the table's.
        """
        if geometry.index is None:
            return table_at(self.relative_position_bias_table, geometry)
        return gather_bias(self.relative_position_bias_table, geometry, dtype)
