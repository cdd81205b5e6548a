"""Checkpoints of every dialect through timm's own loaders, with no conversion before; OpenMMLab: mm/test_loading.py."""

import importlib.util
import json

import pytest
import timm
import torch
from checkpoints.peers import CLASSES, DEPTH, DIM, HEADS, PEERS, TAPS, disk_state, mmseg_segmentor, written
from helpers import images, randomize, relative_error
from safetensors.torch import save_file

import beit_plugin  # noqa: F401  registers
from beit_plugin.checkpoints import CheckpointError, convert, load, save

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec('transformers') is None, reason='needs the extra: test'
)
needs_mmseg = pytest.mark.skipif(importlib.util.find_spec('mmseg') is None, reason="pip install 'beit-plugin[mmseg]'")
SIZES = dict(img_size=32, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, mlp_ratio=2.0)
SEGMENTOR = 'beit_plugin_tiny_patch16_640_upernet'
HEAD = dict(num_classes=CLASSES, auxiliary_channels=6, auxiliary_concat_input=True, decoder_drop_rate=0.0)
NAMES = {
    'classifier': ('beit_plugin_base_patch16_224', dict(num_classes=CLASSES)),
    'encoder': ('beit_plugin_base_patch16_224', dict(num_classes=0)),
    'mim': ('beit_plugin_base_patch16_224_mim', dict(num_classes=11)),
    'segmentor': (SEGMENTOR, HEAD),
}
SKIPPED = ('with everything', 'absolute', 'EncoderDecoder', 'backbone', '[CLS]', 'shared')


@pytest.mark.parametrize('how', ['checkpoint_path', 'file'])
@pytest.mark.parametrize('name', [name for name in PEERS if not any(word in name for word in SKIPPED)])
def test_timm(name, how, tmp_path):
    case, theirs, path = written(name, tmp_path)
    model_name, options = NAMES[case.task]
    if name.endswith('v2'):
        model_name, options = 'beitv2_plugin_base_patch16_224_mim', {**options, 'early_layers': 3}
    if case.task == 'segmentor':  # what a file of names alone cannot say
        options = {**options, 'out_indices': (0, 1, 2, 3) if 'transformers' in name else TAPS}
    classes = options['num_classes']
    way = dict(checkpoint_path=str(path)) if how == 'checkpoint_path' else dict(
        pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=classes))  # fmt: skip
    if name == 'mmseg/encoder':  # a backbone has no norm after its blocks, which a classifier needs
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "fc_norm.weight"'):
            timm.create_model(model_name, **SIZES, **options, checkpoint_path=str(path))
        return
    model = timm.create_model(model_name, **SIZES, **options, **way).eval()
    x = images(32, 32)
    got, expected = case.run_ours(model, x), case.run_theirs(theirs, x)
    assert max(map(relative_error, got, expected)) <= 1e-5


@needs_transformers
@pytest.mark.parametrize('size', [(48, 80), (64, 32)])
def test_timm_at_another_resolution(size, tmp_path):
    """Positions and tables are resized once, from the stored ones, as on the way at run time."""
    _, _, path = written('transformers/classifier', tmp_path)
    native = timm.create_model(NAMES['classifier'][0], **SIZES, num_classes=CLASSES, checkpoint_path=str(path)).eval()
    larger = timm.create_model(
        NAMES['classifier'][0], **{**SIZES, 'img_size': size}, num_classes=CLASSES, checkpoint_path=str(path)
    ).eval()
    assert larger.window_size == (size[0] // 16, size[1] // 16)
    assert relative_error(larger(images(*size)), native(images(*size))) <= 1e-5


class TestStages:
    """Which blocks a segmentor reads is part of its function."""

    def test_the_checkpoint_decides(self, tmp_path, caplog):
        _, theirs, _ = written('transformers/segmentor', tmp_path)
        model = timm.create_model(SEGMENTOR, **SIZES, **HEAD).eval()
        built = model.backbone.stages
        report = load(model, tmp_path)
        assert report.out_indices == (0, 1, 2, 3) != tuple(stage - 1 for stage in built)
        assert 'trained on the outputs of blocks (0, 1, 2, 3)' in caplog.text
        expected = theirs(images(32, 32)).logits
        assert relative_error(model(images(32, 32)), expected) <= 1e-5

        # what timm or torch save of it keeps that
        torch.save(model.state_dict(), tmp_path / 'ours.pth')
        again = timm.create_model(SEGMENTOR, **SIZES, **HEAD, checkpoint_path=str(tmp_path / 'ours.pth')).eval()
        assert again.backbone.stages == model.backbone.stages
        assert torch.equal(again(images(32, 32)), model(images(32, 32)))

    def test_the_caller_decides(self, tmp_path):
        written('transformers/segmentor', tmp_path)
        model = timm.create_model(SEGMENTOR, **SIZES, **HEAD, out_indices=TAPS)
        load(model, tmp_path)
        assert model.backbone.stages == tuple(tap + 1 for tap in TAPS)

    def test_the_same_numbers_mean_other_blocks_without_a_configuration(self, tmp_path, caplog):
        """The default (1, 1 + ...) of the model, counted as transformers counts."""
        _, theirs, _ = written('transformers/segmentor', tmp_path)
        state = theirs.state_dict()
        model = timm.create_model(SEGMENTOR, **{**SIZES, 'depth': 12}, **HEAD)
        longer = {k.replace('layers.4', f'layers.{i}'): v for i in range(4, 12) for k, v in state.items()}
        load(model, longer)
        assert model.backbone.stages == (2, 4, 6, 10)  # facts: out_indices 3, 5, 7, 11 are blocks 1, 3, 5, 9 there
        fixed = timm.create_model(SEGMENTOR, **{**SIZES, 'depth': 12}, **HEAD, out_indices=(3, 5, 7, 11))
        load(fixed, longer)
        assert fixed.backbone.stages == (4, 6, 8, 12) and 'which blocks it reads is not known' in caplog.text
        official = timm.create_model(SEGMENTOR, **{**SIZES, 'depth': 12}, **HEAD)
        load(official, convert(longer, to='unilm'))
        assert official.backbone.stages == (4, 6, 8, 12)

    @needs_mmseg
    def test_a_configuration_that_says_otherwise(self, tmp_path):
        written('transformers/segmentor', tmp_path)
        model = mmseg_segmentor(ours=True)
        with pytest.raises(
            CheckpointError, match=r'blocks \(0, 1, 2, 3\), this model those of \(0, 2, 3, 4\); build it'
        ):
            load(model, tmp_path)
        report = load(model, tmp_path, drop=('stages',))
        assert report.out_indices == TAPS and not report.fresh

    def test_stages_that_do_not_exist(self):
        model = timm.create_model(SEGMENTOR, **SIZES, **HEAD)
        state = {**model.state_dict(), '_extra_state': torch.tensor([1, 2, 3, 9])}
        with pytest.raises(CheckpointError, match=r'reads the outputs of blocks \(0, 1, 2, 8\)'):
            model.load_state_dict(state)
        with pytest.raises(ValueError, match=r'reads the stages \(1, 2, 3, 9\)'):
            model.set_extra_state(state['_extra_state'])


@needs_transformers
class TestFolders:
    def test_shards_and_bin(self, tmp_path):
        _, theirs, path = written('transformers/classifier', tmp_path)
        whole = disk_state(theirs, tmp_path)
        names = sorted(whole)
        path.unlink()
        index = {'weight_map': {}}
        for i, part in enumerate((names[:20], names[20:])):
            file = f'model-0000{i}.safetensors'
            save_file({n: whole[n] for n in part}, tmp_path / file)
            index['weight_map'] |= dict.fromkeys(part, file)
        (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
        model = timm.create_model(NAMES['classifier'][0], **SIZES, num_classes=CLASSES).eval()
        load(model, tmp_path)
        assert relative_error(model(images(32, 32)), theirs(images(32, 32)).logits) <= 1e-5
        index['weight_map']['x'] = '../secret.safetensors'
        (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
        with pytest.raises(
            CheckpointError, match=r"names '../secret.safetensors', which is no checkpoint file beside it"
        ):
            load(model, tmp_path)

    def test_a_folder_without_weights(self, tmp_path):
        with pytest.raises(CheckpointError, match=r'holds none of model\.safetensors'):
            load(timm.create_model(NAMES['encoder'][0], **SIZES), tmp_path)

    def test_non_square_grid_comes_from_the_configuration(self, tmp_path):
        from transformers import BeitConfig, BeitModel

        config = BeitConfig(hidden_size=DIM, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=2 * DIM,
                            image_size=(32, 48), use_relative_position_bias=True, layer_norm_eps=1e-6)  # fmt: skip
        theirs = randomize(BeitModel(config)).eval()
        theirs.save_pretrained(tmp_path)
        sizes = {**SIZES, 'depth': 2, 'img_size': (48, 32), 'num_classes': 0}
        right, wrong = (timm.create_model(NAMES['encoder'][0], **sizes) for _ in range(2))
        load(right, tmp_path)
        load(wrong, theirs.state_dict(), grid=(3, 2))  # an equally long table, read the other way round
        native = timm.create_model(NAMES['encoder'][0], **{**sizes, 'img_size': (32, 48)})
        load(native, tmp_path)
        name = 'blocks.1.attn.relative_position_bias_table'
        assert torch.equal(
            native.state_dict()[name], theirs.layers[1].relative_position_bias.relative_position_bias_table
        )
        native.set_input_size((48, 32))
        assert torch.equal(native.state_dict()[name], right.state_dict()[name])
        assert not torch.equal(native.state_dict()[name], wrong.state_dict()[name])
        # ours notes the grid too
        save(right, tmp_path / 'ours.safetensors')
        third = timm.create_model(NAMES['encoder'][0], **{**sizes, 'img_size': (32, 48)})
        load(third, tmp_path / 'ours.safetensors')
        third.set_input_size((48, 32))
        assert third(images(48, 32)).isfinite().all()
        with pytest.raises(CheckpointError, match='a bias table of 18 rows is not of a 4x4 grid'):
            load(native, theirs.state_dict(), grid=(4, 4))
