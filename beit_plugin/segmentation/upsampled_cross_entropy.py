"""Cross-entropy of enlarged logits that never exist at full size, in either direction.

A decode head gives logits at a quarter of the labels' size. Enlarging them takes B x 150 x 640 x 640 floats, and their
softmax and its gradient as much again. Here bands of rows are enlarged, used and forgotten, and computed a second time
in the backward pass; what is kept for it is one float for each pixel. On a GPU kernels do this pixel by pixel.

Legend: B batch, K classes, h w pixels of the logits, H W those of the labels.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..models.kernel_support import triton_by_default, triton_refusal
from ..models.resample import bilinear_matrix

__all__ = ['upsampled_cross_entropy']

BAND = 2**23  # elements of a band: 32 MiB in float32, about what a GPU's cache holds
NONE = -(2**31)  # no label: nothing is ignored


def upsampled_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None = None,
    ignore_index: int | None = 255,
    align_corners: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum of the pixels' cross-entropies after bilinear resizing of the logits, and how many pixels are right.

    The callers check the labels (`LabelCheck`): one that is no class makes the sum NaN on a GPU, else an IndexError.

    Args:
        logits: (B, K, h, w), K >= 2, of any floating dtype; computed in float32 or wider.
        labels: (B, H, W) integers: classes 0 to K - 1, or ``ignore_index``.
        class_weight: (K,) factors of the pixels by their label; without gradient.
        ignore_index: label of the pixels that do not count; None when all count.
        align_corners: of the resizing.

    Returns:
        The sum, a scalar of float32 or wider; and the number of pixels whose largest logit is that of their label,
        int64 and without gradient. Neither is divided by anything.

    Raises:
        ValueError: one class, or labels of another shape or type.
    """
    if logits.shape[1] < 2 or labels.ndim != 3 or len(labels) != len(logits) or labels.is_floating_point():
        raise ValueError(
            f'got logits of shape {tuple(logits.shape)} and {labels.dtype} labels of shape {tuple(labels.shape)}, '
            'expected (B, K, h, w) with K >= 2 and integers (B, H, W)'
        )
    ignored = NONE if ignore_index is None else ignore_index
    if class_weight is not None:
        class_weight = class_weight.detach().to(logits.device, torch.promote_types(logits.dtype, torch.float32))
    total, right, _ = _forward(logits, labels, class_weight, ignored, align_corners)
    return total, right


def _has_kernels(logits: Tensor) -> bool:
    fast = triton_by_default(logits.device) and triton_refusal(logits.device) is None
    return fast and logits.dtype != torch.float64 and logits.numel() > 0


def _bands(logits: Tensor, labels: Tensor, align_corners: bool) -> Iterator[tuple[Any, ...]]:
    """Bands of rows of the enlarged logits, one image after the other.

    Yields:
        The image's place, slices of the rows in the labels and of those in the logits that they are made of; the maps
        of the vertical axis (rows, rows') and of the horizontal axis (w, W); the enlarged logits (K, rows, W).
    """
    B, K, h, w = logits.shape
    H, W = labels.shape[1:]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    to_y = bilinear_matrix(h, H, align_corners, logits.device, dtype)
    to_x = bilinear_matrix(w, W, align_corners, logits.device, dtype).t()
    height = max(1, BAND // (K * W))
    scale = (h - 1) / max(1, H - 1) if align_corners else h / H
    offset = 0.0 if align_corners else 0.5
    for image in range(B):
        for top in range(0, H, height):
            rows = slice(top, min(H, top + height))
            # one more on each side than needed, whichever way the product is rounded
            first = int((rows.start + offset) * scale - offset) - 1
            last = int((rows.stop - 1 + offset) * scale - offset) + 2
            source = slice(max(0, min(first, h - 1)), min(h, last + 1))
            vertical = to_y[rows, source]
            band = vertical @ (logits[image, :, source].to(dtype) @ to_x)  # K, rows, W
            yield image, rows, source, vertical, to_x, band


@torch.library.custom_op('beit_plugin::upsampled_cross_entropy', mutates_args=())
def _forward(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None, ignored: int, align_corners: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if _has_kernels(logits):
        from ..kernels import cross_entropy_ops  # not before it is needed: Triton looks for a GPU

        return cross_entropy_ops.forward(logits, labels, class_weight, ignored, align_corners)
    total, right, lse = _shapes(logits, labels)
    total.zero_()
    right.zero_()
    for image, rows, _, _, _, band in _bands(logits, labels, align_corners):
        target = labels[image, rows].long()
        counts = target != ignored
        chosen = torch.where(counts, target, 0)
        normaliser = band.logsumexp(0)  # rows, W
        loss = normaliser - band.gather(0, chosen[None])[0]
        if class_weight is not None:
            loss = loss * class_weight[chosen]
        total += torch.where(counts, loss, 0.0).sum()
        right += ((band.argmax(0) == target) & counts).sum()
        lse[image, rows] = normaliser
    return total, right, lse


@_forward.register_fake
def _shapes(logits: Tensor, labels: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    total = logits.new_empty((), dtype=dtype)
    return total, logits.new_empty((), dtype=torch.int64), logits.new_empty(labels.shape, dtype=dtype)


@torch.library.custom_op('beit_plugin::upsampled_cross_entropy_backward', mutates_args=())
def _backward(
    grad: Tensor,
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    lse: Tensor,
    ignored: int,
    align_corners: bool,
) -> Tensor:
    if _has_kernels(logits):
        from ..kernels import cross_entropy_ops

        return cross_entropy_ops.backward(grad, logits, labels, class_weight, lse, ignored, align_corners)
    found = torch.zeros_like(logits, dtype=lse.dtype)  # in the layout of the logits
    for image, rows, source, vertical, to_x, band in _bands(logits, labels, align_corners):
        target = labels[image, rows].long()
        counts = target != ignored
        chosen = torch.where(counts, target, 0)
        band.sub_(lse[image, rows]).exp_()  # the softmax
        band.scatter_(0, chosen[None], band.gather(0, chosen[None]) - 1)
        factor = counts * grad if class_weight is None else counts * class_weight[chosen] * grad
        band *= factor
        found[image, :, source] += (vertical.t() @ band) @ to_x.t()
    return found.to(logits.dtype)


@_backward.register_fake
def _(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, class_weight, ctx.ignored, ctx.align_corners = inputs
    ctx.save_for_backward(logits, labels, class_weight, output[2])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    logits, labels, class_weight, lse = ctx.saved_tensors
    found = _backward(grad, logits, labels, class_weight, lse, ctx.ignored, ctx.align_corners)
    return found, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
