"""Deformable convolution v1 (Dai et al., arXiv:1703.06211) and v2, modulated (Zhu et al., arXiv:1811.11168).

Shapes: B batch, C / O input / output channels, H W input, h w output, kh kw kernel, G deformable groups.
torchvision's kernels take the same layouts: offsets (B, G·kh·kw·2, h, w) as (y, x) pairs, masks (B, G·kh·kw, h, w).
Their offset gradient differs from mmcv's at sampling points that lie exactly on -1, H or W. Buffers named `columns`
and `ones` belong to the compiled implementation; they are left alone.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchvision.ops  # noqa: F401  registers torch.ops.torchvision
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .precision import at_least_fp32

# mmcv asks for the gradients of v1 in two calls, and torchvision gives all at once: that of the weight by grad_output,
# with which it goes, and what else it was made of
_weight_grads = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class _Geometry:
    """Pairs are (height, width)."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    offset_groups: int

    def arguments(self, use_mask: bool) -> tuple[int | bool, ...]:
        """The last arguments of torchvision's deformable convolutions."""
        return *self.stride, *self.padding, *self.dilation, self.groups, self.offset_groups, use_mask


def _forward(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: _Geometry,
) -> None:
    """Fill ``output`` (B, O, h, w)."""
    no_mask, no_bias = input.new_zeros(len(input), 1), input.new_zeros(len(weight))
    tensors = (input, weight, offset, no_mask if mask is None else mask, no_bias if bias is None else bias)
    use_mask = mask is not None
    output.copy_(torch.ops.torchvision.deform_conv2d(*at_least_fp32(*tensors), *geometry.arguments(use_mask)))


def _backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, geometry: _Geometry
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of input, weight, offset, mask and bias."""
    no_mask, no_bias = input.new_zeros(len(input), 1), input.new_zeros(len(weight))
    tensors = (grad_output, input, weight, offset, no_mask if mask is None else mask, no_bias)
    use_mask = mask is not None
    return torch.ops.torchvision._deform_conv2d_backward(*at_least_fp32(*tensors), *geometry.arguments(use_mask))


def _as_output(name: str, tensor: Tensor, output: Tensor) -> Tensor:
    """A view of offsets or masks (B, channels, h', w') as (B, channels, h, w), as mmcv's modulated kernels read them.

    These take the first channels * h * w numbers of each image, whatever h' and w' are: mmcv 2.1.0 indexes
    the memory of `offset[b]` by the output's size (`modulated_deformable_im2col_gpu_kernel` in
    ops/csrc/common/cuda/modulated_deform_conv_cuda_kernel.cuh). mmdetection's DyHead passes offsets of the next finer
    level. Smaller ones are read out of bounds there, and refused here.
    """
    channels, size = tensor.shape[1], output.shape[2:]
    if tensor.shape[2:] == size:
        return tensor
    if tensor.shape[2:].numel() < size.numel():
        raise ValueError(
            f'{name} has {tuple(tensor.shape[2:])} positions, expected at least those of the output, {tuple(size)}: '
            'pad images to a multiple of the largest stride (pad_size_divisor)'
        )
    return tensor.flatten(1)[:, : channels * size.numel()].unflatten(1, (channels, *size))


def _state(geometry: _Geometry, *tensors: Tensor) -> tuple[object, ...]:
    """The same only for the same tensors, unchanged."""
    return geometry, *((id(tensor), tensor._version) for tensor in tensors)


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Fill ``output`` (B, O, h, w) with the deformable convolution.

    Args:
        input: (B, C, H, W).
        weight: (O, C / group, kh, kw).
        offset: (B, G·kh·kw·2, h, w), in pixels.
        kW, kH: kernel size; dW, dH: stride; padW, padH: padding; dilationW, dilationH: dilation.
        group: channel groups.
        deformable_group: G.
        im2col_step: images per kernel launch of the compiled op; has no effect on the result.
    """
    geometry = _Geometry((dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    _forward(output, input, weight, offset, None, None, geometry)


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Fill ``grad_input`` (B, C, H, W) and ``grad_offset`` (B, G·kh·kw·2, h, w); see `deform_conv_forward`."""
    geometry = _Geometry((dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    new_grad_input, grad_weight, new_grad_offset, _, _ = _backward(grad_output, input, weight, offset, None, geometry)
    _weight_grads[grad_output] = _state(geometry, grad_output, input, offset), grad_weight
    grad_input.copy_(new_grad_input)
    grad_offset.copy_(new_grad_offset)


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add ``scale`` times the weight gradient to ``grad_weight`` (O, C / group, kh, kw); see `deform_conv_forward`."""
    geometry = _Geometry((dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group)
    state, new_grad_weight = _weight_grads.pop(grad_output, (None, None))
    if state != _state(geometry, grad_output, input, offset):
        # the weight gradient does not depend on the weight: grad_weight stands for its shape
        new_grad_weight = _backward(grad_output, input, grad_weight, offset, None, geometry)[1]
    grad_weight.add_(new_grad_weight, alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Fill ``output`` (B, O, h, w) with the modulated deformable convolution.

    Args:
        input: (B, C, H, W).
        weight: (O, C / group, kh, kw).
        bias: (O), read when ``with_bias``.
        offset: (B, G·kh·kw·2, h, w), in pixels; if larger, see `_as_output`.
        mask: (B, G·kh·kw, h, w), factor of every sample; likewise.
        group: channel groups.
        deformable_group: G.
    """
    geometry = _Geometry((stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group)
    offset, mask = _as_output('offset', offset, output), _as_output('mask', mask, output)
    _forward(output, input, weight, offset, mask, bias if with_bias else None, geometry)


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Fill the gradients, each shaped as what it belongs to; ``grad_bias`` only when ``with_bias``.

    The other arguments are those of `modulated_deform_conv_forward`.
    """
    geometry = _Geometry((stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group)
    offset, mask = _as_output('offset', offset, grad_output), _as_output('mask', mask, grad_output)
    grads = _backward(grad_output, input, weight, offset, mask, geometry)
    outputs = (grad_input, grad_weight, grad_offset, grad_mask) + ((grad_bias,) if with_bias else ())
    for output, grad in zip(outputs, grads, strict=False):
        if output.shape != grad.shape:  # an offset or mask larger than the output: what was not read has no gradient
            unread = output.shape[1:].numel() - grad.shape[1:].numel()
            grad = F.pad(grad.flatten(1), (0, unread)).view_as(output)
        output.copy_(grad)
