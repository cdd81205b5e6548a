"""The official files. unilm installs nowhere today, so they are made from its published names and shapes, and other
libraries that read them say what they mean: timm's filter, mmsegmentation's converter, mmpretrain's models."""

import importlib.util

import pytest
import torch
from checkpoints.peers import (
    CLASSES,
    DEPTH,
    DIM,
    HEADS,
    TAPS,
    VOCABULARY,
    MMPretrainer,
    all_logits,
    beit,
    mim,
    mim_v2,
    mmseg_backbone,
    mmseg_segmentor,
    segmentor,
    timm_beit,
)
from helpers import images, relative_error

from beit_plugin.checkpoints import CheckpointError, convert, detect, load, save
from beit_plugin.checkpoints.files import read_state_dict
from beit_plugin.models.relative_position import relative_position_index

needs_mmseg = pytest.mark.skipif(importlib.util.find_spec('mmseg') is None, reason="pip install 'beit-plugin[mmseg]'")
needs_mmpretrain = pytest.mark.skipif(
    importlib.util.find_spec('mmpretrain') is None, reason="pip install 'beit-plugin[mmpretrain]'"
)
ROWS = 3 * 3 + 3  # of the table of a 2x2 grid


def block(prefix, table):
    shapes = {
        'gamma_1': (DIM,), 'gamma_2': (DIM,), 'norm1.weight': (DIM,), 'norm1.bias': (DIM,), 'attn.q_bias': (DIM,),
        'attn.v_bias': (DIM,), 'attn.qkv.weight': (3 * DIM, DIM), 'attn.proj.weight': (DIM, DIM),
        'attn.proj.bias': (DIM,), 'norm2.weight': (DIM,), 'norm2.bias': (DIM,), 'mlp.fc1.weight': (2 * DIM, DIM),
        'mlp.fc1.bias': (2 * DIM,), 'mlp.fc2.weight': (DIM, 2 * DIM), 'mlp.fc2.bias': (DIM,),
    }  # fmt: skip
    if table:
        shapes['attn.relative_position_bias_table'] = (ROWS, HEADS)
        shapes['attn.relative_position_index'] = 'index'
    return {f'{prefix}.{name}': shape for name, shape in shapes.items()}


def shapes(task, v2=False):
    """Names and shapes of unilm's files: beit/modeling_finetune.py, beit/modeling_pretrain.py,
    beit2/modeling_pretrain.py and beit/semantic_segmentation/backbone/beit.py at 80d673a."""
    stem = {'cls_token': (1, 1, DIM), 'patch_embed.proj.weight': (DIM, 3, 16, 16), 'patch_embed.proj.bias': (DIM,)}
    if task == 'mim':
        stem |= {
            'mask_token': (1, 1, DIM),
            'rel_pos_bias.relative_position_bias_table': (ROWS, HEADS),
            'rel_pos_bias.relative_position_index': 'index',
        }
    for i in range(DEPTH):
        stem |= block(f'blocks.{i}', table=task != 'mim')
    if v2:
        for i in range(2):
            stem |= block(f'cls_pt_layers.{i}', table=False)
    norm = {'weight': (DIM,), 'bias': (DIM,)}
    if task == 'mim':
        stem |= {f'norm.{k}': s for k, s in norm.items()}
        return stem | {'lm_head.weight': (VOCABULARY, DIM), 'lm_head.bias': (VOCABULARY,)}
    if task == 'classifier':
        stem |= {f'fc_norm.{k}': s for k, s in norm.items()}
        return stem | {'head.weight': (CLASSES, DIM), 'head.bias': (CLASSES,)}
    batch_norm = {'weight': 'var', 'bias': 0, 'running_mean': 0, 'running_var': 'var', 'num_batches_tracked': 'count'}

    def conv(name, out, width, side):
        return {f'{name}.conv.weight': (out, width, side, side)} | {
            f'{name}.bn.{k}': kind if isinstance(kind, str) and kind == 'count' else (out,)
            for k, kind in batch_norm.items()
        }

    double = {'weight': (DIM, DIM, 2, 2), 'bias': (DIM,)}
    for name in ('fpn1.0', 'fpn1.3', 'fpn2.0'):
        stem |= {f'{name}.{k}': s for k, s in double.items()}
    stem |= {f'fpn1.1.{k}': 'count' if kind == 'count' else (DIM,) for k, kind in batch_norm.items()}
    state = {f'backbone.{name}': shape for name, shape in stem.items()}
    for i in range(4):
        state |= conv(f'decode_head.psp_modules.{i}.1', DIM, DIM, 1)
    state |= conv('decode_head.bottleneck', DIM, 5 * DIM, 3) | conv('decode_head.fpn_bottleneck', DIM, 4 * DIM, 3)
    for i in range(3):
        state |= conv(f'decode_head.lateral_convs.{i}', DIM, DIM, 1) | conv(f'decode_head.fpn_convs.{i}', DIM, DIM, 3)
    state |= conv('auxiliary_head.convs.0', 6, DIM, 3) | conv('auxiliary_head.conv_cat', 6, DIM + 6, 3)
    for head, width in (('decode_head', DIM), ('auxiliary_head', 6)):
        state |= {f'{head}.conv_seg.weight': (CLASSES, width, 1, 1), f'{head}.conv_seg.bias': (CLASSES,)}
    return state


def unilm(task, v2=False):
    """A file of random numbers."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes(task, v2).items():
        if shape == 'index':
            state[name] = relative_position_index(2, 2)
        elif shape == 'count':
            state[name] = torch.tensor(12)
        else:
            fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else 4
            tensor = torch.randn(shape, generator=generator) * fan_in**-0.5
            state[name] = tensor.abs() + 0.5 if name.endswith('running_var') else tensor
    return state


@pytest.mark.parametrize(
    'wrap', [lambda s: {'model': s}, lambda s: {'model': {'module': s}}, lambda s: {'state_dict': s}]
)
def test_fine_tuned(wrap, tmp_path):
    """timm's filter reads the file, its strict load confirms names and shapes."""
    from timm.models.beit import checkpoint_filter_fn

    state = unilm('classifier')
    assert detect(state)[:3] == ('unilm', 'classifier', '')
    theirs, ours = timm_beit(num_classes=CLASSES).eval(), beit(num_classes=CLASSES).eval()
    theirs.load_state_dict(checkpoint_filter_fn({'model': state}, theirs), strict=True)
    torch.save(wrap(state), tmp_path / 'x.pth')
    report = load(ours, tmp_path / 'x.pth')
    assert (report.dialect, report.task, report.fresh, report.dropped) == ('unilm', 'classifier', (), ())
    x = images(32, 32)
    assert relative_error(ours(x), theirs(x)) <= 1e-5
    assert_written(ours, state, tmp_path, drop=('mask_token',))


def assert_written(model, state, folder, drop=()):
    save(model, folder / 'back.pth', dialect='unilm', drop=drop)
    written = read_state_dict(folder / 'back.pth')
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in state)


@needs_mmpretrain
@pytest.mark.parametrize('v2', [False, True])
def test_pre_trained(v2, tmp_path):
    state = unilm('mim', v2)
    assert detect(state)[:3] == ('unilm', 'mim', '')
    ours, theirs = (mim_v2 if v2 else mim)().eval(), MMPretrainer(v2).eval()
    load(ours, state)
    theirs.load_state_dict(convert(state, to='mmpretrain'), strict=True)
    x = images(32, 32)
    assert max(map(relative_error, all_logits(ours, x), theirs(x))) <= 1e-5
    assert_written(ours, state, tmp_path)


@needs_mmseg
def test_segmentor(tmp_path):
    from mmseg.models.backbones import BEiT

    state = unilm('segmentor')
    assert detect(state)[:3] == ('unilm', 'segmentor', 'backbone.')
    ours, theirs = segmentor(out_indices=TAPS).eval(), mmseg_segmentor().eval()
    load(ours, state)
    theirs.load_state_dict(convert(state, to='mmseg'), strict=True)
    x = images(32, 32)
    assert relative_error(ours(x), theirs(x, mode='tensor')) <= 1e-5
    assert_written(ours, state, tmp_path)
    # the pyramid was trained inside the backbone there; in a backbone with a pyramid of ours it stays so
    assert isinstance(theirs.backbone, BEiT)


def beit2mmseg(state):
    """mmsegmentation's own converter, from its wheel."""
    from pathlib import Path

    import mmseg

    path = Path(mmseg.__file__).parent / '.mim/tools/model_converters/beit2mmseg.py'
    spec = importlib.util.spec_from_file_location('beit2mmseg', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.convert_beit(state))


@needs_mmseg
@pytest.mark.parametrize('task', ['classifier', 'mim'])
def test_what_mmsegmentations_converter_leaves(task):
    """Everything is in such a file: the patch embedding twice, heads by unilm's names."""
    import beit_plugin.mm  # noqa: F401

    state = unilm(task)
    converted = beit2mmseg(state)
    assert 'patch_embed.proj.weight' in converted and 'patch_embed.projection.weight' in converted
    found = detect(converted)
    assert (found.dialect, found.unknown) == ('mmseg', ())
    ours = beit(num_classes=CLASSES if task == 'classifier' else 0).eval()
    report = load(ours, converted)
    direct = beit(num_classes=CLASSES if task == 'classifier' else 0).eval()
    direct.load_state_dict(ours.state_dict())
    load(direct, state)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), direct.state_dict().values(), strict=True))
    assert report.dropped == (() if task == 'classifier' else ('mask_token', 'norm', 'lm_head'))
    theirs = mmseg_backbone()
    theirs.load_state_dict(converted, strict=False)
    assert torch.equal(theirs.layers[1].ln1.weight, ours.blocks[1].norm1.weight)


def test_pre_trained_for_fine_tuning():
    """The shared table starts every block, the head of the pre-training is dropped by name."""
    state = unilm('mim', v2=True)
    model = beit(num_classes=CLASSES)
    report = load(model, state)
    assert report.fresh == ('fc_norm', 'head')
    assert set(report.dropped) == {'mask_token', 'norm', 'lm_head', 'cls_pt_layers'}
    table = state['rel_pos_bias.relative_position_bias_table']
    assert all(torch.equal(b.attn.relative_position_bias_table, table) for b in model.blocks)
    with pytest.raises(CheckpointError, match='mmseg has no mim, only encoder, segmentor'):
        convert(state, to='mmseg')
    parts = ('mask_token', 'norm', 'lm_head', 'cls_pt_layers')
    expanded = convert(state, to='mmseg', drop=parts)
    assert torch.equal(expanded['layers.3.attn.relative_position_bias_table'], table)
    assert not any('rel_pos_bias.' in name for name in expanded)
