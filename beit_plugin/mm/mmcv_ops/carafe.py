"""Content-aware reassembly of features (Wang et al., CARAFE, arXiv:1905.02188).

Output pixel (i, j) is the sum of the k by k window around input pixel (i // s, j // s), weighted by the mask at (i, j).
Shapes: B batch, C channels, G groups, h w input, s scale factor, k kernel. Mask channel (g·k + y)·k + x belongs to
window offset (y, x) of group g.
One window offset at a time: nothing larger than the output is ever allocated, whereas unfolding takes k² inputs.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import at_least_fp32


def _windows(features: Tensor, masks: Tensor, k: int, groups: int, scale: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the input and of the mask for every window offset: (B, G, C/G, h, 1, w, 1) and (B, G, 1, h, s, w, s).

    Args:
        features: (B, C, h + k - 1, w + k - 1), padded.
        masks: (B, k·k·G, s·h, s·w).
    """
    height, width = masks.shape[2] // scale, masks.shape[3] // scale
    grouped = features.unflatten(1, (groups, -1))  # B, G, C/G, h + k - 1, w + k - 1
    split = masks.unflatten(3, (width, scale)).unflatten(2, (height, scale)).unflatten(1, (groups, k * k))
    for tap in range(k * k):
        y, x = divmod(tap, k)
        window = grouped[..., y : y + height, x : x + width]
        yield window[..., :, None, :, None], split[:, :, tap, None]


def _split_pixels(maps: Tensor, groups: int, scale: int) -> Tensor:
    """View (B, C, s·h, s·w) as (B, G, C/G, h, s, w, s)."""
    return maps.unflatten(3, (-1, scale)).unflatten(2, (-1, scale)).unflatten(1, (groups, -1))


def _pad(features: Tensor, kernel_size: int) -> Tensor:
    return F.pad(features, [(kernel_size - 1) // 2] * 4)


def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    """Fill ``output`` with the reassembled features.

    Args:
        features: (B, C, h, w).
        masks: (B, k·k·G, s·h, s·w).
        output: (B, C, s·h, s·w).
        kernel_size: k, odd.
        group_size: G, divides C.
        scale_factor: s.
    """
    wide_features, wide_masks = at_least_fp32(features, masks)
    total = torch.zeros_like(output, dtype=wide_features.dtype)
    split_total = _split_pixels(total, group_size, scale_factor)
    padded = _pad(wide_features, kernel_size)
    for window, mask in _windows(padded, wide_masks, kernel_size, group_size, scale_factor):
        split_total.addcmul_(window, mask)
    output.copy_(total)


def carafe_naive_backward(
    grad_output: Tensor,
    features: Tensor,
    masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Fill ``grad_input`` and ``grad_masks`` from ``grad_output``; arguments and shapes: `carafe_naive_forward`."""
    grad, wide_features, wide_masks = at_least_fp32(grad_output, features, masks)
    split_grad = _split_pixels(grad, group_size, scale_factor)
    padded = _pad(wide_features, kernel_size)
    padded_grad, wide_grad_masks = torch.zeros_like(padded), torch.zeros_like(wide_masks)
    taps = _windows(padded, wide_masks, kernel_size, group_size, scale_factor)
    grad_taps = _windows(padded_grad, wide_grad_masks, kernel_size, group_size, scale_factor)
    for (window, mask), (grad_window, grad_mask) in zip(taps, grad_taps, strict=True):
        grad_window += (split_grad * mask).sum((4, 6), keepdim=True)
        grad_mask.copy_((split_grad * window).sum(2, keepdim=True))
    border = (kernel_size - 1) // 2
    height, width = features.shape[2:]
    grad_input.copy_(padded_grad[..., border : border + height, border : border + width])
    grad_masks.copy_(wide_grad_masks)


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Fill ``output`` as `carafe_naive_forward` does, and ``rfeatures``, which mmcv keeps for `carafe_backward`.

    ``routput`` and ``rmasks`` are work space of the compiled op and stay as they are. The compiled op keeps
    ``rfeatures`` with channels last; here it is a plain copy (B, C, h, w).
    """
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    grad_output: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rgrad_output: Tensor,
    rgrad_input_hs: Tensor,
    rgrad_input: Tensor,
    rgrad_masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Fill ``grad_input`` and ``grad_masks`` as `carafe_naive_backward` does, from the kept ``rfeatures``.

    The ``rgrad_…`` arguments are work space of the compiled op and stay as they are.
    """
    carafe_naive_backward(grad_output, rfeatures, masks, grad_input, grad_masks, kernel_size, group_size, scale_factor)
