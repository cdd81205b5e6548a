"""Checkpoints of tokenizers: every layout loads, what is no tokenizer is named, files are whole."""

import importlib
import re
import shutil
import sys
from collections import OrderedDict

import pytest
import torch
from helpers import TINY
from torch import nn

from beit_plugin import checkpoints
from beit_plugin.checkpoints import CheckpointError
from beit_plugin.checkpoints.files import write_state_dict
from beit_plugin.models.beit import Beit
from beit_plugin.tokenizers import PUBLISHED, VQKD, DalleTokenizer, load_tokenizer, save_tokenizer


def same(a, b, x):
    return torch.equal(a.encode(x), b.encode(x))


def unilm_of(model):
    """The state dict that unilm's modeling_vqkd.py would have saved while training, teacher and all."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith('quantize.'):
            continue
        if name != 'geometry':
            state[re.sub(r'^(encoder|decoder)\.norm\.', r'\1.fc_norm.', name)] = tensor
    book = model.quantize
    state |= {
        'quantize.embedding.weight': book.weight,
        'quantize.embedding.cluster_size': book.cluster_size,
        'quantize.embedding.embed_avg': book.weight.clone(),
        'quantize.embedding.initted': torch.ones(1),
        'quantize.cluster_size': book.cluster_size,
        'scaling_layer.shift': torch.zeros(1, 3, 1, 1),
        'teacher_model.visual.proj': torch.zeros(4, 4),
    }
    return state


@pytest.fixture
def trained(make_vqkd, images):
    model = make_vqkd()
    for _ in range(3):
        model(images, torch.randn(3, 24, 16))
    return model.eval()


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
def test_vqkd_there_and_back(trained, images, tmp_path, suffix):
    save_tokenizer(trained, tmp_path / f'x{suffix}')
    loaded = load_tokenizer(tmp_path / f'x{suffix}')
    expected = trained.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert isinstance(loaded, VQKD) and loaded.input_size == (32, 48) and same(loaded, trained, images)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_heads_and_grid_are_part_of_the_checkpoint(make_vqkd, images):
    model = make_vqkd(embed_dim=48, num_heads=6).eval()
    loaded = load_tokenizer(model.state_dict())
    assert loaded.encoder.blocks[0].attn.num_heads == 6 and loaded.encoder.window_size == (4, 6)
    bare = {name: value for name, value in model.state_dict().items() if name != 'geometry'}
    with pytest.raises(CheckpointError, match='nothing tells the attention heads of this VQ-KD of width 48; give num_'):
        load_tokenizer(bare, grid=(4, 6))
    assert same(load_tokenizer(bare, grid=(4, 6), num_heads=6), model, images)
    with pytest.raises(CheckpointError, match=r'pos_embed with 1 \+ h \* w tokens.* grid=\(h, w\)'):
        load_tokenizer(bare, num_heads=6)


def test_unilm(make_vqkd, images):
    model = make_vqkd(num_heads=1).eval()  # width 64, so one head by the rule of the published ones
    loaded = load_tokenizer({'model': unilm_of(model)}, grid=(4, 6))
    expected = model.state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]) or name == 'quantize.initialized', name
    assert loaded.quantize.initialized and loaded.decoder is not None
    out, other = loaded(images, torch.ones(3, 24, 16)), model(images, torch.ones(3, 24, 16))
    assert torch.equal(out.loss, other.loss) and torch.equal(out.tokens, other.tokens)


def test_a_decoder_without_its_last_layer_is_left_out(make_vqkd, images):
    model = make_vqkd(num_heads=1).eval()  # mmpretrain's VQKD(decoder_config=...) has one, and never runs it
    state = {name: value for name, value in unilm_of(model).items() if not name.startswith('decode_task_layer')}
    loaded = load_tokenizer(state, grid=(4, 6))
    assert loaded.decoder is None and same(loaded, model, images)


def test_inside_a_larger_checkpoint(trained, images):
    around = {f'target_generator.{name}': value for name, value in trained.state_dict().items()}
    assert same(load_tokenizer({'state_dict': {**around, 'backbone.x': torch.ones(2)}}), trained, images)


@pytest.mark.parametrize('dialect', ['unilm', 'mmpretrain'])
def test_other_dialects_there_and_back(trained, images, tmp_path, dialect):
    save_tokenizer(trained, tmp_path / 'x.pth', dialect)
    loaded = load_tokenizer(tmp_path / 'x.pth', grid=(4, 6), num_heads=2)
    assert same(loaded, trained, images)
    assert (loaded.decoder is None) == (dialect == 'mmpretrain')
    names = set(torch.load(tmp_path / 'x.pth', weights_only=True)['model'] if dialect == 'unilm' else ())
    published = unilm_of(trained)
    assert dialect != 'unilm' or names == {n for n in published if not n.startswith(('teacher', 'scaling'))}


def test_options_reach_the_model(trained, images):
    loaded = load_tokenizer(trained.state_dict(), attn_backend='eager', revive=False)
    assert loaded.encoder.blocks[0].attn.backend == 'eager' and not loaded.quantize.revive
    assert same(loaded, trained, images)
    assert load_tokenizer(trained.state_dict(), decay=0.5).quantize.decay == 0.5


def test_dalle_there_and_back(make_dalle, images, tmp_path):
    model = make_dalle()
    save_tokenizer(model, tmp_path / 'x.safetensors')
    loaded = load_tokenizer(tmp_path / 'x.safetensors', input_size=64, compute_dtype=torch.float32)
    assert isinstance(loaded, DalleTokenizer) and loaded.input_size == (64, 64)
    assert torch.equal(loaded.logits(images), model.logits(images))
    tokens = model.encode(images)
    assert torch.equal(loaded.decode(tokens), model.decode(tokens))
    assert loaded.encoder.compute_dtype == loaded.decoder.compute_dtype == torch.float32


def openai_of(part):
    return {re.sub('weight$', 'w', re.sub('bias$', 'b', name)): value for name, value in part.state_dict().items()}


def flava_of(encoder):
    rename = [(r'(blocks\.group_\d)\.', r'\1.group.'), (r'res_path\.', 'res_path.path.')]
    state = encoder.state_dict()
    for pattern, theirs in rename:
        state = {re.sub(pattern, theirs, name): value for name, value in state.items()}
    return {f'image_codebook.{name}': value for name, value in state.items()} | {'text_model.x': torch.ones(2)}


def test_dalle_of_others(make_dalle, images, tmp_path):
    model = make_dalle()
    tokens = model.encode(images)
    encoder, decoder = openai_of(model.encoder), openai_of(model.decoder)
    for source in (encoder, flava_of(model.encoder)):
        loaded = load_tokenizer(source)
        assert torch.equal(loaded.logits(images), model.logits(images)) and not loaded.can_decode
    for order in ([encoder, decoder], (decoder, encoder)):
        assert torch.equal(load_tokenizer(order).decode(tokens), model.decode(tokens))
    for name, state in (('encoder', encoder), ('decoder', decoder)):
        write_state_dict(state, tmp_path / f'{name}.pt')
    assert torch.equal(load_tokenizer(tmp_path).decode(tokens), model.decode(tokens))  # a folder, as unilm's
    with pytest.raises(CheckpointError, match='holds the decoder of a dVAE alone; give the encoder too'):
        load_tokenizer(decoder)
    with pytest.raises(CheckpointError, match='belongs to a second encoder of a dVAE'):
        load_tokenizer([encoder, encoder])
    with pytest.raises(ValueError, match='must share their tokens'):
        load_tokenizer([encoder, openai_of(make_dalle(vocab_size=16).decoder)])


FAKES = {'utils': ('Conv2d',), 'encoder': ('Encoder', 'EncoderBlock'), 'decoder': ('Decoder', 'DecoderBlock')}


@pytest.fixture
def dall_e(tmp_path, monkeypatch):
    """OpenAI's package in outline: its pickles name these classes."""
    package = tmp_path / 'site' / 'dall_e'
    package.mkdir(parents=True)
    (package / '__init__.py').touch()
    for name, classes in FAKES.items():
        bodies = '\n'.join(f'class {cls}(Module):\n    pass\n' for cls in classes)
        (package / f'{name}.py').write_text(f'from torch.nn import Module\n{bodies}')
    monkeypatch.syspath_prepend(package.parent)
    yield {cls: getattr(importlib.import_module(f'dall_e.{name}'), cls) for name in FAKES for cls in FAKES[name]}
    forget()


def forget():
    for name in [name for name in sys.modules if name.partition('.')[0] == 'dall_e']:
        del sys.modules[name]


def as_openai(ours, part, classes):
    """Our module as those of OpenAI's package, with its attributes."""
    children = OrderedDict((name, as_openai(child, part, classes)) for name, child in ours.named_children())
    if isinstance(ours, nn.Conv2d):
        conv = classes['Conv2d']()
        conv.w, conv.b = ours.weight, ours.bias
        conv.n_in, conv.kw, conv.use_float16, conv.device = ours.in_channels, 3, True, torch.device('cpu')
        return conv
    if isinstance(ours, nn.Sequential) or not children:
        return nn.Sequential(children) if children else ours
    other = classes[part if type(ours).__name__ != '_Block' else f'{part}Block']()
    for name, child in children.items():
        other.add_module(name, child)
    return other


@pytest.mark.parametrize('zipped', [True, False])
def test_whole_modules_are_read_not_run(make_dalle, images, tmp_path, dall_e, zipped, monkeypatch):
    model, folder = make_dalle(), tmp_path / 'weights'
    folder.mkdir()
    for ours, part in ((model.encoder, 'Encoder'), (model.decoder, 'Decoder')):
        file = folder / f'{part.lower()}.pkl'
        torch.save(as_openai(ours, part, dall_e), file, _use_new_zipfile_serialization=zipped)
    forget()
    monkeypatch.undo()  # nobody has to have the package
    with pytest.raises(ImportError):
        importlib.import_module('dall_e')
    loaded = load_tokenizer(folder)
    tokens = model.encode(images)
    assert torch.equal(loaded.logits(images), model.logits(images))
    assert torch.equal(loaded.decode(tokens), model.decode(tokens))


class Evil:
    def __reduce__(self):
        return print, ('this ran',)


def test_pickles_that_run_code_are_refused(make_dalle, tmp_path, capsys):
    module = make_dalle().encoder
    torch.save(module, tmp_path / 'x.pkl')  # of classes that no published file has
    with pytest.raises(CheckpointError, match=r'holds beit_plugin\..*DalleEncoder, which is neither.* save its'):
        load_tokenizer(tmp_path / 'x.pkl')
    torch.save({'blocks.input.w': Evil()}, tmp_path / 'y.pkl')
    with pytest.raises(CheckpointError, match=r'holds builtins.print, which is neither'):
        load_tokenizer(tmp_path / 'y.pkl')
    assert not capsys.readouterr().out
    assert not [g for g in torch.serialization.get_safe_globals() if 'dall_e' in str(g)]


def test_published_names(make_dalle, images, tmp_path, monkeypatch):
    model = make_dalle()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    for name in ('encoder', 'decoder'):
        write_state_dict(openai_of(getattr(model, name)), tmp_path / f'{name}.pkl')
    fetched = []

    def fetch(url, target, *_):
        fetched.append(url)
        shutil.copy(tmp_path / url.rsplit('/', 1)[1], target)

    monkeypatch.setattr(torch.hub, 'download_url_to_file', fetch)
    assert same(load_tokenizer('dalle'), model, images)
    assert fetched == ['https://cdn.openai.com/dall-e/encoder.pkl', 'https://cdn.openai.com/dall-e/decoder.pkl']
    assert all(url.startswith('https://') for urls in PUBLISHED.values() for url in urls)


def test_what_is_no_tokenizer(trained, make_dalle, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"unknown tokenizer 'dale': no file of that name .*known names are dalle,"
    ):
        load_tokenizer('dale')
    with pytest.raises(CheckpointError, match=r'none.pth does not exist; give the path'):
        load_tokenizer(tmp_path / 'none.pth')
    checkpoints.save(Beit(**TINY), tmp_path / 'beit.pth')
    message = (
        r'expected the dVAE of DALL-E or a VQ-KD, got .*beit.pth with the names cls_token.*; give a checkpoint of a'
    )
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path / 'beit.pth')

    state = trained.state_dict()
    with pytest.raises(CheckpointError, match=r'no table knows encoder.blocks.0.surprise of this VQ-KD; remove'):
        load_tokenizer({**state, 'encoder.blocks.0.surprise': torch.ones(1)})
    with pytest.raises(CheckpointError, match=r'no table knows quantize.spare of this'):
        load_tokenizer({**state, 'quantize.spare': torch.ones(1)})
    lacking = {name: value for name, value in state.items() if name != 'encoder.norm.bias'}
    with pytest.raises(
        CheckpointError, match=r'the VQKD of the state dict does not fit: lacks encoder.norm.bias; fetch'
    ):
        load_tokenizer(lacking)
    with pytest.raises(CheckpointError, match=r'expected quantize.weight with 2 dimensions, got nothing'):
        load_tokenizer({name: value for name, value in state.items() if not name.startswith('quantize')})
    with pytest.raises(CheckpointError, match=r'encode_task_layer.2.weight has shape \(9, 64\) instead of \(8, 64\)'):
        load_tokenizer({**state, 'encode_task_layer.2.weight': torch.ones(9, 64)})
    wider = {**state, 'decoder.patch_embed.proj.weight': torch.ones(64, 8, 2, 2)}
    with pytest.raises(
        CheckpointError, match='expected the decoder of a VQ-KD to be like its encoder but for the depth'
    ):
        load_tokenizer(wider)

    dalle = make_dalle().encoder.state_dict()
    with pytest.raises(
        CheckpointError, match=r'the DalleEncoder of encoder of the state dict does not fit: lacks blocks'
    ):
        load_tokenizer({n: value for n, value in dalle.items() if 'group_2.block_1.res_path.conv_2' not in n})
    with pytest.raises(CheckpointError, match=r'has no place for blocks.extra.weight'):
        load_tokenizer({**dalle, 'blocks.extra.weight': torch.ones(1)})
    with pytest.raises(CheckpointError, match=r'expected blocks.output.conv.weight with 4 dimensions, got nothing'):
        load_tokenizer({n: value for n, value in dalle.items() if 'output' not in n})


def test_what_cannot_be_saved(trained, make_dalle, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"DalleTokenizer can be saved as native, got the dialect 'unilm'; choose"
    ):
        save_tokenizer(make_dalle(), tmp_path / 'x.pth', 'unilm')
    with pytest.raises(
        CheckpointError, match=r"VQKD can be saved as native, unilm, mmpretrain, got the dialect 'timm'"
    ):
        save_tokenizer(trained, tmp_path / 'x.pth', 'timm')
    with pytest.raises(CheckpointError, match=r'x.zip is no name of a checkpoint file; end it in one of'):
        save_tokenizer(trained, tmp_path / 'x.zip')
    assert not list(tmp_path.iterdir())
