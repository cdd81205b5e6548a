"""Focal losses: published values, a plain reference under autograd, numeric gradients, and extreme logits."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip('mmcv', reason='needs the extra beit-plugin[mmseg]')

from beit_plugin.mm.mmcv_ops import install
from beit_plugin.mm.mmcv_ops.focal_loss import (
    sigmoid_focal_loss_backward,
    sigmoid_focal_loss_forward,
    softmax_focal_loss_backward,
    softmax_focal_loss_forward,
)

# inputs, labels, then (loss, gradient) of both losses: mmcv 2.1.0 tests/test_ops/test_focal_loss.py
PUBLISHED = [
    (
        [[1.0, 0], [0, 1]],
        [0, 1],
        (0.00566451, [[-0.00657264, 0.00657264], [0.00657264, -0.00657264]]),
        (0.13562961, [[-0.00657264, 0.11185755], [0.11185755, -0.00657264]]),
    ),
    (
        [[1.0, 0, -1], [0, 1, 2]],
        [2, 1],
        (0.34956908, [[0.10165970, 0.03739851, -0.13905823], [0.01227554, -0.10298023, 0.09070466]]),
        (1.10251057, [[0.28808805, 0.11185755, -0.09602935], [0.11185755, -0.00657264, 0.40376765]]),
    ),
    (
        [[1e-6, 2e-6, 3e-6], [4e-6, 5e-5, 6e-4], [7e-3, 8e-2, 9e-1]],
        [1, 2, 0],
        (
            0.15754992,
            [
                [0.02590877, -0.05181759, 0.02590882],
                [0.02589641, 0.02589760, -0.05179400],
                [-0.07307514, 0.02234372, 0.05073142],
            ],
        ),
        (
            0.42287254,
            [
                [0.07457182, -0.02485716, 0.07457201],
                [0.07457211, 0.07457669, -0.02483728],
                [-0.02462499, 0.08277918, 0.18050370],
            ],
        ),
    ),
]
GAMMAS = [0.0, 0.5, 2.0]


@pytest.fixture(scope='module')
def ops() -> ModuleType:
    install()
    return pytest.importorskip('mmcv.ops')


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name, column', [('softmax_focal_loss', 2), ('sigmoid_focal_loss', 3)])
def test_published_values_through_mmcv(ops: ModuleType, name: str, column: int, dtype: torch.dtype) -> None:
    # 1e-2 is the tolerance of the published test for fp32 and fp16; bf16 keeps 8 bits
    tolerance = dict(rtol=1e-4, atol=1e-6) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    for case in PUBLISHED:
        logits = torch.tensor(case[0], dtype=dtype, requires_grad=True)
        loss = getattr(ops, name)(logits, torch.tensor(case[1]), 2.0, 0.25, None, 'mean')
        loss.backward()
        expected_loss, expected_grad = case[column]
        torch.testing.assert_close(loss.float(), torch.tensor(expected_loss), **tolerance)
        torch.testing.assert_close(logits.grad.float(), torch.tensor(expected_grad), **tolerance)


def random_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Logits (7, 5), labels (7), class weights (5)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (7,), generator=generator)
    return logits, labels, torch.rand(5, generator=generator, dtype=torch.float64) + 0.5


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('gamma', GAMMAS)
def test_sigmoid_matches_autograd_of_the_definition(gamma: float, weighted: bool) -> None:
    logits, labels, weight = random_rows()
    labels[0] = 5  # background
    logits.requires_grad_()
    one_hot = torch.nn.functional.one_hot(labels, 6)[:, :5].double()
    p = logits.sigmoid()
    p_true = p * one_hot + (1 - p) * (1 - one_hot)
    expected = -(0.3 * one_hot + 0.7 * (1 - one_hot)) * (1 - p_true) ** gamma * p_true.log()
    if weighted:
        expected = expected * torch.cat([weight, weight.new_ones(1)])[labels][:, None]
    (expected_grad,) = torch.autograd.grad(expected.sum(), logits)

    output, grad = torch.full_like(logits, -1), torch.full_like(logits, -1)
    given = weight if weighted else weight.new_empty(0)
    with torch.no_grad():
        sigmoid_focal_loss_forward(logits, labels, given, output, gamma=gamma, alpha=0.3)
        sigmoid_focal_loss_backward(logits, labels, given, grad, gamma=gamma, alpha=0.3)
    torch.testing.assert_close(output, expected.detach())
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('gamma', GAMMAS)
def test_softmax_matches_autograd_of_the_definition(gamma: float, weighted: bool) -> None:
    logits, labels, weight = random_rows()
    labels[2] = -1  # ignored
    valid = labels >= 0
    logits.requires_grad_()
    p = logits.softmax(1)[torch.arange(7), labels.clamp(min=0)]
    expected = -0.3 * (1 - p) ** gamma * p.log() * valid
    if weighted:
        expected = expected * weight[labels.clamp(min=0)]
    (expected_grad,) = torch.autograd.grad(expected.sum(), logits)

    softmax = logits.detach().softmax(1)
    output, buff, grad = softmax.new_full((7,), -1), softmax.new_full((7,), -1), torch.full_like(softmax, -1)
    given = weight if weighted else weight.new_empty(0)
    softmax_focal_loss_forward(softmax, labels, given, output, gamma=gamma, alpha=0.3)
    softmax_focal_loss_backward(softmax, labels, given, buff, grad, gamma=gamma, alpha=0.3)
    torch.testing.assert_close(output, expected.detach())
    torch.testing.assert_close(grad, expected_grad)
    rows = torch.arange(7)
    torch.testing.assert_close((buff * (1 - softmax[rows, labels]))[valid], grad[rows, labels][valid])


@pytest.mark.parametrize('gamma', GAMMAS)
def test_certain_predictions_have_finite_losses_and_gradients(gamma: float) -> None:
    logits = torch.tensor([[1000.0, -1000.0], [-1000.0, 1000.0]])
    labels, no_weight = torch.tensor([0, 0]), torch.empty(0)
    output, grad = torch.empty(2, 2), torch.empty(2, 2)
    sigmoid_focal_loss_forward(logits, labels, no_weight, output, gamma=gamma, alpha=0.25)
    sigmoid_focal_loss_backward(logits, labels, no_weight, grad, gamma=gamma, alpha=0.25)
    torch.testing.assert_close(output, torch.tensor([[0.0, 0], [250, 750]]))
    torch.testing.assert_close(grad, torch.tensor([[0.0, 0], [-0.25, 0.75]]))
    softmax, row = logits.softmax(1), torch.empty(2)
    softmax_focal_loss_backward(softmax, labels, no_weight, row, grad, gamma=gamma, alpha=0.25)
    assert bool(grad.isfinite().all())
    assert grad[0].tolist() == [0.0, 0.0]


def test_no_rows(ops: ModuleType) -> None:
    logits = torch.zeros(0, 3, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.long)
    (ops.sigmoid_focal_loss(logits, labels, 2.0, 0.25, None, 'sum') * 2).backward()
    assert logits.grad.shape == (0, 3)
