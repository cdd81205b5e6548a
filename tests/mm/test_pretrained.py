"""BEiTBackbone and checkpoints: init_cfg=dict(type='Pretrained', ...), and the pyramid that it has inside."""

import importlib.util
from collections import OrderedDict

import pytest
import torch
from checkpoints.peers import DEPTH, DIM, HEADS, PEERS, SIZE, TAPS, build, disk_state, segmentor
from checkpoints.peers import mmseg_segmentor as encoder_decoder
from helpers import images, randomize, relative_error

if importlib.util.find_spec('mmseg') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  first: makes mmseg importable

# isort: split

from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint

from beit_plugin.checkpoints import CheckpointError, convert, load, save

BACKBONE = dict(type='BEiTBackbone', img_size=SIZE, embed_dims=DIM, num_layers=DEPTH, num_heads=HEADS, mlp_ratio=2,
                out_indices=TAPS, norm_cfg=dict(type='LN', eps=1e-6))  # fmt: skip


def logits(model):
    return model.eval()(images(SIZE, SIZE), mode='tensor')


@pytest.mark.parametrize(
    'name', ['timm/encoder', 'transformers/mim', 'transformers/segmentor', 'mmpretrain/mim', 'mmseg/segmentor']
)
def test_init_cfg_reads_every_dialect_and_grid(name, tmp_path):
    for need in PEERS[name].needs:
        pytest.importorskip(need)
    theirs, _ = build(PEERS[name])
    path = tmp_path / 'x.pth'
    torch.save(disk_state(theirs, tmp_path) if PEERS[name].dialect == 'transformers' else theirs.state_dict(), path)
    cfg = {**BACKBONE, 'img_size': (48, 80), 'init_cfg': dict(type='Pretrained', checkpoint=str(path))}
    model = MODELS.build(cfg)
    model.init_weights()
    native = MODELS.build(BACKBONE)
    load(native, path)
    got, expected = model(images(48, 80)), native(images(48, 80))
    assert max(map(relative_error, got, expected)) <= 1e-5


class TestPyramidInside:
    """BEiTBackbone(add_fpn=True) and no neck: the pyramid of every file is that of the backbone."""

    def inside(self):
        model = encoder_decoder(ours=True)
        del model.neck
        model.backbone = MODELS.build({**BACKBONE, 'add_fpn': True, 'fpn_norm_cfg': dict(type='BN')})
        return randomize(model, seed=1)

    @pytest.mark.parametrize(
        'dialect, extra',
        [
            *((dialect, {}) for dialect in ('mmseg', 'openmmlab', 'unilm', 'native')),
            ('mmseg', {'message_hub': {}, 'optimizer': {}}),  # what mmsegmentation's training wrote
        ],
    )
    def test_it_is_loaded(self, dialect, extra, tmp_path):
        theirs = randomize(encoder_decoder(ours=True))
        state = OrderedDict(convert(theirs.state_dict(), to=dialect))
        torch.save({'state_dict': state, 'meta': {}, **extra}, tmp_path / 'x.pth')
        model = self.inside()
        load_checkpoint(model, str(tmp_path / 'x.pth'), map_location='cpu', strict=True)
        assert torch.equal(logits(model), logits(theirs))

    def test_its_own_file(self, tmp_path):
        theirs, model = self.inside(), randomize(self.inside(), seed=2)
        torch.save(theirs.state_dict(), tmp_path / 'x.pth')
        load_checkpoint(model, str(tmp_path / 'x.pth'), map_location='cpu', strict=True)
        assert torch.equal(logits(model), logits(theirs))

    def test_a_neck_keeps_its_pyramid(self, tmp_path):
        """Two pyramids are somebody's wish: nothing goes to another place than its name says."""
        theirs = randomize(encoder_decoder(ours=True))
        torch.save(convert(theirs.state_dict(), to='unilm'), tmp_path / 'x.pth')
        model = encoder_decoder(ours=True)
        model.backbone = self.inside().backbone
        before = model.backbone.fpn.upsample_2x[0].weight.clone()
        load_checkpoint(model, str(tmp_path / 'x.pth'), map_location='cpu')
        assert torch.equal(model.backbone.fpn.upsample_2x[0].weight, before)
        assert torch.equal(model.neck.upsample_2x[0].weight, theirs.neck.upsample_2x[0].weight)


class TestPretrained:
    """init_cfg=dict(type='Pretrained', ...) of the backbone."""

    def init(self, path, img_size=SIZE, **options):
        cfg = dict(type='Pretrained', checkpoint=str(path), **options)
        model = MODELS.build({**BACKBONE, 'img_size': img_size, 'init_cfg': cfg})
        model.init_weights()
        return model

    @pytest.mark.parametrize('grid', [(2, 3), [2, 3]])
    @pytest.mark.parametrize('prefix', ['', 'backbone.'])
    def test_grid(self, grid, prefix, tmp_path):
        theirs = randomize(MODELS.build({**BACKBONE, 'img_size': (32, 48)}))
        state = {f'{prefix}{name}': tensor for name, tensor in theirs.state_dict().items()}
        torch.save(state, tmp_path / 'x.pth')
        with pytest.raises(CheckpointError, match=r'give the grid .* as grid=\(h, w\)'):
            self.init(tmp_path / 'x.pth', prefix=prefix)
        model = self.init(tmp_path / 'x.pth', grid=grid, prefix=prefix)
        theirs.set_input_size((SIZE, SIZE))
        name = 'layers.1.attn.relative_position_bias_table'
        assert torch.equal(model.state_dict()[name], theirs.state_dict()[name])

    def test_the_same_grid_changes_nothing(self, tmp_path):
        state = randomize(MODELS.build({**BACKBONE, 'use_abs_pos_emb': True, 'img_size': (32, 48)})).state_dict()
        torch.save(state, tmp_path / 'x.pth')
        cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth'), grid=[2, 3])
        model = MODELS.build({**BACKBONE, 'use_abs_pos_emb': True, 'img_size': (32, 48), 'init_cfg': cfg})
        model.init_weights()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())

    def test_the_grid_that_a_file_notes_holds_under_a_prefix_too(self, tmp_path):
        theirs = randomize(MODELS.build({**BACKBONE, 'img_size': (32, 48)}))
        save(theirs, tmp_path / 'x.safetensors')
        model = self.init(tmp_path / 'x.safetensors', img_size=(48, 32))  # an equally long table
        turned = randomize(segmentor(img_size=(32, 48), out_indices=TAPS))
        save(turned, tmp_path / 'y.safetensors')
        inner = self.init(tmp_path / 'y.safetensors', img_size=(48, 32), prefix='backbone')
        theirs.set_input_size((48, 32))
        turned.set_input_size((48, 32))
        for got, expected in ((model.layers, theirs.layers), (inner.layers, turned.backbone.blocks)):
            assert torch.equal(got[1].attn.relative_position_bias_table, expected[1].attn.relative_position_bias_table)

    def test_drop(self, tmp_path):
        theirs = randomize(MODELS.build(BACKBONE)).state_dict()
        torch.save({**theirs, 'layers.1.attn.gate': torch.ones(1)}, tmp_path / 'x.pth')
        with pytest.raises(CheckpointError, match=r'no table knows layers\.1\.attn\.gate'):
            self.init(tmp_path / 'x.pth')
        model = self.init(tmp_path / 'x.pth', drop=['layers.1.attn.gate'])
        assert torch.equal(model.cls_token, theirs['cls_token'])

    def test_unknown_keys(self, tmp_path):
        torch.save(randomize(MODELS.build(BACKBONE)).state_dict(), tmp_path / 'x.pth')
        self.init(tmp_path / 'x.pth', prefix=None, map_location='cpu')
        with pytest.raises(
            ValueError, match=r'takes checkpoint, prefix, map_location, grid, drop, not revise_keys, strict$'
        ):
            self.init(tmp_path / 'x.pth', revise_keys=[], strict=True)


@pytest.mark.parametrize(
    'options, error, message',
    [
        (dict(pretrained=123), TypeError, 'pretrained is 123, expected a file, URL or hub id as a str, or None'),
        (dict(init_cfg=123), TypeError, 'init_cfg is 123, expected a dict such as .* or a list of dicts'),
        (dict(init_cfg=[dict(type='Constant'), 'x.pth']), TypeError, r"init_cfg is \[.*'x.pth'\], expected a dict"),
        (dict(init_cfg=dict(checkpoint='x.pth')), TypeError, 'init_cfg is .*, expected a dict such as'),
        (dict(init_cfg=dict(type='Pretrained')), ValueError, "init_cfg of type 'Pretrained' needs checkpoint='FILE'"),
        (dict(init_cfg=dict(type='Pretrained', checkpoint=1)), ValueError, 'init_cfg .* needs checkpoint='),
        (dict(init_cfg=dict(type='Pretrained', checkpoint='x', preffix='')), ValueError, 'prefix, .*, not preffix'),
    ],
)
def test_a_checkpoint_is_checked_when_it_is_named(options, error, message):
    with pytest.raises(error, match=message):
        MODELS.build({**BACKBONE, **options})
