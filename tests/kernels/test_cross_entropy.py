"""The kernels of the cross-entropy of resized logits against PyTorch in float64; see also tests/models."""

import pytest
import torch
from torch.nn import functional as F

from beit_plugin.kernels import cross_entropy_ops as ops
from beit_plugin.segmentation import upsampled_cross_entropy as upsampled_loss
from beit_plugin.segmentation.upsampled_cross_entropy import upsampled_cross_entropy

CUDA = torch.cuda.is_available()
DEVICE = 'cuda' if CUDA else 'cpu'
HALF = torch.bfloat16 if CUDA else torch.float16
SMALL = [(5, (3, 4), (7, 13)), (2, (1, 1), (5, 7)), (3, (4, 5), (2, 3)), (3, (1, 3), (1, 3)), (2, (2, 3), (1, 1))]
LARGE = [
    (150, (160, 160), (640, 640)),
    (150, (40, 40), (640, 640)),
    (19, (128, 256), (512, 1024)),
    (70, (37, 53), (590, 847)),
]


@pytest.fixture
def kernels(monkeypatch):
    """The kernels run, on the CPU in Triton's interpreter."""
    calls, forward = [], ops.forward
    monkeypatch.setattr(upsampled_loss, 'triton_by_default', lambda device: True)
    monkeypatch.setattr(ops, 'forward', lambda *args: calls.append(1) or forward(*args))
    return calls


def inputs(classes, small, large, dtype=torch.float32, memory_format=torch.contiguous_format):
    logits = (3 * torch.randn(2, classes, *small)).to(DEVICE, dtype, memory_format=memory_format)
    labels = torch.randint(classes, (2, *large), device=DEVICE)
    labels[torch.rand(labels.shape, device=DEVICE) < 0.2] = 255
    labels[0, 0, 0] = 0
    return logits.requires_grad_(), labels


def reference(logits, labels, class_weight, align_corners):
    """One image at a time."""
    total, right, grads = 0.0, 0, []
    for image, label in zip(logits.detach().double(), labels, strict=True):
        image = image[None].requires_grad_()
        enlarged = F.interpolate(image, labels.shape[1:], mode='bilinear', align_corners=align_corners)
        loss = F.cross_entropy(enlarged, label[None], class_weight, ignore_index=255, reduction='sum')
        grads.append(torch.autograd.grad(0.3 * loss, image)[0])
        total, right = total + loss.detach(), right + (enlarged.argmax(1)[0] == label).sum()
    return total, right, torch.cat(grads)


def check(case, dtype, memory_format, align_corners, weighted, tolerance):
    logits, labels = inputs(*case, dtype, memory_format)
    weight = torch.rand(case[0], device=DEVICE) if weighted else None
    total, right = upsampled_cross_entropy(logits, labels, weight, align_corners=align_corners)
    (grad,) = torch.autograd.grad(0.3 * total, logits)
    expected, expected_right, expected_grad = reference(
        logits, labels, None if weight is None else weight.double(), align_corners
    )
    # a loss is the difference of numbers of the size of the logits
    assert abs(total.double() - expected) <= 2e-6 * (expected + 3 * labels.numel())
    assert abs(right - expected_right) <= 2e-6 * labels.numel()  # two logits may be alike in float32
    assert grad.dtype == dtype and grad.stride() == logits.stride()
    # and so is the exponent of a probability: near 1, what is left to the label is as exact as the logits
    error = (grad.double() - expected_grad).abs().max()
    assert error <= tolerance * expected_grad.abs().max() + 0.3 * 1e-6


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('case', SMALL)
def test_values_and_gradients(case, align_corners, weighted, kernels):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        check(case, torch.float32, memory_format, align_corners, weighted, 1e-5)
    assert len(kernels) == 2


def test_half_precision_and_several_blocks(kernels):
    check((70, (2, 18), (5, 20)), HALF, torch.channels_last, False, True, 1e-2)
    assert kernels


@pytest.mark.skipif(not CUDA, reason='needs a GPU')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('case', LARGE)
def test_large(case, dtype, kernels):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        check(case, dtype, memory_format, False, True, 1e-5 if dtype == torch.float32 else 1e-2)


def test_the_same_bits_twice(kernels):
    logits, labels = inputs(7, (3, 4), (7, 13))
    results = []
    for _ in range(2):
        total, _ = upsampled_cross_entropy(logits, labels)
        results.append((total, *torch.autograd.grad(total, logits)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_every_element_is_written(kernels, monkeypatch):
    """New memory is filled with NaN first."""
    logits, labels = inputs(5, (3, 4), (7, 13))
    expected = torch.autograd.grad(upsampled_cross_entropy(logits, labels)[0], logits)[0]
    make, make_strided = torch.empty, torch.empty_strided

    def poisoned(made):
        return lambda *args, **options: made(*args, **options).fill_(
            77 if options.get('dtype') == torch.int32 else torch.nan
        )

    monkeypatch.setattr(torch, 'empty', poisoned(make))
    monkeypatch.setattr(torch, 'empty_strided', poisoned(make_strided))
    got = torch.autograd.grad(upsampled_cross_entropy(logits, labels)[0], logits)[0]
    assert torch.equal(got, expected)


@pytest.mark.parametrize('wrong', [-1, 5, 200])
def test_labels_that_are_no_class(wrong, kernels):
    """Nothing is read out of bounds, and the loss is no number; where the label is to be ignored it is."""
    logits, labels = inputs(5, (3, 4), (7, 13))
    weight = torch.rand(5, device=DEVICE)
    expected = upsampled_cross_entropy(logits, labels.masked_fill(labels == 0, 255), weight)[0]
    labels[labels == 0] = wrong
    total, _ = upsampled_cross_entropy(logits, labels, weight)
    assert total.isnan() and torch.autograd.grad(total, logits)[0].isfinite().all()
    labels[labels == 255] = wrong
    assert torch.equal(upsampled_cross_entropy(logits, labels, weight, ignore_index=wrong)[0], expected)
