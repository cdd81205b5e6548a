"""Neck, decode head, auxiliary head and their losses against mmsegmentation's."""

import importlib.util

import pytest
import torch
from heads_common import GRIDS, assert_parity, assert_same_gradients, pyramid_maps, randomise
from torch import nn

if importlib.util.find_spec('mmseg') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  first: makes mmseg importable

# isort: split

from mmengine.structures import PixelData
from mmseg.models.decode_heads import FCNHead as MMFCNHead
from mmseg.models.decode_heads import UPerHead
from mmseg.models.necks import Feature2Pyramid
from mmseg.structures import SegDataSample

from beit_plugin.mm.segmentation.decode_head import BEiTFCNHead, BEiTUPerHead
from beit_plugin.mm.segmentation.neck import BEiTPyramid
from beit_plugin.segmentation.upernet import FCNHead, UPerNetHead

BN = {'type': 'SyncBN', 'requires_grad': True}
CE = {'type': 'CrossEntropyLoss', 'avg_non_ignore': True}


def arguments(**options):
    defaults = {
        'in_channels': [8] * 4,
        'in_index': [0, 1, 2, 3],
        'channels': 6,
        'num_classes': 5,
        'norm_cfg': BN,
        'dropout_ratio': 0.0,
        'loss_decode': CE,
    }
    return {**defaults, **options}


def pair(ours, theirs, training):
    randomise(theirs).train(training)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.train(training), theirs


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('rescales', [(4, 2, 1, 0.5), (2, 1, 0.5, 0.25)])
def test_neck(grid, rescales, training):
    ours, theirs = pair(BEiTPyramid(8, rescales), Feature2Pyramid(8, rescales), training)
    assert_parity(ours, theirs, [torch.randn(2, 8, *grid) for _ in range(4)])


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('grid', GRIDS)
def test_decode_head(grid, training):
    assert_parity(*pair(BEiTUPerHead(**arguments()), UPerHead(**arguments()), training), pyramid_maps(grid))


@pytest.mark.parametrize(
    'options',
    [
        {'pool_scales': (1, 4)},
        {'norm_cfg': None},
        {'norm_cfg': {'type': 'GN', 'num_groups': 2}},
        {'norm_cfg': {'type': 'BN', 'requires_grad': True, 'eps': 0.1, 'momentum': 0.3}},
        {'act_cfg': {'type': 'LeakyReLU', 'negative_slope': 0.2}},
        {'act_cfg': {'type': 'PReLU'}},
        {'act_cfg': None},
        {'in_channels': [8] * 2, 'in_index': [1, 3]},
        {'in_channels': [8], 'in_index': [2]},
        {'conv_cfg': {'type': 'Conv2d'}},
    ],
    ids=str,
)
def test_decode_head_options(options):
    ours, theirs = pair(BEiTUPerHead(**arguments(**options)), UPerHead(**arguments(**options)), True)
    # BatchNorm of two images pooled to 1x1 magnifies rounding a thousandfold, on some processors beyond the bound
    assert_parity(ours, theirs, pyramid_maps((4, 6), batch=8))


def test_align_corners():
    options = arguments(align_corners=True)
    assert_parity(*pair(BEiTUPerHead(**options), UPerHead(**options), True), pyramid_maps((5, 7)))


@pytest.mark.parametrize('training', [True, False])
def test_standalone_head(training):
    ours, theirs = pair(UPerNetHead([8] * 4, 6, 5, dropout=0.0), UPerHead(**arguments()), training)
    assert_parity(ours, theirs, pyramid_maps((4, 6)))


class Alone(nn.Module):
    """Our auxiliary head takes its map; theirs picks it from a list."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, maps):
        return self.head(maps[0])


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize(
    'options',
    [
        {'num_convs': 1, 'concat_input': False},
        {'num_convs': 2, 'concat_input': True, 'kernel_size': 5, 'dilation': 2},
        {'num_convs': 0, 'concat_input': True, 'channels': 8},
    ],
    ids=str,
)
def test_standalone_auxiliary_head(training, options):
    options = {'channels': 6, **options}
    theirs = MMFCNHead(**arguments(in_channels=8, in_index=0, **options))
    ours, theirs = pair(FCNHead(8, num_classes=5, dropout=0.0, **options), theirs, training)
    assert_parity(Alone(ours), theirs, [torch.randn(2, 8, 5, 7)], lambda name: f'head.{name}')


def test_same_seed_starts_with_the_same_weights():
    states = []
    for kind in (BEiTUPerHead, UPerHead):
        torch.manual_seed(0)
        head = kind(**arguments())
        head.init_weights()
        states.append(head.state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


LOSSES = {
    'cross-entropy': {},
    'ignored pixels count': {'loss_decode': {'type': 'CrossEntropyLoss', 'loss_weight': 0.7}},
    'sum': {'loss_decode': {'type': 'CrossEntropyLoss', 'reduction': 'sum'}},
    'two losses': {'loss_decode': [{**CE, 'loss_name': 'loss_ce'}, {'type': 'DiceLoss', 'loss_name': 'loss_dice'}]},
    'one name twice': {'loss_decode': [CE, CE]},
    'hard pixels': {'sampler': {'type': 'OHEMPixelSampler', 'thresh': 0.4, 'min_kept': 100}},
    'hardest pixels': {'sampler': {'type': 'OHEMPixelSampler', 'min_kept': 100}},
    'align corners': {'align_corners': True},
    'binary': {
        'num_classes': 2,
        'out_channels': 1,
        'threshold': 0.5,
        'loss_decode': {'type': 'CrossEntropyLoss', 'use_sigmoid': True},
    },
}


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('size', [(64, 64), (61, 93)])
def test_losses(name, size):
    options = arguments(**LOSSES[name])
    ours, theirs = pair(BEiTUPerHead(**options), UPerHead(**options), True)
    labels = torch.randint(options['num_classes'], (2, 1, *size))
    labels[torch.rand(labels.shape) < 0.3] = 255
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]
    inputs = [x.double() for x in pyramid_maps((4, 6))]
    our_losses, their_losses = (head.double().loss(inputs, samples, {}) for head in (ours, theirs))
    assert list(our_losses) == list(their_losses)
    for key, expected in their_losses.items():
        # percent of pixels in float32
        torch.testing.assert_close(our_losses[key], expected, rtol=1e-6, atol=1e-9, check_dtype='acc' not in key)
    for losses in (our_losses, their_losses):
        sum(value for key, value in losses.items() if key.startswith('loss')).backward()
    assert_same_gradients(ours, theirs)


def test_class_weights():
    options = arguments(loss_decode={**CE, 'class_weight': [0.5, 1.0, 2.0, 0.1, 3.0]})
    ours, theirs = pair(BEiTUPerHead(**options), UPerHead(**options), True)
    # without ignored pixels: mmsegmentation 1.2.2 looks their weight up out of bounds
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in torch.randint(5, (2, 1, 64, 96))]
    inputs = [x.double() for x in pyramid_maps((4, 6))]
    got, expected = (head.double().loss(inputs, samples, {}) for head in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9, check_dtype=False)  # accuracy is in float32
    assert abs(got['loss_ce'] - expected['loss_ce']) <= 1e-12


@pytest.mark.parametrize('training', [True, False])
def test_auxiliary_head(training):
    options = arguments(in_channels=8, in_index=2, num_convs=2, concat_input=True)
    assert_parity(*pair(BEiTFCNHead(**options), MMFCNHead(**options), training), pyramid_maps((5, 7)))


@pytest.mark.parametrize('name', ['cross-entropy', 'ignored pixels count', 'two losses', 'hard pixels', 'binary'])
def test_auxiliary_losses(name):
    options = arguments(in_channels=8, in_index=2, **LOSSES[name])
    ours, theirs = pair(BEiTFCNHead(**options), MMFCNHead(**options), True)
    labels = torch.randint(options['num_classes'], (2, 1, 61, 93))
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]
    inputs = [x.double() for x in pyramid_maps((4, 6))]
    got, expected = (head.double().loss(inputs, samples, {}) for head in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9, check_dtype=False)
    for losses in (got, expected):
        sum(value for key, value in losses.items() if key.startswith('loss')).backward()
    assert_same_gradients(ours, theirs)


def test_all_pixels_ignored():
    """The loss is 0 with a gradient of 0, and the accuracy is mmsegmentation's 100 percent of nothing."""
    ours, theirs = pair(BEiTUPerHead(**arguments()), UPerHead(**arguments()), True)
    samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.full((1, 64, 96), 255))) for _ in range(2)]
    got, expected = (head.loss(pyramid_maps((4, 6)), samples, {}) for head in (ours, theirs))
    got['loss_ce'].backward()
    assert got['loss_ce'] == expected['loss_ce'] == 0 and got['acc_seg'] == expected['acc_seg']
    assert all(parameter.grad.isfinite().all() for parameter in ours.parameters())


@pytest.mark.parametrize('kind', [BEiTUPerHead, BEiTFCNHead])
def test_one_class_with_a_softmax(kind):
    options = arguments(num_classes=1) if kind is BEiTUPerHead else arguments(num_classes=1, in_channels=8, in_index=2)
    with pytest.raises(ValueError, match='num_classes=1 and out_channels=1 with a softmax cross-entropy, which is alw'):
        kind(**options)
    sigmoid = {'type': 'CrossEntropyLoss', 'use_sigmoid': True}
    assert kind(**{**options, 'threshold': 0.5, 'loss_decode': sigmoid}).out_channels == 1


@pytest.mark.parametrize('threshold', [None, 0.5])
def test_prediction(threshold):
    sigmoid = {'type': 'CrossEntropyLoss', 'use_sigmoid': True}
    extra = dict(num_classes=2, out_channels=1, threshold=threshold, loss_decode=sigmoid) if threshold else {}
    ours, theirs = pair(BEiTUPerHead(**arguments(**extra)), UPerHead(**arguments(**extra)), False)
    metas = [{'img_shape': (64, 96), 'pad_shape': (70, 99)}] * 2
    inputs = pyramid_maps((4, 6))
    with torch.no_grad():
        torch.testing.assert_close(ours.predict(inputs, metas, {}), theirs.predict(inputs, metas, {}))
    assert (ours.threshold, ours.out_channels, ours.align_corners) == (
        theirs.threshold,
        theirs.out_channels,
        theirs.align_corners,
    )
