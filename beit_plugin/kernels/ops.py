"""Attention with a learned relative position bias as an operator of PyTorch, with gradients, on the Triton kernels.

The operators are registered in ``torch.library`` with shapes for tracing and with their derivative, so that
``torch.compile``, activation checkpointing and distributed wrappers take them as they take those of PyTorch.

Legend: B batch, N tokens, K heads, D head dim, h w grid, R rows of the table, P [CLS] tokens (0 or 1).
"""

from functools import cache
from math import lcm
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import rel_pos_attention
from .launch import DTYPES, MAX_INT32, Launcher, ceil_div, make_call, power_of_2

__all__ = ['DTYPES', 'HEAD_DIMS', 'attend', 'lengthen_table', 'reduce_to_table']

kernels: Any = rel_pos_attention  # a kernel is called by grid and options that its signature does not show

HEAD_DIMS = range(16, 129, 16)
PROGRAMS = 396  # of grad_bias that run at once on an H200: three on each multiprocessor
HOPPER_MEMORY = 227 * 1024  # bytes of shared memory that a program may have on an H100 or H200
CACHE = 48 * 2**20  # bytes of the second cache of an H100 or H200, about
LARGEST_BLOCK = 128  # tokens; what the kernels read of all tokens is padded to a multiple of it
ROW_ALIGNMENT = 64  # elements to which rows of the gradient of the bias are padded


class Blocks(NamedTuple):
    """Sizes of a kernel's blocks, warps, stages of its pipeline, and registers of a thread (None: as many as it takes).

    With fewer registers more programs fit on a multiprocessor, and hide each other's waiting.
    """

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        options = {name: getattr(self, name) for name in ('num_warps', 'num_stages', 'maxnreg')}
        return {name: value for name, value in options.items() if value is not None}


def _blocks(kind: str, head_dim: int, shared_memory: int = HOPPER_MEMORY) -> Blocks:
    """Blocks of a kernel, the fastest of those tried on an H200.

    Larger head dims leave room for smaller ones only. What ``grad_q`` writes of its queries ``grad_kv`` reads, so its
    BLOCK_M is no smaller.

    Args:
        kind: ``forward``, ``grad_q``, ``grad_kv`` or ``grad_bias``.
        head_dim: D.
        shared_memory: of a program, in bytes.
    """
    if head_dim > 64:
        small = shared_memory < HOPPER_MEMORY
        return {
            'forward': Blocks(128, 32, 8, 3),
            'grad_q': Blocks(64, 32, 4, 2),
            'grad_kv': Blocks(32, 64, 4, 3),
            'grad_bias': Blocks(64, 32, 4, 2) if small else Blocks(128, 64, 8, 2),
        }[kind]
    narrow = head_dim <= 32
    return {
        'forward': Blocks(64, 64, 4, 3, 128),
        'grad_q': Blocks(64, 32, 4, 3),
        'grad_kv': Blocks(32, 64, 4, 3, 128),
        'grad_bias': Blocks(64, 64, 4, 3) if narrow else Blocks(64, 64, 4, 2, 168),
    }[kind]


@cache
def _shared_memory(device: torch.device) -> int:
    """Of a program, in bytes; elsewhere than on a GPU as much as wanted."""
    if device.type != 'cuda':
        return HOPPER_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def num_places(h: int, w: int) -> int:
    """S, how many places the patches of a grid take."""
    return (h - 1) * (2 * w - 1) + w


def _shapes(qkv: Tensor) -> tuple[int, int, int, int]:
    B, N, _, K, D = qkv.shape
    return B, N, K, D


def _packed(qkv: Tensor) -> Tensor:
    """The projection with q, k, v, heads and head dim dense for each token; a view of it usually is."""
    K, D = qkv.shape[3:]
    dense = qkv.stride()[2:] == (K * D, D, 1)
    # the kernels reckon in 32 bits within an image
    return qkv if dense and qkv.shape[1] * qkv.stride(1) <= MAX_INT32 else qkv.contiguous()


@cache
def _launcher(kind: str, head_dim: int, prefix: int, pair: bool, memory: int) -> tuple[Launcher, Blocks]:
    """Of one of the kernels on the matrix units."""
    blocks = _blocks(kind, head_dim, memory)
    kernel = getattr(kernels, f'{kind}_kernel')
    direct = isinstance(kernel, triton.JITFunction)  # else it is interpreted, without assembly
    constants = dict(P=prefix, D=head_dim, BLOCK_D=power_of_2(head_dim), PAIR=pair, DIRECT=direct)
    constants.update(BLOCK_M=blocks.BLOCK_M, BLOCK_N=blocks.BLOCK_N)
    return Launcher(kernel, constants, blocks.options), blocks


@cache
def _small_launcher(name: str, **constants: int) -> Launcher:
    return Launcher(getattr(kernels, name), constants, {})


def _padded(tokens: int) -> int:
    """V."""
    return ceil_div(tokens, LARGEST_BLOCK) * LARGEST_BLOCK


def lengthen_table(table: Tensor, h: int, w: int, prefix: int) -> tuple[Tensor, Tensor]:
    """The bias by the difference of two tokens' places, as the kernels read it, and the places.

    Args:
        table: (R, K) with R = (2h-1)*(2w-1)+3.
        h, w: grid.
        prefix: 1 with [CLS], 0 without.

    Returns:
        places: (2, K, 7*S, 2) float32 with S = ``num_places``: log2(e) times the bias of pairs of tokens.
        offsets: (2, V) int32: where in ``places`` keys and queries stand, in bytes.
    """
    rows, heads = table.shape
    S, N = num_places(h, w), prefix + h * w
    V = _padded(N)
    places = torch.empty(2, heads, 7 * S, 2, dtype=torch.float32, device=table.device)
    offsets = torch.empty(2, V, dtype=torch.int32, device=table.device)
    block = 512
    _small_launcher('table_kernel', P=prefix, BLOCK=block)(
        (ceil_div(max(7 * S, V), block), heads + 1, 2), table.contiguous(), places, offsets, N, w, S, rows, V, heads
    )
    return places, offsets


class Folding(NamedTuple):
    """How much of the gradient of the bias is kept; ``grad_bias_kernel`` says how.

    Args:
        period: patches, a multiple of the sides of a tile; of the grid's width too, or no less than all.
        columns: of the rows that are kept whole, padded.
        size: elements of one head.
        tiles: of one head that are kept.
        longest: tiles that the longest diagonal has.
        all_tiles: of one head.
    """

    period: int
    columns: int
    size: int
    tiles: int
    longest: int
    all_tiles: int

    def splits(self, batch: int, heads: int) -> int:
        """Programs that share a diagonal, so that the longest takes half of the time that all take, or less."""
        return max(1, min(self.longest * batch, round(2 * PROGRAMS * self.longest / (self.all_tiles * heads))))


def fold(patches: int, w: int, block_m: int, block_n: int, heads: int) -> Folding:
    """The folding of the patches of a grid of width w in tiles of block_m x block_n.

    What the cache holds unfolded in half precision stays so: its programs then go through the images in step, and find
    them in the cache as well.
    """
    both = lcm(block_m, block_n)
    columns = ceil_div(patches, ROW_ALIGNMENT) * ROW_ALIGNMENT
    period = everything = ceil_div(patches, both) * both
    if 2 * heads * patches * columns > CACHE:
        period = min(lcm(w, both), everything)
    tiles_m, tiles_n = ceil_div(patches, block_m), ceil_div(patches, block_n)
    beyond_m, beyond_n = max(0, tiles_m - period // block_m), max(0, tiles_n - period // block_n)
    size = min(period, patches) * columns + max(0, patches - period) * period
    longest = min(ceil_div(tiles_m * block_m, period), ceil_div(tiles_n * block_n, period))
    return Folding(period, columns, size, tiles_m * tiles_n - beyond_m * beyond_n, longest, tiles_m * tiles_n)


def reduce_to_table(
    folded: Tensor, cls: Tensor, folding: Folding, h: int, w: int, prefix: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Sums the folded gradient of the bias to that of the table.

    Args:
        folded: (splits, K, size): of the pairs of patches, see ``grad_bias_kernel``.
        cls: (K, any number, 2) float32: of the pairs with [CLS] as the key, see ``grad_q_kernel``.
        folding: as they were folded.
        h, w: grid.
        prefix: 1 with [CLS], 0 without.
        dtype: of the result.

    Returns:
        (R, K).
    """
    splits, K, size = folded.shape
    width = 2 * w - 1
    grad_table = torch.empty((2 * h - 1) * width + 3, K, dtype=dtype, device=folded.device)
    block_o = max(16, min(128, power_of_2(width)))
    _small_launcher('table_sums_kernel', P=prefix, BLOCK_R=4096 // block_o, BLOCK_O=block_o, BLOCK=256)(
        (2 * h, ceil_div(width, block_o), K),
        folded, cls, grad_table, splits, cls.shape[1], K, h, w, size, folding.columns, folding.period,
    )  # fmt: skip
    return grad_table


def _run_forward(qkv: Tensor, table: Tensor, h: int, w: int, prefix: int) -> tuple[Tensor, Tensor]:
    qkv = _packed(qkv)
    B, N, K, D = _shapes(qkv)
    out = torch.empty(B, N, K, D, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(B, K, N, dtype=torch.float32, device=qkv.device)
    launch, blocks = _launcher('forward', D, prefix, w % 2 == 0, _shared_memory(qkv.device))
    with torch.cuda.device_of(qkv):  # Triton launches on the current device
        places, offsets = lengthen_table(table, h, w, prefix)
        launch(
            (ceil_div(N, blocks.BLOCK_M), K, B),
            qkv, places, offsets, out, lse, D**-0.5, N, K, num_places(h, w), offsets.shape[1], *qkv.stride()[:2],
        )  # fmt: skip
    return out, lse


_forward = torch.library.custom_op('beit_plugin::rel_pos_attention', _run_forward, mutates_args=())


@_forward.register_fake
def _(qkv: Tensor, table: Tensor, h: int, w: int, prefix: int) -> tuple[Tensor, Tensor]:
    B, N, K, D = _shapes(qkv)
    return qkv.new_empty(B, N, K, D), qkv.new_empty(B, K, N, dtype=torch.float32)


def _run_backward(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor,
    out: Tensor,
    lse: Tensor,
    h: int,
    w: int,
    prefix: int,
    wants_table: bool,
) -> tuple[Tensor, Tensor]:
    qkv, grad, out = _packed(qkv), grad.contiguous(), out.contiguous()
    B, N, K, D = _shapes(qkv)
    grad_qkv = torch.empty(B, N, 3, K, D, dtype=qkv.dtype, device=qkv.device)
    stats = torch.empty(B, K, _padded(N), 2, dtype=torch.float32, device=qkv.device)
    form = (D, prefix, w % 2 == 0, _shared_memory(qkv.device))
    scale = D**-0.5
    with torch.cuda.device_of(qkv):
        # anew: a lengthened table per layer would add up until the backward pass
        places, offsets = lengthen_table(table, h, w, prefix)
        sizes = (N, K, num_places(h, w), offsets.shape[1], *qkv.stride()[:2])
        launch, blocks = _launcher('grad_q', *form)
        tiles = ceil_div(N, blocks.BLOCK_M)
        cls = torch.empty(K, B * tiles, 2, dtype=torch.float32, device=qkv.device)
        launch((tiles, K, B), qkv, places, offsets, out, grad, lse, stats, grad_qkv, cls, scale, *sizes)
        launch, blocks = _launcher('grad_kv', *form)
        launch((ceil_div(N, blocks.BLOCK_N), K, B), qkv, places, offsets, grad, stats, grad_qkv, scale, *sizes)
        if not wants_table:
            return grad_qkv, table.new_empty(0)
        launch, blocks = _launcher('grad_bias', *form)
        folding = fold(h * w, w, blocks.BLOCK_M, blocks.BLOCK_N, K)
        splits = folding.splits(B, K)
        # sums of many tiles are few, and are kept in full
        kept = qkv.dtype if splits == 1 and folding.period >= h * w else torch.float32
        folded = torch.empty(splits, K, folding.size, dtype=kept, device=qkv.device)
        launch(
            (folding.tiles, K * splits, 1),
            qkv, places, offsets, grad, stats, folded, scale, B, *sizes,
            folding.size, folding.columns, folding.period, splits,
        )  # fmt: skip
        return grad_qkv, reduce_to_table(folded, cls, folding, h, w, prefix, table.dtype)


_backward = torch.library.custom_op('beit_plugin::rel_pos_attention_backward', _run_backward, mutates_args=())


@_backward.register_fake
def _(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor,
    out: Tensor,
    lse: Tensor,
    h: int,
    w: int,
    prefix: int,
    wants_table: bool,
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), table.new_empty(table.shape if wants_table else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, table, *ctx.grid = inputs
    ctx.save_for_backward(qkv, table, *output)
    ctx.set_materialize_grads(False)


def _differentiate(
    run: Any, ctx: Any, saved: tuple[Tensor, ...], grad: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    wanted = ctx.needs_input_grad[1]
    grad_qkv, grad_table = run(grad, *saved, *ctx.grid, wanted)
    return grad_qkv, grad_table if wanted else None, None, None, None


@register_flop_formula(torch.ops.beit_plugin.rel_pos_attention)
def _forward_flops(qkv_shape: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """As PyTorch counts its own attention: two matrix products."""
    B, N, _, K, D = qkv_shape
    return 2 * 2 * B * K * N * N * D


@register_flop_formula(torch.ops.beit_plugin.rel_pos_attention_backward)
def _backward_flops(grad_shape: tuple[int, ...], qkv_shape: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """As PyTorch counts its own: the five products that are needed, however often they are computed."""
    return _forward_flops(qkv_shape) * 5 // 2


_attend = make_call(_forward, _run_forward, _backward, _run_backward, _save, _differentiate)


def attend(qkv: Tensor, table: Tensor, grid: tuple[int, int], prefix: int = 1) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v with the bias of each pair of tokens read from a table.

    Args:
        qkv: (B, N, 3, K, D), N = prefix + h*w: the fused projection; one of ``DTYPES``, D one of ``HEAD_DIMS``.
        table: (R, K) with R = (2h-1)*(2w-1)+3, of any floating dtype; the table of this grid, finite.
        grid: (h, w).
        prefix: number of [CLS] tokens, 1 or 0.

    Returns:
        (B, N, K, D) in the dtype of qkv. The gradient of the table is summed over the batch; it is the same, bit for
        bit, in every run.

    Raises:
        ValueError: shapes that do not fit each other, another dtype or head dim.
    """
    h, w = grid
    if min(h, w) < 1:
        raise ValueError(f'expected a grid of at least 1x1, got {h}x{w}')
    if qkv.ndim != 5 or qkv.shape[2] != 3 or qkv.shape[1] != prefix + h * w or prefix not in (0, 1):
        raise ValueError(
            f'expected qkv of shape (B, {prefix + h * w}, 3, heads, head dim) for a {h}x{w} grid with {prefix} [CLS] '
            f'tokens, got {tuple(qkv.shape)}'
        )
    if qkv.dtype not in DTYPES or qkv.shape[4] not in HEAD_DIMS:
        raise ValueError(
            'expected qkv in float16, bfloat16 or float32 with a head dim that is a multiple of 16 up to 128, got '
            f'{qkv.dtype} and a head dim of {qkv.shape[4]}'
        )
    rows = (2 * h - 1) * (2 * w - 1) + 3
    if tuple(table.shape) != (rows, qkv.shape[3]):
        raise ValueError(
            f'expected a table of shape ({rows}, {qkv.shape[3]}) for a {h}x{w} grid, got {tuple(table.shape)}; resize '
            'it to the grid first'
        )
    return _attend(qkv, table, h, w, prefix)[0]
