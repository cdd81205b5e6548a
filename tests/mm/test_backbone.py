"""BEiTBackbone in OpenMMLab: stock configs, checkpoints, modes, errors."""

import copy
import importlib.util
import pickle
from pathlib import Path

import pytest
import torch
from helpers import images, randomize, relative_error
from torch import nn

if importlib.util.find_spec('mmseg') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  first: makes mmseg importable

# isort: split

import mmseg
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS
from mmengine.structures import PixelData
from mmseg.registry import MODELS as MMSEG_MODELS
from mmseg.structures import SegDataSample

from beit_plugin.checkpoints.convert import CheckpointError, from_native, to_native
from beit_plugin.mm.backbone import BEiTBackbone
from beit_plugin.models.beit import Beit
from beit_plugin.models.relative_position import relative_position_index
from beit_plugin.models.resample import resize_rel_pos_bias_table

pytestmark = pytest.mark.usefixtures('mmseg_scope')

CONFIGS = sorted((Path(mmseg.__file__).parent / '.mim' / 'configs' / 'beit').glob('*.py'))
RENAMES = {'BEiT': 'BEiTBackbone', 'Feature2Pyramid': 'BEiTPyramid', 'UPerHead': 'BEiTUPerHead'}
SMALL = dict(img_size=64, embed_dims=16, num_layers=4, num_heads=2, mlp_ratio=2, out_indices=(0, 1, 2, 3))


def backbone(**options):
    return BEiTBackbone(**{**SMALL, 'fpn_norm_cfg': dict(type='BN'), **options})


def renamed(cfg):
    if isinstance(cfg, dict):
        return {k: RENAMES.get(v, v) if k == 'type' else renamed(v) for k, v in cfg.items()}
    return [renamed(x) for x in cfg] if isinstance(cfg, list | tuple) else cfg


def build(cfg):
    return MMSEG_MODELS.build(ConfigDict(copy.deepcopy(cfg)))


def small(path):
    """A shipped config, its arguments kept but for the sizes, and batch norm in place of SyncBN (no CPU kernel)."""
    model = Config.fromfile(path).model.to_dict()
    model['pretrained'] = None
    model['data_preprocessor']['size'] = (64, 64)
    model['backbone'].update(img_size=(64, 64), embed_dims=16, num_layers=4, num_heads=2, out_indices=(0, 1, 2, 3))
    model['neck'].update(embed_dim=16, norm_cfg=dict(type='BN'))
    for head, width in (('decode_head', [16] * 4), ('auxiliary_head', 16)):
        model[head].update(in_channels=width, channels=8, norm_cfg=dict(type='BN'), dropout_ratio=0.0)
    model['backbone']['drop_path_rate'] = 0.0
    return model


def batch():
    samples = [SegDataSample(metainfo=dict(img_path=name, img_shape=(64, 64))) for name in 'ab']
    for i, sample in enumerate(samples):
        labels = torch.randint(150, (1, 64, 64), generator=torch.Generator().manual_seed(i))
        sample.gt_sem_seg = PixelData(data=labels)
    return images(64, 64), samples


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_stock_config_becomes_ours_by_type_names_only(path):
    stock_cfg = small(path)
    stock = randomize(build(stock_cfg))
    ours = build(renamed(stock_cfg))
    assert type(ours.backbone) is BEiTBackbone and len(list(ours.parameters())) == len(list(stock.parameters()))
    ours.load_state_dict(stock.state_dict(), strict=True)
    stock.eval()  # mmsegmentation's backbone returns None from train() and eval()
    ours.eval()
    x, samples = batch()
    assert relative_error(ours(x), stock(x)) < 1e-5
    stock.train()
    ours.train()
    losses = [m.loss(x, samples) for m in (ours, stock)]
    assert losses[0].keys() == losses[1].keys() and 'aux.loss_ce' in losses[0]
    for name, value in losses[1].items():
        assert relative_error(losses[0][name], value) < 1e-5, name
    for loss in losses:
        sum(v for k, v in loss.items() if 'loss' in k).backward()
    theirs, rest = to_native({n: p.grad for n, p in stock.backbone.named_parameters()})
    got, _ = to_native({n: p.grad for n, p in ours.backbone.named_parameters()})
    assert not rest and got.keys() == theirs.keys()
    errors = {name: relative_error(got[name], theirs[name]) for name in theirs}
    assert max(errors.values()) < 1e-4, max(errors, key=errors.get)  # the gradient of batch norm at batch 2 is steep


def test_four_configs_are_shipped():
    assert len(CONFIGS) == 4


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_stock_config_builds_at_its_own_size(path):
    cfg = renamed(Config.fromfile(path).model.to_dict())
    with torch.device('meta'):
        model = build(cfg)
    assert model.backbone.window_size == (40, 40) and len(model.backbone.layers) in (12, 24)
    checkpoint = 'pretrain/beit_{}_patch16_224_pt22k_ft22k.pth'.format('base' if 'base' in path.stem else 'large')
    assert model.backbone.init_cfg == dict(type='Pretrained', checkpoint=checkpoint)


def test_registered_in_the_root_and_found_from_other_scopes():
    assert MODELS.get('BEiTBackbone') is BEiTBackbone is MMSEG_MODELS.get('BEiTBackbone')


def test_any_size_and_pyramid_inside():
    model = backbone(add_fpn=True).eval()
    assert [tuple(y.shape[2:]) for y in model(images(70, 33))] == [(18, 9), (9, 5), (5, 3), (2, 1)]
    assert isinstance(
        backbone(add_fpn=True, fpn_norm_cfg=dict(type='GN', num_groups=2)).fpn.upsample_4x[1], nn.GroupNorm
    )
    names = [n for n, _ in backbone().named_children()]
    assert 'layers' in names and 'blocks' not in names


@pytest.mark.parametrize('size', [[64, 96], (64, 96), (64,), 64])
def test_img_size_as_a_config_writes_it(size):
    assert backbone(img_size=size).window_size == ((4, 6) if size not in ((64,), 64) else (4, 4))


def dialects():
    native = randomize(Beit(img_size=48, embed_dim=16, depth=4, num_heads=2, mlp_ratio=2.0, num_classes=0)).state_dict()
    encoder = {n: t for n, t in native.items() if not n.startswith('fc_norm')}
    yield 'native', native, encoder
    for dialect in ('openmmlab', 'mmseg'):
        yield dialect, from_native(encoder, dialect), encoder
    for dialect in ('transformers', 'transformers-v5'):
        beit = {f'beit.{n}': t for n, t in from_native(native, dialect).items()}
        yield dialect, beit, encoder
    segmentor = {f'backbone.{n}': t for n, t in from_native(encoder, 'mmseg').items()}
    yield 'segmentor', {**segmentor, 'decode_head.conv_seg.weight': torch.ones(1)}, encoder
    index = {'blocks.0.attn.relative_position_index': relative_position_index(3, 3)}
    classifier = {'head.weight': torch.ones(5, 16), 'head.bias': torch.ones(5)}
    yield 'unilm', {**native, **index, **classifier}, encoder


@pytest.mark.parametrize('wrapper', [None, 'model', 'state_dict'])
@pytest.mark.parametrize('source', list(dialects()), ids=lambda source: source[0])
def test_pretrained_of_each_dialect_at_another_resolution(source, wrapper, tmp_path):
    _, state, encoder = source
    torch.save(state if wrapper is None else {wrapper: state}, tmp_path / 'x.pth')
    model = backbone(
        img_size=(64, 96), add_fpn=True, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth'))
    )
    assert not torch.equal(model.cls_token, encoder['cls_token'])  # built first, loaded by init_weights
    model.init_weights()
    got, _ = to_native(model.state_dict())
    for name, tensor in encoder.items():
        if name.endswith('bias_table'):
            tensor = resize_rel_pos_bias_table(tensor, (3, 3), (4, 6))
        assert torch.equal(got[name], tensor), name


def test_pretrained_by_the_short_way_and_inside_a_segmentor(tmp_path):
    state = randomize(backbone()).state_dict()
    torch.save(state, tmp_path / 'x.pth')
    cfg = renamed(small(CONFIGS[0]))
    cfg['pretrained'] = str(tmp_path / 'x.pth')
    cfg['backbone']['mlp_ratio'] = 2
    model = build(cfg)
    model.init_weights()
    assert torch.equal(model.backbone.layers[3].mlp.fc2.weight, state['layers.3.mlp.fc2.weight'])
    with pytest.raises(ValueError, match='give a checkpoint by pretrained or by init_cfg, not by both'):
        backbone(pretrained='a.pth', init_cfg=dict(type='Pretrained', checkpoint='b.pth'))


def test_pretrained_is_strict(tmp_path):
    state = randomize(backbone()).state_dict()
    path = tmp_path / 'x.pth'
    model = backbone(pretrained=str(path))
    torch.save({n: t for n, t in state.items() if n != 'layers.1.norm2.bias'}, path)
    with pytest.raises(CheckpointError, match=r'x.pth: it lacks layers.1.norm2.bias; name what to leave out'):
        model.init_weights()
    torch.save({**state, 'layers.1.attn.gate': torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r'x.pth: no table knows layers.1.attn.gate; .*prefix='):
        model.init_weights()
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(
        CheckpointError, match=r'no BEiT encoder of a known dialect \(timm, .*; its names begin with wei'
    ):
        model.init_weights()
    torch.save({**state, 'layers.0.gamma_1': torch.ones(5)}, path)
    with pytest.raises(CheckpointError, match=r'layers\.0\.gamma_1 is \(5,\) instead of \(16,\)'):
        model.init_weights()
    (path.parent / 'cut.pth').write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r'cut\.pth is cut off'):
        backbone(init_cfg=dict(type='Pretrained', checkpoint=str(path.parent / 'cut.pth'))).init_weights()


def test_attributes_that_hosts_read():
    model = backbone()
    stock = MMSEG_MODELS.build(dict(type='BEiT', embed_dims=16, num_layers=4, num_heads=2))
    for name in ('embed_dims', 'num_layers', 'norm_eval'):
        assert getattr(model, name) == getattr(stock, name)


def test_other_initialisers():
    model = backbone(init_cfg=[dict(type='Constant', layer='Linear', val=0.25)])
    model.init_weights()
    assert (model.layers[0].mlp.fc1.weight == 0.25).all()


def test_activation_with_arguments():
    act = backbone(act_cfg=dict(type='LeakyReLU', negative_slope=0.5)).layers[1].mlp.act
    assert isinstance(act, torch.nn.LeakyReLU) and act.negative_slope == 0.5


@pytest.mark.parametrize(
    'act_cfg, expected',
    [
        (dict(type='SELU'), nn.SELU),  # mmcv lacks these two
        (dict(type='gelu_new'), lambda: nn.GELU(approximate='tanh')),
        (dict(type=nn.SELU), nn.SELU),
        (dict(type='SiLU'), nn.SiLU),
    ],
)
def test_activations_that_mmcv_lacks(act_cfg, expected):
    act, x = backbone(act_cfg=act_cfg).layers[1].mlp.act, torch.randn(3, 5)
    torch.testing.assert_close(act(x), expected()(x))


def test_options_of_the_encoder():
    model = backbone(pos_drop_rate=0.1, proj_drop_rate=0.2, init_std=0.05)
    block = model.layers[1]
    assert (model.pos_drop.p, block.attn.proj_drop.p, block.mlp.drop2.p) == (0.1, 0.2, 0.2)
    for _ in range(2):
        assert block.mlp.fc1.weight.std().item() == pytest.approx(0.05, rel=0.1)
        model.init_weights()


def test_shared_table_of_pre_training(tmp_path):
    source = randomize(Beit(img_size=48, embed_dim=16, depth=4, num_heads=2, mlp_ratio=2.0, num_classes=0,
                            use_rel_pos_bias=False, use_shared_rel_pos_bias=True, use_mask_token=True))  # fmt: skip
    torch.save(source.state_dict(), tmp_path / 'x.pth')
    model = backbone(img_size=48, pretrained=str(tmp_path / 'x.pth'))
    model.init_weights()
    tables = [layer.attn.relative_position_bias_table for layer in model.layers]
    assert all(torch.equal(t, source.rel_pos_bias.relative_position_bias_table) for t in tables)


def test_init_weights_draws_anew():
    model = randomize(backbone(add_fpn=True))
    model.init_weights()
    for layer in model.layers:
        assert (layer.gamma_1 == 0.1).all() and not layer.attn.relative_position_bias_table.any()
        assert (layer.norm1.weight == 1).all() and not layer.attn.q_bias.any()
    assert (model.fpn.upsample_4x[1].running_var == 1).all() and model.layers[0].attn.qkv.weight.std() < 0.03


def test_deepcopy_runs_and_loads():
    model = randomize(backbone())
    twin = copy.deepcopy(model)
    randomize(twin, seed=1)
    assert not torch.equal(twin(images(64, 64))[0], model(images(64, 64))[0])
    twin.load_state_dict(from_native(to_native(model.state_dict())[0], 'mmseg'))
    assert torch.equal(twin(images(64, 64))[0], model(images(64, 64))[0])


def test_pickles():
    model = randomize(backbone()).eval()
    assert torch.equal(pickle.loads(pickle.dumps(model))(images(64, 64))[0], model(images(64, 64))[0])


def test_norm_eval():
    for norm_eval in (True, False):
        model = backbone(add_fpn=True, norm_eval=norm_eval).train()
        modes = {m.training for m in model.modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d)}
        assert modes == {not norm_eval} and model.layers[0].mlp.training
        assert model.train(False) is model and not any(m.training for m in model.modules())


def test_with_cp_changes_nothing_but_memory():
    results, runs = [], []
    for with_cp in (False, True):
        model = randomize(backbone(with_cp=with_cp)).train()
        model.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
        sum(y.square().sum() for y in model(images(70, 33))).backward()
        results.append([p.grad for p in model.parameters()])
    assert len(runs) == 1 + 2
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_mask_token():
    model = backbone(use_mask_token=True).eval()
    mask = torch.rand(2, 16) < 0.5
    assert not torch.equal(model(images(64, 64), mask)[0], model(images(64, 64))[0])


@pytest.mark.parametrize(
    'options, sentence',
    [
        (dict(num_fcs=3), 'the MLP of BEiT has two layers, got num_fcs=3; leave it out'),
        (dict(use_shared_rel_pos_bias=True), 'use_rel_pos_bias and use_shared_rel_pos_bias exclude each other here'),
        (dict(norm_cfg=dict(type='BN')), r"with LayerNorm: norm_cfg must be dict\(type='LN', eps=...\)"),
        (dict(norm_cfg=dict(type='LN', momentum=1)), 'BEiT normalises with LayerNorm'),
        (dict(norm_cfg=None), r"norm_cfg must be dict\(type='LN', eps=...\), got None"),
        (dict(act_cfg=None), r"act_cfg must be a dict with a type, such as dict\(type='GELU'\), got None"),
        (dict(act_cfg=dict(type='XU')), "act_cfg names the activation 'XU', which neither mmcv nor timm knows"),
        (dict(img_size=(64, 64, 3)), r'img_size must be one or two whole numbers \(H, W\) of pixels above 0, got'),
        (dict(img_size=None), r'img_size must be one or two whole numbers .*, got None'),
        (dict(out_indices=(1, 9)), r'out_indices \[9\] do not exist'),
        (dict(add_fpn=True, out_indices=(1,)), 'add_fpn needs exactly 4 out_indices, got 1'),
        (dict(add_fpn=True, fpn_norm_cfg=dict(type='XN')), "got norm type 'XN', which is not registered"),
        (dict(embed_dims=15), 'embed_dim must be a multiple of num_heads'),
    ],
)
def test_error_sentences(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        backbone(**options)


def test_unknown_argument():
    with pytest.raises(TypeError, match="unexpected keyword argument 'qkv_bias'"):
        MODELS.build(dict(type='BEiTBackbone', qkv_bias=True))
