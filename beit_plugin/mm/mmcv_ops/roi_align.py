"""RoI align (He et al., Mask R-CNN, arXiv:1703.06870), average and max.

The average is torchvision's kernel, whose arithmetic is mmcv's; torchvision has no max. Rules of the max as in mmcv
2.1.0 ``csrc/common/cuda/roi_align_cuda_kernel.cuh``, except that a bin without samples gives 0, not the lowest float.
Shapes: B batch, C channels, H W pixels, R regions, ph pw pooled size.
"""

import torch
import torchvision.ops  # noqa: F401  registers torch.ops.torchvision
from torch import Tensor

from .precision import at_least_fp32
from .windows import region_slices

_MAX = 0
_NO_SAMPLE = -1.0  # argmax of a bin without samples, as mmcv marks it


def _samples(
    first: Tensor, last: Tensor, spatial_scale: float, num_bins: int, sampling_ratio: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """Sampling points (R, num_bins, S) along one axis, and which of them exist (R, S); S is the largest number."""
    shift = 0.5 if aligned else 0.0
    start, stop = first * spatial_scale - shift, last * spatial_scale - shift
    bin_size = (stop - start if aligned else (stop - start).clamp(min=1)) / num_bins
    counts = torch.full_like(bin_size, sampling_ratio) if sampling_ratio > 0 else bin_size.ceil().clamp(min=0)
    steps = torch.arange(max(1, int(counts.max())), device=first.device)
    fractions = (steps + 0.5) / counts[:, None].clamp(min=1)  # R, S
    bins = torch.arange(num_bins, device=first.device)[:, None]
    points = start[:, None, None] + bin_size[:, None, None] * (bins + fractions[:, None])
    return points, steps < counts[:, None]


def _corners(points: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lower and upper pixel and their weights along one axis; both weights are 0 beyond one pixel outside the map."""
    inside = (points >= -1) & (points <= size)
    points = points.clamp(0, size - 1)
    low = points.floor().long()
    fraction = points - low
    return low, (low + 1).clamp(max=size - 1), (1 - fraction) * inside, fraction * inside


def _max_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> None:
    images, (height, width) = rois[:, 0].long(), input.shape[2:]
    all_y, has_y = _samples(rois[:, 2], rois[:, 4], spatial_scale, output.shape[2], sampling_ratio, aligned)
    all_x, has_x = _samples(rois[:, 1], rois[:, 3], spatial_scale, output.shape[3], sampling_ratio, aligned)
    for part in region_slices(len(rois), input.shape[1] * all_y[:1].numel() * all_x[:1].numel()):
        y, x = all_y[part, :, None, :, None], all_x[part, None, :, None, :]  # r, ph, 1, Sy, 1 and r, 1, pw, 1, Sx
        y_low, y_high, y_low_weight, y_high_weight = _corners(y, height)
        x_low, x_high, x_low_weight, x_high_weight = _corners(x, width)
        image = images[part, None, None, None, None]
        values = input.new_zeros(())
        for rows, y_weight in ((y_low, y_low_weight), (y_high, y_high_weight)):
            for columns, x_weight in ((x_low, x_low_weight), (x_high, x_high_weight)):
                values = values + input[image, :, rows, columns] * (y_weight * x_weight)[..., None]
        exists = (has_y[part, :, None] & has_x[part, None, :])[:, None, None]  # r, 1, 1, Sy, Sx
        best, index = values.masked_fill_(~exists[..., None], -torch.inf).flatten(3, 4).max(3)  # r, ph, pw, C
        empty = ~exists.flatten(1).any(1)[:, None, None, None]
        for target, source, no_sample in (
            (output, best, 0.0),
            (argmax_y, y.expand(values.shape[:-1]).flatten(3, 4).gather(3, index), _NO_SAMPLE),
            (argmax_x, x.expand(values.shape[:-1]).flatten(3, 4).gather(3, index), _NO_SAMPLE),
        ):
            target[part] = source.masked_fill(empty, no_sample).permute(0, 3, 1, 2).to(target.dtype)


def _max_backward(grad: Tensor, images: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor) -> None:
    _, channels, height, width = grad_input.shape
    grad = grad * (argmax_y != _NO_SAMPLE)
    planes = images[:, None] * channels + torch.arange(channels, device=grad.device)  # R, C
    total = torch.zeros_like(grad_input, dtype=grad.dtype, memory_format=torch.contiguous_format)
    y_low, y_high, y_low_weight, y_high_weight = _corners(argmax_y, height)
    x_low, x_high, x_low_weight, x_high_weight = _corners(argmax_x, width)
    for rows, y_weight in ((y_low, y_low_weight), (y_high, y_high_weight)):
        for columns, x_weight in ((x_low, x_low_weight), (x_high, x_high_weight)):
            places = (planes[..., None, None] * height + rows) * width + columns
            total.view(-1).index_add_(0, places.flatten(), (grad * y_weight * x_weight).flatten())
    grad_input.copy_(total)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill ``output`` with the average or the largest of the bilinear samples of every bin.

    Args:
        input: (B, C, H, W).
        rois: (R, 5), batch index and x1, y1, x2, y2 in image pixels.
        output: (R, C, ph, pw).
        argmax_y, argmax_x: (R, C, ph, pw), receive the place of the largest sample; unused for averages.
        aligned_height, aligned_width: ph, pw.
        spatial_scale: feature pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 for as many as the bin has pixels.
        pool_mode: 0 max, 1 average.
        aligned: shift by half a pixel and allow regions smaller than one pixel.
    """
    if len(rois) == 0:
        return
    features, boxes = at_least_fp32(input, rois)
    if pool_mode == _MAX:
        _max_forward(features, boxes, output, argmax_y, argmax_x, spatial_scale, sampling_ratio, aligned)
        return
    pooled = torch.ops.torchvision.roi_align(
        features, boxes, spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
    )
    output.copy_(pooled)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fill ``grad_input`` (B, C, H, W) from ``grad_output`` (R, C, ph, pw); other arguments: `roi_align_forward`."""
    grad, boxes = at_least_fp32(grad_output, rois)
    if pool_mode == _MAX:
        places_y, places_x = at_least_fp32(argmax_y, argmax_x)
        _max_backward(grad, boxes[:, 0].long(), places_y, places_x, grad_input)
        return
    new_grad = torch.ops.torchvision._roi_align_backward(
        grad, boxes, spatial_scale, aligned_height, aligned_width, *grad_input.shape, sampling_ratio, aligned
    )
    grad_input.copy_(new_grad)
