"""Attention with a learned relative position bias as an operator of PyTorch, with gradients, on the Triton kernels.

The operators are registered in ``torch.library`` with shapes for tracing and with their derivative, so that
``torch.compile``, activation checkpointing and distributed wrappers take them as they take those of PyTorch.

Legend: B batch, N tokens, K heads, D head dim, h w grid, R rows of the table, P [CLS] tokens (0 or 1).
"""

import os
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import rel_pos_attention

__all__ = ['attend', 'lengthen_table', 'reduce_to_table']

kernels: Any = rel_pos_attention  # a kernel is called by grid and options that its signature does not show

MIN_PROGRAMS = 264  # two for each multiprocessor of an H200: with fewer blocks the batch is split among more programs
ROW_ALIGNMENT = 64  # elements to which rows of the gradient of the bias are padded


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
        'forward': Blocks(128, 64, 8, 2 if wide else 3),
        'grad_kv': Blocks(32 if wide else 64, 128, 8, 2),
        'grad_q': Blocks(128, 32 if wide else 64, 8, 2),
        'grad_bias': Blocks(128, 64, 8, 2),
    }
    return table[kind]


class _Geometry(NamedTuple):
    """What the kernels need to know of a grid."""

    w: int
    magic: int
    places: int  # S

    @staticmethod
    def of(h: int, w: int) -> '_Geometry':
        magic = -(-(2**32) // w) & 0xFFFFFFFF  # 2**32 for w = 1 becomes 0: there the quotient counts nothing
        # the bits of a signed number, which is what an argument of a kernel of this size is
        return _Geometry(w, magic - 2**32 if magic >= 2**31 else magic, (h - 1) * (2 * w - 1) + w)


def _shapes(qkv: Tensor) -> tuple[int, int, int, int]:
    B, N, _, K, D = qkv.shape
    return B, N, K, D


def _packed(qkv: Tensor) -> Tensor:
    """The projection with q, k, v, heads and head dim dense for each token; a view of it usually is."""
    K, D = qkv.shape[3:]
    return qkv if qkv.stride()[2:] == (K * D, D, 1) else qkv.contiguous()


def _constants(head_dim: int, prefix: int) -> dict[str, Any]:
    interpreted = os.environ.get('TRITON_INTERPRET') == '1'  # the interpreter has no assembly
    return dict(P=prefix, D=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), DIRECT=not interpreted)


def lengthen_table(table: Tensor, h: int, w: int) -> Tensor:
    """The bias by the difference of two tokens' places, as the kernels read it.

    Args:
        table: (R, K) with R = (2h-1)*(2w-1)+3.
        h, w: grid.

    Returns:
        (K, 7*S) float32 with S = (h-1)*(2w-1)+w: log2(e) times the bias; -inf where the key is padding.
    """
    rows, heads = table.shape
    S = _Geometry.of(h, w).places
    places = torch.empty(heads, 7 * S, dtype=torch.float32, device=table.device)
    block = 1024
    kernels.table_kernel[(triton.cdiv(7 * S, block), heads)](table.contiguous(), places, S, rows, heads, BLOCK=block)
    return places


def reduce_to_table(grad_bias: Tensor, h: int, w: int, prefix: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sums the gradient of the bias to that of the table.

    Args:
        grad_bias: (splits, K, N, N padded).
        h, w: grid.
        prefix: 1 with [CLS], 0 without.
        dtype: of the result.

    Returns:
        (R, K).
    """
    splits, K, N, _ = grad_bias.shape
    width = 2 * w - 1
    sums = torch.empty(K, h, h, width, dtype=torch.float32, device=grad_bias.device)
    block_o = min(128, triton.next_power_of_2(width))
    kernels.row_sums_kernel[(h, h, K)](
        grad_bias, sums, splits, w, h, *grad_bias.stride()[:3],
        P=prefix, BLOCK_X=min(16, triton.next_power_of_2(w)), BLOCK_O=block_o,
    )  # fmt: skip
    grad_table = torch.empty((2 * h - 1) * width + 3, K, dtype=dtype, device=grad_bias.device)
    kernels.table_sums_kernel[(2 * h, triton.cdiv(width, block_o), K)](
        sums, grad_bias, grad_table, splits, N, K, w, h, *grad_bias.stride()[:3],
        P=prefix, BLOCK_Y=min(32, triton.next_power_of_2(h)), BLOCK_O=block_o, BLOCK_N=256,
    )  # fmt: skip
    return grad_table


@torch.library.custom_op('beit_plugin::rel_pos_attention', mutates_args=())
def _forward(qkv: Tensor, table: Tensor, h: int, w: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    qkv = _packed(qkv)
    B, N, K, D = _shapes(qkv)
    out = torch.empty(B, N, K, D, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(B, K, N, dtype=torch.float32, device=qkv.device)
    blocks = _blocks('forward', D)
    with torch.cuda.device_of(qkv):  # Triton launches on the current device
        places = lengthen_table(table, h, w)
        kernels.forward_kernel[(triton.cdiv(N, blocks.BLOCK_M), K, B)](
            qkv, places, out, lse, D**-0.5, N, K, *_Geometry.of(h, w), *qkv.stride()[:2],
            **_constants(D, prefix), **blocks.options,
        )  # fmt: skip
    return out, lse, places


@_forward.register_fake
def _(qkv: Tensor, table: Tensor, h: int, w: int, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    B, N, K, D = _shapes(qkv)
    lse = qkv.new_empty(B, K, N, dtype=torch.float32)
    return qkv.new_empty(B, N, K, D), lse, lse.new_empty(K, 7 * _Geometry.of(h, w).places)


@torch.library.custom_op('beit_plugin::rel_pos_attention_backward', mutates_args=())
def _backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    places: Tensor,
    h: int,
    w: int,
    prefix: int,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv and, if a dtype is given for it, of the table."""
    qkv, grad, out = _packed(qkv), grad.contiguous(), out.contiguous()
    B, N, K, D = _shapes(qkv)
    delta = torch.empty_like(lse)
    grad_qkv = torch.empty(B, N, 3, K, D, dtype=qkv.dtype, device=qkv.device)
    sizes = (N, K, *_Geometry.of(h, w), *qkv.stride()[:2])
    constants = _constants(D, prefix)
    scale = D**-0.5
    with torch.cuda.device_of(qkv):
        blocks = _blocks('grad_q', D)
        kernels.grad_q_kernel[(triton.cdiv(N, blocks.BLOCK_M), K, B)](
            qkv, places, out, grad, lse, delta, grad_qkv, scale, *sizes, **constants, **blocks.options
        )
        read = (qkv, places, grad, lse, delta)
        blocks = _blocks('grad_kv', D)
        kernels.grad_kv_kernel[(triton.cdiv(N, blocks.BLOCK_N), K, B)](
            *read, grad_qkv, scale, *sizes, **constants, **blocks.options
        )
        if dtype is None:
            return grad_qkv, lse.new_empty(0)
        blocks = _blocks('grad_bias', D)
        tiles = triton.cdiv(N, blocks.BLOCK_N), triton.cdiv(N, blocks.BLOCK_M)
        splits = max(1, min(B, MIN_PROGRAMS // (tiles[0] * tiles[1] * K)))
        per_split = triton.cdiv(B, splits)
        splits = triton.cdiv(B, per_split)
        columns = triton.cdiv(N, ROW_ALIGNMENT) * ROW_ALIGNMENT
        kept = qkv.dtype if splits == 1 else torch.float32
        grad_bias = torch.empty(splits, K, N, columns, dtype=kept, device=qkv.device)
        kernels.grad_bias_kernel[(*tiles, K * splits)](
            *read, grad_bias, scale, B, *sizes, *grad_bias.stride()[:3], per_split, **constants, **blocks.options
        )
        return grad_qkv, reduce_to_table(grad_bias, h, w, prefix, dtype)


@_backward.register_fake
def _(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    places: Tensor,
    h: int,
    w: int,
    prefix: int,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    rows = (2 * h - 1) * (2 * w - 1) + 3
    grad_table = lse.new_empty(0) if dtype is None else lse.new_empty(rows, places.shape[0], dtype=dtype)
    return qkv.new_empty(qkv.shape), grad_table


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    qkv, table, *ctx.grid = inputs
    ctx.dtype = table.dtype
    ctx.save_for_backward(qkv, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None, __: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    wanted = ctx.needs_input_grad[1]
    grad_qkv, grad_table = _backward(grad, *ctx.saved_tensors, *ctx.grid, ctx.dtype if wanted else None)
    return grad_qkv, grad_table if wanted else None, None, None, None


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
