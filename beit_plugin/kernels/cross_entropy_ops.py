"""Launches of the kernels of the cross-entropy of resized logits; `models.upsampled_loss` is the operator.

Legend: B batch, K classes, h w pixels of the logits, H W those of the labels.
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import cross_entropy
from .launch import DTYPES, ceil_div

__all__ = ['DTYPES', 'backward', 'forward']

kernels: Any = cross_entropy  # a kernel is called by grid and options that its signature does not show

BLOCK_X, BLOCK_K, WARPS = 16, 64, 4


def _scales(old: tuple[int, int], new: tuple[int, int], align_corners: bool) -> list[float]:
    """Steps on the old axes for a step on the new ones."""
    if align_corners:
        return [(a - 1) / (b - 1) if b > 1 else 0.0 for a, b in zip(old, new, strict=True)]
    return [a / b for a, b in zip(old, new, strict=True)]


def forward(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None, ignored: int, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses, number of right pixels, and log of the sum of exponentials (B, H, W), as the operator."""
    (B, K, h, w), (H, W), labels = logits.shape, labels.shape[1:], labels.contiguous()
    blocks = ceil_div(W, BLOCK_X)
    lse = torch.empty(B, H, W, dtype=torch.float32, device=logits.device)
    losses = torch.empty(B, H, blocks, dtype=torch.float32, device=logits.device)
    rights = torch.empty(B, H, blocks, dtype=torch.int32, device=logits.device)
    with torch.cuda.device_of(logits):
        kernels.forward_kernel[(blocks, H, B)](
            logits, labels, class_weight, lse, losses, rights, ignored, *_scales((h, w), (H, W), align_corners),
            K, h, w, H, W, *logits.stride(),
            ALIGN=align_corners, BLOCK_X=BLOCK_X, BLOCK_K=BLOCK_K, num_warps=WARPS,
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
    """Gradient of the logits (B, K, h, w), in their dtype."""
    (B, K, h, w), (H, W), labels = logits.shape, labels.shape[1:], labels.contiguous()
    scale_y, scale_x = _scales((h, w), (H, W), align_corners)
    # a scale of 0 puts all pixels at the first logit
    reach = W if scale_x == 0 else min(W, math.ceil(2 / scale_x) + 4)
    grad_logits = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)
    with torch.cuda.device_of(logits):
        kernels.backward_kernel[(ceil_div(w, BLOCK_X) * ceil_div(K, BLOCK_K), h, B)](
            grad.contiguous(), logits, labels, class_weight, lse, grad_logits, ignored,
            max(scale_y, 1e-12), max(scale_x, 1e-12), reach, K, h, w, H, W, *logits.stride(),
            ALIGN=align_corners, BLOCK_X=BLOCK_X, BLOCK_K=BLOCK_K, num_warps=WARPS,
        )  # fmt: skip
    return grad_logits
