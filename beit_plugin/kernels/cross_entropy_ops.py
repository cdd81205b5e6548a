"""Launches of the kernels of the cross-entropy of resized logits; `models.upsampled_loss` is the operator.

Legend: B batch, K classes, h w pixels of the logits, H W those of the labels.
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import cross_entropy
from .launch import ceil_div, power_of_2

__all__ = ['backward', 'forward']

kernels: Any = cross_entropy  # a kernel is called by grid and options that its signature does not show

PIXELS = 16  # of a cell at a time, at most
BLOCK, BLOCK_K, WARPS = 64, 32, 2  # pixels and classes of a program; measured on an H200


def _axis(old: int, new: int, align_corners: bool) -> tuple[float, int]:
    """Step on the old axis for a step on the new one, and how many places of the new one may lie in a cell."""
    if align_corners:
        scale = (old - 1) / (new - 1) if new > 1 else 0.0
    else:
        scale = old / new
    scale = max(scale, 1e-12)  # 0 puts all at the first logit
    inverse = min(1 / scale, float(new))
    exact = inverse == power_of_2(math.ceil(inverse))
    return scale, math.ceil(inverse) + (0 if exact else 1)  # one more by rounding


def _plan(small: tuple[int, int], large: tuple[int, int], align_corners: bool) -> tuple[list[Any], dict[str, Any]]:
    """Scales and numbers of chunks, and the constants of both kernels."""
    (scale_y, count_y), (scale_x, count_x) = (_axis(*ends, align_corners) for ends in zip(small, large, strict=True))
    columns = min(power_of_2(count_x), PIXELS)
    rows = min(power_of_2(count_y), PIXELS // columns)
    constants = dict(
        ALIGN=align_corners, S=rows * columns, SX=columns, BLOCK_X=BLOCK // (rows * columns), BLOCK_K=BLOCK_K,
        num_warps=WARPS,
    )  # fmt: skip
    return [scale_y, scale_x, ceil_div(count_y, rows), ceil_div(count_x, columns)], constants


def forward(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None, ignored: int, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses, number of right pixels, and log of the sum of exponentials (B, H, W), as the operator."""
    (B, K, h, w), (H, W), labels = logits.shape, labels.shape[1:], labels.contiguous()
    logits = logits.contiguous(memory_format=torch.channels_last)  # small, and read class by class
    sizes, constants = _plan((h, w), (H, W), align_corners)
    grid = (ceil_div(w + 1, constants['BLOCK_X']) * sizes[3], (h + 1) * sizes[2], B)
    lse = torch.empty(B, H, W, dtype=torch.float32, device=logits.device)
    losses = torch.empty(grid, dtype=torch.float32, device=logits.device)
    rights = torch.empty(grid, dtype=torch.int32, device=logits.device)
    with torch.cuda.device_of(logits):
        kernels.forward_kernel[grid](
            logits, labels, class_weight, lse, losses, rights, ignored, *sizes, K, h, w, H, W, *logits.stride(),
            **constants,
        )  # fmt: skip
    return losses.sum(), rights.sum(), lse


def backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    lse: Tensor,
    ignored: int,
    align_corners: bool,
) -> Tensor:
    """Gradient of the logits (B, K, h, w), in their dtype and layout."""
    (B, K, h, w), (H, W), labels = logits.shape, labels.shape[1:], labels.contiguous()
    small = logits.contiguous(memory_format=torch.channels_last)
    sizes, constants = _plan((h, w), (H, W), align_corners)
    found = torch.empty_strided(small.shape, small.stride(), dtype=logits.dtype, device=logits.device)
    with torch.cuda.device_of(logits):
        kernels.backward_kernel[(ceil_div(w, constants['BLOCK_X']) * ceil_div(K, BLOCK_K), h, B)](
            grad.contiguous(), small, labels, class_weight, lse, found, ignored, *sizes, K, h, w, H, W,
            *small.stride(), **constants,
        )  # fmt: skip
    return found if small is logits else torch.empty_like(logits).copy_(found)
