"""A configuration beside weights of another model, and one that asks for more than any model has."""

import json
import re
import tracemalloc

import pytest
import torch
from checkpoints.peers import CLASSES, VOCABULARY, backbone, beit, mim, segmentor

from beit_plugin.checkpoints import CheckpointError, convert, load, save
from beit_plugin.checkpoints.files import read_state_dict, write_state_dict
from beit_plugin.checkpoints.hf_config import read_config
from beit_plugin.checkpoints.sources import read_source


def labels(n):
    return {str(i): str(i) for i in range(n)}


def shared(**options):
    return mim(**options)


def positions():
    return beit(use_abs_pos_emb=True, global_pool='token')


def classifier():
    return beit(num_classes=CLASSES)


def taps():
    return segmentor(out_indices=(0, 1, 2, 3), channels=16)


@pytest.mark.parametrize(
    ('make', 'option', 'value', 'weights'),
    [
        (classifier, 'num_hidden_layers', 6, 5), (classifier, 'hidden_size', 32, 16),
        (classifier, 'num_attention_heads', 4, 2), (classifier, 'intermediate_size', 33, 32),
        (classifier, 'num_channels', 4, 3), (classifier, 'patch_size', [8, 16], 16),
        (classifier, 'patch_size', [16, 8], 16), (classifier, 'image_size', [32, 48], 12),
        (positions, 'image_size', 48, 5),
        (classifier, 'use_relative_position_bias', False, True),
        (classifier, 'use_shared_relative_position_bias', True, False),
        (classifier, 'use_absolute_position_embeddings', True, False),
        (positions, 'use_absolute_position_embeddings', False, True),
        (classifier, 'layer_scale_init_value', 0, True), (shared, 'use_shared_relative_position_bias', False, True),
        (shared, 'vocab_size', 12, VOCABULARY), (classifier, 'id2label', labels(8), CLASSES),
        (taps, 'id2label', labels(8), CLASSES), (taps, 'auxiliary_channels', 8, 6), (taps, 'auxiliary_num_convs', 2, 1),
        (taps, 'auxiliary_concat_input', False, True), (taps, 'use_auxiliary_head', False, True),
        (taps, 'pool_scales', [1, 2, 3], 4),
    ],
)  # fmt: skip
def test_contradictions(make, option, value, weights, tmp_path):
    model = make()
    save(model, tmp_path / 'x', dialect='transformers')
    load(make(), tmp_path / 'x')
    config = tmp_path / 'x/config.json'
    config.write_text(json.dumps({**json.loads(config.read_text()), option: value}))
    name = {'id2label': 'num_labels'}.get(option, option)
    with pytest.raises(
        CheckpointError, match=rf'config\.json says .*{name}.* the weights beside it say {weights} \('
    ) as e:
        load(make(), tmp_path / 'x')
    assert '\n' not in str(e.value)


def test_index_buffers_and_notes_of_another_grid(tmp_path):
    """Tables of 25x41 and of 32x32 patches have one length."""
    save(beit(img_size=(400, 656), depth=1), tmp_path, dialect='transformers')
    config = tmp_path / 'config.json'
    config.write_text(json.dumps({**json.loads(config.read_text()), 'image_size': 512}))
    with pytest.raises(
        CheckpointError, match=r'says .* \(32, 32\), but the weights beside it say \(25, 41\) \(the note'
    ):
        read_source(tmp_path)
    index = convert(beit(img_size=(400, 656), depth=1).state_dict(), to='unilm')
    write_state_dict(dict(index), tmp_path / 'model.safetensors')
    with pytest.raises(CheckpointError, match=r'say \(25, 41\) \(relative_position_index\)'):
        read_source(tmp_path)


@pytest.mark.parametrize('make', [beit, classifier, mim, backbone, taps, positions])
def test_what_we_write_agrees_also_in_part(make, tmp_path):
    save(make(), tmp_path, dialect='transformers')
    state = read_state_dict(tmp_path / 'model.safetensors')
    parts = ('classifier', 'lm_head', 'decode_head', 'auxiliary_head')
    write_state_dict({n: t for n, t in state.items() if not n.startswith(parts)}, tmp_path / 'model.safetensors')
    assert read_source(tmp_path).config is not None


def test_weights_of_something_else_are_left_to_who_loads_them(tmp_path):
    (tmp_path / 'config.json').write_text('{"model_type": "beit"}')
    write_state_dict({'conv.weight': torch.ones(1)}, tmp_path / 'model.safetensors')
    assert read_source(tmp_path).state_dict.keys() == {'conv.weight'}


HUGE = 10**9
DEEP = '[' * 10**5
NESTED = '[' * 500 + ']' * 500


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'num_hidden_layers': HUGE}, 'num_hidden_layers must be a whole number from 1 to 1000, got 1000000000'),
        ({'num_hidden_layers': 10**6}, 'num_hidden_layers must be a whole number from 1 to 1000'),
        ({'hidden_size': HUGE}, 'hidden_size must be'), ({'image_size': [HUGE, 16]}, 'image_size must be'),
        ({'num_labels': HUGE}, 'num_labels be their number'), ({'auxiliary_num_convs': HUGE}, 'num_convs must be'),
        ({'pool_scales': [HUGE]}, 'pool_scales must be'), ({'pool_scales': [1] * 5000}, 'pool_scales must be'),
        ({'layer_norm_eps': 10**400}, 'layer_norm_eps must be'), ({'drop_path_rate': 10**400}, 'path_rate must be'),
        ({'semantic_loss_ignore_index': 10**400}, 'semantic_loss_ignore_index must be'),
        ({'out_indices': [9] * 10**5}, r'has \[9, 9, 9, 9, 9, 9, \.\.\.\]'),
        ({'out_features': ['x' * 10**5]}, r"has \['x+\.\.\.x+'\]"),
        ({'hidden_act': [[1]] * 10**5}, 'hidden_act must be one of'),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_no_model_has(options, words, tmp_path):
    save(beit(), tmp_path, dialect='transformers')
    config = tmp_path / 'config.json'
    config.write_text(json.dumps({**json.loads(config.read_text()), **options}))
    tracemalloc.start()
    for read in (read_config, read_source):
        with pytest.raises(CheckpointError, match=words) as e:
            read(tmp_path)
        assert len(str(e.value)) < 1000
    assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        (f'{{"model_type": "beit", "problem_type": {NESTED}}}', 'nests more than 20 levels'),
        (f'{{"model_type": "beit", "image_size": {NESTED}}}', 'nests more than 20 levels'),
        (f'{{"model_type": "beit", "image_size": {DEEP}}}', 'is cut off or no JSON'),
        ('{"a": ' * 10**5, 'is cut off or no JSON'),
        (f'{{"image_size": 1{"0" * 5000}}}', 'is cut off or no JSON'),
        ('[1]', 'holds a list, expected an object'),
    ],
    ids=range(6),
)
@pytest.mark.parametrize('name', ['config.json', 'model.safetensors.index.json'])
def test_nested_and_broken_files(name, text, words, tmp_path):
    if name == 'config.json':
        save(beit(), tmp_path, dialect='transformers')
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=f'{re.escape(name)} {words}'):
        read_source(tmp_path)


@pytest.mark.parametrize(
    'names',
    [
        ['model.safetensors.index.json'], ['..'], ['.'], ['../x.safetensors'], ['/x.safetensors'], [''], [3], [None],
        [['x.safetensors']], ['x' * 300 + '.safetensors'], [3, 'x.pth'], [], ['a'] * 10**5,
    ],
    ids=lambda names: str(names)[:30],
)  # fmt: skip
def test_an_index_that_names_no_files_beside_it(names, tmp_path):
    weight_map = {f'blocks.{i}': name for i, name in enumerate(names)}
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': weight_map}))
    words = 'which is no checkpoint file beside it' if names else 'is no list of checkpoint files'
    with pytest.raises(CheckpointError, match=words) as e:
        read_source(tmp_path)
    assert len(str(e.value)) < 1000
