"""CARAFE: against a loop over pixels, nearest upsampling, and numeric gradients through mmcv."""

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip('mmcv', reason='needs the extra beit-plugin[mmseg]')

from beit_plugin.mm.mmcv_ops import install
from beit_plugin.mm.mmcv_ops.carafe import carafe_naive_backward, carafe_naive_forward

# kernel, groups, scale
CASES = [(3, 1, 2), (5, 2, 1), (1, 4, 3)]


@pytest.fixture(scope='module')
def ops() -> ModuleType:
    install()
    return pytest.importorskip('mmcv.ops')


def inputs(kernel: int, groups: int, scale: int) -> tuple[Tensor, Tensor]:
    """Features (2, 4, 3, 5) and masks (2, k·k·G, s·3, s·5)."""
    generator = torch.Generator().manual_seed(kernel)
    features = torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)
    shape = (2, kernel * kernel * groups, 3 * scale, 5 * scale)
    return features, torch.rand(*shape, generator=generator, dtype=torch.float64)


def carafe_loop(features: Tensor, masks: Tensor, kernel: int, groups: int, scale: int) -> Tensor:
    """One output pixel and window offset at a time; differentiable."""
    batch, channels, height, width = features.shape
    output = features.new_zeros(batch, channels, height * scale, width * scale)
    per_group = channels // groups
    for i in range(height * scale):
        for j in range(width * scale):
            for tap in range(kernel * kernel):
                y = i // scale + tap // kernel - kernel // 2
                x = j // scale + tap % kernel - kernel // 2
                if 0 <= y < height and 0 <= x < width:
                    mask = masks[:, tap :: kernel * kernel, i, j].repeat_interleave(per_group, 1)  # B, C
                    output[:, :, i, j] = output[:, :, i, j] + features[:, :, y, x] * mask
    return output


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_carafe_matches_a_loop_with_gradients(
    ops: ModuleType, case: tuple[int, int, int], memory_format: torch.memory_format
) -> None:
    leaves = [tensor.to(memory_format=memory_format).requires_grad_() for tensor in inputs(*case)]
    expected = carafe_loop(*leaves, *case)
    output = ops.carafe(*leaves, *case)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(ops.carafe_naive(*leaves, *case), expected)
    grad = torch.rand(output.shape, dtype=torch.float64)
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    naive_grads = [torch.zeros_like(leaf) for leaf in leaves]
    kernel, groups, scale = case
    with torch.no_grad():  # mmcv's own backward of carafe_naive insists on CUDA
        carafe_naive_backward(grad, *leaves, *naive_grads, kernel_size=kernel, group_size=groups, scale_factor=scale)
    for grads in (torch.autograd.grad(output, leaves, grad), naive_grads):
        for ours, theirs in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_mask_on_the_centre_only_is_nearest_upsampling(ops: ModuleType) -> None:
    features, masks = inputs(3, 1, 2)
    masks = torch.zeros_like(masks)
    masks[:, 4] = 1
    assert torch.equal(ops.carafe(features, masks, 3, 1, 2), F.interpolate(features, scale_factor=2))


def test_gradients_are_numeric_ones(ops: ModuleType) -> None:
    features, masks = (tensor[:1].requires_grad_() for tensor in inputs(3, 2, 2))
    assert torch.autograd.gradcheck(lambda x, m: ops.carafe(x, m, 3, 2, 2), (features, masks))


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_narrow_dtypes_accumulate_in_fp32(ops: ModuleType, dtype: torch.dtype, tolerance: float) -> None:
    narrow = [tensor.to(dtype).requires_grad_() for tensor in inputs(5, 2, 1)]
    wide = [tensor.detach().float().requires_grad_() for tensor in narrow]
    with torch.autocast('cpu', torch.bfloat16):  # trainers run the ops inside autocast regions
        output = ops.carafe(*narrow, 5, 2, 1)
    expected = ops.carafe(*wide, 5, 2, 1)
    assert torch.equal(output, expected.to(dtype))
    output.sum().backward()
    expected.sum().backward()
    for ours, theirs in zip(narrow, wide, strict=True):
        torch.testing.assert_close(ours.grad.float(), theirs.grad, atol=tolerance, rtol=tolerance)


def test_an_empty_batch() -> None:
    features, masks = (tensor[:0] for tensor in inputs(3, 1, 2))
    output = features.new_zeros(0, 4, 6, 10)
    carafe_naive_forward(features, masks, output, kernel_size=3, group_size=1, scale_factor=2)
    assert output.shape == (0, 4, 6, 10)
