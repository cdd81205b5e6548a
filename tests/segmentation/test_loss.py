import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from beit_plugin.models.deferred_check import LabelCheck
from beit_plugin.segmentation.loss import SegmentationLoss


def batch(classes=5, size=(12, 20), ignored=0.3):
    labels = torch.randint(classes, (2, *size))
    labels[torch.rand(labels.shape) < ignored] = 255
    return torch.randn(2, classes, 3, 5, requires_grad=True), labels


def test_averages_over_the_pixels_that_count():
    logits, labels = batch()
    full = F.interpolate(logits, labels.shape[-2:], mode='bilinear')
    torch.testing.assert_close(SegmentationLoss()(logits, labels), F.cross_entropy(full, labels, ignore_index=255))


def test_auxiliary_loss_is_weighted():
    logits, labels = batch()
    loss = SegmentationLoss(aux_weight=0.25)
    both = loss(logits, labels, logits.flip(1))
    torch.testing.assert_close(both, loss(logits, labels) + 0.25 * loss(logits.flip(1), labels))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_everything_ignored_gives_zero_with_a_graph(dtype):
    logits, labels = batch(ignored=2.0)
    loss = SegmentationLoss()(logits.to(dtype), labels, logits.to(dtype))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


def test_half_precision_logits_are_widened():
    logits, labels = batch()
    loss = SegmentationLoss()(logits.half(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, SegmentationLoss()(logits, labels), rtol=1e-3, atol=0)


def test_gradient_in_double_precision():
    logits, labels = batch(3, (4, 6))
    assert torch.autograd.gradcheck(lambda x: SegmentationLoss()(x, labels), logits.double())


def test_narrow_integer_labels():
    logits, labels = batch()
    assert torch.equal(SegmentationLoss()(logits, labels.to(torch.uint8)), SegmentationLoss()(logits, labels))


def test_another_ignore_index_may_be_a_class():
    logits, labels = batch(ignored=0)
    full = F.interpolate(logits, labels.shape[-2:], mode='bilinear')
    expected = F.cross_entropy(full, labels, ignore_index=0)
    torch.testing.assert_close(SegmentationLoss(ignore_index=0)(logits, labels), expected)


@pytest.mark.parametrize('value', [5, 254, -1])
def test_names_image_and_values_of_wrong_labels(value):
    logits, labels = batch()
    labels[1, 3, 4] = value
    sentence = rf'image 1 of the batch has the labels {value}, but there are only the 5 classes 0 to 4; give pixels'
    with pytest.raises(ValueError, match=sentence):
        SegmentationLoss()(logits, labels)


def test_a_long_list_of_values_is_cut():
    with pytest.raises(ValueError, match=r'image a.png has the labels 5, 6, 7, 8, 9, 10, 11, 12, …, .*; look there'):
        LabelCheck('look there')(torch.arange(20).view(1, 4, 5), 5, None, ['a.png'])


def test_refuses_one_class():
    with pytest.raises(ValueError, match='logits of one class, whose cross-entropy is always 0'):
        SegmentationLoss()(torch.randn(1, 1, 2, 2), torch.zeros(1, 4, 4, dtype=torch.long))


@pytest.mark.parametrize('labels', [torch.zeros(2, 1, 4, 4).long(), torch.zeros(3, 4, 4).long(), torch.zeros(2, 4, 4)])
def test_refuses_labels_of_another_shape_or_type(labels):
    with pytest.raises(ValueError, match=r'got labels of shape .* and type .*, expected integers of shape \(2, height'):
        SegmentationLoss()(torch.randn(2, 5, 2, 2), labels)


def test_compiles_without_a_graph_break():
    logits, labels = batch()
    loss = SegmentationLoss()
    compiled = torch.compile(loss, fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(logits, labels, logits), loss(logits, labels, logits))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
class TestLabelCheckOnCuda:
    def test_ignores_wrong_labels_now_and_reports_them_next(self):
        guard = LabelCheck('look there')
        labels = torch.zeros(2, 1, 8, 8, dtype=torch.long, device='cuda')
        wrong = labels.clone()
        wrong[1, 0, 2, 3] = 200
        assert torch.equal(guard(labels, 5, 255), labels)
        cleaned = guard(wrong, 5, 255, ['a.png', 'b.png'])
        assert cleaned[1, 0, 2, 3] == 255 and (cleaned != 0).sum() == 1
        with pytest.raises(ValueError, match=r'image b.png has the labels 200, but'):
            guard(labels, 5, 255)
        assert torch.equal(guard(labels, 5, 255), labels)

    def test_without_an_ignore_index_wrong_labels_become_zero(self):
        wrong = torch.full((1, 2, 2), 9, device='cuda')
        assert not LabelCheck('')(wrong, 5, None).any()

    def test_a_waiting_answer_is_neither_copied_nor_pickled(self):
        loss = SegmentationLoss()
        labels = torch.zeros(2, 8, 8, dtype=torch.long, device='cuda')
        loss(torch.randn(2, 5, 4, 4, device='cuda'), labels)
        assert loss._guard._later._pending is not None
        for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert twin._guard._later._pending is None

    def test_does_not_wait_for_the_device(self):
        guard = LabelCheck('')
        labels = torch.zeros(2, 8, 8, dtype=torch.long, device='cuda')
        guard(labels, 5, 255)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode('error')
        try:
            guard(labels, 5, 255)
        finally:
            torch.cuda.set_sync_debug_mode('default')
