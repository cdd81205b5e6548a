"""The timm segmentors: what timm's factories and trainers ask of them, and encoder weights in them."""

import pytest
import timm
import torch
from helpers import randomize
from timm.optim import create_optimizer_v2

from beit_plugin.segmentation.segmentor import BeitSegmentor

NAME = 'beit_plugin_tiny_patch16_640_upernet'
SMALL = dict(img_size=(32, 48), embed_dim=16, depth=4, num_heads=2, channels=8, auxiliary_channels=8, num_classes=5)


def create(**options) -> BeitSegmentor:
    return timm.create_model(NAME, **{**SMALL, **options})


def test_shapes_and_loss():
    model, x = create(), torch.randn(2, 3, 40, 72)
    assert model(x).shape == (2, 5, 10, 18)
    loss, logits = model(x, torch.randint(0, 5, (2, 40, 72)))
    loss.backward()
    assert logits.shape == (2, 5, 10, 18) and all(p.grad is not None for p in model.parameters())
    assert torch.equal(model.eval().forward_head(model.forward_features(x)), model(x))


def test_optimiser_groups():
    model = create()
    groups = create_optimizer_v2(model, 'adamw', lr=1.0, weight_decay=0.1, layer_decay=0.5).param_groups
    rate = {id(p): (g['lr'] * g['lr_scale'], g['weight_decay']) for g in groups for p in g['params']}

    def of(name):
        return rate[id(model.get_parameter(name))]

    assert of('backbone.cls_token') == (0.5**5, 0.0)
    assert of('backbone.blocks.0.attn.relative_position_bias_table') == (0.5**4, 0.0)
    assert of('backbone.blocks.3.mlp.fc1.weight') == (0.5, 0.1)
    assert of('pyramid.upsample_2x.0.weight') == of('auxiliary_head.conv_seg.weight') == (1.0, 0.1)


def test_switches_reach_the_encoder():
    model = create()
    model.set_grad_checkpointing()
    assert model.backbone.grad_checkpointing
    model.set_input_size((64, 64))
    assert model.backbone.window_size == (4, 4)
    assert [tuple(y.shape[2:]) for y in model.forward_intermediates(torch.randn(1, 3, 64, 64), 2)[1]] == [(4, 4)] * 2
    assert len(model.feature_info) == 4


def test_reset_classifier():
    model = create()
    model.reset_classifier(7, None)
    assert model.num_classes == 7 and model(torch.randn(2, 3, 32, 48)).shape[1] == 7
    with pytest.raises(ValueError, match=r"a segmentor pools nothing, .* got 'avg'"):
        model.reset_classifier(7, 'avg')


@pytest.mark.parametrize('num_classes', [5, 150])
def test_encoder_weights(tmp_path, num_classes):
    sizes = dict(img_size=64, embed_dim=16, depth=4, num_heads=2)
    encoder = randomize(timm.create_model('beit_plugin_tiny_patch16_224', **sizes))
    torch.save(encoder.state_dict(), tmp_path / 'x.pth')
    model = create(num_classes=num_classes, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'x.pth')))
    assert torch.equal(model.backbone.cls_token, encoder.cls_token)
    assert torch.equal(model.backbone.blocks[3].mlp.fc2.weight, encoder.blocks[3].mlp.fc2.weight)
    assert model.backbone.blocks[0].attn.relative_position_bias_table.shape == (3 * 5 + 3, 2)  # resized to 2x3


def test_segmentor_weights(tmp_path):
    source = randomize(create())
    torch.save(source.state_dict(), tmp_path / 'x.pth')
    model, x = create(checkpoint_path=str(tmp_path / 'x.pth')).eval(), torch.randn(1, 3, 32, 48)
    assert torch.equal(model(x), source.eval()(x))


def test_reshape_option_and_stage_names_of_encoders():
    options = dict(img_size=64, embed_dim=16, depth=4, num_heads=2, features_only=True)
    model = timm.create_model('beit_plugin_tiny_patch16_224', out_features=['stage2', 'stage3'], **options)
    assert model.feature_info.module_name() == ['blocks.1', 'blocks.2']
    model = timm.create_model('beit_plugin_tiny_patch16_224', reshape_hidden_states=False, **options)
    assert [y.shape for y in model(torch.randn(1, 3, 64, 48))] == [(1, 12, 16)] * 3
    with pytest.raises(ValueError, match="'stem' cannot be one of out_features here"):
        timm.create_model('beit_plugin_tiny_patch16_224', out_features=['stem'], **options)
