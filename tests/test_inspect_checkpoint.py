"""The lines of code that tools/inspect_checkpoint.py prints: run as they are, they make and load the same function."""

import importlib.util
import sys

import pytest
import tools_common  # noqa: F401  puts the tools on the path
import torch
from checkpoints.peers import CLASSES, PEERS, backbone, beit, build, disk_state, mim, mim_v2, segmentor
from helpers import images, randomize, relative_error

from beit_plugin.checkpoints import convert, load
from beit_plugin.checkpoints.files import write_state_dict

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec('transformers') is None, reason='needs the extra: test'
)


def inspected(monkeypatch, capsys, *args):
    """What the tool prints, in this process."""
    import inspect_checkpoint

    monkeypatch.setattr(sys, 'argv', ['inspect_checkpoint.py', *map(str, args)])
    inspect_checkpoint.main()
    return capsys.readouterr().out


def made_by(said):
    """The model that the first line of code makes and loads."""
    import timm

    import beit_plugin

    line = said.split('loads into\n')[1].splitlines()[0].strip()
    scope = {'timm': timm, 'beit_plugin': beit_plugin}
    result = eval(line, scope)
    return line, scope.get('model', result).eval()


def result(model, x):
    """One tensor of all that a model gives."""
    out = model.eval()(x)
    return torch.cat([y.flatten() for y in (out if isinstance(out, tuple) else (out,)) if y is not None])


NAMED = dict(embed_dim=192, depth=12, num_heads=3, mlp_ratio=4.0)  # the published size that is called tiny
POSITIONS = dict(use_rel_pos_bias=False, use_abs_pos_emb=True)
BARE = dict(in_chans=1, qkv_bias=False, init_values=None, patch_norm=True)


@pytest.mark.parametrize(
    ('make', 'expected'),
    [
        (lambda: beit(num_classes=CLASSES, global_pool='token', **NAMED),
         "timm.create_model('beit_plugin_tiny_patch16_224', img_size=(32, 32), num_classes=7, global_pool='token', "),
        (lambda: beit(**{**NAMED, **POSITIONS, **BARE, 'num_classes': 1000, 'img_size': 224}),
         "timm.create_model('beit_plugin_tiny_patch16_224', in_chans=1, use_abs_pos_emb=True, use_rel_pos_bias=False, "
         'qkv_bias=False, patch_norm=True, init_values=0.0, checkpoint_path='),
        (lambda: beit(**{**NAMED, 'num_heads': 6, 'mlp_ratio': 2.5}), ', mlp_ratio=2.5, num_heads=6, '),
        (lambda: beit(use_shared_rel_pos_bias=True, use_mask_token=True, **NAMED),
         ', use_mask_token=True, use_shared_rel_pos_bias=True, '),
        (lambda: mim(use_shared_rel_pos_bias=False, use_mask_token=False, **NAMED),
         ', use_mask_token=False, use_shared_rel_pos_bias=False, '),
        (lambda: mim(use_rel_pos_bias=True, vocab_size=8192, **NAMED),
         "timm.create_model('beit_plugin_tiny_patch16_224_mim', use_rel_pos_bias=True, img_size=(32, 32), check"),
        (lambda: mim_v2(early_layers=9, head_layers=1, **{**NAMED, 'embed_dim': 768, 'num_heads': 12}),
         "timm.create_model('beitv2_plugin_base_patch16_224_mim', img_size=(32, 32), num_classes=11, head_layers=1, "),
        (lambda: mim_v2(early_layers=9, **NAMED),
         'load(model := beit_plugin.models.mim.BeitV2ForMaskedImageModeling(embed_dim=192, '),
        (lambda: segmentor(channels=8, auxiliary_num_convs=2, out_indices=(0, 2, 4, 6), **NAMED),
         "timm.create_model('beit_plugin_tiny_patch16_640_upernet', img_size=(32, 32), num_classes=7, channels=8, "
         'out_indices=(0, 2, 4, 6), auxiliary_channels=6, auxiliary_num_convs=2, auxiliary_concat_input=True, '),
        (lambda: segmentor(**{**NAMED, 'auxiliary_concat_input': False, 'auxiliary_channels': 192,
                              'auxiliary_num_convs': 0}), ', auxiliary_channels=192, auxiliary_num_convs=0, check'),
        (lambda: segmentor(use_auxiliary_head=False, **NAMED), ', use_auxiliary_head=False, '),
        (lambda: segmentor(out_features=['stem', 'stage2', 'stage3', 'stage4'], **NAMED), ", out_features=('stem', "),
        (lambda: backbone(out_indices=None, add_fpn=True, final_norm=True, **NAMED),
         'beit_plugin.checkpoints.load(model := beit_plugin.BeitBackbone(embed_dim=192, num_heads=3, '
         'img_size=(32, 32), add_fpn=True, final_norm=True), '),
        (lambda: backbone(out_indices=None), 'beit_plugin.BeitBackbone(embed_dim=16, depth=5, mlp_ratio=2.0, '),
        (beit, 'beit_plugin.checkpoints.load(model := beit_plugin.Beit(embed_dim=16, depth=5, mlp_ratio=2.0, '),
        (lambda: segmentor(channels=8), 'beit_plugin.segmentation.segmentor.build_segmentor(embed_dim=16, '),
        (lambda: beit(patch_size=8, **NAMED), 'beit_plugin.Beit(embed_dim=192, patch_size=(8, 8), num_heads=3, '),
    ],
)  # fmt: skip
def test_inspect_the_code_it_prints(make, expected, tmp_path, monkeypatch, capsys):
    """Run as printed, it makes the same function."""
    path, model = tmp_path / 'x.pth', randomize(make())
    write_state_dict(model.state_dict(), path)
    line, made = made_by(inspected(monkeypatch, capsys, path))
    assert expected in line and str(path) in line
    x = images(32, 32, channels=next(iter(model.modules())).in_chans if hasattr(model, 'in_chans') else 3)
    assert torch.equal(result(made, x), result(model, x))


@pytest.mark.parametrize(('size', 'options'), [(NAMED, {}), (NAMED, POSITIONS), ({}, {})])
def test_inspect_the_code_for_another_grid(size, options, tmp_path, monkeypatch, capsys):
    path, model = tmp_path / 'x.pth', randomize(beit(img_size=(32, 48), **size, **options))
    write_state_dict(model.state_dict(), path)
    line, made = made_by(inspected(monkeypatch, capsys, path, '--grid', 2, 3))
    assert 'img_size=(32, 48)' in line and made.window_size == (2, 3)
    assert torch.equal(result(made, images(32, 48)), result(model, images(32, 48)))


def test_inspect_what_no_weight_tells(tmp_path, monkeypatch, capsys):
    write_state_dict(beit(**POSITIONS).state_dict(), tmp_path / 'x.pth')
    said = inspected(monkeypatch, capsys, tmp_path / 'x.pth')
    assert 'not told    num_heads: no weight says it' in said and 'Beit(num_heads=..., embed_dim=16' in said
    assert '5 blocks, an unknown number of heads, MLP' in said
    write_state_dict(segmentor(pool_scales=(1, 2), **NAMED).state_dict(), tmp_path / 'y.pth')
    said = inspected(monkeypatch, capsys, tmp_path / 'y.pth')
    assert 'not told    pool_scales: no weight says it' in said and "_upernet', pool_scales=..., " in said


@needs_transformers
@pytest.mark.parametrize('peer', ['encoder', 'encoder with everything', 'classifier of [CLS]', 'mim', 'segmentor'])
def test_inspect_the_code_for_a_folder(peer, tmp_path, monkeypatch, capsys):
    """The configuration of transformers says what weights do not: here the epsilon of the norms, blocks, dropout."""
    theirs, ours = build(PEERS[f'transformers/{peer}'])
    theirs.config.layer_norm_eps = 1e-3
    disk_state(theirs, tmp_path)
    line, made = made_by(inspected(monkeypatch, capsys, tmp_path))
    load(ours, tmp_path)
    for module in ours.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-3
    assert (
        'norm_eps=0.001' in line
        and 'drop_path_rate=0.1' in line
        and ('out_indices=(0, 1, 2, 3)' in line) == (peer == 'segmentor')
    )
    assert torch.equal(result(made, images(32, 32)), result(ours, images(32, 32)))


@needs_transformers
@pytest.mark.parametrize('add_fpn', [True, False])
def test_inspect_the_code_for_a_backbone_of_transformers(add_fpn, tmp_path, monkeypatch, capsys):
    from checkpoints.peers import hf_config
    from transformers.models.beit.modeling_beit import BeitBackbone

    theirs = randomize(BeitBackbone(hf_config(add_fpn=add_fpn))).eval()
    disk_state(theirs, tmp_path)
    _, made = made_by(inspected(monkeypatch, capsys, tmp_path))
    for got, expected in zip(made(images(32, 32)), theirs(images(32, 32)).feature_maps, strict=True):
        assert relative_error(got, expected) <= 1e-5


def test_inspect_which_blocks_a_segmentor_reads(tmp_path, monkeypatch, capsys):
    path, state = tmp_path / 'x.pth', segmentor(out_indices=(0, 1, 2, 3)).state_dict()
    write_state_dict(state, path)
    said = inspected(monkeypatch, capsys, path)
    assert 'taps        outputs of blocks (0, 1, 2, 3), counted from 0\n' in said
    write_state_dict(convert(state, to='transformers'), path)
    said = inspected(monkeypatch, capsys, path)
    rule = 'out_indices=[3, 5, 7, 11] of transformers are blocks (1, 3, 5, 9), counted from 0'
    assert f'taps        not said by the weights; {rule}\n' in said
