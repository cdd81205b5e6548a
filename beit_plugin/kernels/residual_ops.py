"""Residual sums and LayerNorm of a transformer as an operator of PyTorch, with gradients, on the Triton kernels.

One operator, registered in ``torch.library`` as those of ``ops``, serves the three functions: each leaves out a part.

Legend: B batch, N tokens, C channels, R = B*N rows.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import residual
from .launch import DTYPES, Launcher, ceil_div, make_call, power_of_2

__all__ = ['DTYPES', 'MAX_CHANNELS', 'add_norm', 'layer_norm', 'scaled_add']

kernels: Any = residual  # a kernel is called by grid and options that its signature does not show

MAX_CHANNELS = 4096  # a program holds whole rows in registers
# four for each multiprocessor of an H100 or H200; the same on every GPU, so that sums are in the same order
MAX_PROGRAMS = 528


class Tile(NamedTuple):
    """What a program holds at a time, and its warps."""

    BLOCK_R: int
    BLOCK_C: int
    num_warps: int


def _tile(kind: str, channels: int) -> Tile:
    """Whole rows; a thread has 16 elements in the forward pass, 8 beside the sums of the backward pass."""
    block_c = power_of_2(channels)
    elements = {'forward': 2048, 'backward': 1024}[kind]
    return Tile(max(1, elements // block_c), block_c, min(16, max(4, block_c // 256)))


def _rows(x: Tensor, keep: Tensor | None) -> tuple[int, int]:
    """R and N; N is of no consequence without ``keep``."""
    rows = x.numel() // x.shape[-1]
    return rows, max(1, rows // keep.numel()) if keep is not None and keep.numel() else 1


def _dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def _nothing(like: Tensor) -> Tensor:
    """In the place of a result that is not wanted: operators cannot return None."""
    return like.new_empty(0)


@cache
def _launcher(kind: str, channels: int, **constants: Any) -> tuple[Launcher, Tile]:
    tile = _tile(kind, channels)
    constants.update(C=channels, BLOCK_R=tile.BLOCK_R, BLOCK_C=tile.BLOCK_C)
    return Launcher(getattr(kernels, f'{kind}_kernel'), constants, dict(num_warps=tile.num_warps)), tile


@cache
def _sums_launcher(channels: int) -> Launcher:
    return Launcher(kernels.sums_kernel, dict(C=channels, BLOCK_P=64, BLOCK_C=32), {})


def _run_forward(
    x: Tensor,
    y: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The sum (of a y), its norm and the statistics of this (with a weight)."""
    x = x.contiguous()
    y, gamma, keep, weight, bias = _dense(y, gamma, keep, weight, bias)
    C = x.shape[-1]
    rows, tokens = _rows(x, keep)
    total = normed = stats = None
    if y is not None:
        total = torch.empty_like(x)
    if weight is not None:
        normed = torch.empty_like(x, dtype=dtype)
        stats = torch.empty(2, rows, dtype=torch.float32, device=x.device)
    launch, tile = _launcher('forward', C)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        launch(
            (ceil_div(rows, tile.BLOCK_R), 1, 1),
            x, y, gamma, keep, weight, bias, total, normed, stats, rows, tokens, eps,
        )  # fmt: skip
    return total, normed, stats


def _operator(name: str, run: Callable[..., tuple[Tensor | None, ...]], schema: str) -> Any:
    """In ``torch.library``; in the place of a None, which no operator returns, a tensor without elements."""

    def filled(*inputs: Any) -> tuple[Tensor, ...]:
        like = next(tensor for tensor in inputs if tensor is not None)
        return tuple(_nothing(like) if tensor is None else tensor for tensor in run(*inputs))

    return torch.library.custom_op(f'beit_plugin::{name}', filled, mutates_args=(), schema=schema)


_forward = _operator(
    'residual',
    _run_forward,
    '(Tensor x, Tensor? y, Tensor? gamma, Tensor? keep, Tensor? weight, Tensor? bias, float eps, ScalarType dtype)'
    ' -> (Tensor, Tensor, Tensor)',
)


@_forward.register_fake
def _(
    x: Tensor, y: Tensor | None, gamma: Any, keep: Any, weight: Tensor | None, bias: Any, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    total = _nothing(x) if y is None else x.new_empty(x.shape)
    if weight is None:
        return total, _nothing(x), _nothing(x)
    stats = x.new_empty(2, x.numel() // x.shape[-1], dtype=torch.float32)
    return total, x.new_empty(x.shape, dtype=dtype), stats


def _run_backward(
    grad_total: Tensor | None,
    grad_normed: Tensor | None,
    normalised: Tensor | None,
    stats: Tensor | None,
    weight: Tensor | None,
    y: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    dtype_x: torch.dtype | None,
    dtype_y: torch.dtype | None,
    affine: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, y, gamma, weight and bias; each is wanted if its dtype, ``y`` or ``affine`` says so."""
    grad_total, grad_normed, normalised = _dense(grad_total, grad_normed, normalised)
    y, gamma, keep, weight = _dense(y, gamma, keep, weight)
    read = grad_total if grad_normed is None else grad_normed
    assert read is not None
    C = read.shape[-1]
    rows, tokens = _rows(read, keep)
    grad_x = None if dtype_x is None else torch.empty_like(read, dtype=dtype_x)
    grad_y = None if dtype_y is None else torch.empty_like(read, dtype=dtype_y)
    grad_gamma = None if y is None or gamma is None else torch.empty_like(gamma)
    grad_weight = torch.empty_like(weight) if affine and weight is not None else None
    grad_bias = torch.empty_like(weight) if affine and weight is not None else None
    launch, tile = _launcher('backward', C, AFFINE=affine)
    programs = min(MAX_PROGRAMS, ceil_div(rows, tile.BLOCK_R))
    wanted = (grad_gamma is not None) + 2 * affine
    partials = torch.empty(3, programs, C, dtype=torch.float32, device=read.device) if wanted else None
    with torch.cuda.device_of(read):
        launch(
            (programs, 1, 1),
            grad_total, grad_normed, normalised, stats, weight, y, gamma, keep, grad_x, grad_y, partials, rows, tokens,
        )  # fmt: skip
        if wanted:
            _sums_launcher(C)((ceil_div(C, 32), wanted, 1), partials, grad_gamma, grad_weight, grad_bias, programs)
    return grad_x, grad_y, grad_gamma, grad_weight, grad_bias


_backward = _operator(
    'residual_backward',
    _run_backward,
    '(Tensor? grad_total, Tensor? grad_normed, Tensor? normalised, Tensor? stats, Tensor? weight, Tensor? y, '
    'Tensor? gamma, Tensor? keep, ScalarType? dtype_x, ScalarType? dtype_y, bool affine)'
    ' -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
)


@_backward.register_fake
def _(
    grad_total: Tensor | None,
    grad_normed: Tensor | None,
    normalised: Any,
    stats: Any,
    weight: Tensor | None,
    y: Tensor | None,
    gamma: Tensor | None,
    keep: Any,
    dtype_x: torch.dtype | None,
    dtype_y: torch.dtype | None,
    affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    read = grad_total if grad_normed is None else grad_normed
    assert read is not None
    return (
        _nothing(read) if dtype_x is None else read.new_empty(read.shape, dtype=dtype_x),
        _nothing(read) if dtype_y is None else read.new_empty(read.shape, dtype=dtype_y),
        _nothing(read) if y is None or gamma is None else gamma.new_empty(gamma.shape),
        weight.new_empty(weight.shape) if affine and weight is not None else _nothing(read),
        weight.new_empty(weight.shape) if affine and weight is not None else _nothing(read),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    x, y, gamma, keep, weight = inputs[:5]
    total, _, stats = output
    ctx.set_materialize_grads(False)  # the statistics have no gradient, and the last sum of a model may have none
    ctx.dtypes = x.dtype, None if y is None else y.dtype
    norm = (None, None, None) if weight is None else (x if y is None else total, stats, weight)
    ctx.save_for_backward(*norm, y if ctx.needs_input_grad[2] else None, gamma, keep)


def _differentiate(
    run: Any,
    ctx: Any,
    saved: tuple[Any, ...],
    grad_total: Tensor | None,
    grad_normed: Tensor | None,
    _: Tensor | None,
) -> tuple[Tensor | None, ...]:
    normalised, stats, weight, y, gamma, keep = saved
    wants_x, wants_y, wants_gamma, _, wants_weight, wants_bias = ctx.needs_input_grad[:6]
    dtype_x, dtype_y = ctx.dtypes
    if dtype_y is None:
        grad_total = None  # in the place of a sum there is nothing, whatever its gradient
    if weight is None:
        grad_normed = None
    if grad_total is None and grad_normed is None:
        return (None,) * 8
    if grad_normed is None:  # the gradient of x is that of the sum
        normalised = stats = weight = None
    same = gamma is None and keep is None  # the gradient of y is that of x
    affine = weight is not None and (wants_weight or wants_bias)
    writes_x = weight is not None and (wants_x or (wants_y and same))
    writes_y = wants_y and not same
    grad_x, grad_y, grad_gamma, grad_weight, grad_bias = grad_total, None, None, None, None
    if writes_x or writes_y or wants_gamma or affine:
        found, grad_y, grad_gamma, grad_weight, grad_bias = run(
            grad_total, grad_normed, normalised, stats, weight, y, gamma, keep,
            dtype_x if writes_x else None, dtype_y if writes_y else None, affine,
        )  # fmt: skip
        grad_x = found if writes_x else grad_total
    if wants_y and same and grad_x is not None:
        grad_y = grad_x.to(dtype_y)
    grads = (grad_x, grad_y, grad_gamma, None, grad_weight if affine else None, grad_bias if affine else None)
    wants = ctx.needs_input_grad
    return (*(grad if wanted else None for grad, wanted in zip(grads, wants, strict=False)), None, None)


# the sum, its norm and the statistics; what is not wanted of them is nothing that could be used
_residual = make_call(_forward, _run_forward, _backward, _run_backward, _save, _differentiate)


def _check(
    x: Tensor, y: Tensor | None, gamma: Tensor | None, keep: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> None:
    channels = x.shape[-1:]
    if not 1 <= channels.numel() <= MAX_CHANNELS or x.ndim < 2 or x.dtype not in DTYPES:
        raise ValueError(
            f'expected float32, bfloat16 or float16 of shape (..., C) with C up to {MAX_CHANNELS}, got {x.dtype} of '
            f'shape {tuple(x.shape)}'
        )
    expected = {'y': (y, x.shape), 'keep': (keep, x.shape[:1])}
    expected.update(gamma=(gamma, channels), weight=(weight, channels), bias=(bias, channels))
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f'expected {name} of shape {tuple(shape)}, got {tuple(tensor.shape)}')


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm over the last axis, computed in float32.

    Args:
        x: (..., C) with C up to ``MAX_CHANNELS``; one of ``DTYPES``.
        weight, bias: (C,), of any floating dtype.
        eps: added to the variance.
        dtype: of the result; that of x by default.

    Returns:
        (..., C). The gradients of weight and bias are the same, bit for bit, in every run; so are those below.

    Raises:
        ValueError: shapes that do not fit each other, or another dtype of x.
    """
    _check(x, None, None, None, weight, bias)
    return _residual(x, None, None, None, weight, bias, eps, dtype or x.dtype)[1]


def add_norm(
    x: Tensor,
    y: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual sum of a branch, and its LayerNorm.

    Args:
        x: (B, N, C), see ``layer_norm``.
        y: (B, N, C) output of the branch, of any floating dtype.
        gamma: (C,) layer scale, of any floating dtype; None for 1.
        keep: (B,) float32 factors of the samples' branches, without gradient: 0, or 1 / probability of being kept; None
            for 1.
        weight, bias, eps, dtype: see ``layer_norm``.

    Returns:
        x + keep * gamma * y in the dtype of x, and the LayerNorm of it.

    Raises:
        ValueError: as ``layer_norm``.
    """
    _check(x, y, gamma, keep, weight, bias)
    total, normed, _ = _residual(x, y, gamma, keep, weight, bias, eps, dtype or x.dtype)
    return total, normed


def scaled_add(x: Tensor, y: Tensor, gamma: Tensor | None, keep: Tensor | None) -> Tensor:
    """The sum of ``add_norm`` alone; arguments and errors are the same."""
    _check(x, y, gamma, keep, None, None)
    return _residual(x, y, gamma, keep, None, None, 0.0, x.dtype)[0]
