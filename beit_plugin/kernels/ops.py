"""Attention with a learned relative position bias as an operator of PyTorch, with gradients, on the Triton kernels.

The operators are registered in ``torch.library`` with shapes for tracing and with their derivative, so that
``torch.compile``, activation checkpointing and distributed wrappers take them as they take those of PyTorch.

Legend: B batch, N tokens, K heads, D head dim, h w grid, R rows of the table, P [CLS] tokens (0 or 1).
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import rel_pos_attention

__all__ = ['attend', 'lay_out_bias', 'reduce_to_table']

kernels: Any = rel_pos_attention  # a kernel is called by grid and options that its signature does not show

PADDING = 128  # the bias has columns up to a multiple of this: no block of keys is larger, so none needs a mask
MIN_PROGRAMS = 264  # two for each multiprocessor of an H200: with fewer blocks the batch is split among more programs


class Blocks(NamedTuple):
    """Sizes of a kernel's blocks, warps and stages of its pipeline."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return self._asdict()


def _blocks(kind: str, head_dim: int) -> Blocks:
    """Blocks of a kernel; larger head dims leave room for smaller ones only."""
    wide = head_dim > 64
    table = {
        'forward': Blocks(128, 64, 8 if wide else 4, 2 if wide else 3),
        'grad_kv': Blocks(32 if wide else 64, 128, 8, 2),
        'grad_q': Blocks(128, 32 if wide else 64, 8, 2),
        'grad_bias': Blocks(128, 64, 8, 2),
    }
    return table[kind]


def _shapes(qkv: Tensor) -> tuple[int, int, int, int]:
    B, N, _, K, D = qkv.shape
    return B, N, K, D


def _packed(qkv: Tensor) -> Tensor:
    """The projection with q, k, v, heads and head dim dense for each token; a view of it usually is."""
    K, D = qkv.shape[3:]
    return qkv if qkv.stride()[2:] == (K * D, D, 1) else qkv.contiguous()


def lay_out_bias(table: Tensor, h: int, w: int, prefix: int, dtype: torch.dtype) -> Tensor:
    """The bias of every pair of tokens, as the kernels read it.

    Args:
        table: (R, K) with R = (2h-1)*(2w-1)+3.
        h, w: grid.
        prefix: 1 with [CLS], 0 without.
        dtype: of the result, that of the queries.

    Returns:
        (K, N, N padded to a multiple of ``PADDING``): log2(e) times the bias, -inf in the padding.
    """
    rows, heads = table.shape
    N = prefix + h * w
    columns = triton.cdiv(N, PADDING) * PADDING
    by_head = table.detach().t().float().contiguous()  # K, R
    bias = torch.empty(heads, N, columns, dtype=dtype, device=table.device)
    block_m, block_n = 32, 128
    kernels.bias_kernel[(columns // block_n, triton.cdiv(N, block_m), heads)](
        by_head,
        bias,
        N,
        w,
        (h - 1) * (2 * w - 1) + w - 1,
        rows - 1,
        by_head.stride(0),
        bias.stride(0),
        bias.stride(1),
        P=prefix,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
    )
    return bias


def reduce_to_table(grad_bias: Tensor, h: int, w: int, prefix: int, rows: int) -> Tensor:
    """Sums the gradient of the bias to that of the table.

    Args:
        grad_bias: (splits, K, N, N padded).
        h, w, prefix: see ``lay_out_bias``.
        rows: R.

    Returns:
        (R, K) float32.
    """
    splits, K, N, _ = grad_bias.shape
    width = 2 * w - 1
    sums = torch.empty(K, h, h, width, dtype=torch.float32, device=grad_bias.device)
    kernels.row_sums_kernel[(h, h, K)](
        grad_bias,
        sums,
        splits,
        w,
        h,
        *grad_bias.stride()[:3],
        P=prefix,
        BLOCK_X=min(16, triton.next_power_of_2(w)),
        BLOCK_O=min(128, triton.next_power_of_2(width)),
    )
    grad_table = torch.zeros(K, rows, dtype=torch.float32, device=grad_bias.device)
    block_o = min(128, triton.next_power_of_2(width))
    kernels.column_sums_kernel[(2 * h - 1, triton.cdiv(width, block_o), K)](
        sums,
        grad_table,
        w,
        h,
        grad_table.stride(0),
        BLOCK_Y=min(32, triton.next_power_of_2(h)),
        BLOCK_O=block_o,
    )
    if prefix:
        first_row = grad_bias[:, :, 0, :N].sum(0, dtype=torch.float32)  # K, N
        first_column = grad_bias[:, :, 1:, 0].sum((0, 2), dtype=torch.float32)  # K
        grad_table[:, -3] = first_row[:, 1:].sum(1)
        grad_table[:, -2] = first_column
        grad_table[:, -1] = first_row[:, 0]
    return grad_table.t()


@torch.library.custom_op('beit_plugin::rel_pos_attention', mutates_args=())
def _forward(qkv: Tensor, table: Tensor, h: int, w: int, prefix: int) -> tuple[Tensor, Tensor]:
    qkv = _packed(qkv)
    B, N, K, D = _shapes(qkv)
    bias = lay_out_bias(table, h, w, prefix, qkv.dtype)
    out = torch.empty(B, N, K, D, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(B, K, N, dtype=torch.float32, device=qkv.device)
    blocks = _blocks('forward', D)
    kernels.forward_kernel[(B, triton.cdiv(N, blocks.BLOCK_M), K)](
        qkv, bias, out, lse, D**-0.5, N, K, *qkv.stride()[:2], *bias.stride()[:2],
        D=D, BLOCK_D=triton.next_power_of_2(D), **blocks.options,
    )  # fmt: skip
    return out, lse


@_forward.register_fake
def _(qkv: Tensor, table: Tensor, h: int, w: int, prefix: int) -> tuple[Tensor, Tensor]:
    B, N, K, D = _shapes(qkv)
    return qkv.new_empty(B, N, K, D), qkv.new_empty(B, K, N, dtype=torch.float32)


@torch.library.custom_op('beit_plugin::rel_pos_attention_backward', mutates_args=())
def _backward(
    grad: Tensor, qkv: Tensor, table: Tensor, out: Tensor, lse: Tensor, h: int, w: int, prefix: int
) -> tuple[Tensor, Tensor]:
    qkv, grad, out = _packed(qkv), grad.contiguous(), out.contiguous()
    B, N, K, D = _shapes(qkv)
    bias = lay_out_bias(table, h, w, prefix, qkv.dtype)  # anew: nothing of this size lives until the backward pass
    delta = torch.empty_like(lse)
    block_d = triton.next_power_of_2(D)
    kernels.delta_kernel[(triton.cdiv(N, 64), K, B)](out, grad, delta, N, K, D=D, BLOCK_D=block_d, BLOCK_M=64)
    grad_qkv = torch.empty(B, N, 3, K, D, dtype=qkv.dtype, device=qkv.device)
    read = (qkv, bias, grad, lse, delta)
    sizes = (N, K, *qkv.stride()[:2], *bias.stride()[:2])
    dims = dict(D=D, BLOCK_D=block_d)
    blocks = _blocks('grad_kv', D)
    kernels.grad_kv_kernel[(B, triton.cdiv(N, blocks.BLOCK_N), K)](
        *read, grad_qkv, D**-0.5, *sizes, **dims, **blocks.options
    )
    blocks = _blocks('grad_q', D)
    kernels.grad_q_kernel[(B, triton.cdiv(N, blocks.BLOCK_M), K)](
        *read, grad_qkv, D**-0.5, *sizes, **dims, **blocks.options
    )
    blocks = _blocks('grad_bias', D)
    tiles = triton.cdiv(N, blocks.BLOCK_M) * triton.cdiv(N, blocks.BLOCK_N)
    splits = max(1, min(B, MIN_PROGRAMS // (tiles * K)))
    per_split = triton.cdiv(B, splits)
    splits = triton.cdiv(B, per_split)
    if splits == 1:
        grad_bias = bias[None]  # in its place: each block is read by the program that overwrites it, and by no other
    else:
        grad_bias = torch.empty(splits, *bias.shape, dtype=torch.float32, device=bias.device)
    kernels.grad_bias_kernel[(tiles, K, splits)](
        *read, grad_bias, D**-0.5, B, *sizes, grad_bias.stride(0), per_split, **dims, **blocks.options
    )
    return grad_qkv, reduce_to_table(grad_bias, h, w, prefix, table.shape[0]).to(table.dtype).contiguous()


@_backward.register_fake
def _(
    grad: Tensor, qkv: Tensor, table: Tensor, out: Tensor, lse: Tensor, h: int, w: int, prefix: int
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), table.new_empty(table.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, table, *ctx.grid = inputs
    ctx.save_for_backward(qkv, table, *output)


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grad_qkv, grad_table = _backward(grad, *ctx.saved_tensors, *ctx.grid)
    return grad_qkv, grad_table, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def attend(qkv: Tensor, table: Tensor, grid: tuple[int, int], prefix: int = 1) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v with the bias of each pair of tokens read from a table.

    Args:
        qkv: (B, N, 3, K, D), N = prefix + h*w: the fused projection; float16, bfloat16 or float32.
        table: (R, K) with R = (2h-1)*(2w-1)+3, of any floating dtype; the table of this grid.
        grid: (h, w).
        prefix: number of [CLS] tokens, 1 or 0.

    Returns:
        (B, N, K, D) in the dtype of qkv. The gradient of the table is summed over the batch; it is the same, bit for
        bit, in every run.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    h, w = grid
    if qkv.ndim != 5 or qkv.shape[2] != 3 or qkv.shape[1] != prefix + h * w or prefix not in (0, 1):
        raise ValueError(
            f'expected qkv of shape (B, {prefix + h * w}, 3, heads, head dim) for a {h}x{w} grid with {prefix} [CLS] '
            f'tokens, got {tuple(qkv.shape)}'
        )
    rows = (2 * h - 1) * (2 * w - 1) + 3
    if tuple(table.shape) != (rows, qkv.shape[3]):
        raise ValueError(
            f'expected a table of shape ({rows}, {qkv.shape[3]}) for a {h}x{w} grid, got {tuple(table.shape)}; resize '
            'it to the grid first'
        )
    return _forward(qkv, table, h, w, prefix)[0]
