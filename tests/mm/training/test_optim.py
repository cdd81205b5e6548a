"""Learning rate and weight decay of every parameter, under mmsegmentation's constructors and under ours."""

import importlib.util

import pytest
import torch
from helpers import images
from torch import nn

if importlib.util.find_spec('mmseg') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  first: makes mmseg importable

# isort: split

from mmengine.optim import build_optim_wrapper
from mmseg.models.backbones import BEiT
from mmseg.models.necks import Feature2Pyramid

from beit_plugin.checkpoints.convert import to_native
from beit_plugin.mm.backbone import BEiTBackbone
from beit_plugin.mm.segmentation.neck import BEiTPyramid

pytestmark = pytest.mark.usefixtures('mmseg_scope')

DEPTH, LR, WD, DECAY = 4, 0.01, 0.05, 0.5
SMALL = dict(img_size=(32, 48), embed_dims=16, num_layers=DEPTH, num_heads=2, mlp_ratio=2)
CONSTRUCTORS = {
    'LayerDecayOptimizerConstructor': dict(num_layers=DEPTH, layer_decay_rate=DECAY),
    'LearningRateDecayOptimizerConstructor': dict(num_layers=DEPTH, decay_rate=DECAY, decay_type='layer_wise'),
    'BEiTLayerDecayConstructor': dict(decay_rate=DECAY),
}
ALL = dict(
    use_rel_pos_bias=False, use_shared_rel_pos_bias=True, use_mask_token=True, use_abs_pos_emb=True, add_fpn=True,
    final_norm=True, patch_norm=True, fpn_norm_cfg=dict(type='BN'), out_indices=(0, 1, 2, 3),
)  # fmt: skip


class Model(nn.Module):
    def __init__(self, backbone, neck=None):
        super().__init__()
        self.backbone, self.decode_head = backbone, nn.Conv2d(16, 5, 1)
        if neck is not None:
            self.neck = neck


def wrapper(model, constructor, optimizer=None, **paramwise):
    return build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            optimizer=optimizer or dict(type='AdamW', lr=LR, weight_decay=WD),
            constructor=constructor,
            paramwise_cfg={**CONSTRUCTORS[constructor], **paramwise},
        ),
    )


def rates(model, constructor):
    """(learning rate, weight decay) by parameter name."""
    groups = wrapper(model, constructor).optimizer.param_groups
    found = {id(p): (g['lr'], g['weight_decay']) for g in groups for p in g['params']}
    assert sum(len(g['params']) for g in groups) == len(found) == len(list(model.parameters()))
    return {name: found[id(p)] for name, p in model.named_parameters()}


def native(rates_by_name):
    """The backbone's rates by our names."""
    inner = {
        n.removeprefix('backbone.'): torch.tensor(r) for n, r in rates_by_name.items() if n.startswith('backbone.')
    }
    # the tables of names take tensors; rates of a fused tensor do not occur in mmsegmentation's dialect
    names, rest = to_native(inner)
    assert not rest
    return {name: tuple(r.tolist()) for name, r in names.items()}


@pytest.mark.parametrize('norms', [dict(), dict(patch_norm=True, final_norm=True)])
@pytest.mark.parametrize('constructor', CONSTRUCTORS)
def test_every_parameter_as_in_stock(constructor, norms):
    stock = Model(BEiT(**SMALL, **norms), Feature2Pyramid(16, norm_cfg=dict(type='BN')))
    ours = Model(BEiTBackbone(**SMALL, **norms), BEiTPyramid(16, norm_cfg=dict(type='BN')))
    expected = rates(stock, 'LearningRateDecayOptimizerConstructor')
    assert expected == rates(stock, 'LayerDecayOptimizerConstructor')
    got = rates(ours, constructor)
    assert native(got) == native(expected)
    outside = {n: r for n, r in expected.items() if not n.startswith('backbone.')}
    assert {
        n: r for n, r in got.items() if not n.startswith('backbone.')
    } == outside and 'neck.upsample_2x.0.weight' in outside


def expected_rate(name, parameter):
    inner = name.removeprefix('backbone.')
    if inner.startswith(('cls_token', 'mask_token', 'pos_embed', 'patch_embed')):
        layer = 0
    elif inner.startswith('layers.'):
        layer = int(inner.split('.')[1]) + 1
    else:  # norm, fpn, rel_pos_bias, decode_head
        layer = DEPTH + 1
    return pytest.approx((LR * DECAY ** (DEPTH + 1 - layer), WD if parameter.ndim > 1 else 0.0))


@pytest.mark.parametrize('constructor', CONSTRUCTORS)
def test_what_stock_does_not_have(constructor):
    model = Model(BEiTBackbone(**SMALL, **ALL))
    got = rates(model, constructor)
    for name in (
        'mask_token',
        'pos_embed',
        'rel_pos_bias.relative_position_bias_table',
        'fpn.upsample_2x.0.weight',
        'norm.weight',
    ):
        assert f'backbone.{name}' in got
    for name, parameter in model.named_parameters():
        assert got[name] == expected_rate(name, parameter), name


def test_encoder_anywhere_in_a_model():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.ModuleDict({'student': BEiTBackbone(**SMALL), 'teacher': BEiTBackbone(**SMALL)})
            self.head = nn.Linear(2, 2)

    model = Detector()
    model.body['teacher'].requires_grad_(False)
    groups = wrapper(model, 'BEiTLayerDecayConstructor').optimizer.param_groups
    scales = {n: g['lr'] for g in groups for n in g['param_names']}
    assert scales['body.student.cls_token'] == pytest.approx(LR * DECAY**5) and scales['head.weight'] == LR
    assert scales['body.student.layers.3.attn.qkv.weight'] == pytest.approx(LR * DECAY)
    assert not any('teacher' in name for name in scales)  # frozen
    bare = wrapper(BEiTBackbone(**SMALL), 'BEiTLayerDecayConstructor').optimizer.param_groups
    assert sorted({g['lr'] for g in bare}) == pytest.approx([LR * DECAY**i for i in range(5, 0, -1)])


def test_stock_constructors_do_not_see_an_encoder_of_another_name():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = BEiTBackbone(**SMALL)

    with pytest.raises(AttributeError, match="no attribute 'backbone'"):
        wrapper(Detector(), 'LearningRateDecayOptimizerConstructor')


def test_a_step_moves_every_parameter():
    model = Model(BEiTBackbone(**SMALL, **ALL))
    wrapped = wrapper(model, 'BEiTLayerDecayConstructor')
    before = {n: p.clone() for n, p in model.named_parameters()}
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[:, 1] = True
    maps = model.backbone(images(32, 48), mask)
    wrapped.update_params(sum(model.decode_head(y).square().sum() for y in maps))
    still = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
    assert still <= {'backbone.fpn.upsample_4x.0.bias'}  # batch norm takes its gradient away


def test_without_a_weight_decay_the_optimiser_keeps_its_own():
    model = Model(BEiTBackbone(**SMALL))
    wrapped = wrapper(model, 'BEiTLayerDecayConstructor', dict(type='AdamW', lr=LR))
    assert {g['weight_decay'] for g in wrapped.optimizer.param_groups} == {0.0, 0.01}
    wrapped.update_params(model.backbone(images(32, 48))[0].sum())


@pytest.mark.parametrize(
    'paramwise, sentence',
    [
        (dict(decay_rate=0), r'takes decay_rate \(above 0, at most 1\) and num_layers, got'),
        (dict(decay_rate=1.5), r'takes decay_rate \(above 0, at most 1\)'),
        (dict(layer_decay_rate=0.9), r"takes decay_rate .* got \{.*'layer_decay_rate': 0.9\}"),
        (dict(num_layers=12), r'paramwise_cfg says num_layers=12, the encoder has \[4\] blocks'),
    ],
)
def test_error_sentences(paramwise, sentence):
    with pytest.raises(ValueError, match=sentence):
        wrapper(Model(BEiTBackbone(**SMALL)), 'BEiTLayerDecayConstructor', **paramwise)


def test_refuses_a_model_without_our_encoder():
    with pytest.raises(
        ValueError, match='Model has no BEiT encoder of this plugin, so nothing would be decayed; use type='
    ):
        wrapper(Model(BEiT(**SMALL)), 'BEiTLayerDecayConstructor')
