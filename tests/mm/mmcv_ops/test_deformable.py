"""Deformable convolutions and attention: against loops, torch's convolution, and numeric gradients through mmcv."""

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip('mmcv', reason='needs the extra beit-plugin[mmseg]')

from helpers import relative_error

from beit_plugin.mm.mmcv_ops import deform_conv, install
from beit_plugin.mm.mmcv_ops.deform_conv import deform_conv_backward_parameters
from beit_plugin.mm.mmcv_ops.ms_deform_attn import ms_deform_attn_backward, ms_deform_attn_forward

# stride, padding, dilation as (h, w), groups, deformable groups, kernel
GEOMETRIES = [
    ((1, 1), (1, 1), (1, 1), 1, 1, (3, 3)),
    ((2, 1), (0, 2), (1, 2), 2, 2, (3, 2)),
    ((1, 2), (2, 1), (2, 1), 1, 4, (1, 3)),
]


@pytest.fixture(scope='module')
def ops() -> ModuleType:
    install()
    return pytest.importorskip('mmcv.ops')


def sample(plane: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bilinear value of one map (H, W) at one point, 0 outside."""
    total = plane.new_zeros(())
    y0, x0 = int(y.floor()), int(x.floor())
    for row, column in ((y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1)):
        if 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]:
            total = total + plane[row, column] * (1 - (y - row).abs()) * (1 - (x - column).abs())
    return total


def deform_conv_loop(input: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, geometry: tuple) -> Tensor:
    """Deformable convolution, one output pixel and kernel tap at a time."""
    stride, padding, dilation, groups, offset_groups, kernel = geometry
    (batch, channels), (height, width) = input.shape[:2], offset.shape[2:]
    offset = offset.unflatten(1, (offset_groups, *kernel, 2))
    mask = mask.unflatten(1, (offset_groups, *kernel))
    columns = []
    for b in range(batch):
        for h in range(height):
            for w in range(width):
                for c in range(channels):
                    g = c // (channels // offset_groups)
                    for i in range(kernel[0]):
                        for j in range(kernel[1]):
                            y = h * stride[0] - padding[0] + i * dilation[0] + offset[b, g, i, j, 0, h, w]
                            x = w * stride[1] - padding[1] + j * dilation[1] + offset[b, g, i, j, 1, h, w]
                            columns.append(sample(input[b, c], y, x) * mask[b, g, i, j, h, w])
    taps = torch.stack(columns).view(batch, height, width, groups, -1)  # B, h, w, groups, C/groups·kh·kw
    output = torch.einsum('bhwgk,gok->bgohw', taps, weight.flatten(1).unflatten(0, (groups, -1)))
    return output.flatten(1, 2)


def deform_conv_inputs(geometry: tuple, spread: float = 1.3) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Input (2, 4, 5, 4), offset, mask, weight (6, 4 / groups, kh, kw), bias (6)."""
    stride, padding, dilation, groups, offset_groups, kernel = geometry
    generator = torch.Generator().manual_seed(1)
    input = torch.randn(2, 4, 5, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 4 // groups, *kernel, generator=generator, dtype=torch.float64)
    output_size = F.conv2d(input, weight, None, stride, padding, dilation, groups).shape[2:]
    taps = offset_groups * kernel[0] * kernel[1]
    offset = spread * torch.randn(2, taps * 2, *output_size, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, taps, *output_size, generator=generator, dtype=torch.float64)
    return input, offset, mask, weight, torch.randn(6, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_deform_conv_matches_a_loop_with_gradients(ops: ModuleType, geometry: tuple) -> None:
    input, offset, _, weight, _ = deform_conv_inputs(geometry)
    leaves = [tensor.requires_grad_() for tensor in (input, offset, weight)]
    expected = deform_conv_loop(input, offset, torch.ones_like(offset[:, ::2]), weight, geometry)
    output = ops.deform_conv2d(input, offset, weight, *geometry[:5])
    torch.testing.assert_close(output, expected)
    grad = torch.rand(output.shape, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(output, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('with_bias', [True, False])
@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_modulated_deform_conv_matches_a_loop_with_gradients(ops: ModuleType, geometry: tuple, with_bias: bool) -> None:
    input, offset, mask, weight, bias = deform_conv_inputs(geometry)
    leaves = [tensor.requires_grad_() for tensor in (input, offset, mask, weight)]
    expected = deform_conv_loop(input, offset, mask, weight, geometry)
    if with_bias:
        leaves.append(bias.requires_grad_())
        expected = expected + bias[:, None, None]
    output = ops.modulated_deform_conv2d(input, offset, mask, weight, bias if with_bias else None, *geometry[:5])
    torch.testing.assert_close(output, expected)
    grad = torch.rand(output.shape, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(output, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_larger_offsets_are_read_as_mmcv_reads_them(
    ops: ModuleType, geometry: tuple, memory_format: torch.memory_format
) -> None:
    """DyHead: the memory of each image, as if it had the size of the output; the rest has no gradient."""
    input, offset, mask, weight, _ = deform_conv_inputs(geometry)
    leaves = [input.requires_grad_(), weight.requires_grad_()]
    for tensor in (offset, mask):
        unread = torch.randn(2, tensor.shape[1] * 2 * 11, dtype=torch.float64)
        flat = torch.cat([tensor.flatten(1), unread], 1)
        width = tensor.shape[3] + 2
        height = flat.shape[1] // (tensor.shape[1] * width)
        larger = flat[:, : tensor.shape[1] * height * width].unflatten(1, (-1, height, width))
        leaves.append(larger.contiguous(memory_format=memory_format).requires_grad_())
    output = ops.modulated_deform_conv2d(leaves[0], leaves[2], leaves[3], leaves[1], None, *geometry[:5])
    expected = deform_conv_loop(input, offset.requires_grad_(), mask.requires_grad_(), weight, geometry)
    torch.testing.assert_close(output, expected)
    grad = torch.rand(output.shape, dtype=torch.float64)
    theirs = torch.autograd.grad(expected, [input, weight, offset, mask], grad)
    for ours, their in zip(torch.autograd.grad(output, leaves, grad), theirs, strict=True):
        read, unread = ours.flatten(1).split([n := their[0].numel(), ours[0].numel() - n], 1)
        torch.testing.assert_close(read.view_as(their), their)
        assert not unread.any()


def test_smaller_offsets_are_refused(ops: ModuleType) -> None:
    input, offset, mask, weight, _ = deform_conv_inputs(GEOMETRIES[0])
    for tensors in ((input, offset[..., 1:], mask, weight), (input, offset, mask[:, :, 1:], weight)):
        with pytest.raises(ValueError, match=r'^(offset|mask) has \(\d, \d\) positions, expected .* output, \(5, 4\)'):
            ops.modulated_deform_conv2d(*tensors, None, *GEOMETRIES[0][:5])


@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_without_offsets_it_is_torchs_convolution(ops: ModuleType, geometry: tuple) -> None:
    input, offset, _, weight, _ = deform_conv_inputs(geometry, spread=0)
    stride, padding, dilation, groups, _, _ = geometry
    expected = F.conv2d(input, weight, None, stride, padding, dilation, groups)
    torch.testing.assert_close(ops.deform_conv2d(input, offset, weight, *geometry[:5]), expected)


def test_the_weight_gradient_accumulates_times_scale() -> None:
    geometry = GEOMETRIES[0]
    input, offset, _, weight, _ = deform_conv_inputs(geometry)
    grad_output = torch.rand(2, 6, 5, 4, dtype=torch.float64)
    sizes = dict(kW=3, kH=3, dW=1, dH=1, padW=1, padH=1, dilationW=1, dilationH=1, group=1, deformable_group=1)
    buffers = (torch.empty(0), torch.empty(0))
    once, more = torch.zeros_like(weight), torch.ones_like(weight)
    deform_conv_backward_parameters(input, offset, grad_output, once, *buffers, **sizes, scale=1, im2col_step=2)
    deform_conv_backward_parameters(input, offset, grad_output, more, *buffers, **sizes, scale=0.5, im2col_step=2)
    torch.testing.assert_close(more, 1 + 0.5 * once)


def test_one_backward_gives_both_gradients(ops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """mmcv asks for those of v1 in two calls."""
    calls = []

    def counted(*args: object) -> tuple[Tensor, ...]:
        calls.append(args)
        return backward(*args)

    backward = deform_conv._backward
    monkeypatch.setattr(deform_conv, '_backward', counted)
    input, offset, _, weight, _ = deform_conv_inputs(GEOMETRIES[0])
    tensors = [tensor.requires_grad_() for tensor in (input, offset, weight)]
    ops.deform_conv2d(*tensors, 1, 1).sum().backward()
    assert len(calls) == 1 and not len(deform_conv._weight_grads)

    arguments = (3, 3, 1, 1, 1, 1, 1, 1, 1, 1)
    with torch.no_grad():
        grad = torch.ones(2, 6, *offset.shape[2:], dtype=torch.float64)
        outs = torch.empty_like(input), torch.empty_like(offset)
        deform_conv.deform_conv_backward_input(input, offset, grad, *outs, weight, input, *arguments, 1)
        input.mul_(2)  # what was kept is of other values now
        grad_weight = torch.zeros_like(weight)
        deform_conv_backward_parameters(input, offset, grad, grad_weight, input, input, *arguments, 1.0, 1)
    assert relative_error(grad_weight, 2 * weight.grad) < 1e-12 and len(calls) == 3


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_narrow_dtypes_follow_fp32(ops: ModuleType, dtype: torch.dtype, tolerance: float) -> None:
    narrow = [tensor.to(dtype).requires_grad_() for tensor in deform_conv_inputs(GEOMETRIES[1])]
    wide = [tensor.detach().float().requires_grad_() for tensor in narrow]
    output = ops.modulated_deform_conv2d(*narrow, *GEOMETRIES[1][:5])
    expected = ops.modulated_deform_conv2d(*wide, *GEOMETRIES[1][:5])
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, atol=tolerance, rtol=tolerance)
    output.float().square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(narrow, wide, strict=True):  # the incoming gradient itself is rounded to dtype
        torch.testing.assert_close(ours.grad.float(), theirs.grad, atol=20 * tolerance, rtol=4 * tolerance)


def attention_inputs(queries: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two images, three levels (one of them 1 pixel), two heads of 3, two points; some locations lie outside."""
    generator = torch.Generator().manual_seed(queries)
    shapes = torch.tensor([[4, 5], [1, 1], [3, 2]])
    starts = torch.tensor([0, 20, 21])
    value = torch.randn(2, 27, 2, 3, generator=generator, dtype=torch.float64)
    locations = torch.rand(2, queries, 2, 3, 2, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    weights = torch.rand(2, queries, 2, 3, 2, generator=generator, dtype=torch.float64)
    return value.to(dtype), shapes, starts, locations.to(dtype), weights.to(dtype)


def attention_loop(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """One query, head and point at a time."""
    batch, queries, heads, levels, points, _ = locations.shape
    rows = []
    for b in range(batch):
        for q in range(queries):
            for k in range(heads):
                for d in range(value.shape[3]):
                    total = value.new_zeros(())
                    for level in range(levels):
                        height, width = shapes[level].tolist()
                        start = int(starts[level])
                        plane = value[b, start : start + height * width, k, d].view(height, width)
                        for p in range(points):
                            x, y = locations[b, q, k, level, p]
                            value_at_point = sample(plane, y * height - 0.5, x * width - 0.5)
                            total = total + weights[b, q, k, level, p] * value_at_point
                    rows.append(total)
    return torch.stack(rows).view(batch, queries, -1)


def test_ms_deform_attn_matches_a_loop_with_gradients() -> None:
    value, shapes, starts, locations, weights = attention_inputs(queries=3)
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    expected = attention_loop(value, shapes, starts, locations, weights)
    grad = torch.rand(expected.shape, dtype=torch.float64)
    grads = [torch.zeros_like(leaf) for leaf in leaves]
    with torch.no_grad():
        output = ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step=64)
        ms_deform_attn_backward(value, shapes, starts, locations, weights, grad, *grads, im2col_step=64)
    torch.testing.assert_close(output, expected.detach())
    for ours, theirs in zip(grads, torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_ms_deform_attn_is_mmcvs_own_reference(ops: ModuleType) -> None:
    value, shapes, starts, locations, weights = attention_inputs(queries=5)
    module = ops.multi_scale_deform_attn
    expected = module.multi_scale_deformable_attn_pytorch(value, shapes.tolist(), locations, weights)
    function = module.MultiScaleDeformableAttnFunction
    torch.testing.assert_close(function.apply(value, shapes, starts, locations, weights, 64), expected)
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    assert torch.autograd.gradcheck(lambda v, x, w: function.apply(v, shapes, starts, x, w, 64), leaves)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_ms_deform_attn_of_narrow_dtypes_follows_fp32(dtype: torch.dtype, tolerance: float) -> None:
    value, shapes, starts, locations, weights = attention_inputs(queries=4, dtype=dtype)
    output = ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step=64)
    expected = ms_deform_attn_forward(value.float(), shapes, starts, locations.float(), weights.float(), im2col_step=64)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, atol=tolerance, rtol=tolerance)
