"""The two checkpoint tools, as a user starts them."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from checkpoints.peers import CLASSES, PEERS, beit, build, disk_state, mim, mim_v2, segmentor
from helpers import images, randomize, relative_error
from tools_common import ROOT

from beit_plugin.checkpoints import convert, detect, load
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
    error = tool('convert_checkpoint.py', *args, cwd=tmp_path, status=1)
    assert error.startswith('error: ') and len(error.strip().splitlines()) == 1 and sentence in error
    assert sorted(os.listdir(tmp_path)) == ['flat.pth', 'x.pth']


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


def test_inspect_the_code_it_prints(tmp_path):
    """The line for timm runs."""
    import timm  # noqa: F401

    import beit_plugin  # noqa: F401

    for name, model in (
        ('a.pth', beit(embed_dim=192, depth=12, num_heads=3, mlp_ratio=4.0, num_classes=CLASSES, global_pool='token')),
        ('b.pth', mim_v2(embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0, early_layers=9)),
        ('c.pth', segmentor(embed_dim=192, depth=12, num_heads=3, mlp_ratio=4.0, auxiliary_channels=256,
                            auxiliary_concat_input=False)),
    ):  # fmt: skip
        path = tmp_path / name
        write_state_dict(model.state_dict(), path)
        said = tool('inspect_checkpoint.py', path, cwd=tmp_path)
        (line,) = [line for line in said.splitlines() if 'timm.create_model' in line]
        made = eval(line)
        assert torch.equal(next(iter(made.state_dict().values())), next(iter(model.state_dict().values())))


def test_inspect_something_else(tmp_path):
    write_state_dict({'conv.weight': torch.ones(1)}, tmp_path / 'x.pth')
    assert 'error: no BEiT encoder of a known dialect' in tool('inspect_checkpoint.py', 'x.pth', cwd=tmp_path, status=1)
    state = beit().state_dict()
    write_state_dict({**state, 'more': torch.ones(1)}, tmp_path / 'y.pth')
    assert '1 tensors that no table knows: more' in tool('inspect_checkpoint.py', 'y.pth', cwd=tmp_path)
    del state['patch_embed.proj.weight']
    write_state_dict(state, tmp_path / 'z.pth')
    sentence = tool('inspect_checkpoint.py', 'z.pth', cwd=tmp_path, status=1)
    assert 'expected patch_embed.proj.weight with 4 dimensions, got nothing; the checkpoint is not whole' in sentence
