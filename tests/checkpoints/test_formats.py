"""Files as people have them: extras of trainers, other patches and grids, parts of larger models, odd tensors."""

import argparse
import importlib.util
import os
import stat
import warnings

import pytest
import timm
import torch
from checkpoints.peers import CLASSES, DEPTH, DIM, HEADS, VOCABULARY, backbone, beit, mim, mim_v2, segmentor
from helpers import images, randomize, relative_error
from timm.layers import resample_patch_embed
from torch import nn

import beit_plugin  # noqa: F401  registers
from beit_plugin.checkpoints import CheckpointError, convert, load, save
from beit_plugin.checkpoints.files import read_state_dict
from beit_plugin.models.resample import resize_abs_pos_embed, resize_rel_pos_bias_table

SIZES = dict(img_size=32, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, mlp_ratio=2.0)
NAME = 'beit_plugin_base_patch16_224'
TABLE = 'blocks.1.attn.relative_position_bias_table'


class TestTrainers:
    def test_of_timm(self, tmp_path):
        """Arguments as a Namespace, optimiser, average."""
        state = randomize(beit()).state_dict()
        whole = {'state_dict': state, 'args': argparse.Namespace(lr=1e-3), 'optimizer': {'state': {}}, 'metric': 81.5}
        torch.save({**whole, 'state_dict_ema': {}}, tmp_path / 'last.pth.tar')  # an average that was never taken
        model = beit()
        load(model, tmp_path / 'last.pth.tar')
        assert torch.equal(model.cls_token, state['cls_token'])

    @pytest.mark.skipif(importlib.util.find_spec('mmengine') is None, reason="pip install 'beit-plugin[mmseg]'")
    def test_of_mmengine(self, tmp_path):
        """With its message hub, in a process that has mmengine's classes and in one that does not allow them."""
        from mmengine.logging import HistoryBuffer

        history = HistoryBuffer([0.5, 0.25], [1, 1])
        state = randomize(segmentor(out_indices=(0, 2, 3, 4))).state_dict()
        hub = dict(log_scalars={'loss': history}, statistics=[getattr(HistoryBuffer, 'mean')])  # noqa: B009
        torch.save({'meta': {'iter': 3}, 'state_dict': state, 'message_hub': hub}, tmp_path / 'iter_3.pth')
        assert read_state_dict(tmp_path / 'iter_3.pth').keys() == state.keys()
        script = (
            'import sys; from beit_plugin.checkpoints.files import read_state_dict; '
            "print(len(read_state_dict(sys.argv[1]))); assert 'mmengine' not in sys.modules"
        )
        import subprocess
        import sys

        out = subprocess.run([sys.executable, '-c', script, tmp_path / 'iter_3.pth'], capture_output=True, text=True)
        assert out.stdout.strip() == str(len(state)), out.stderr

    def test_a_wrapper_that_holds_itself(self, tmp_path):
        endless = {}
        endless['model'] = endless
        torch.save(endless, tmp_path / 'x.pth')
        with pytest.raises(CheckpointError, match='holds no tensors by name'):
            load(beit(), tmp_path / 'x.pth')

    def test_files_have_the_usual_permissions(self, tmp_path):
        save(beit(), tmp_path / 'x.pth')
        (tmp_path / 'y').touch()
        assert stat.S_IMODE(os.stat(tmp_path / 'x.pth').st_mode) == stat.S_IMODE(os.stat(tmp_path / 'y').st_mode)

    def test_torchscript(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch calls its own format deprecated
            torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / 'x.pt')
        with pytest.raises(CheckpointError, match=r'x\.pt is a TorchScript program; save the state_dict'):
            load(beit(), tmp_path / 'x.pt')


class TestSizes:
    @pytest.mark.parametrize('patch', [8, 14, 32])
    def test_patch_kernel(self, patch):
        source = randomize(beit()).state_dict()
        model = beit(patch_size=patch, img_size=2 * patch)
        load(model, source)
        expected = resample_patch_embed(source['patch_embed.proj.weight'], [patch, patch])
        assert torch.equal(model.patch_embed.proj.weight, expected)
        assert torch.equal(model.state_dict()[TABLE], source[TABLE])  # the grid is the same

    @pytest.mark.parametrize('size', [(48, 80), (80, 48)])
    def test_positions(self, size):
        options = dict(use_abs_pos_emb=True, use_rel_pos_bias=False)
        source = dict(randomize(beit(**options, img_size=(32, 64))).state_dict())  # states no grid
        model = beit(**options, img_size=size)
        load(model, source, grid=(2, 4))
        grid = size[0] // 16, size[1] // 16
        assert torch.equal(model.pos_embed, resize_abs_pos_embed(source['pos_embed'], (2, 4), grid))
        with pytest.raises(CheckpointError, match=r'pos_embed of 9 tokens is of no square grid and not of \(\d, \d\)'):
            load(model, source)

    def test_as_long_as_a_square(self, caplog):
        """18x32 patches have as many positions as 24x24, and 25x41 as long tables as 32x32."""
        positions = dict(use_abs_pos_emb=True, use_rel_pos_bias=False)
        for options, size, square in ((positions, (288, 512), 384), (dict(), (400, 656), 512)):
            source = dict(randomize(beit(**options, img_size=square)).state_dict())  # states no grid
            model = beit(**options, img_size=size)
            with pytest.raises(CheckpointError, match=r'say which it was trained at: .*grid=\(h, w\)'):
                load(model, source)
            load(model, source, grid=(square // 16, square // 16))
            name = 'pos_embed' if options else TABLE
            assert not torch.equal(model.state_dict()[name], source[name])
            # a host that resumes such a model must find its own values
            own = timm.create_model(NAME, **{**SIZES, 'img_size': size}, num_classes=0, **options)
            state = {n: t.clone() for n, t in randomize(own).state_dict().items()}
            own.load_state_dict(state)
            assert torch.equal(own.state_dict()[name], state[name]) and "taken for the model's" in caplog.text
            caplog.clear()

    @pytest.mark.parametrize('dialect', ['unilm', 'mmpretrain'])
    def test_the_index_says_the_grid(self, dialect, tmp_path):
        source = randomize(beit(img_size=(32, 48)))
        save(source, tmp_path / 'x.pth', dialect=dialect)
        model = beit(img_size=(48, 32))  # tables of the same length
        load(model, tmp_path / 'x.pth')
        expected = resize_rel_pos_bias_table(source.state_dict()[TABLE], (2, 3), (3, 2))
        assert torch.equal(model.state_dict()[TABLE], expected)
        back = convert(convert(read_state_dict(tmp_path / 'x.pth'), to='transformers'), to=dialect, grid=(2, 3))
        assert all(torch.equal(t, back[n]) for n, t in read_state_dict(tmp_path / 'x.pth').items())
        state = read_state_dict(tmp_path / 'x.pth')
        index = next(name for name in state if name.endswith('relative_position_index'))
        with pytest.raises(CheckpointError, match=r'is not the index of any grid; leave it out by drop='):
            load(model, {**state, index: state[index].flip(0)})

    def test_shared_table_on_top_of_own_ones(self):
        source = randomize(beit(use_shared_rel_pos_bias=True))
        state = source.state_dict()
        model = beit()
        load(model, state)
        shared = state['rel_pos_bias.relative_position_bias_table']
        assert torch.equal(model.state_dict()[TABLE], state[TABLE] + shared)
        x = images(32, 32)
        assert relative_error(model.eval()(x), source.eval()(x)) <= 1e-5
        with pytest.raises(CheckpointError, match='and the shared bias table have different shapes'):
            load(model, {**state, TABLE: torch.zeros(30, HEADS)})


class TestParts:
    def test_pooling(self):
        mean, cls = (randomize(beit(num_classes=CLASSES, global_pool=pool)).state_dict() for pool in ('avg', 'token'))
        for state, pool, norm in ((mean, 'token', 'norm'), (cls, 'avg', 'fc_norm')):
            model = beit(num_classes=CLASSES, global_pool=pool)
            with pytest.raises(CheckpointError, match=f'was trained without {norm}, which this model has'):
                load(model, state)
            assert load(model, state, drop=('head',)).fresh == (norm, 'head')

    @pytest.mark.parametrize('missing', ['norm', 'mask_token'])
    def test_head_of_the_pre_training_alone(self, missing):
        state = {n: t for n, t in mim().state_dict().items() if not n.startswith(missing)}
        with pytest.raises(CheckpointError, match='the head of the pre-training came without'):
            load(mim(), state)

    @pytest.mark.parametrize('dialect', ['unilm', 'mmseg', 'openmmlab', 'transformers', 'transformers-v5', 'native'])
    @pytest.mark.parametrize('make', [beit, mim, backbone])
    def test_encoder_of_a_segmentor(self, dialect, make):
        source = randomize(segmentor(out_indices=(0, 2, 3, 4))).state_dict()
        model = make(use_rel_pos_bias=True, use_shared_rel_pos_bias=False)
        report = load(model, convert(source, to=dialect))
        name = 'blocks.2.mlp.fc1.weight'
        assert torch.equal(model.state_dict()[name], source[f'backbone.{name}'])
        assert {'pyramid', 'decode_head', 'auxiliary_head'} <= set(report.dropped)

    def test_whole_and_in_parts(self):
        state = convert(beit().state_dict(), to='transformers')
        state['encoder.layer.1.attention.attention.qkv.weight'] = torch.zeros(3 * DIM, DIM)
        with pytest.raises(CheckpointError, match=r'no table knows encoder\.layer\.1\.attention\.attention\.qkv'):
            load(beit(), state)
        twice = {**beit().state_dict(), 'module.cls_token': torch.zeros(1, 1, DIM)}
        with pytest.raises(CheckpointError, match=r'no table knows module\.cls_token'):
            load(beit(), twice)

    def test_inside_a_larger_model(self):
        class Detector(nn.Module):
            def __init__(self):
                super().__init__()
                self.backbone = backbone()
                self.neck = nn.Conv2d(DIM, 4, 1)
                self.roi_head = nn.Linear(4, 2)

        first, second = randomize(Detector()), randomize(Detector(), seed=1)
        neck = second.neck.weight.clone()
        report = load(second, {n: t for n, t in beit().state_dict().items() if not n.startswith('fc_norm')})
        assert report.fresh == ('other',) and torch.equal(second.neck.weight, neck)
        load(second, first.state_dict())
        assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
        with pytest.raises(CheckpointError, match=r'it lacks roi_head\.weight'):
            load(second, {n: t for n, t in first.state_dict().items() if n != 'roi_head.weight'})

    def test_backbone_without_a_pyramid(self, tmp_path):
        model = randomize(backbone())
        state = convert(model.state_dict(), to='transformers-v5', task='backbone')
        assert all(name.startswith('beit.') for name in state)
        save(model, tmp_path / 'x.pth', dialect='transformers-v5')
        assert read_state_dict(tmp_path / 'x.pth').keys() == state.keys()
        save(model, tmp_path / 'y.pth', dialect='mmseg')  # which has no backbone apart from the encoder

    @pytest.mark.parametrize('dialect', ['unilm', 'mmpretrain'])
    def test_branch_of_v2_with_own_tables(self, dialect, tmp_path):
        model = randomize(mim_v2(use_rel_pos_bias=True, use_shared_rel_pos_bias=False))
        save(model, tmp_path / 'x.pth', dialect=dialect)
        twin = randomize(mim_v2(use_rel_pos_bias=True, use_shared_rel_pos_bias=False), seed=1)
        load(twin, tmp_path / 'x.pth')
        assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))
        assert twin.lm_head.out_features == VOCABULARY


class TestTimmIsNotStrict:
    """With another number of classes timm itself ignores what does not match."""

    def create(self, path, classes, name=NAME, **options):
        file = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=CLASSES))
        return timm.create_model(name, **{**SIZES, **options}, num_classes=classes, **file)

    @pytest.mark.parametrize('classes', [0, 3, CLASSES])
    def test_encoder(self, classes, tmp_path):
        state = randomize(beit(num_classes=CLASSES)).state_dict()
        torch.save(state, tmp_path / 'good.pth')
        assert torch.equal(self.create(tmp_path / 'good.pth', classes).cls_token, state['cls_token'])
        for options in (dict(depth=8), dict(depth=3)):
            with pytest.raises(CheckpointError, match=r'does not fit Beit: (it lacks|the model has no) blocks'):
                self.create(tmp_path / 'good.pth', classes, **options)
        state['blocks.1.attn.qqkv.weight'] = state.pop('blocks.1.attn.qkv.weight')
        torch.save(state, tmp_path / 'x.pth')
        with pytest.raises(CheckpointError, match=r'no table knows blocks\.1\.attn\.qqkv\.weight; it lacks blocks\.1'):
            self.create(tmp_path / 'x.pth', classes)

    def test_a_classifier_that_is_missing(self, tmp_path):
        torch.save(beit().state_dict(), tmp_path / 'x.pth')
        with pytest.raises(RuntimeError, match='Missing key'):
            self.create(tmp_path / 'x.pth', CLASSES)

    def test_segmentor(self, tmp_path):
        options = dict(auxiliary_channels=6, auxiliary_concat_input=True, out_indices=(0, 2, 3, 4))
        name = 'beit_plugin_tiny_patch16_640_upernet'
        state = randomize(segmentor(out_indices=(0, 2, 3, 4))).state_dict()
        torch.save(state, tmp_path / 'x.pth')
        model = self.create(tmp_path / 'x.pth', 9, name, **options)  # both classifiers are new
        assert model.decode_head.conv_seg.out_channels == model.auxiliary_head.conv_seg.out_channels == 9
        assert torch.equal(model.decode_head.bottleneck.conv.weight, state['decode_head.bottleneck.conv.weight'])
        torch.save({n: t for n, t in state.items() if 'upsample_2x' not in n}, tmp_path / 'y.pth')
        with pytest.raises(CheckpointError, match=r'it lacks pyramid\.upsample_2x'):
            self.create(tmp_path / 'y.pth', 9, name, **options)


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        (lambda s: s.update(cls_token=torch.zeros(1, 1, DIM, device='meta')), 'with values, got one on the meta'),
        (lambda s: s.update(cls_token=torch.zeros(1, 1, DIM).to_sparse()), 'must be a plain tensor with values'),
        (lambda s: s.update({'patch_embed.proj.weight': torch.zeros(DIM, 3, 0, 0)}), r'of shape \(16, 3, 0, 0\)'),
        (lambda s: s.update({TABLE: torch.tensor(1.0)}), r'is \(\) instead of \(12, 2\)'),
        (lambda s: s.update({'blocks.77.norm1.weight': torch.ones(DIM)}), 'without a gap, but there is no block 5'),
        (lambda s: s.update({TABLE: torch.zeros(11, HEADS)}), 'a bias table of 11 rows is of no square grid'),
    ],
)
def test_odd_tensors(change, sentence):
    state = beit().state_dict()
    change(state)
    with pytest.raises(CheckpointError, match=sentence):
        load(beit(), state)


@pytest.mark.parametrize('rows', [49, 2])
def test_thirds_that_are_none(rows):
    state = {**beit().state_dict(), 'blocks.0.attn.qkv.weight': torch.zeros(rows, DIM)}
    with pytest.raises(CheckpointError, match='must hold q, k and v one below the other, got'):
        convert(state, to='transformers')
    split = convert(beit().state_dict(), to='transformers')
    for part in ('query', 'key', 'value'):
        split[f'encoder.layer.0.attention.attention.{part}.weight'] = torch.tensor(1.0)
    with pytest.raises(CheckpointError, match='must have one shape and dtype'):
        convert(split, to='timm')
    with pytest.raises(CheckpointError, match='must have two dimensions, got shape'):
        convert({**beit().state_dict(), TABLE: torch.tensor(1.0)}, to='unilm', drop=('fc_norm',))


def test_models_without_values(tmp_path):
    with torch.device('meta'):
        model = beit()
    for act in (lambda: load(model, beit().state_dict()), lambda: save(model, tmp_path / 'x.pth')):
        with pytest.raises(CheckpointError, match=r"have no values yet; call model.to_empty\(device='cpu'\) first"):
            act()


@pytest.mark.parametrize('source', [None, 3])
def test_no_source(source):
    with pytest.raises(
        CheckpointError, match=f'expected a path, URL, hub id or state dict as a checkpoint, got {source}'
    ):
        load(beit(), source)


def test_a_typo_in_drop():
    state = beit().state_dict()
    for act in (lambda: load(beit(), state, drop=('heaad',)), lambda: convert(state, to='unilm', drop=('heaad',))):
        with pytest.raises(CheckpointError, match='drop names heaad, which the checkpoint does not have'):
            act()
    assert load(beit(), state, drop=('head',)).loaded  # a part that there may be


@pytest.mark.parametrize('grid', [(2,), (2, 0), (2.0, 2)])
def test_a_grid_that_is_none(grid):
    with pytest.raises(CheckpointError, match=r'grid must be two whole numbers of patches \(h, w\), got'):
        load(beit(), beit().state_dict(), grid=grid)
