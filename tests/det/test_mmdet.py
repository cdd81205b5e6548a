"""mmdetection's shipped configs with our backbone in them: built, trained, asked, by every way of making a pyramid."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

if importlib.util.find_spec('mmdet') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmdet]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  first: makes mmdet importable

# isort: split

import mmdet
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.structures import InstanceData

CONFIGS = Path(mmdet.__file__).parent / '.mim' / 'configs'
DETECTORS = {
    'Faster R-CNN': 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco',
    'Mask R-CNN': 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco',
    'Cascade Mask R-CNN': 'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco',
    'RetinaNet': 'retinanet/retinanet_r50_fpn_1x_coco',
    'FCOS': 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco',
    'DyHead': 'dyhead/atss_r50_fpn_dyhead_1x_coco',
    'DETR': 'detr/detr_r50_8xb2-150e_coco',
    'Deformable DETR': 'deformable_detr/deformable-detr_r50_16xb2-50e_coco',
    'DINO': 'dino/dino-4scale_r50_8xb2-12e_coco',
    'Mask2Former': 'mask2former/mask2former_r50_8xb2-lsj-50e_coco',
}
FORMS = ['add_fpn', 'BEiTPyramid', 'BEiTSimplePyramid']
DETRS = ('DETR', 'Deformable DETR', 'DINO')
SMALL = dict(img_size=(48, 64), embed_dims=16, num_layers=4, num_heads=2, mlp_ratio=2, window_size=3)
# (H, W); Faster R-CNN and its kind pad both to 96 x 96, the DETRs to 75 x 90, no multiples of the patch
SHAPES = [(64, 90), (75, 56)]


@pytest.fixture(autouse=True)
def _mmdet_scope(_default_scope):
    register_all_modules(init_default_scope=True)


def swapped(name, form, **sizes):
    """A shipped config with the lines that a user changes, as docs/detectors.md has them."""
    model = Config.fromfile(CONFIGS / f'{DETECTORS[name]}.py').model
    head, necks = model.get('panoptic_head'), model.get('neck')
    neck, *others = necks if isinstance(necks, list) else [necks]  # DyHead follows an FPN
    width, depth = sizes.get('embed_dims', 768), sizes.get('num_layers', 12)
    backbone = dict(type='BEiTBackbone', **sizes)
    fpn_norm = dict(type='GN', num_groups=1)  # two images are too few for batch norm
    if form == 'add_fpn':  # strides 4, 8, 16 and 32, as ResNet's
        model.backbone = dict(**backbone, add_fpn=True, fpn_norm_cfg=fpn_norm)
        (neck or head).in_channels = [width] * 4
    elif form == 'BEiTPyramid':  # the same, with no more levels than the shipped neck takes
        rescales = {1: (0.5,), 3: (2, 1, 0.5), 4: (4, 2, 1, 0.5)}[len((neck or head).in_channels)]
        taps = [depth * i // len(rescales) - 1 for i in range(1, len(rescales) + 1)]
        model.backbone = dict(**backbone, out_indices=taps)
        (neck or head).in_channels = [width] * len(rescales)
        pyramid = dict(type='BEiTPyramid', embed_dim=width, rescales=rescales, norm_cfg=fpn_norm)
        model.neck = [pyramid, neck, *others] if neck else pyramid
    elif name == 'DETR':  # the last map as it is, of stride 16
        model.backbone = backbone
        neck.in_channels = [width]
    else:  # ViTDet's, in the place of the shipped neck
        model.backbone = backbone
        pyramid = dict(type='BEiTSimplePyramid', in_channels=width, out_channels=256)
        if name in ('RetinaNet', 'FCOS', 'DyHead', 'Deformable DETR', 'DINO'):  # from stride 8
            pyramid.update(rescales=(2, 1, 0.5), num_outs=neck.num_outs)
        elif head:
            pyramid.update(num_outs=4)
            head.in_channels = [256] * 4
        model.neck = [pyramid, *others] if others else pyramid
    return model


SMALLER = dict(
    feedforward_channels=16, fc_out_channels=16, stacked_convs=1, num_convs=1, num_queries=10, num_layers=2,
    num_dn_queries=4, max_per_img=10,
)  # fmt: skip


def shrink(cfg, width):
    for key, value in list(cfg.items()) if isinstance(cfg, dict) else enumerate(cfg):
        if isinstance(value, dict | list) and key not in ('backbone', 'data_preprocessor'):
            shrink(value, width)
        elif key in SMALLER:
            cfg[key] = SMALLER[key]
        elif type(value) is int and value == 256:
            cfg[key] = width
        elif key == 'num_feats':
            cfg[key] = width // 2


def small(name, form):
    model = swapped(name, form, **SMALL)
    width = 256 if name == 'DINO' else 32  # DINO's embedding of positions has the number in its code
    shrink(model, width)
    if name in DETRS:
        model.bbox_head.embed_dims = width
    if name == 'Mask2Former':
        model.data_preprocessor.batch_augments = None  # it pads to 1024 x 1024
        model.train_cfg.num_points = 64
    model = MODELS.build(model)
    model.init_weights()
    return model


def batch():
    """Two images of different shapes, each with an object or two."""
    generator = np.random.default_rng(0)
    samples, inputs = [], []
    for i, (height, width) in enumerate(SHAPES):
        inputs.append(torch.from_numpy(generator.integers(0, 255, (3, height, width), dtype=np.uint8)))
        boxes = np.array([[4, 8, 40, 50], [20, 3, width - 2, 33]][: i + 1])
        masks = np.zeros((len(boxes), height, width), dtype=np.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
            mask[top:bottom, left:right] = 1
        truth = InstanceData(
            bboxes=torch.tensor(boxes, dtype=torch.float32),
            labels=torch.arange(len(boxes)),
            masks=BitmapMasks(masks, height, width),
        )
        # twice as large before the pipeline resized it
        meta = dict(img_id=i, img_shape=(height, width), ori_shape=(2 * height, 2 * width), scale_factor=(0.5, 0.5))
        samples.append(
            DetDataSample(metainfo=meta, gt_instances=truth, ignored_instances=InstanceData(bboxes=boxes[:0]))
        )
    return dict(inputs=inputs, data_samples=samples)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('name', DETECTORS)
def test_loss_backward_predict(name, form):
    model = small(name, form)
    data = model.data_preprocessor(batch(), training=True)
    total, log = model.parse_losses(model(**data, mode='loss'))
    assert len(log) > 2 and all(torch.isfinite(torch.as_tensor(value)) for value in log.values())
    total.backward()
    for parameter, tensor in model.backbone.named_parameters():
        if not parameter.startswith('fpn.'):  # a level may be left out
            assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any(), parameter

    model.eval()
    with torch.no_grad():
        results = model(**model.data_preprocessor(batch(), training=False), mode='predict')
    assert [r.ori_shape for r in results] == [(2 * height, 2 * width) for height, width in SHAPES]
    for result in results:
        found, (height, width) = result.pred_instances, result.ori_shape
        assert found.bboxes.shape == (len(found.scores), 4) and found.bboxes.isfinite().all()
        assert (found.bboxes <= torch.tensor([width, height] * 2) + 1e-3).all() and (found.bboxes >= 0).all()
        if 'Mask' in name:
            assert found.masks.shape == (len(found.scores), height, width)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('name', DETECTORS)
def test_shipped_sizes_fit_the_base_model(name, form):
    with torch.device('meta'):
        model = MODELS.build(swapped(name, form))
    assert model.backbone.embed_dim == 768 and len(model.backbone.layers) == 12


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('name', DETRS)
def test_padding_is_masked(name, form):
    """What stands in the padding of an image's maps changes nothing for that image."""
    model = small(name, form).eval()
    data = model.data_preprocessor(batch(), training=False)
    extract, changed = type(model).extract_feat, []

    def predict(noise):
        def noisy(x):
            maps = [y.clone() for y in extract(model, x)]
            for y in maps:  # the second image is the narrower one
                first = -(-SHAPES[1][1] * y.shape[3] // x.shape[3])
                y[1, :, :, first:] += noise
                changed.append(y[1, :, :, first:].numel())
            return tuple(maps)

        model.extract_feat = noisy
        with torch.no_grad():
            return model(**copy.deepcopy(data), mode='predict')

    clean, disturbed = predict(0.0), predict(100.0)
    assert sum(changed) > 0
    for a, b in zip(clean, disturbed, strict=True):
        torch.testing.assert_close(a.pred_instances.scores, b.pred_instances.scores)
        torch.testing.assert_close(a.pred_instances.bboxes, b.pred_instances.bboxes)


def test_layer_decay():
    model = small('Mask R-CNN', 'BEiTSimplePyramid')
    wrapper = build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.1),
            constructor='BEiTLayerDecayConstructor',
            paramwise_cfg=dict(decay_rate=0.7),
        ),
    )
    rates = {name: group['lr'] for group in wrapper.optimizer.param_groups for name in group['param_names']}
    assert rates.keys() == dict(model.named_parameters()).keys()
    assert rates['backbone.cls_token'] == pytest.approx(1e-4 * 0.7**5)
    assert rates['backbone.layers.3.mlp.fc1.weight'] == pytest.approx(1e-4 * 0.7)
    assert rates['neck.levels.0.0.weight'] == rates['roi_head.mask_head.conv_logits.weight'] == 1e-4


@pytest.mark.parametrize('size', [(800, 1333), (333, 517)])
def test_large_and_odd_images(size):
    """Strides stay exact: the levels are as large as mmdetection expects them to be."""
    backbone = MODELS.build(
        dict(type='BEiTBackbone', **{**SMALL, 'num_layers': 1, 'window_size': 14, 'global_blocks': ()})
    )
    neck = MODELS.build(dict(type='BEiTSimplePyramid', in_channels=[16], out_channels=8))
    with torch.no_grad():
        levels = neck(backbone(torch.randn(1, 3, *size)))
    grid = [-(-side // 16) for side in size]
    expected = [tuple(4 * g for g in grid), tuple(2 * g for g in grid)] + [
        tuple(-(-g // factor) for g in grid) for factor in (1, 2, 4)
    ]
    assert [tuple(y.shape[2:]) for y in levels] == expected


def test_norms_of_the_simple_pyramid():
    for cfg, kind in ((None, 'LayerNorm2d'), (dict(type='BEiTLN2d', eps=1e-3), 'BEiTLN2d'), (dict(type='BN'), None)):
        neck = MODELS.build(dict(type='BEiTSimplePyramid', in_channels=[8, 8], out_channels=4, norm_cfg=cfg))
        norm = neck.levels[2][1]
        assert type(norm).__name__ == (kind or 'BatchNorm2d') and norm.eps == {'BEiTLN2d': 1e-3, None: 1e-5}.get(
            kind, 1e-6
        )
    with pytest.raises(ValueError, match=r'got norm_cfg=.*, expected a dict with a type'):
        MODELS.build(dict(type='BEiTSimplePyramid', in_channels=8, norm_cfg='LN'))
