"""One convolution over maps of several sizes, computed without enlarging the small ones first.

UPerNet (arXiv:1807.10221) enlarges all levels to the size of the finest, concatenates them and convolves. Both steps
are linear, and mixing channels commutes with enlarging: here each small map is mixed at its own size, once for each tap
of the kernel; enlarging, shifting by the tap and adding up are then two products with small matrices. Four levels of C
channels, each half the size of the one before, take 1.33 instead of 4 times the multiplications of one level.

Legend: B batch, C channels of a map, O channels of the result, h w its pixels, H W those of the finest, k kernel size.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.attention import attention_dtype
from ..models.kernel_support import is_exporting, is_open, is_plain
from ..models.resample import bilinear_matrix

__all__ = ['add_enlarged', 'average_pool', 'conv_of_levels']

HALF = (torch.float16, torch.bfloat16)
SMALL = 0.5  # of the finest map's pixels: what has more is enlarged


def conv_of_levels(conv: nn.Conv2d, levels: Sequence[Tensor], align_corners: bool) -> Tensor:
    """The convolution of all levels, enlarged bilinearly to the first and concatenated.

    Args:
        conv: over all channels; its padding keeps the size.
        levels: (B, C_i, h_i, w_i) each; the first has the size of the result.
        align_corners: of the enlarging.

    Returns:
        (B, O, H, W).
    """
    area = levels[0].shape[-2] * levels[0].shape[-1]
    if not _can_mix(conv, levels[0]):
        return conv(_enlarged(levels, levels[0], align_corners))
    small = [x.shape[-2] * x.shape[-1] <= SMALL * area for x in levels]
    if not any(small):
        return conv(_enlarged(levels, levels[0], align_corners))
    weights = conv.weight.split([x.shape[1] for x in levels], dim=1)  # each O, C_i, k, k
    whole = [x for x, less in zip(levels, small, strict=True) if not less]
    whole_weight = torch.cat([weight for weight, less in zip(weights, small, strict=True) if not less], 1)
    y = F.conv2d(_enlarged(whole, levels[0], align_corners), whole_weight, conv.bias, padding=conv.padding)
    parts = [(x, weight) for x, weight, less in zip(levels, weights, small, strict=True) if less]
    return _add_small(y, parts, align_corners)


def add_enlarged(fine: Tensor, coarse: Tensor, align_corners: bool) -> Tensor:
    """A map and a coarser one that is enlarged bilinearly to it.

    In half precision by two products with small matrices: autocast would enlarge in float32, four times the memory
    traffic, and PyTorch's gradient of that uses atomics, so that no training is the same twice.

    Args:
        fine: (B, C, H, W).
        coarse: (B, C, h, w).
        align_corners: of the enlarging.

    Returns:
        (B, C, H, W).
    """
    B, C, H, W = fine.shape
    h, w = coarse.shape[2:]
    dtype = attention_dtype(coarse)
    if dtype not in HALF or is_exporting() or torch.jit.is_tracing():
        return fine + F.interpolate(coarse, (H, W), mode='bilinear', align_corners=align_corners)
    to_x = bilinear_matrix(w, W, align_corners, coarse.device, dtype)
    to_y = bilinear_matrix(h, H, align_corners, coarse.device, dtype)
    wide = torch.bmm(to_x.expand(B * h, -1, -1), coarse.permute(0, 2, 3, 1).reshape(B * h, w, C))  # B h, W, C
    return _add_rows(fine, to_y, wide.view(B, h, W * C))


def average_pool(pool: nn.AdaptiveAvgPool2d, x: Tensor) -> Tensor:
    """A map (B, C, h, w) pooled to (B, C, s, s); where h and w are open in an export, by products with matrices.

    The layer itself would guard on whether s divides h, and ONNX has it for s = 1 only.
    """
    if not is_open(*x.shape[2:]):
        return pool(x)
    size = cast(int, pool.output_size)
    to_y, to_x = (_average_matrix(old, size, x) for old in x.shape[2:])
    return (to_y @ (x.to(to_x.dtype) @ to_x.t())).to(x.dtype)


def _average_matrix(old: int, new: int, like: Tensor) -> Tensor:
    """What adaptive average pooling does along one axis, as a linear map (new, old), in float32 or wider."""
    start = torch.arange(new, device=like.device) * old // new
    end = (torch.arange(1, new + 1, device=like.device) * old + (new - 1)) // new
    place = torch.arange(old, device=like.device)
    inside = (place >= start[:, None]) & (place < end[:, None])  # new, old
    return inside.to(torch.promote_types(like.dtype, torch.float32)) / (end - start)[:, None]


def _can_mix(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether mixing first is the same, and faster.

    In float32 a GPU convolves on its matrix units (TF32), but multiplies matrices there only on request.
    """
    if is_exporting() or torch.jit.is_tracing() or not is_plain(conv, nn.Conv2d):
        return False
    odd = all(size % 2 == 1 for size in conv.kernel_size)
    centred = conv.padding == tuple(size // 2 for size in conv.kernel_size) and conv.padding_mode == 'zeros'
    if not odd or not centred or (*conv.dilation, *conv.stride, conv.groups) != (1, 1, 1, 1, 1):
        return False
    return x.device.type != 'cuda' or attention_dtype(x) in HALF or bool(torch.backends.cuda.matmul.allow_tf32)


def _enlarged(levels: Sequence[Tensor], like: Tensor, align_corners: bool) -> Tensor:
    size = tuple(like.shape[-2:])

    def fits(x: Tensor) -> bool:  # comparing an open size would pin an exported graph to the answer
        return x is like or (not is_open(*size) and tuple(x.shape[-2:]) == size)

    resized = (x if fits(x) else F.interpolate(x, size, mode='bilinear', align_corners=align_corners) for x in levels)
    return torch.cat(list(resized), dim=1)


def _add_small(y: Tensor, parts: Sequence[tuple[Tensor, Tensor]], align_corners: bool) -> Tensor:
    """Adds to y (B, O, H, W) what small maps (B, C_i, h_i, w_i) with their weights (O, C_i, k, k) contribute."""
    B, out, H, W = y.shape
    rows, to_y = [], []
    for x, weight in parts:
        C, h, w = x.shape[1:]
        k_y, k_x = weight.shape[2:]
        dtype = attention_dtype(x)
        pixels = x.permute(0, 2, 3, 1).reshape(1, B * h * w, C).expand(k_y, -1, -1)
        mixed = torch.bmm(pixels, weight.permute(2, 1, 3, 0).reshape(k_y, C, k_x * out))  # k_y, B*h*w, k_x*O
        to_x = _taps(w, W, k_x, align_corners, x.device, dtype).transpose(1, 2).reshape(1, W, w * k_x)
        wide = torch.bmm(to_x.expand(k_y * B * h, -1, -1), mixed.view(k_y * B * h, w * k_x, out))
        rows.extend(wide.view(k_y, B, h, W * out).unbind(0))
        to_y.append(_taps(h, H, k_y, align_corners, x.device, dtype).reshape(H, k_y * h))
    return _add_rows(y, torch.cat(to_y, 1), torch.cat(rows, 1))  # over all levels and vertical taps, for y is large


def _add_rows(y: Tensor, to_y: Tensor, rows: Tensor) -> Tensor:
    """y (B, O, H, W) and the rows (B, n, W*O) of smaller maps, which a matrix (H, n) places; in y's memory format."""
    B, out, H, W = y.shape
    whole = y.permute(0, 2, 3, 1).reshape(B, H, W * out)
    summed = torch.baddbmm(whole, to_y.expand(B, -1, -1), rows).view(B, H, W, out).permute(0, 3, 1, 2)
    # in the order of the convolution: on the CPU BatchNorm of channels that come last is less accurate
    return summed.contiguous() if y.is_contiguous() else summed


def _taps(old: int, new: int, kernel: int, align_corners: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Enlarges an axis and shifts it by each tap of a kernel, with zeros beyond its ends: (new, kernel, old)."""
    enlarged = bilinear_matrix(old, new, align_corners, device, dtype)
    padded = F.pad(enlarged, (0, 0, kernel // 2, kernel // 2))
    return torch.stack([padded[tap : tap + new] for tap in range(kernel)], 1)
