"""Weights of every origin through timm's own loaders, at the resolution of the model that asks for them."""

import importlib.util
import subprocess
import sys

import pytest
import timm
import torch
from helpers import images, randomize, relative_error
from timm.models.beit import Beit as TimmBeit

import beit_plugin  # noqa: F401  registers
from beit_plugin.models.resample import resize_rel_pos_bias_table

NAME = 'beit_plugin_base_patch16_224'
SMALL = dict(img_size=64, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2.0)


def create(tag='', **options):
    return timm.create_model(NAME + tag, **{**SMALL, **options}).eval()


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A model of timm and its file."""
    model = randomize(TimmBeit(**SMALL, init_values=0.1, use_rel_pos_bias=True, use_abs_pos_emb=False)).eval()
    path = tmp_path_factory.mktemp('timm') / 'model.pth'
    torch.save(model.state_dict(), path)
    return model, path


def saved(tmp_path, model):
    model.save_pretrained(tmp_path)
    return tmp_path / 'model.safetensors'


def hf_config(**options):
    transformers = pytest.importorskip('transformers', reason="needs the extra: pip install 'beit-plugin[test]'")
    return transformers, transformers.BeitConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=64,
        layer_norm_eps=1e-6, vocab_size=10, **options,
    )  # fmt: skip


def file_of(path):
    return dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


def test_checkpoint_path_and_file_at_the_native_size(source):
    theirs, path = source
    x = images(64, 64)
    for model in (create(checkpoint_path=str(path)), create('.in22k_ft_in22k_in1k', **file_of(path))):
        assert relative_error(model(x), theirs(x)) < 1e-5


@pytest.mark.parametrize('load', [lambda path: dict(checkpoint_path=str(path)), file_of])
@pytest.mark.parametrize('rule', ['geometric', 'linear'])
def test_another_resolution(source, load, rule):
    theirs, path = source
    model = create('.in22k_ft_in22k_in1k', img_size=(48, 96), rel_pos_resize=rule, **load(path))
    name = 'blocks.1.attn.relative_position_bias_table'
    expected = resize_rel_pos_bias_table(theirs.state_dict()[name], (4, 4), (3, 6), rule)
    assert torch.equal(model.state_dict()[name], expected)
    # resized once or on the way is the same
    native = create(checkpoint_path=str(path), rel_pos_resize=rule)
    assert relative_error(model(images(48, 96)), native(images(48, 96))) < 1e-5


def test_another_patch_size(source):
    model = create(patch_size=8, **file_of(source[1]))
    assert model.patch_embed.proj.weight.shape == (16, 3, 8, 8) and model.window_size == (8, 8)
    assert model.patch_embed.proj.weight.std() > 0.01


@pytest.mark.parametrize('wrapper', ['model', 'module', 'state_dict'])
def test_wrapped_files(source, wrapper, tmp_path):
    torch.save({wrapper: source[0].state_dict()}, tmp_path / 'x.pth')
    model = create('.in22k_ft_in22k_in1k', **file_of(tmp_path / 'x.pth'))
    assert torch.equal(model.cls_token, source[0].cls_token)


def test_another_classifier_and_grey_images(source):
    theirs, path = source
    model = create('.in22k_ft_in22k_in1k', num_classes=5, in_chans=1, **file_of(path))
    assert model(images(64, 64, channels=1)).shape == (2, 5)
    kernel = theirs.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(model.patch_embed.proj.weight, kernel)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, theirs.blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize('add_fpn', [True, False])
def test_feature_extractors(source, add_fpn):
    theirs, path = source
    options = dict(add_fpn=True, out_indices=(0, 0, 1, 1)) if add_fpn else dict(out_indices=(0, 1))
    model = create('.in22k_ft_in22k_in1k', features_only=True, img_size=(48, 96), **options, **file_of(path))
    got = model(images(48, 96))
    assert len(got) == (4 if add_fpn else 2)
    native = theirs.state_dict()['blocks.1.attn.proj.weight']
    assert torch.equal(model.model.blocks[1].attn.proj.weight, native)


def test_encoder_of_transformers(tmp_path):
    transformers, config = hf_config(use_relative_position_bias=True)
    theirs = randomize(transformers.BeitModel(config)).eval()
    model = create(num_classes=0, checkpoint_path=str(saved(tmp_path, theirs)), img_size=(64, 64))
    x = images(64, 64)
    assert relative_error(model(x), theirs(x).pooler_output) < 1e-5
    larger = create(num_classes=0, checkpoint_path=str(tmp_path / 'model.safetensors'), img_size=(80, 112))
    assert relative_error(larger(images(80, 112)), model(images(80, 112))) < 1e-5


@pytest.fixture(scope='module')
def pre_training(tmp_path_factory):
    """A pre-trained model, and its file as mmengine's Runner saves it: with objects of its own."""
    model = randomize(timm.create_model('beit_plugin_base_patch16_224_mim', **{**SMALL, 'depth': 4, 'num_classes': 7}))
    path = tmp_path_factory.mktemp('mmengine') / 'iter_4.pth'
    torch.save({f'model.{name}': value for name, value in model.state_dict().items()}, path)
    code = (  # in another process: here mmengine's own objects may be allowed already
        'import sys, torch, mmengine.logging.history_buffer as h; state = torch.load(sys.argv[1], weights_only=True); '
        'buffer = h.HistoryBuffer([1.0], [1]); '
        'torch.save(dict(state_dict=state, message_hub=dict(loss=buffer), meta={}), sys.argv[1])'
    )
    if importlib.util.find_spec('mmengine') is not None:
        subprocess.run([sys.executable, '-W', 'ignore', '-c', code, path], check=True)
    return model, str(path)


@pytest.mark.parametrize(
    'name, options',
    [
        ('224', dict(num_classes=0)),
        ('640_upernet', dict(num_classes=3)),
        ('224', dict(features_only=True, add_fpn=True)),
    ],
)
def test_a_pre_training_of_mmengine(name, options, pre_training):
    """Its head is left out, and what it does not have keeps its initial values."""
    pretrained, path = pre_training
    model = timm.create_model(
        f'beit_plugin_base_patch16_{name}', checkpoint_path=path, **{**SMALL, 'depth': 4, **options}
    )
    state = model.state_dict()
    (loaded,) = (value for key, value in state.items() if key.endswith('blocks.1.attn.qkv.weight'))
    assert torch.equal(loaded, pretrained.blocks[1].attn.qkv.weight)


def test_shared_table_of_pre_training_starts_every_layer(tmp_path):
    transformers, config = hf_config(use_shared_relative_position_bias=True)
    theirs = randomize(transformers.BeitModel(config)).eval()
    path = str(saved(tmp_path, theirs))
    model = create(num_classes=0, checkpoint_path=path)
    table = theirs.shared_position_bias.relative_position_bias_table
    assert all(torch.equal(b.attn.relative_position_bias_table, table) for b in model.blocks)
    x = images(64, 64)
    assert relative_error(model(x), theirs(x).pooler_output) < 1e-5
    shared = create(num_classes=0, checkpoint_path=path, use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
    assert relative_error(shared(x), model(x)) < 1e-5


@pytest.mark.parametrize('load', [lambda path: dict(checkpoint_path=str(path)), file_of])
def test_classifier_of_transformers(tmp_path, load):
    transformers, config = hf_config(use_relative_position_bias=True, num_labels=1000)
    theirs = randomize(transformers.BeitForImageClassification(config)).eval()
    model = create('.in22k_ft_in22k_in1k', **load(saved(tmp_path, theirs)))
    assert relative_error(model(images(64, 64)), theirs(images(64, 64)).logits) < 1e-5


# the form of microsoft/beit-base-patch16-224-pt22k, which the tags .in22k name: no pooler, norm and head of the
# pre-training beside the encoder
@pytest.mark.parametrize(
    'options', [dict(), dict(global_pool='token'), dict(features_only=True), dict(in_chans=1, global_pool='token')]
)
def test_pre_trained_file_behind_the_tag(tmp_path, options):
    transformers, config = hf_config(use_shared_relative_position_bias=True, use_mask_token=True)
    theirs = randomize(transformers.BeitForMaskedImageModeling(config)).eval()
    model = create('.in22k', **options, **file_of(saved(tmp_path, theirs)))
    encoder = model.model if options.get('features_only') else model
    table = theirs.beit.shared_position_bias.relative_position_bias_table
    assert all(torch.equal(b.attn.relative_position_bias_table, table) for b in encoder.blocks)


def test_pre_trained_file_for_fine_tuning(tmp_path):
    # with another number of classes timm loads without strictness; the encoder must be there all the same
    transformers, config = hf_config(use_shared_relative_position_bias=True, use_mask_token=True)
    theirs = randomize(transformers.BeitForMaskedImageModeling(config)).eval()
    model = create('.in22k', num_classes=7, **file_of(saved(tmp_path, theirs)))
    table = theirs.beit.shared_position_bias.relative_position_bias_table
    assert all(torch.equal(b.attn.relative_position_bias_table, table) for b in model.blocks)
    assert torch.equal(model.blocks[1].attn.qkv.weight[16:32], theirs.beit.layers[1].attention.k_proj.weight)


def test_foreign_and_incomplete_files_are_errors(source, tmp_path):
    state = source[0].state_dict()
    torch.save({**state, 'blocks.0.attn.gate': torch.zeros(1)}, tmp_path / 'more.pth')
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "blocks.0.attn.gate"'):
        create(checkpoint_path=str(tmp_path / 'more.pth'))
    torch.save({n: t for n, t in state.items() if n != 'blocks.1.norm2.bias'}, tmp_path / 'less.pth')
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "blocks.1.norm2.bias"'):
        create(checkpoint_path=str(tmp_path / 'less.pth'))
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / 'foreign.pth')
    with pytest.raises(RuntimeError, match='Missing key'):
        create(checkpoint_path=str(tmp_path / 'foreign.pth'))
    table = 'blocks.0.attn.relative_position_bias_table'
    torch.save({**state, table: torch.zeros(60, 2)}, tmp_path / 'odd.pth')
    with pytest.raises(ValueError, match='a bias table of 60 rows is of no square grid and not of the 4x4 grid'):
        create(checkpoint_path=str(tmp_path / 'odd.pth'))


def test_loading_does_not_change_the_file_in_memory(source):
    state = {n: t.clone() for n, t in source[0].state_dict().items()}
    names = list(state)
    create(img_size=(48, 96)).load_state_dict(state)
    assert list(state) == names and all(torch.equal(t, state[n]) for n, t in source[0].state_dict().items())


def test_state_dict_round_trip():
    model = randomize(create(use_mask_token=True, use_abs_pos_emb=True, use_shared_rel_pos_bias=True))
    other = create(use_mask_token=True, use_abs_pos_emb=True, use_shared_rel_pos_bias=True)
    other.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))
