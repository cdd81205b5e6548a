"""What the tests of `BEiTSegmentor` and `BEiTSegTTAModel` share: mmsegmentation's segmentor beside ours, both tiny."""

import math

import beit_plugin.mm  # noqa: F401  first: makes mmseg importable

# isort: split

import torch
from helpers import randomize
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from mmseg.structures import SegDataSample

BN = {'type': 'BN', 'requires_grad': True}
CROP, STRIDE = (48, 64), (32, 40)
SLIDE = {'mode': 'slide', 'crop_size': CROP, 'stride': STRIDE}
WHOLE = {'mode': 'whole'}
# smaller than the window in both directions and in one, the window, one pixel more, several windows, not square
SIZES = [(30, 20), (31, 100), (90, 64), (48, 64), (49, 65), (48, 65), (80, 104), (97, 131), (128, 64), (61, 180)]

BACKBONE = {
    'type': 'BEiTBackbone', 'img_size': (48, 64), 'embed_dims': 16, 'num_layers': 4, 'num_heads': 2, 'mlp_ratio': 2,
    'out_indices': (0, 1, 2, 3), 'norm_cfg': {'type': 'LN', 'eps': 1e-6},
}  # fmt: skip
HEAD = {'num_classes': 11, 'channels': 8, 'norm_cfg': BN, 'dropout_ratio': 0.0}
HEAD['loss_decode'] = {'type': 'CrossEntropyLoss'}
LEVELS = {'in_channels': [16] * 4, 'in_index': [0, 1, 2, 3], **HEAD}
RESNET = {
    'type': 'ResNetV1c', 'depth': 18, 'stem_channels': 8, 'base_channels': 4, 'out_indices': (0, 1, 2, 3),
    'strides': (1, 2, 1, 1), 'dilations': (1, 1, 2, 4), 'norm_cfg': BN,
}  # fmt: skip
PARTS = {
    'ours': {
        'backbone': BACKBONE,
        'neck': {'type': 'BEiTPyramid', 'embed_dim': 16, 'norm_cfg': BN},
        'decode_head': {'type': 'BEiTUPerHead', **LEVELS},
    },
    'stock': {'backbone': RESNET, 'decode_head': {'type': 'FCNHead', 'in_channels': 32, 'in_index': 3, **HEAD}},
    'stock head with its own predict': {
        'backbone': RESNET,
        'decode_head': {'type': 'EncHead', 'in_channels': [16, 32], 'in_index': [2, 3], 'num_codes': 4, **HEAD},
    },
    'mmsegmentation BEiT': {
        'backbone': {**BACKBONE, 'type': 'BEiT'},
        'neck': {'type': 'Feature2Pyramid', 'embed_dim': 16, 'norm_cfg': BN},
        'decode_head': {'type': 'UPerHead', **LEVELS},
    },
}
BINARY = {'num_classes': 2, 'out_channels': 1, 'threshold': 0.3}
BINARY['loss_decode'] = {'type': 'CrossEntropyLoss', 'use_sigmoid': True}


def build(kind, test_cfg=SLIDE, parts='ours', preprocessor=None, **head):
    normalise = {'type': 'SegDataPreProcessor', 'mean': [120.0] * 3, 'std': [60.0] * 3}
    cfg = ConfigDict(
        type=kind, data_preprocessor={**normalise, **(preprocessor or {})}, test_cfg=test_cfg, **PARTS[parts]
    )
    cfg.decode_head.update(head)
    return randomize(MODELS.build(cfg)).eval()


def pair(test_cfg=SLIDE, ours=None, **options):
    """mmsegmentation's segmentor and ours, with equal weights; `ours` is added to the test_cfg."""
    return build('EncoderDecoder', test_cfg, **options), build('BEiTSegmentor', {**test_cfg, **(ours or {})}, **options)


def samples(*metas, size=None):
    return [SegDataSample(metainfo={'img_shape': size, 'img_path': f'{i}.png', **m}) for i, m in enumerate(metas)]


def originals(size, *shapes, **more):
    return samples(*({'ori_shape': shape, **more} for shape in shapes), size=size)


def assert_same_results(got, expected, threshold=None, tolerance=1e-6):
    """Of our samples and mmsegmentation's; a label may differ where two classes are equal up to rounding.

    Args:
        threshold: of one channel.
        tolerance: largest difference of the logits, relative to the largest of them.
    """
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.metainfo == theirs.metainfo
        scores, truth, label = theirs.seg_logits.data, theirs.pred_sem_seg.data, ours.pred_sem_seg.data
        tolerated = tolerance * scores.abs().max().clamp(min=1)
        if 'seg_logits' in ours:
            assert ours.seg_logits.data.dtype == scores.dtype
            assert ours.seg_logits.data.shape == scores.shape
            assert (ours.seg_logits.data - scores).abs().max() <= tolerated
        assert (label.shape, label.dtype) == (truth.shape, truth.dtype)
        wrong = (label != truth)[0]
        if wrong.any():
            top = scores.topk(min(2, len(scores)), 0).values
            margin = top[0] - top[1] if threshold is None else (top[0] - threshold).abs()
            assert wrong.float().mean() < 1e-3
            assert margin[wrong].max() <= 2 * tolerated


@torch.no_grad()
def assert_same(stock, ours, inputs, make_samples, tolerance=1e-6):
    """Results of two segmentors for samples made afresh; returns ours."""
    expected, got = stock.predict(inputs, make_samples()), ours.predict(inputs, make_samples())
    assert_same_results(got, expected, ours.decode_head.threshold if ours.out_channels == 1 else None, tolerance)
    return got


@torch.no_grad()
def at_threshold(models, inputs):
    """Shifts the one channel of models with equal weights, until half of the pixels are above the threshold of 0.3."""
    middle = models[0](inputs).median()
    for model in models:
        model.decode_head.conv_seg.bias += math.log(0.3 / 0.7) - middle
    return models


def batches(model):
    """Shapes of what the backbone sees, appended as it runs."""
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    return seen
