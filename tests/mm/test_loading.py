"""mmengine's own loaders on checkpoints of every dialect, and on those that are none of our business."""

import importlib.util
import json
import warnings
from collections import OrderedDict

import pytest
import timm
import torch
from checkpoints.peers import CLASSES, DEPTH, DIM, HEADS, PEERS, SIZE, TAPS, build, disk_state, segmentor, written
from checkpoints.peers import mmseg_segmentor as encoder_decoder
from helpers import images, randomize, relative_error

if importlib.util.find_spec('mmseg') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[mmseg]'", allow_module_level=True)

import beit_plugin.mm  # noqa: F401  first: makes mmseg importable

# isort: split

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from mmseg.apis import init_model

from beit_plugin.checkpoints import CheckpointError, convert, save
from beit_plugin.mm.loading import to_openmmlab

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec('transformers') is None, reason='needs the extra: test'
)
BACKBONE = dict(type='BEiTBackbone', img_size=SIZE, embed_dims=DIM, num_layers=DEPTH, num_heads=HEADS, mlp_ratio=2,
                out_indices=TAPS, norm_cfg=dict(type='LN', eps=1e-6))  # fmt: skip
OTHER_TAPS = (0, 1, 2, 3)  # those of the segmentor of transformers in peers.py


def logits(model):
    return model.eval()(images(SIZE, SIZE), mode='tensor')


@pytest.fixture
def log(tmp_path, request):
    """What mmengine logged so far."""
    MMLogger.get_instance(request.node.name, log_file=str(tmp_path / 'log'))  # the 'current' one from now on
    return (tmp_path / 'log').read_text


@pytest.mark.parametrize('name', ['transformers/segmentor', 'unilm', 'native', 'mmseg/segmentor'])
def test_load_checkpoint_sets_a_whole_segmentor(name, tmp_path):
    """What load_from, test.py, init_model and the inferencers call, with mmsegmentation's own EncoderDecoder."""
    model = encoder_decoder(ours=True)
    if name in PEERS:
        case, theirs, path = written(name, tmp_path)
        model.backbone.stages = (1, 2, 3, 4) if 'transformers' in name else model.backbone.stages
    else:
        case = PEERS['mmseg/segmentor']
        theirs, path = build(case)[0], tmp_path / 'x.pth'
        torch.save({'model': convert(theirs.state_dict(), to=name)}, path)
    loaded = load_checkpoint(model, str(path), map_location='cpu', strict=True)
    assert 'state_dict' in loaded
    assert relative_error(logits(model), case.run_theirs(theirs, images(SIZE, SIZE))[0]) <= 1e-5


def test_a_translation_loads_into_the_stock_classes_too(tmp_path):
    theirs = build(PEERS['mmseg/segmentor'])[0]
    torch.save(convert(theirs.state_dict(), to='unilm'), tmp_path / 'x.pth')
    model = encoder_decoder()
    load_checkpoint(model, str(tmp_path / 'x.pth'), map_location='cpu', strict=True)
    assert torch.equal(logits(model), logits(theirs))


def test_an_encoder_alone_gets_a_hint(tmp_path, log):
    _, _, path = written('timm/encoder', tmp_path)
    load_checkpoint(encoder_decoder(ours=True), str(path), map_location='cpu')
    assert 'init_cfg of BEiTBackbone takes it' in log()


class TestTaps:
    """What is known of the blocks that a segmentor reads is said, for the configuration has to say the same."""

    SENTENCE = 'trained on out_indices=[0, 1, 2, 3] of the backbone; set out_indices so'

    @pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
    def test_native(self, suffix, tmp_path, log):
        theirs = randomize(segmentor(out_indices=OTHER_TAPS)).eval()
        save(theirs, tmp_path / f'x.{suffix}')
        model = encoder_decoder(ours=True)
        load_checkpoint(model, str(tmp_path / f'x.{suffix}'), map_location='cpu', strict=True)
        assert f'read a segmentor of native, {self.SENTENCE}' in log()
        model.backbone.stages = (1, 2, 3, 4)
        assert relative_error(logits(model), theirs(images(SIZE, SIZE))) <= 1e-5

    @needs_transformers
    @pytest.mark.parametrize('form', ['folder', 'model.safetensors', 'pytorch_model.bin', 'folder of .bin'])
    def test_transformers(self, form, tmp_path, log):
        _, theirs, path = written('transformers/segmentor', tmp_path)
        if 'bin' in form:
            torch.save(disk_state(theirs, tmp_path), tmp_path / 'pytorch_model.bin')
            path.unlink()
        load_checkpoint(encoder_decoder(ours=True), str(tmp_path if 'folder' in form else tmp_path / form), strict=True)
        assert f'read a segmentor of transformers, {self.SENTENCE}' in log()

    @needs_transformers
    def test_transformers_that_reads_the_embeddings(self, tmp_path, log):
        written('transformers/segmentor', tmp_path)
        config = json.loads((tmp_path / 'config.json').read_text())
        (tmp_path / 'config.json').write_text(json.dumps({**config, 'out_indices': [1, 2, 3, 5], 'out_features': None}))
        load_checkpoint(encoder_decoder(ours=True), str(tmp_path))
        assert "trained on out_features=['stem', 'stage1', 'stage2', 'stage4'] of the backbone; set" in log()

    @needs_transformers
    def test_transformers_without_a_configuration(self, tmp_path, log):
        _, _, path = written('transformers/segmentor', tmp_path)
        (tmp_path / 'config.json').unlink()
        load_checkpoint(encoder_decoder(ours=True), str(path))
        said = 'what its configuration calls out_indices=[3, 5, 7, 11] is out_indices=[1, 3, 5, 9] here'
        assert said in log() and 'trained on' not in log()

    def test_unilm_counts_as_we_do(self, tmp_path, log):
        torch.save(convert(randomize(segmentor()).state_dict(), to='unilm'), tmp_path / 'x.pth')
        load_checkpoint(encoder_decoder(ours=True), str(tmp_path / 'x.pth'), strict=True)
        assert 'read a segmentor of unilm; the out_indices of its configuration are the same here' in log()


class TestInitModel:
    """mmseg.apis.init_model asks for the meta of a checkpoint."""

    def config(self):
        model = encoder_decoder(ours=True)
        head = dict(channels=DIM, num_classes=CLASSES, norm_cfg=dict(type='BN'), align_corners=False)
        cfg = dict(
            type='EncoderDecoder',
            data_preprocessor=dict(type='SegDataPreProcessor'),
            backbone={**BACKBONE},
            neck=dict(type='BEiTPyramid', embed_dim=DIM, rescales=[4, 2, 1, 0.5], norm_cfg=dict(type='BN')),
            decode_head=dict(type='BEiTUPerHead', in_channels=[DIM] * 4, in_index=[0, 1, 2, 3], **head),
            auxiliary_head=dict(type='mmseg.FCNHead', in_channels=DIM, in_index=2, num_convs=1, concat_input=True,
                                **{**head, 'channels': 6}),
            test_cfg=dict(mode='whole'),
        )  # fmt: skip
        return Config(dict(model=cfg)), randomize(model)

    @pytest.mark.parametrize('dialect', ['mmseg', 'openmmlab', 'unilm', 'native'])
    @pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
    def test_what_save_wrote(self, dialect, suffix, tmp_path):
        cfg, theirs = self.config()
        save(theirs, tmp_path / f'x.{suffix}', dialect=dialect)
        with warnings.catch_warnings(record=True):  # no dataset has seven classes
            model = init_model(cfg, str(tmp_path / f'x.{suffix}'), device='cpu')
        assert torch.equal(logits(model), logits(theirs))

    @pytest.mark.parametrize('dialect', ['mmseg', 'unilm'])
    def test_the_classes_of_the_checkpoint_survive(self, dialect, tmp_path):
        cfg, theirs = self.config()
        meta = {'dataset_meta': {'classes': list('abcdefg')}, 'epoch': 3}
        state = convert(theirs.state_dict(), to=dialect)
        torch.save({'state_dict': state, 'meta': meta, 'note': 'kept'}, tmp_path / 'x.pth')
        assert init_model(cfg, str(tmp_path / 'x.pth'), device='cpu').dataset_meta == meta['dataset_meta']
        loaded = CheckpointLoader.load_checkpoint(str(tmp_path / 'x.pth'))
        assert loaded['meta'] == meta and loaded['note'] == 'kept' and loaded.keys() == {'state_dict', 'meta', 'note'}

    @pytest.mark.parametrize('wrapper', ['model.', '_orig_mod.', 'model._orig_mod.', 'module.', 'module.model.'])
    @pytest.mark.parametrize('dialect', ['mmseg', 'openmmlab'])
    def test_what_other_trainers_put_before_the_names(self, wrapper, dialect, tmp_path):
        cfg, theirs = self.config()
        state = {f'{wrapper}{name}': t for name, t in convert(theirs.state_dict(), to=dialect).items()}
        meta = {'dataset_meta': {'classes': list('abcdefg')}}
        torch.save({'state_dict': state, 'meta': meta}, tmp_path / 'x.pth')
        model = init_model(cfg, str(tmp_path / 'x.pth'), device='cpu')
        assert torch.equal(logits(model), logits(theirs)) and model.dataset_meta == meta['dataset_meta']

    def test_a_plain_encoder(self):
        encoder = convert(randomize(MODELS.build(BACKBONE)).state_dict(), to='mmseg')
        assert to_openmmlab(encoder) == {'state_dict': encoder, 'meta': {}}
        for wrapped in ({'state_dict': encoder}, {'model': encoder, 'epoch': 3}):
            assert to_openmmlab(wrapped) is wrapped

    def test_nothing_of_our_own_dialects_is_lost(self):
        state = OrderedDict(convert(randomize(segmentor()).state_dict(), to='mmseg'))
        state['loss._extra_state'] = {'a': 1}
        state._metadata = OrderedDict({'backbone': {'version': 2}, 'decode_head': {'version': 3}})
        got = to_openmmlab(state)
        assert got.keys() == {'state_dict', 'meta', 'loss._extra_state'} and got['state_dict'] == state
        metadata = got['state_dict']._metadata
        assert metadata['backbone']['version'] == 2 and metadata['decode_head'] == {'version': 3}
        assert state._metadata['backbone'] == {'version': 2}
        parallel = {f'module.{name}': tensor for name, tensor in state.items()}  # mmengine takes that off itself
        assert to_openmmlab({'state_dict': parallel})['state_dict'] == parallel

    @pytest.mark.parametrize('size, options', [((32, 48), {}), (SIZE, dict(use_abs_pos_emb=True))])
    def test_what_stock_classes_do_not_have(self, size, options, tmp_path):
        theirs = randomize(segmentor(img_size=size, out_indices=TAPS, **options)).eval()
        save(theirs, tmp_path / 'x.pth')
        model = encoder_decoder(ours=True)
        model.backbone = MODELS.build({**BACKBONE, 'img_size': size, **options})
        load_checkpoint(model, str(tmp_path / 'x.pth'), map_location='cpu', strict=True)
        assert relative_error(logits(model), theirs(images(SIZE, SIZE))) <= 1e-5


class Holder(BaseModel):
    """A model of mmengine that holds one of another library."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.net(inputs)


def nets():
    yield (
        'native',
        lambda: timm.create_model(
            'beit_plugin_tiny_patch16_640_upernet',
            img_size=SIZE,
            embed_dim=DIM,
            depth=DEPTH,
            num_heads=HEADS,
            num_classes=2,
        ),
    )
    yield 'mmseg', encoder_decoder
    yield 'timm', lambda: timm.create_model('vit_tiny_patch16_224', img_size=SIZE, embed_dim=DIM, depth=2, num_heads=2)
    if importlib.util.find_spec('transformers') is not None:
        yield 'transformers-v5', PEERS['transformers-v5/segmentor'].theirs


class TestNoneOfOurBusiness:
    @pytest.mark.parametrize('training', [True, False])
    @pytest.mark.parametrize('name, net', list(nets()), ids=lambda x: x if isinstance(x, str) else '')
    def test_a_model_that_holds_a_segmentor(self, name, net, training, tmp_path, log):
        theirs, model = Holder(randomize(net())), Holder(randomize(net(), seed=1))
        rest = {'optimizer': {'state': {}}, 'message_hub': {'log_scalars': {}}, 'param_schedulers': []}
        checkpoint = {'state_dict': theirs.state_dict(), 'meta': {'iter': 3}, **(rest if training else {})}
        torch.save(checkpoint, tmp_path / 'x.pth')
        loaded = load_checkpoint(model, str(tmp_path / 'x.pth'), map_location='cpu', strict=True)
        assert loaded.keys() == checkpoint.keys() and loaded['meta'] == {'iter': 3}
        assert all(torch.equal(t, theirs.state_dict()[n]) for n, t in model.state_dict().items())
        assert 'WARNING' not in log()

    @pytest.mark.parametrize('dialect', ['native', 'unilm', 'mmseg', 'openmmlab'])
    @pytest.mark.parametrize('outer', ['', 'model.'])
    def test_a_training_goes_on_with_what_it_saved(self, dialect, outer, log):
        state = convert(randomize(encoder_decoder(ours=True)).state_dict(), to=dialect)
        names = [f'{outer}{name}' for name in state]
        checkpoint = {
            'state_dict': OrderedDict(zip(names, state.values(), strict=True)),
            'meta': {'iter': 3},
            'message_hub': {},
        }
        got = to_openmmlab(checkpoint)
        assert (
            got is checkpoint
            and list(got) == ['state_dict', 'meta', 'message_hub']
            and list(got['state_dict']) == names
        )
        assert 'WARNING' not in log()

    def test_only_a_prefix_of_all_names_is_taken_off(self):
        state = convert(randomize(segmentor()).state_dict(), to='mmseg')
        partly = {'state_dict': {**{f'model.{name}': tensor for name, tensor in state.items()}, 'ema': torch.ones(1)}}
        assert to_openmmlab(partly) is partly

    def test_a_foreign_dialect_in_another_model(self):
        state = convert(randomize(segmentor()).state_dict(), to='unilm')
        inside = {'state_dict': {f'model.{name}': tensor for name, tensor in state.items()}}
        assert to_openmmlab(inside) is inside

    def test_the_training_of_another_trainer_is_translated(self):
        """unilm and mmcv 0.x store their optimizer too."""
        state = convert(randomize(segmentor()).state_dict(), to='unilm')
        got = to_openmmlab({'model': state, 'optimizer': {'state': {}}})
        assert 'backbone.layers.0.ln1.weight' in got['state_dict'] and got['optimizer'] == {'state': {}}

    def test_a_vit_is_no_beit(self, tmp_path, log):
        vit = timm.create_model('vit_tiny_patch16_224', img_size=SIZE, embed_dim=DIM, depth=2, num_heads=2).state_dict()
        assert to_openmmlab(vit) is vit and 'WARNING' not in log()
        whole = {f'backbone.{name}': tensor for name, tensor in vit.items()}
        whole = {'state_dict': {**whole, 'decode_head.conv_seg.weight': torch.ones(1)}}
        assert to_openmmlab(whole) is whole
        assert 'the encoder of this segmentor has backbone.blocks.0.attn.qkv.bias, so it is no BEiT, and is' in log()

    def test_a_segmentor_with_a_part_that_no_table_knows(self):
        state = convert(randomize(segmentor()).state_dict(), to='unilm')
        with pytest.raises(CheckpointError, match=r'no table knows decode_head\.gate'):
            to_openmmlab({'model': {**state, 'decode_head.gate': torch.ones(1)}})

    def test_other_files(self, tmp_path):
        thing = {'state_dict': {'conv.weight': torch.ones(2)}, 'meta': {'epoch': 3}}
        torch.save(thing, tmp_path / 'x.pth')
        assert CheckpointLoader.load_checkpoint(str(tmp_path / 'x.pth'))['meta'] == {'epoch': 3}
        for plain in ({'conv.weight': torch.ones(2)}, [1], {'epoch': 3}):
            assert to_openmmlab(plain) is plain
        with pytest.raises(FileNotFoundError):
            CheckpointLoader.load_checkpoint(str(tmp_path / 'y.pth'))

    def test_the_home_folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv('HOME', str(tmp_path))
        save(randomize(segmentor()), tmp_path / 'x.safetensors')
        assert 'neck.upsample_2x.0.bias' in CheckpointLoader.load_checkpoint('~/x.safetensors')['state_dict']
