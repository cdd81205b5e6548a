"""Tables of 25x41 patches are as long as those of 32x32: what is stated counts, what is not is not guessed."""

from collections import OrderedDict
from unittest import mock

import pytest
import timm
import torch
from checkpoints.peers import beit
from helpers import randomize
from safetensors.torch import load_file, save_file
from timm.models import _builder
from torch import nn

from beit_plugin.checkpoints import CheckpointError, convert, load, save
from beit_plugin.checkpoints.describe import describe
from beit_plugin.checkpoints.sources import read_source
from beit_plugin.models.resample import resize_rel_pos_bias_table

WIDE, SQUARE = (25, 41), (32, 32)
TABLE = 'blocks.0.attn.relative_position_bias_table'
NAME, SEGMENTOR = 'beit_plugin_large_patch16_512', 'beit_plugin_tiny_patch16_640_upernet'
SIZES = dict(patch_size=16, embed_dim=16, num_heads=2)
REFUSED = r'is as long at the 25x41 grid of the model as at 32x32 patches; say which .*grid=\(h, w\)'


def pixels(grid):
    return grid[0] * 16, grid[1] * 16


def encoder(grid, **options):
    return randomize(beit(img_size=pixels(grid), depth=1, global_pool='token', **options))


def of_timm(grid, name=NAME, **options):
    options = {**SIZES, 'depth': 1, 'num_classes': 3, **options}
    return randomize(timm.create_model(name, img_size=pixels(grid), **options))


def segmentor(grid):
    return of_timm(grid, SEGMENTOR, depth=4, out_indices=(0, 1, 2, 3), channels=8, auxiliary_channels=4)


def loaded(model, state, source, target, prefix=''):
    """Whether the table came to the model as a resize of one grid to the other."""
    expected = resize_rel_pos_bias_table(state[prefix + TABLE], source, target, 'geometric')
    return torch.equal(model.state_dict()[prefix + TABLE], expected)


@pytest.mark.parametrize(('source', 'target'), [(WIDE, SQUARE), (SQUARE, WIDE), (WIDE, WIDE), (SQUARE, SQUARE)])
def test_our_state_dicts_state_it(source, target, tmp_path):
    state = of_timm(source).state_dict()
    torch.save(state, tmp_path / 'x.pth')
    file = torch.load(tmp_path / 'x.pth', weights_only=True)
    for given in (state, file, {'state_dict': state}, OrderedDict(module=state)):
        model = of_timm(target)
        load(model, given)
        assert loaded(model, state, source, target)
    model = of_timm(target)
    model.load_state_dict(file)
    assert loaded(model, state, source, target)


@pytest.mark.parametrize('name', ['x.pth', 'x.safetensors', 'folder'])
@pytest.mark.parametrize('dialect', ['native', 'timm', 'unilm', 'transformers', 'openmmlab'])
def test_what_we_write_states_it(name, dialect, tmp_path):
    if name == 'folder' and dialect != 'transformers':
        pytest.skip('only transformers has folders')
    saved, model = encoder(WIDE), encoder(SQUARE)
    save(saved, tmp_path / name, dialect=dialect)
    assert read_source(tmp_path / name).grid == WIDE
    load(model, tmp_path / name)
    assert loaded(model, saved.state_dict(), WIDE, SQUARE)


def test_a_conversion_states_it():
    state = convert(encoder(WIDE).state_dict(), to='timm')
    assert describe(state).grid == WIDE and describe(convert(state, to='openmmlab')).grid == WIDE


@pytest.mark.parametrize('around', [lambda model: model, nn.Sequential])
def test_a_segmentor_is_resized_once(around):
    theirs, model = segmentor(WIDE), segmentor(SQUARE)
    around(model).load_state_dict(around(theirs).state_dict())
    assert loaded(model, theirs.state_dict(), WIDE, SQUARE, 'backbone.')
    model.backbone.load_state_dict(theirs.backbone.state_dict())
    assert loaded(model, theirs.state_dict(), WIDE, SQUARE, 'backbone.')


def test_what_states_nothing_is_refused():
    plain = dict(encoder(SQUARE).state_dict())
    for model, ask in ((encoder(WIDE), load), (of_timm(WIDE), lambda m, state: m.load_state_dict(state, strict=False))):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=REFUSED):
            ask(model, plain)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for grid in (SQUARE, WIDE):
        model = encoder(WIDE)
        load(model, plain, grid=grid)
        assert loaded(model, plain, grid, WIDE)


def test_its_own_names_and_shapes_are_the_models(tmp_path, caplog):
    """What PyTorch would load as it is: a training that goes on from a file that states nothing."""
    state = of_timm(WIDE).state_dict()
    save_file(state, tmp_path / 'x.safetensors')
    model = of_timm(WIDE)
    model.load_state_dict(load_file(tmp_path / 'x.safetensors'))
    assert torch.equal(model.state_dict()[TABLE], state[TABLE]) and "taken for the model's" in caplog.text


def test_published_weights_are_of_their_own_size():
    """timm's loader drops what a file states, but knows what it downloads."""
    state = dict(of_timm(SQUARE).state_dict())
    options = {**SIZES, 'depth': 1, 'num_classes': 3, 'img_size': pixels(WIDE), 'pretrained': True}
    with mock.patch.object(_builder, 'load_state_dict_from_hf', lambda *_, **__: dict(state)):
        model = timm.create_model(f'{NAME}.in22k_ft_in22k_in1k', pretrained_cfg_overlay={'num_classes': 3}, **options)
    assert loaded(model, state, SQUARE, WIDE)


def test_a_file_of_the_user_may_be_of_any_size(tmp_path):
    torch.save(of_timm(SQUARE).state_dict(), tmp_path / 'x.pth')
    overlay = {'file': str(tmp_path / 'x.pth'), 'num_classes': 3}
    options = {**SIZES, 'depth': 1, 'num_classes': 3, 'img_size': pixels(WIDE), 'pretrained': True}
    with pytest.raises(CheckpointError, match=REFUSED):
        timm.create_model(NAME, pretrained_cfg_overlay=overlay, **options)


@pytest.mark.parametrize('note', [(2, 3), [2], 'wide', (0, -3), (2.0, 2.0), None, [[2, 2], 3]])
def test_a_note_that_does_not_fit_counts_for_nothing(note):
    state = OrderedDict(encoder((2, 2)).state_dict())
    for metadata in ({'': {'beit_plugin.grid': note}}, {'': 3}, 3):
        state._metadata = metadata
        model = encoder((2, 2))
        load(model, state)
        assert torch.equal(model.state_dict()[TABLE], state[TABLE])


def test_stock_models_do_not_mind():
    ours = of_timm((2, 3), num_classes=0, global_pool='token')
    theirs = timm.create_model(
        'beit_base_patch16_224', img_size=(32, 48), **SIZES, depth=1, num_classes=0, global_pool='token'
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(theirs.state_dict()[TABLE], ours.state_dict()[TABLE])


def test_an_index_that_was_expanded_speaks_of_no_grid():
    """A few bytes of a file would ask for the memory of a million tokens."""
    index = torch.zeros(1, 1).long().expand(1 << 20, 1 << 20)
    state = {**encoder((2, 2)).state_dict(), 'blocks.0.attn.relative_position_index': index}
    with pytest.raises(CheckpointError, match='is not the index of any grid'):
        load(encoder((2, 2)), state)
