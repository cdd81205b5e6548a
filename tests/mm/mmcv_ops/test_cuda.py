"""Every implemented op on CUDA against itself on the CPU, through mmcv's own functions, outputs and gradients."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip('mmcv', reason='needs the extra beit-plugin[mmseg]')

from beit_plugin.mm.mmcv_ops import install

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')

# one rounding of values up to about 8, and of gradients that sum tens of them
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}
BOXES = torch.tensor([[0, 1.3, 2.1, 8.9, 12.4], [1, 0.2, 0.1, 13.7, 17.9], [1, -6.3, 8.2, 5.1, 25.3]])
SHAPES, STARTS = torch.tensor([[4, 5], [1, 1], [3, 2]]), torch.tensor([0, 20, 21])
LABELS = torch.tensor([0, 3, 1, 2, 0])

# name: shapes of the differentiable inputs, and the call of mmcv's function with them
Call = Callable[..., Tensor]
CASES: dict[str, tuple[list[tuple[int, ...]], Call]] = {
    'roi_align avg': ([(2, 3, 9, 7)], lambda ops, to, x: ops.roi_align(x, to(BOXES), (3, 2), 0.5, 0, 'avg', True)),
    'roi_align max': ([(2, 3, 9, 7)], lambda ops, to, x: ops.roi_align(x, to(BOXES), (3, 2), 0.5, 2, 'max', True)),
    'roi_pool': ([(2, 3, 9, 7)], lambda ops, to, x: ops.roi_pool(x, to(BOXES), (3, 2), 0.5)),
    'sigmoid focal': ([(5, 4)], lambda ops, to, x: ops.sigmoid_focal_loss(x, to(LABELS), 2.0, 0.25, None, 'none')),
    'softmax focal': ([(5, 4)], lambda ops, to, x: ops.softmax_focal_loss(x, to(LABELS), 2.0, 0.25, None, 'mean')),
    'deform conv': (
        [(2, 4, 6, 5), (2, 36, 6, 5), (6, 2, 3, 3)],
        lambda ops, to, x, offset, weight: ops.deform_conv2d(x, offset, weight, 1, 1, 1, 2, 2),
    ),
    'modulated deform conv': (
        [(2, 4, 6, 5), (2, 36, 6, 5), (2, 18, 6, 5), (6, 2, 3, 3), (6,)],
        lambda ops, to, x, offset, mask, weight, bias: ops.modulated_deform_conv2d(
            x, offset, mask, weight, bias, 1, 1, 1, 2, 2
        ),
    ),
    'carafe': ([(2, 4, 3, 5), (2, 18, 6, 10)], lambda ops, to, x, masks: ops.carafe(x, masks, 3, 2, 2)),
    'psa mask': ([(2, 35, 4, 3)], lambda ops, to, x: ops.PSAMask('distribute', (7, 5))(x)),
    'deformable attention': (
        [(2, 27, 2, 3), (2, 6, 2, 3, 2, 2), (2, 6, 2, 3, 2)],
        lambda ops, to, value, places, weights: ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction.apply(
            value, to(SHAPES), to(STARTS), places.sigmoid(), weights, 64
        ),
    ),
}


@pytest.fixture(scope='module')
def ops() -> ModuleType:
    install()
    return pytest.importorskip('mmcv.ops')


def outputs_and_grads(ops: ModuleType, case: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    shapes, call = CASES[case]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    leaves = [tensor.to(device).requires_grad_() for tensor in inputs]

    def to(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

    output = call(ops, to, *leaves)
    return [output.detach().cpu(), *(grad.cpu() for grad in torch.autograd.grad(output.float().square().sum(), leaves))]


@pytest.mark.parametrize('dtype', TOLERANCES)
@pytest.mark.parametrize('case', CASES)
def test_outputs_and_gradients_are_those_of_the_cpu(ops: ModuleType, case: str, dtype: torch.dtype) -> None:
    tolerance = TOLERANCES[dtype]
    on_cuda, on_cpu = (outputs_and_grads(ops, case, dtype, device) for device in ('cuda', 'cpu'))
    for ours, expected in zip(on_cuda, on_cpu, strict=True):
        assert ours.dtype == expected.dtype == dtype
        torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)


def test_naive_carafe_through_mmcv_whose_backward_insists_on_cuda(ops: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    features, masks = (torch.randn(shape, generator=generator).cuda() for shape in CASES['carafe'][0])
    leaves = (features.requires_grad_(), masks.requires_grad_())
    naive, fast = ops.carafe_naive(*leaves, 3, 2, 2), ops.carafe(*leaves, 3, 2, 2)
    assert torch.equal(naive, fast)
    for ours, expected in zip(
        torch.autograd.grad(naive.sum(), leaves), torch.autograd.grad(fast.sum(), leaves), strict=True
    ):
        assert torch.equal(ours, expected)


def test_boxes(ops: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    corners, scores = torch.rand(50, 2, generator=generator) * 20, torch.rand(50, generator=generator)
    boxes = torch.cat([corners, corners + 10], 1)
    for function in (
        lambda to: ops.nms(to(boxes), to(scores), 0.4)[1],
        lambda to: ops.soft_nms(to(boxes), to(scores), 0.4)[0],
        lambda to: ops.nms_match(torch.cat([to(boxes), to(scores)[:, None]], 1), 0.4)[0],
        lambda to: ops.bbox_overlaps(to(boxes), to(boxes[:7])),
    ):
        torch.testing.assert_close(function(Tensor.cuda).cpu(), function(Tensor.cpu))


def test_masked_convolution(ops: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 3, 6, 5), (1, 6, 5), (4, 3, 3, 3), (4,))  # features, mask, weight, bias
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    on_cuda = ops.masked_conv2d(*(tensor.cuda() for tensor in inputs), 1)
    torch.testing.assert_close(on_cuda.cpu(), ops.masked_conv2d(*inputs, 1), atol=1e-4, rtol=1e-4)
