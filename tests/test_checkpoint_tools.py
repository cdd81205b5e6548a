"""The two checkpoint tools, as a user starts them."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from checkpoints.peers import (
    CLASSES,
    PEERS,
    backbone,
    beit,
    build,
    disk_state,
    mim,
    mmpretrain_vit,
    mmseg_backbone,
    segmentor,
)
from helpers import images, randomize, relative_error
from tools_common import ROOT

from beit_plugin.checkpoints import convert, detect, load, save
from beit_plugin.checkpoints.files import read_state_dict, write_state_dict

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec('transformers') is None, reason='needs the extra: test'
)


def tool(name, *args, cwd, status=0):
    """What the tool printed; its error output when it is to fail."""
    done = subprocess.run(
        [sys.executable, ROOT / 'tools' / name, *map(str, args)],
        cwd=cwd, capture_output=True, text=True, timeout=120,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)},
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if status else done.stdout


def converted(monkeypatch, capsys, *args):
    """What the tool prints, in this process, which takes a tenth of the time."""
    import convert_checkpoint

    monkeypatch.setattr(sys, 'argv', ['convert_checkpoint.py', *map(str, args)])
    convert_checkpoint.main()
    return capsys.readouterr().out


@needs_transformers
def test_there_and_back(tmp_path):
    """transformers' folder to mmsegmentation's file to a folder again: the same logits by transformers itself."""
    import transformers

    theirs, _ = build(PEERS['transformers/segmentor'])
    theirs.save_pretrained(tmp_path / 'hf')
    said = tool('convert_checkpoint.py', 'hf', 'x.pth', '--to', 'mmseg', cwd=tmp_path)
    assert 'x.pth: the segmentor of transformers as mmseg' in said and 'blocks (0, 1, 2, 3), counted from 0' in said
    assert detect(read_state_dict(tmp_path / 'x.pth'))[:2] == ('mmseg', 'segmentor')
    options = ('--to', 'transformers', '--out-indices', 0, 1, 2, 3)
    assert 'back: the segmentor of mmseg as transformers' in tool(
        'convert_checkpoint.py', 'x.pth', 'back', *options, cwd=tmp_path
    )
    again = transformers.BeitForSemanticSegmentation.from_pretrained(tmp_path / 'back').eval()
    x = images(32, 32)
    assert relative_error(again(x).logits, theirs(x).logits) <= 1e-6
    sentence = tool('convert_checkpoint.py', 'x.pth', 'other', '--to', 'transformers', '--out-indices', 1, 2, 3, 4,
                    cwd=tmp_path, status=1)  # fmt: skip
    assert 'block 4, the last, in out_indices' in sentence and not (tmp_path / 'other').exists()


@needs_transformers
@pytest.mark.parametrize('make', [mim, lambda: beit(num_classes=CLASSES, global_pool='token'), beit])
def test_a_file_to_a_folder(make, tmp_path):
    """The configuration is told from the shapes."""
    import transformers

    ours = randomize(make()).eval()
    drop = () if hasattr(ours, 'lm_head') else ('mask_token',)
    state = convert(ours.state_dict(), to='unilm', drop=drop)
    write_state_dict(state, tmp_path / 'x.pth')
    tool('convert_checkpoint.py', 'x.pth', 'hf', '--to', 'transformers', cwd=tmp_path)
    config = transformers.BeitConfig.from_pretrained(tmp_path / 'hf')
    theirs = getattr(transformers, config.architectures[0]).from_pretrained(tmp_path / 'hf').eval()
    x = images(32, 32)
    if hasattr(ours, 'lm_head'):
        mask = torch.tensor([[True, False, True, True], [False, False, True, False]])
        pair = ours(x, mask, all_logits=True).logits, theirs(x, bool_masked_pos=mask).logits
    elif ours.num_classes:
        pair = ours(x), theirs(x).logits
    else:
        pair = ours.encode(x).pooler_output, theirs(x).pooler_output
    assert relative_error(*pair) <= 1e-5


@pytest.mark.parametrize(
    ('args', 'sentence'),
    [
        (('none.pth', 'y.pth', '--to', 'timm'), 'none.pth does not exist; give the path'),
        (('x.pth', 'y.pth', '--to', 'unilm', '--drop', 'lm_haed'), 'drop names lm_haed, which the checkpoint does not'),
        (('x.pth', 'y', '--to', 'transformers', '--drop', 'lm_head', 'maks'), 'drop names maks, which the checkpoint'),
        (
            ('seg.pth', 'y', '--to', 'transformers', '--out-indices', 1, 2, 3, 9),
            'seg.pth makes no model: out_indices [9] do not exist',
        ),
        (('odd.pth', 'y', '--to', 'transformers'), 'expected blocks.0.gamma_1 with 1 dimension, not 0, got shape ()'),
        (('x.pth', 'y.pth', '--to', 'klingon'), "unknown dialect 'klingon'; known are timm"),
        (('x.pth', 'y', '--to', 'timm'), 'y is no name of a file: end it in one of .safetensors, .pth'),
        (('x.pth', 'no/y.pth', '--to', 'unilm'), 'no/y.pth cannot be written: No such file or directory'),
        (('x.pth', 'y.pth', '--to', 'timm'), 'timm has no mim, only encoder, classifier; name what to leave out by'),
        (
            ('flat.pth', 'y', '--to', 'transformers'),
            'no bias table that tells the number of heads: give it by --num-heads',
        ),
    ],
)
def test_one_sentence(args, sentence, tmp_path):
    write_state_dict(mim().state_dict(), tmp_path / 'x.pth')
    write_state_dict(beit(use_rel_pos_bias=False).state_dict(), tmp_path / 'flat.pth')
    write_state_dict(segmentor().state_dict(), tmp_path / 'seg.pth')
    write_state_dict({**beit().state_dict(), 'blocks.0.gamma_1': torch.tensor(1.0)}, tmp_path / 'odd.pth')
    error = tool('convert_checkpoint.py', *args, cwd=tmp_path, status=1)
    assert error.startswith('error: ') and len(error.strip().splitlines()) == 1 and sentence in error
    assert sorted(os.listdir(tmp_path)) == ['flat.pth', 'odd.pth', 'seg.pth', 'x.pth']


def test_drop_and_grid(tmp_path):
    state = randomize(mim(img_size=(32, 48))).state_dict()
    write_state_dict(state, tmp_path / 'x.pth')
    options = ('--drop', 'mask_token', 'lm_head', '--grid', 2, 3)
    tool('convert_checkpoint.py', 'x.pth', 'y.safetensors', '--to', 'mmseg', *options, cwd=tmp_path)
    model = beit(img_size=(48, 32))
    load(model, tmp_path / 'y.safetensors')  # knows that it is 2x3
    expected = beit(img_size=(48, 32))
    load(expected, state, grid=(2, 3))
    assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))


@needs_transformers
def test_inspect(tmp_path):
    theirs, _ = build(PEERS['transformers/segmentor'])
    disk_state(theirs, tmp_path)
    said = tool('inspect_checkpoint.py', tmp_path, cwd=tmp_path)
    for part in (
        "dialect     transformers, under the prefix 'beit.'",
        'task        segmentor',
        'width 16, 5 blocks, 2 heads, MLP x2',
        '2x2 patches of 16x16, 32x32 pixels',
        'position    rel_pos_bias',
        'outputs     7',
        'taps        outputs of blocks (0, 1, 2, 3), counted from 0',
        'pyramid (11 tensors), decode_head (74 tensors), auxiliary_head (14 tensors)',
        "load_from = '",
    ):
        assert part in said, said


def test_which_blocks_a_segmentor_reads(tmp_path, monkeypatch, capsys):
    """Every conversion of a segmentor says it, with what the weights note or else the rule."""
    path = tmp_path / 'ours.pth'
    write_state_dict(segmentor(out_indices=(0, 1, 2, 3)).state_dict(), path)
    write_state_dict(convert(read_state_dict(path), to='transformers'), tmp_path / 'theirs.pth')
    known = 'it reads the outputs of blocks (0, 1, 2, 3), counted from 0'
    rule = (
        'the out_indices of its configuration say which blocks it reads, not the weights: out_indices=[3, 5, 7, 11] of '
    )
    theirs, ours = 'transformers are blocks (1, 3, 5, 9), counted from 0', '{} are blocks (3, 5, 7, 11), counted from 0'
    for source, to, line in (
        ('ours.pth', 'mmseg', f'{known}: out_indices=[0, 1, 2, 3] of mmseg'),
        ('ours.pth', 'transformers', f'{known}: out_indices=[2, 3, 4, 5] of transformers'),
        ('theirs.pth', 'mmseg', f'{rule}{theirs}; out_indices=[3, 5, 7, 11] of {ours.format("mmseg")}'),
        ('mmseg.pth', 'transformers', f'{rule}{ours.format("mmseg")}; out_indices=[3, 5, 7, 11] of {theirs}'),
        ('mmseg.pth', 'unilm', f'{rule}{ours.format("mmseg")}; out_indices=[3, 5, 7, 11] of {ours.format("unilm")}'),
        ('unilm.pth', 'unilm', f'{rule}{ours.format("unilm")}'),
    ):
        said = converted(monkeypatch, capsys, tmp_path / source, tmp_path / f'{to}.pth', '--to', to)
        assert said.splitlines()[1:] == [line]
    write_state_dict(segmentor(out_indices=(0, 1, 2, 4)).state_dict(), path)
    said = converted(monkeypatch, capsys, path, tmp_path / 'y.pth', '--to', 'transformers')
    assert said.endswith('blocks (0, 1, 2, 4), counted from 0: no out_indices of transformers say this\n')
    drop = ('--drop', 'decode_head', 'auxiliary_head', 'pyramid')
    said = converted(monkeypatch, capsys, path, tmp_path / 'y.pth', '--to', 'mmseg', *drop)
    assert said.endswith('blocks (0, 1, 2, 4), counted from 0\n')
    said = converted(monkeypatch, capsys, path, tmp_path / 'y.pth', '--to', 'native', '--drop', '_extra_state')
    assert '_extra_state' not in read_state_dict(tmp_path / 'y.pth')
    write_state_dict(beit().state_dict(), path)
    assert len(converted(monkeypatch, capsys, path, tmp_path / 'y.pth', '--to', 'unilm').splitlines()) == 1


@needs_transformers
def test_a_segmentor_of_transformers_as_a_file_of_ours(tmp_path, monkeypatch, capsys):
    """The blocks that its configuration names go into the file."""
    theirs, ours = build(PEERS['transformers/segmentor'])
    disk_state(theirs, tmp_path)
    said = converted(monkeypatch, capsys, tmp_path, tmp_path / 'x.pth', '--to', 'native')
    assert said.endswith('blocks (0, 1, 2, 3), counted from 0: out_indices=[0, 1, 2, 3] of native\n')
    ours = segmentor().eval()  # reads blocks 0, 1, 2, 4 until it is told otherwise
    load(ours, tmp_path / 'x.pth')
    assert relative_error(ours(images(32, 32)), theirs(images(32, 32)).logits) <= 1e-5


@pytest.mark.parametrize('to', ['mmseg', 'mmpretrain', 'unilm'])
def test_the_index_of_a_grid_that_is_not_square(to, tmp_path, monkeypatch, capsys):
    """The file has the index that the host makes, and loads into it with strict=True."""
    pytest.importorskip('mmpretrain' if to == 'mmpretrain' else 'mmseg')
    options = dict(img_size=(32, 48))
    host = mmpretrain_vit(**options) if to == 'mmpretrain' else mmseg_backbone(**options)
    model = beit(**options) if to == 'mmpretrain' else backbone(**options)
    write_state_dict(model.state_dict(), tmp_path / 'x.pth')
    save(model, tmp_path / 'saved.pth', dialect=to)
    converted(monkeypatch, capsys, tmp_path / 'x.pth', tmp_path / 'y.pth', '--to', to, '--grid', 2, 3)
    expected = host.state_dict()['layers.0.attn.relative_position_index']
    for name in ('saved.pth', 'y.pth'):
        state = read_state_dict(tmp_path / name)
        indices = [tensor for name, tensor in state.items() if name.endswith('relative_position_index')]
        assert len(indices) == 5 and all(torch.equal(index, expected) for index in indices)
        if to != 'unilm':
            host.load_state_dict(state, strict=True)


def test_inspect_something_else(tmp_path):
    write_state_dict({'conv.weight': torch.ones(1)}, tmp_path / 'x.pth')
    assert 'error: no BEiT encoder of a known dialect' in tool('inspect_checkpoint.py', 'x.pth', cwd=tmp_path, status=1)
    state = beit().state_dict()
    write_state_dict({**state, 'more': torch.ones(1)}, tmp_path / 'y.pth')
    assert '1 tensors that no table knows: more' in tool('inspect_checkpoint.py', 'y.pth', cwd=tmp_path)
    del state['patch_embed.proj.weight']
    write_state_dict(state, tmp_path / 'z.pth')
    sentence = tool('inspect_checkpoint.py', 'z.pth', cwd=tmp_path, status=1)
    assert 'expected patch_embed.proj.weight with 4 dimensions, none of them 0, got nothing; the checkpoint' in sentence
    state = beit(img_size=(32, 48), use_rel_pos_bias=False, use_abs_pos_emb=True).state_dict()
    write_state_dict(dict(state), tmp_path / 'w.pth')  # states no grid
    sentence = tool('inspect_checkpoint.py', 'w.pth', cwd=tmp_path, status=1)
    assert 'which is not of a square grid; give the grid' in sentence and len(sentence.strip().splitlines()) == 1
