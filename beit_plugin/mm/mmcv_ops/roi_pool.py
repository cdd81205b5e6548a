"""RoI max pooling over whole pixels (Girshick, Fast R-CNN, arXiv:1504.08083), with mmcv's bin borders.

mmcv (2.1.0, ``csrc/common/cuda/roi_pool_cuda_kernel.cuh``) keeps fractional regions where torchvision rounds them.
Shapes: B batch, C channels, H W pixels, R regions, ph pw pooled size.
"""

import torch
from torch import Tensor

from .precision import at_least_fp32
from .windows import region_slices


def _bins(first: Tensor, last: Tensor, spatial_scale: float, num_bins: int, size: int) -> tuple[Tensor, Tensor]:
    """First pixel and number of pixels (R, num_bins) of every bin along one axis; 0 pixels for malformed regions."""
    low, high = first * spatial_scale, (last + 1) * spatial_scale
    bin_size = ((high - low) / num_bins)[:, None]
    edges = torch.arange(num_bins + 1, device=first.device)
    starts = (edges[:-1] * bin_size + low[:, None]).floor().clamp(0, size).long()
    ends = (edges[1:] * bin_size + low[:, None]).ceil().clamp(0, size).long()
    return starts, (ends - starts).clamp(min=0) * (high > low)[:, None]


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Fill ``output`` and ``argmax`` with the largest value of every bin and its place.

    Args:
        input: (B, C, H, W).
        rois: (R, 5), batch index and x1, y1, x2, y2 in image pixels; x2 and y2 are inside.
        output: (R, C, ph, pw); 0 where a bin has no pixel.
        argmax: (R, C, ph, pw), int32 y·W + x; -1 where a bin has no pixel.
        pooled_height, pooled_width: ph, pw.
        spatial_scale: feature pixels per image pixel.
    """
    if len(rois) == 0:
        return
    height, width = input.shape[2:]
    (boxes,) = at_least_fp32(rois)
    y_starts, y_counts = _bins(boxes[:, 2], boxes[:, 4], spatial_scale, pooled_height, height)  # R, ph
    x_starts, x_counts = _bins(boxes[:, 1], boxes[:, 3], spatial_scale, pooled_width, width)  # R, pw
    rows = torch.arange(max(1, int(y_counts.max())), device=input.device)
    columns = torch.arange(max(1, int(x_counts.max())), device=input.device)
    for part in region_slices(len(rois), output[:1].numel() * len(rows) * len(columns)):
        y = y_starts[part, :, None, None, None] + rows[:, None]  # r, ph, 1, rows, 1
        x = x_starts[part, None, :, None, None] + columns  # r, 1, pw, 1, columns
        inside = (rows[:, None] < y_counts[part, :, None, None, None]) & (columns < x_counts[part, None, :, None, None])
        y, x = y.clamp(max=height - 1), x.clamp(max=width - 1)
        images = boxes[part, 0].long()[:, None, None, None, None]
        values = input[images, :, y, x].masked_fill_(~inside[..., None], -torch.inf)  # r, ph, pw, rows, columns, C
        best, index = values.flatten(3, 4).max(3)  # r, ph, pw, C
        places = (y * width + x).flatten(3, 4).gather(3, index)
        empty = ~inside.flatten(3, 4).any(3)[..., None]
        output[part] = best.masked_fill_(empty, 0).permute(0, 3, 1, 2)
        argmax[part] = places.masked_fill_(empty, -1).permute(0, 3, 1, 2).to(argmax.dtype)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Fill ``grad_input`` (B, C, H, W): each ``grad_output`` (R, C, ph, pw) goes to the pixel that ``argmax`` names.

    The other arguments are those of `roi_pool_forward`.
    """
    (grad,) = at_least_fp32(grad_output)
    channels, pixels = grad_input.shape[1], grad_input.shape[2:].numel()
    planes = rois[:, 0].long()[:, None] * channels + torch.arange(channels, device=rois.device)  # R, C
    places = planes[..., None, None] * pixels + argmax.clamp(min=0)
    total = torch.zeros_like(grad_input, dtype=grad.dtype, memory_format=torch.contiguous_format)
    total.view(-1).index_add_(0, places.flatten(), (grad * (argmax >= 0)).flatten())
    grad_input.copy_(total)
