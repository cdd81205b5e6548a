"""torchvision's detectors, transformers' and segmentation_models.pytorch's models on features of ``timm.create_model``.

The recipes are those of docs/detectors.md.
"""

import importlib.util

import pytest
import timm
import torch
from helpers import gradients, images, randomize, weighted_sum
from timm.layers import LayerNorm2d
from torch import nn

import beit_plugin
from beit_plugin import checkpoints

TORCHVISION = importlib.util.find_spec('torchvision') is not None
TRANSFORMERS = importlib.util.find_spec('transformers') is not None
SMP = importlib.util.find_spec('segmentation_models_pytorch') is not None
SMALL = dict(img_size=(48, 64), embed_dim=16, depth=4, num_heads=2, mlp_ratio=2.0)
FORMS = {'add_fpn': dict(add_fpn=True), 'windows': dict(add_fpn=True, window_size=2)}


def learns(loss, encoder):
    assert loss.isfinite()
    loss.backward()
    found = gradients(encoder)  # of all parameters: nothing stands around that a wrapper for several GPUs would miss
    assert all(gradient.isfinite().all() for gradient in found.values())
    silent = [name for name, gradient in found.items() if not gradient.any()]
    # ahead of a norm over the batch a bias changes nothing
    assert set(silent) <= {'fpn.upsample_4x.0.bias'}


def named_maps(form):
    return timm.create_model(
        'beit_plugin_base_patch16_224',
        features_only=True,
        return_dict=True,
        fpn_norm=LayerNorm2d,
        **SMALL,
        **FORMS[form],
    )


@pytest.mark.skipif(not TORCHVISION, reason='needs torchvision')
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('name', ['FasterRCNN', 'MaskRCNN', 'RetinaNet'])
def test_torchvision(name, form):
    from torchvision.models import detection
    from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

    body = named_maps(form)
    backbone = nn.Sequential(body, FeaturePyramidNetwork(body.feature_info.channels(), 16, LastLevelMaxPool()))
    backbone.out_channels = 16
    model = getattr(detection, name)(backbone, num_classes=4, min_size=64, max_size=96)

    x = [images(64, 90)[0].sigmoid(), images(75, 56)[0].sigmoid()]
    truth = []
    for image in x:
        masks = torch.zeros(1, *image.shape[1:], dtype=torch.uint8)
        masks[:, 8:50, 4:40] = 1
        truth.append(dict(boxes=torch.tensor([[4.0, 8.0, 40.0, 50.0]]), labels=torch.tensor([1]), masks=masks))
    losses = model(x, truth)
    assert len(losses) == {'FasterRCNN': 4, 'MaskRCNN': 5, 'RetinaNet': 2}[name]
    learns(sum(losses.values()), body.model)
    model.eval()
    with torch.no_grad():
        for image, found in zip(x, model(x), strict=True):
            assert found['boxes'].shape == (len(found['scores']), 4) and (found['boxes'] >= 0).all()
            assert (found['boxes'] <= torch.tensor([*image.shape[:0:-1]] * 2)).all()
            if name == 'MaskRCNN':
                assert found['masks'].shape == (len(found['scores']), 1, *image.shape[1:])


def test_maps_by_name():
    body, plain = named_maps('add_fpn').eval(), None
    maps = body(images(64, 90))
    assert list(maps) == ['0', '1', '2', '3'] and body.feature_info.reduction() == [4, 8, 16, 32]
    plain = timm.create_model('beit_plugin_base_patch16_224', features_only=True, return_dict=True, **SMALL)
    assert [tuple(y.shape) for y in plain(images(64, 90)).values()] == [(2, 16, 4, 6)] * 3
    with pytest.raises(ValueError, match='return_dict gives feature maps by name; it needs features_only=True'):
        timm.create_model('beit_plugin_base_patch16_224', return_dict=True, **SMALL)


def timm_backbone(name='beit_plugin_tiny_patch16_224_fpn', **options):
    from transformers import TimmBackboneConfig

    return TimmBackboneConfig(backbone=name, use_pretrained_backbone=False, freeze_batch_norm_2d=False, **options)


needs_transformers = pytest.mark.skipif(not TRANSFORMERS, reason="needs the extra: pip install 'beit-plugin[test]'")


@needs_transformers
@pytest.mark.parametrize(
    'name, out_indices, strides',
    [
        ('beit_plugin_tiny_patch16_224', [-1], [16]),
        ('beit_plugin_tiny_patch16_224', [3, 11], [16, 16]),
        ('beit_plugin_tiny_patch16_224_fpn', [0, 1, 2, 3], [4, 8, 16, 32]),
        ('beit_plugin_tiny_patch16_224_fpn', [1, 3], [8, 32]),
    ],
)
def test_timm_backbone_of_transformers(name, out_indices, strides):
    from transformers import TimmBackbone

    model = TimmBackbone(timm_backbone(name, out_indices=out_indices)).train()
    assert model.channels == [192] * len(strides)
    maps = model(images(64, 96)).feature_maps
    assert [tuple(y.shape) for y in maps] == [(2, 192, 64 // s, 96 // s) for s in strides]
    sum(y.square().mean() for y in maps).backward()
    assert model._backbone.model.cls_token.grad.any()


def encoder_of(model):
    return next(module for module in model.modules() if isinstance(module, beit_plugin.Beit))


@needs_transformers
@pytest.mark.parametrize('name, out_indices', [('', [-1]), ('_fpn', [3])])  # of stride 16, of stride 32
def test_detr_of_transformers(name, out_indices, tmp_path):
    from transformers import DetrConfig, DetrForObjectDetection

    config = DetrConfig(
        backbone_config=timm_backbone(f'beit_plugin_tiny_patch16_224{name}', out_indices=out_indices),
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, num_queries=5, num_labels=3,
    )  # fmt: skip
    model = DetrForObjectDetection(config)
    x = images(64, 96)
    mask = torch.ones(2, 64, 96, dtype=torch.long)
    mask[1, :, 64:] = 0
    labels = [dict(class_labels=torch.tensor([1]), boxes=torch.tensor([[0.4, 0.5, 0.3, 0.4]])) for _ in x]
    output = model(pixel_values=x, pixel_mask=mask, labels=labels)
    learns(output.loss, encoder_of(model))
    with torch.no_grad():
        output = model.eval()(pixel_values=x, pixel_mask=mask)
    assert output.logits.shape == (2, 5, 4) and output.pred_boxes.isfinite().all()
    model.save_pretrained(tmp_path)
    again = DetrForObjectDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(pixel_values=x, pixel_mask=mask).logits, output.logits)


@needs_transformers
def test_mask2former_of_transformers():
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    config = Mask2FormerConfig(
        backbone_config=timm_backbone(out_indices=[0, 1, 2, 3]),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=5, num_labels=3, train_num_points=64,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    x = images(64, 96)
    masks = torch.zeros(1, 64, 96)
    masks[:, 8:50, 4:40] = 1
    output = model(pixel_values=x, mask_labels=[masks, masks], class_labels=[torch.tensor([1])] * 2)
    learns(output.loss, encoder_of(model))
    with torch.no_grad():
        output = model.eval()(pixel_values=x)
    assert output.masks_queries_logits.shape == (2, 5, 16, 24)


# segmentation_models_pytorch gives FPN a stride 2 of no channels when it is less deep, as of every transformer
SMP_MODELS = [('Unet', 5), ('Unet', 4), ('UPerNet', 5), ('UPerNet', 4), ('FPN', 5)]
SMP_WIDTHS = {
    'Unet': lambda depth: dict(decoder_channels=(32, 16, 16, 8, 8)[:depth]),
    'UPerNet': lambda depth: dict(decoder_channels=16),
    'FPN': lambda depth: dict(decoder_pyramid_channels=32, decoder_segmentation_channels=32),
}


@pytest.mark.skipif(not SMP, reason='needs pip install segmentation_models_pytorch')
@pytest.mark.parametrize('name, depth', SMP_MODELS)
def test_segmentation_models_pytorch(name, depth):
    import segmentation_models_pytorch as smp

    encoder = dict(encoder_name='tu-beit_plugin_tiny_patch16_224_fpn', encoder_weights=None, encoder_depth=depth)
    model = getattr(smp, name)(**encoder, classes=3, **SMP_WIDTHS[name](depth))
    x = images(64, 96)
    y = model(x)
    assert y.shape == (2, 3, 64, 96)
    learns(nn.functional.cross_entropy(y, torch.randint(3, (2, 64, 96))), encoder_of(model))
    with torch.no_grad():
        assert model.eval()(x).shape == (2, 3, 64, 96)


def test_pyramid_models():
    classifier = timm.create_model('beit_plugin_base_patch16_224_fpn', **SMALL)
    assert classifier(images(64, 96)).shape == (2, 1000)
    levels = timm.create_model('beit_plugin_base_patch16_224_fpn', features_only=True, out_indices=(1, -1), **SMALL)
    assert levels.feature_info.reduction() == [8, 32] and len(levels(images(64, 96))) == 2


@pytest.mark.parametrize('levels, blocks', [((0, 1, 2, 3), 4), ((1, 3), 4), ((0,), 1), ((2, 0), 3)])
def test_levels_that_are_left_out_are_not_computed(levels, blocks):
    def create(levels):
        return timm.create_model(
            'beit_plugin_base_patch16_224_fpn', features_only=True, out_indices=levels, **SMALL
        ).eval()

    whole, some = randomize(create((0, 1, 2, 3))), create(levels)
    assert len(some.model.blocks) == blocks and some.feature_info.reduction() == [(4, 8, 16, 32)[i] for i in levels]
    assert tuple(some.feature_info.out_indices) == levels  # by which transformers builds a model again
    some.load_state_dict({name: whole.state_dict()[name] for name in some.state_dict()})
    maps = whole(images(70, 90))
    for got, level in zip(some(images(70, 90)), levels, strict=True):
        torch.testing.assert_close(got, maps[level])
    weighted_sum(*some(images(70, 90))).backward()
    gradients(some)


def test_pretrained_weights_for_a_pyramid(tmp_path):
    """The encoder's come from the file, the pyramid starts anew; a training of one size goes on with windows."""
    encoder = randomize(timm.create_model('beit_plugin_base_patch16_224', **SMALL))
    checkpoints.save(encoder, tmp_path / 'encoder.safetensors')
    model = timm.create_model(
        'beit_plugin_base_patch16_224_fpn', features_only=True, window_size=2, **SMALL, pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'encoder.safetensors')),
    )  # fmt: skip
    expected = {
        name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith(('head', 'fc_norm'))
    }
    got = model.model.state_dict()
    assert {name for name in got if not name.startswith('fpn.')} == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
