"""The models in timm's registry: names, configurations, features, optimiser groups."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers import images, randomize, relative_error, weighted_sum
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import set_fused_attn
from timm.models import get_notrace_functions, get_notrace_modules
from timm.models._hub import save_for_hf
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import beit_plugin  # noqa: F401  registers
from beit_plugin.models.layer_decay import layer_id

NAME = 'beit_plugin_base_patch16_224'
SMALL = dict(img_size=(48, 80), embed_dim=16, depth=4, num_heads=2, mlp_ratio=2.0)
X = images(48, 80)
V1, V2 = f'{NAME}.in22k_ft_in22k_in1k', 'beitv2_plugin_base_patch16_224.in1k_ft_in22k_in1k'
ENCODERS = [n for n in timm.list_models('beit*_plugin_*') if not n.endswith(('_mim', '_upernet', '_fpn'))]


def create(name=NAME, **options):
    return randomize(timm.create_model(name, **{**SMALL, **options})).eval()


def test_names():
    sizes = {'tiny_patch16_224', 'small_patch16_224', 'base_patch16_224', 'base_patch16_384', 'large_patch16_224'}
    v1 = {f'beit_plugin_{size}' for size in sizes | {'large_patch16_384', 'large_patch16_512'}}
    assert set(ENCODERS) == v1 | {'beitv2_plugin_base_patch16_224', 'beitv2_plugin_large_patch16_224'}
    assert NAME in timm.list_models(module='timm_models')
    # timm's own models keep their weights: nothing of theirs is overwritten
    assert 'beit_base_patch16_224.in22k_ft_in22k_in1k' in timm.list_models('beit_*', pretrained=True)


def test_tags_are_timms_and_one_for_pre_training():
    ours = {n for n in timm.list_pretrained('beit*_plugin_*') if n.split('.')[0] in ENCODERS}
    published = timm.list_pretrained('beit_*') + timm.list_pretrained('beitv2_*')
    theirs = {n.replace('_', '_plugin_', 1) for n in published if '_plugin_' not in n}
    assert theirs <= ours
    assert {n.split('.')[1] for n in ours - theirs} == {'in22k'}


@pytest.mark.parametrize('name', [n for n in timm.list_pretrained('beit*_plugin_*') if n.split('.')[0] in ENCODERS])
def test_configuration(name):
    cfg = timm.get_pretrained_cfg(name)
    size = int(name.split('.')[0].rsplit('_', 1)[1])
    owner, _, repository = cfg.hf_hub_id.partition('/')
    assert owner in ('timm', 'microsoft') and repository
    assert cfg.license == 'apache-2.0' and cfg.input_size == (3, size, size) and not cfg.fixed_input_size
    assert (cfg.classifier, cfg.first_conv, cfg.interpolation) == ('head', 'patch_embed.proj', 'bicubic')
    v2 = name.startswith('beitv2')
    assert cfg.mean == (IMAGENET_DEFAULT_MEAN if v2 else (0.5, 0.5, 0.5))
    assert cfg.std == (IMAGENET_DEFAULT_STD if v2 else (0.5, 0.5, 0.5))
    if owner == 'timm':  # the same numbers as the model that the weights come from
        theirs = timm.get_pretrained_cfg(repository)
        assert repository == name.replace('_plugin', '')
        for field in ('num_classes', 'mean', 'std', 'crop_pct', 'input_size', 'interpolation', 'license'):
            assert getattr(cfg, field) == getattr(theirs, field), field
    else:
        assert cfg.num_classes == 0


@pytest.mark.parametrize('name', ENCODERS)
def test_builds_at_its_published_size(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    size = int(name.rsplit('_', 1)[1])
    assert model.patch_embed.img_size == (size, size) and model.num_classes == 1000
    assert model.pretrained_cfg['architecture'] == name and model.default_cfg is model.pretrained_cfg
    theirs = name.replace('_plugin', '')
    if timm.is_model(theirs):
        with torch.device('meta'):
            peer = timm.create_model(theirs)
        shapes = {n: p.shape for n, p in model.named_parameters()}
        assert shapes == {n: p.shape for n, p in peer.named_parameters()}
        ours = model.blocks[0].init_values
        assert ours == getattr(peer.blocks[0], 'init_values', ours)  # timm 1.0.21 keeps none


def test_data_configuration_follows_the_model():
    config = timm.data.resolve_model_data_config(create(V1))
    assert config['mean'] == (0.5, 0.5, 0.5) and config['interpolation'] == 'bicubic'


def test_tag_and_configuration_arguments():
    assert create(f'{NAME}.in22k_ft_in22k').num_classes == 21841 and create(f'{NAME}.in22k').num_classes == 0
    assert create(pretrained_cfg=dict(num_classes=9)).num_classes == 9
    assert create(V1, pretrained_cfg_overlay=dict(mean=(0, 0, 0))).pretrained_cfg['mean'] == (0, 0, 0)
    assert create(cache_dir='nowhere')(X).shape == (2, 1000)


def test_unknown_argument():
    with pytest.raises(TypeError, match="unexpected keyword argument 'depht'"):
        create(depht=3)


@pytest.mark.parametrize('channels', [1, 4])
def test_channels(channels):
    assert create(in_chans=channels)(images(48, 80, channels=channels)).shape == (2, 1000)


def test_features_have_stride_16():
    model = create(features_only=True)
    assert model.feature_info.reduction() == [16] * 3 and model.feature_info.channels() == [16] * 3
    assert model.feature_info.module_name() == ['blocks.1', 'blocks.2', 'blocks.3']
    model = create(features_only=True, out_indices=(0, 2))
    assert len(model.model.blocks) == 3 and not model.model.get_classifier().state_dict()
    whole = create()
    whole.load_state_dict({**whole.state_dict(), **model.model.state_dict()})
    expected = whole.forward_intermediates(images(50, 61), [0, 2], intermediates_only=True)
    got = model(images(50, 61))
    assert [y.shape for y in got] == [(2, 16, 4, 4)] * 2
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize('size', [(48, 80), (50, 61), (64, 64)])
def test_features_with_a_pyramid(size):
    model = create(features_only=True, add_fpn=True)
    assert model.feature_info.reduction() == [4, 8, 16, 32] and model.feature_info.channels() == [16] * 4
    assert model.feature_info.module_name() == ['fpn.0', 'fpn.1', 'fpn.2', 'fpn.3']
    grid = [-(-s // 16) for s in size]
    expected = [tuple(-(-s // stride) for s in size) for stride in (4, 8, 16)] + [tuple(g // 2 for g in grid)]
    assert [tuple(y.shape[2:]) for y in model(images(*size))] == expected


def test_pyramid_over_chosen_blocks():
    model = create(features_only=True, add_fpn=True, out_indices=(0, 0, 1, 2))
    assert model.model.stages == (1, 1, 2, 3) and len(model(X)) == 4 and len(model.model.blocks) == 3
    with pytest.raises(ValueError, match='add_fpn makes feature maps; it needs features_only=True'):
        create(add_fpn=True)
    with pytest.raises(ValueError, match='add_fpn needs exactly 4 out_indices, got 2'):
        create(features_only=True, add_fpn=True, out_indices=(0, 1))


@pytest.mark.parametrize('size, grid', [((48, 80), (3, 5)), ((70, 33), (5, 3))])
@pytest.mark.parametrize('norm', [True, False])
def test_forward_intermediates(size, grid, norm):
    model, x = create(global_pool='token'), images(*size)
    states = model.run_blocks(x, stages=(1, 3))[2]
    expected = [model.norm(y) if norm else y for y in states.values()]
    tokens, maps = model.forward_intermediates(x, [0, 2], norm=norm)
    assert torch.equal(tokens, model.forward_features(x))
    for y, z in zip(maps, expected, strict=True):
        assert torch.equal(y.flatten(2).transpose(1, 2), z[:, 1:]) and y.shape[2:] == grid
    pairs = model.forward_intermediates(
        x, [0, 2], norm=norm, output_fmt='NLC', return_prefix_tokens=True, intermediates_only=True, stop_early=True
    )
    for (y, cls), z in zip(pairs, expected, strict=True):
        assert torch.equal(y, z[:, 1:]) and torch.equal(cls, z[:, :1])
    assert len(model.forward_intermediates(x, 2)[1]) == 2 and len(model.forward_intermediates(x)[1]) == 4
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC', got 'NHWC'"):
        model.forward_intermediates(x, output_fmt='NHWC')


def test_stop_early_does_not_run_the_rest():
    model = create()
    model.blocks[3] = nn.Identity()  # would fail if called
    assert len(model.forward_intermediates(X, [0, 2], stop_early=True, intermediates_only=True)) == 2


def test_prune():
    model = create(global_pool='token')
    expected = model.forward_intermediates(X, [1], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1], prune_norm=True) == [1]
    assert len(model.blocks) == 2 and isinstance(model.norm, nn.Identity) and isinstance(model.head, nn.Identity)
    assert model.num_classes == 0 and model.global_pool == ''
    assert torch.equal(model.forward_intermediates(X, [1], intermediates_only=True)[0], expected)


def test_classifier():
    model = create(dtype=torch.float64)
    assert model.get_classifier() is model.head
    model.reset_classifier(7)
    assert model.head.weight.dtype == torch.float64 and model(X.double()).shape == (2, 7) and model.num_classes == 7
    model.reset_classifier(0, 'token')
    assert torch.equal(model(X.double()), model.forward_head(model.forward_features(X.double()), pre_logits=True))
    assert model(X.double()).shape == (2, 16) == (2, model.num_features) and model.head_hidden_size == 16
    with pytest.raises(ValueError, match="global_pool must be 'avg', 'token' or '', got 'max'"):
        model.reset_classifier(7, 'max')


@pytest.mark.parametrize('built, reset', [('avg', 'token'), ('token', 'avg'), ('avg', 'avg')])
def test_a_folder_of_timms_builds_the_same_model(built, reset, tmp_path):
    model = create(global_pool=built)
    model.reset_classifier(3, reset)
    save_for_hf(model, tmp_path)
    if not hasattr(model, '_traits'):
        pytest.skip('this timm does not write how its models are built')
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(X), model(X))


def test_set_input_size():
    model = create()
    expected = model(images(64, 96))
    model.set_input_size(img_size=(64, 96))
    assert relative_error(model(images(64, 96)), expected) < 1e-5 and model.window_size == (4, 6)
    if hasattr(model, '_traits'):  # timm 1.0.28 and later
        assert timm.models.get_model_traits(model)['img_size'] == (64, 96)
    model.set_input_size(patch_size=(8, 16))
    assert model.window_size == (8, 6) and model(images(64, 96)).shape == (2, 1000)


def timm_groups(model, decay):
    groups = param_groups_layer_decay(
        model, weight_decay=0.1, no_weight_decay_list=model.no_weight_decay(), layer_decay=decay
    )
    return {id(p): (g['lr_scale'], g['weight_decay']) for g in groups for p in g['params']}


AFTER_THE_BLOCKS = ('norm.weight', 'norm.bias', 'rel_pos_bias.relative_position_bias_table')


def test_layer_ids_in_timms_optimiser_groups():
    model = create(use_mask_token=True, use_abs_pos_emb=True, use_shared_rel_pos_bias=True, global_pool='token')
    found = timm_groups(model, 0.5)
    assert len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        decayed = parameter.ndim > 1 and not name.endswith(('token', 'pos_embed', 'bias_table'))
        scale = found[id(parameter)][0] if name in AFTER_THE_BLOCKS else 0.5 ** (5 - layer_id(name, 4))
        assert found[id(parameter)] == (scale, 0.1 if decayed else 0.0), name


@pytest.mark.parametrize('name', AFTER_THE_BLOCKS)
def test_what_follows_the_blocks_gets_the_full_rate(name):
    model = create(use_shared_rel_pos_bias=True, global_pool='token')
    assert timm_groups(model, 0.5)[id(model.get_parameter(name))][0] == 0.5 ** (5 - layer_id(name, 4)) == 1


def test_optimiser_factory_takes_layer_decay():
    model = create()
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    scales = sorted({g['lr_scale'] for g in optimizer.param_groups})
    assert scales == pytest.approx([0.75**i for i in range(5, -1, -1)])
    before = {n: p.clone() for n, p in model.named_parameters()}
    weighted_sum(model(X)).backward()
    optimizer.step()
    assert not [n for n, p in model.named_parameters() if torch.equal(p, before[n])]


def test_pyramid_gets_the_full_rate():
    model = create(features_only=True, add_fpn=True).model
    groups = param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5)
    found = {id(p): g['lr_scale'] for g in groups for p in g['params']}
    scales = {found[id(p)] for n, p in model.named_parameters() if n.startswith('fpn.')}
    assert scales == {1.0} and found[id(model.cls_token)] == 0.5**5


def test_grad_checkpointing():
    model = create()
    model.set_grad_checkpointing()
    assert model.grad_checkpointing
    model.set_grad_checkpointing(False)
    assert not model.grad_checkpointing


def test_init_non_persistent_buffers_has_nothing_to_do():
    model = create()
    assert not list(model.buffers()) and model.init_non_persistent_buffers() is None


@pytest.mark.parametrize(
    'form', [{}, dict(use_abs_pos_emb=True, use_rel_pos_bias=False), dict(use_shared_rel_pos_bias=True)], ids=str
)
def test_graph_features(form):
    """Graphs of torch.fx, by timm's and torchvision's extractors: every block is a node, any size runs."""
    model = create(**form)
    modules, functions = get_notrace_modules(), get_notrace_functions()
    tracing = dict(leaf_modules=modules, autowrap_functions=functions)
    nodes = get_graph_node_names(model, tracer_kwargs=tracing)[1]
    assert [f'blocks.{i}' for i in range(4)] == [node for node in nodes if node.startswith('blocks')]
    features = create_feature_extractor(model, ['blocks.1', 'head'], tracer_kwargs=tracing)
    for size in ((48, 80), (64, 33)):
        x = images(*size)
        got = features(x)
        assert relative_error(got['head'], model(x)) < 1e-6
        expected = model.forward_intermediates(x, [1], return_prefix_tokens=True, output_fmt='NLC')[1][0]
        assert relative_error(got['blocks.1'][0], torch.cat(expected[::-1], 1)) < 1e-6
    weighted_sum(features.train()(X)['head']).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_eager_attention_by_timms_flag():
    assert create().blocks[0].attn.backend == 'auto'
    set_fused_attn(False)
    try:
        assert create().blocks[0].attn.backend == 'eager'
        assert create(attn_backend='sdpa').blocks[0].attn.backend == 'sdpa'
    finally:
        set_fused_attn(True)


def test_graph_features_of_eager_blocks():
    model, x = create(attn_backend='eager'), images(64, 33)
    tracing = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
    got = create_feature_extractor(model, ['blocks.1', 'head'], tracer_kwargs=tracing)(x)
    assert torch.equal(got['head'], model(x))
    patches, cls_token = model.forward_intermediates(x, [1], return_prefix_tokens=True, output_fmt='NLC')[1][0]
    assert torch.equal(got['blocks.1'], torch.cat((cls_token, patches), 1))


def test_pickles():
    model = create()
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(X), model(X))


def test_import_registers_and_loads_no_openmmlab_module():
    code = (
        'import sys, timm, beit_plugin\n'
        f'assert timm.is_model({NAME!r})\n'
        "print(*[m for m in sys.modules if m.partition('.')[0] in "
        "('mmengine', 'mmcv', 'mmseg', 'mmdet', 'mmpretrain', 'transformers', 'scipy')])"
    )
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, ''), result.stderr
