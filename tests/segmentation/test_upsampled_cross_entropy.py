"""Cross-entropy band by band against PyTorch's on the enlarged logits."""

import pytest
import torch
from helpers import relative_error
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from beit_plugin.segmentation import upsampled_cross_entropy as upsampled_loss
from beit_plugin.segmentation.upsampled_cross_entropy import upsampled_cross_entropy

SIZES = [
    ((7, 9), (28, 36)),
    ((16, 24), (61, 95)),
    ((1, 1), (5, 7)),
    ((9, 8), (4, 3)),
    ((6, 6), (6, 6)),
    ((1, 5), (1, 9)),
]


def inputs(small, large, classes=5, dtype=torch.float64):
    logits = (3 * torch.randn(2, classes, *small, dtype=dtype)).requires_grad_()
    labels = torch.randint(classes, (2, *large))
    labels[torch.rand(labels.shape) < 0.3] = 255
    return logits, labels


def reference(logits, labels, class_weight=None, ignore_index=255, align_corners=False):
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = F.interpolate(logits, labels.shape[1:], mode='bilinear', align_corners=align_corners)
    ignored = -100 if ignore_index is None else ignore_index
    total = F.cross_entropy(logits, labels, class_weight, ignore_index=ignored, reduction='sum')
    return total, ((logits.argmax(1) == labels) & (labels != ignored)).sum()


@pytest.fixture(params=[1, 200, 2**23])
def band(request, monkeypatch):
    """A row at a time; some rows; all."""
    monkeypatch.setattr(upsampled_loss, 'BAND', request.param)


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize(('small', 'large'), SIZES)
def test_values_and_gradients(small, large, align_corners, weighted, band):
    logits, labels = inputs(small, large)
    class_weight = torch.rand(5).double() if weighted else None
    got, right = upsampled_cross_entropy(logits, labels, class_weight, align_corners=align_corners)
    expected, expected_right = reference(logits, labels, class_weight, align_corners=align_corners)
    assert relative_error(got, expected) <= 1e-13 and right == expected_right
    grads = [torch.autograd.grad(0.3 * total, logits)[0] for total in (got, expected)]
    assert relative_error(*grads) <= 1e-12


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_logits_are_widened(dtype):
    logits, labels = inputs((8, 12), (32, 48), 150, dtype)
    got, right = upsampled_cross_entropy(logits, labels)
    expected, expected_right = reference(logits, labels)
    assert got.dtype == torch.float32 and relative_error(got, expected) <= 1e-6 and right == expected_right
    grads = [torch.autograd.grad(total, logits)[0] for total in (got, expected)]
    assert grads[0].dtype == dtype
    assert relative_error(*(grad.float() for grad in grads)) <= {torch.float32: 1e-5}.get(dtype, 1e-2)


def test_sizes_at_random():
    """Whichever rows a band needs, it has them."""
    for _ in range(60):
        small, large = torch.randint(1, 40, (2,)).tolist(), torch.randint(1, 90, (2,)).tolist()
        logits, labels = inputs(small, large, 2)
        for align_corners in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(upsampled_loss, 'BAND', 2 * large[1] * 3)
                got = upsampled_cross_entropy(logits, labels, align_corners=align_corners)[0]
            expected = reference(logits, labels, align_corners=align_corners)[0]
            assert relative_error(got, expected) <= 1e-12, (small, large, align_corners)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int32, torch.int64])
def test_types_of_labels(dtype):
    logits, labels = inputs((7, 9), (28, 36))
    got, right = upsampled_cross_entropy(logits, labels.to(dtype))
    assert torch.equal(got, upsampled_cross_entropy(logits, labels)[0]) and right > 0


def test_all_pixels_count():
    logits, labels = inputs((7, 9), (28, 36))
    labels[labels == 255] = 0
    got, right = upsampled_cross_entropy(logits, labels, ignore_index=None)
    expected, expected_right = reference(logits, labels, ignore_index=None)
    assert relative_error(got, expected) <= 1e-13 and right == expected_right


def test_everything_ignored():
    logits, labels = inputs((7, 9), (28, 36))
    got, right = upsampled_cross_entropy(logits, torch.full_like(labels, 255))
    got.backward()
    assert got == 0 and right == 0 and not logits.grad.any()


def test_scores_far_apart_stay_finite():
    logits, labels = inputs((7, 9), (28, 36))
    with torch.no_grad():
        logits *= 1e4
    got = upsampled_cross_entropy(logits, labels)[0]
    got.backward()
    assert relative_error(got, reference(logits, labels)[0]) <= 1e-12 and logits.grad.isfinite().all()


class Largest(TorchDispatchMode):
    """The largest memory of any result, views aside."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def test_enlarged_logits_never_exist(monkeypatch):
    logits, labels = inputs((16, 16), (64, 64), 50, torch.float32)
    monkeypatch.setattr(upsampled_loss, 'BAND', 50 * 64 * 4)
    # inside of the operators, where a mode does not look by itself
    for name in ('_forward', '_backward'):
        operator = getattr(upsampled_loss, name)
        monkeypatch.setattr(upsampled_loss, name, operator._init_fn)
    with torch.no_grad(), Largest() as largest:
        *_, lse = upsampled_loss._forward(logits, labels, None, 255, False)
        upsampled_loss._backward(torch.ones(()), logits, labels, None, lse, 255, False)
    assert largest.bytes == 4 * logits.numel() < 4 * 2 * 50 * 64 * 64 / 8


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    logits, labels = inputs((7, 9), (28, 36))

    def loss(logits):
        total, right = upsampled_cross_entropy(logits, labels)
        return total / (labels != 255).sum() + 0 * right

    results = []
    for call in (torch.compile(loss, fullgraph=True, backend='aot_eager'), loss):
        value = call(logits)
        results.append((value, *torch.autograd.grad(value, logits)))
    assert all(relative_error(*pair) <= 1e-12 for pair in zip(*results, strict=True))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_registration(dtype):
    logits, labels = inputs((5, 6), (11, 13), 3, dtype)
    weights = torch.rand(3, dtype=dtype)
    for arguments in ((logits, labels, None, 255, False), (logits, labels, weights, 255, True)):
        torch.library.opcheck(upsampled_loss._forward, arguments)


@pytest.mark.parametrize(
    ('logits', 'labels'),
    [((2, 1, 3, 4), (2, 6, 8)), ((2, 3, 3, 4), (1, 6, 8)), ((2, 3, 3, 4), (2, 1, 6, 8)), ((2, 3, 3, 4), None)],
    ids=str,
)
def test_refuses(logits, labels):
    given = torch.zeros(2, 6, 8) if labels is None else torch.zeros(labels, dtype=torch.long)
    with pytest.raises(ValueError, match=r'expected \(B, K, h, w\) with K >= 2 and integers \(B, H, W\)'):
        upsampled_cross_entropy(torch.randn(logits), given)
