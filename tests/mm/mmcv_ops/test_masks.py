"""Masked convolution and point-wise spatial attention masks: against loops and torch's convolution."""

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip('mmcv', reason='needs the extra beit-plugin[mmseg]')

from beit_plugin.mm.mmcv_ops import install
from beit_plugin.mm.mmcv_ops.masked_conv import masked_col2im_forward, masked_im2col_forward

DTYPES = [torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(scope='module')
def ops() -> ModuleType:
    install()
    return pytest.importorskip('mmcv.ops')


@pytest.mark.parametrize('kernel, padding', [((3, 3), (1, 1)), ((1, 5), (0, 2)), ((1, 1), (0, 0))])
def test_masked_conv_is_the_convolution_at_the_masked_positions(
    ops: ModuleType, kernel: tuple[int, int], padding: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 3, 6, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 3, *kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, generator=generator, dtype=torch.float64)
    mask = torch.rand(1, 6, 5, generator=generator) > 0.5
    expected = F.conv2d(features, weight, bias, padding=padding) * mask
    torch.testing.assert_close(ops.masked_conv2d(features, mask, weight, bias, padding), expected)


def test_masked_conv_without_a_masked_position_is_zero(ops: ModuleType) -> None:
    features, weight = torch.randn(1, 3, 6, 5), torch.randn(4, 3, 3, 3)
    assert not ops.masked_conv2d(features, torch.zeros(1, 6, 5), weight, torch.ones(4), 1).any()


@pytest.mark.parametrize('dtype', DTYPES)
def test_masked_columns_are_those_of_unfold(dtype: torch.dtype) -> None:
    features = torch.arange(2 * 4 * 3).view(1, 2, 4, 3).to(dtype)
    rows, columns = torch.tensor([0, 3, 1]), torch.tensor([2, 0, 1])
    data = features.new_empty(2 * 3 * 3, 3)
    masked_im2col_forward(features, rows, columns, data, kernel_h=3, kernel_w=3, pad_h=1, pad_w=1)
    assert torch.equal(data, F.unfold(features.double(), 3, padding=1)[0][:, rows * 3 + columns].to(dtype))


@pytest.mark.parametrize('dtype', DTYPES)
def test_masked_col2im_writes_the_masked_positions_only(dtype: torch.dtype) -> None:
    output = torch.full((1, 2, 4, 3), 7, dtype=dtype)
    rows, columns = torch.tensor([0, 3]), torch.tensor([2, 0])
    data = torch.tensor([[1, 2], [3, 4]], dtype=dtype)
    masked_col2im_forward(data, rows, columns, output, height=4, width=3, channels=2)
    expected = torch.full((1, 2, 4, 3), 7, dtype=dtype)
    expected[0, :, 0, 2], expected[0, :, 3, 0] = data[:, 0], data[:, 1]
    assert torch.equal(output, expected)


def psa_mask_loop(masks: Tensor, mask_size: tuple[int, int], collect: bool) -> Tensor:
    """One position and mask offset at a time; differentiable."""
    batch, _, height, width = masks.shape
    output = masks.new_zeros(batch, height * width, height, width)
    for h in range(height):
        for w in range(width):
            for i in range(mask_size[0]):
                for j in range(mask_size[1]):
                    y, x = h + i - (mask_size[0] - 1) // 2, w + j - (mask_size[1] - 1) // 2
                    if 0 <= y < height and 0 <= x < width:
                        value = masks[:, i * mask_size[1] + j, h, w]
                        if collect:
                            output[:, y * width + x, h, w] = value
                        else:
                            output[:, h * width + w, y, x] = value
    return output


@pytest.mark.parametrize('mask_size', [(7, 5), (3, 3), (1, 9), (4, 2)])
@pytest.mark.parametrize('psa_type', ['collect', 'distribute'])
@pytest.mark.parametrize('dtype', DTYPES)
def test_psa_mask_matches_a_loop_with_gradients(
    ops: ModuleType, psa_type: str, mask_size: tuple[int, int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(2, mask_size[0] * mask_size[1], 4, 3, generator=generator, dtype=torch.float64)
    masks = masks.to(dtype).requires_grad_()
    expected = psa_mask_loop(masks, mask_size, psa_type == 'collect')
    output = ops.PSAMask(psa_type, mask_size)(masks)
    assert torch.equal(output, expected)
    grad = torch.rand(output.shape, generator=generator, dtype=torch.float64).to(dtype)
    (ours,) = torch.autograd.grad(output, masks, grad)
    (theirs,) = torch.autograd.grad(expected, masks, grad)
    assert torch.equal(ours, theirs)
