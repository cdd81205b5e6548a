"""Configurations of transformers as arguments of our models and back, with the real BeitConfig as the other side."""

import importlib.util
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

if importlib.util.find_spec('transformers') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[test]'", allow_module_level=True)

import transformers
from transformers import BeitConfig

from beit_plugin.checkpoints.hf_config import read_config, write_config
from beit_plugin.checkpoints.hf_options import ACTIVATIONS, ENCODER, OF_TASK, ROWS
from beit_plugin.models.beit import Beit
from beit_plugin.models.mim import BeitForMaskedImageModeling
from beit_plugin.segmentation.backbone import BeitBackbone
from beit_plugin.segmentation.segmentor import build_segmentor

ARCHITECTURES = {
    'encoder': 'BeitModel',
    'classifier': 'BeitForImageClassification',
    'mim': 'BeitForMaskedImageModeling',
    'segmentor': 'BeitForSemanticSegmentation',
    'backbone': 'BeitBackbone',
}
TINY = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24, image_size=32)
# what a task cannot do without, or would be slow with
NEEDS = {'segmentor': dict(out_indices=[0, 2, 3, 4], auxiliary_channels=6)}

# a value of each option that is not its default, nor TINY's
VALUES = dict(
    vocab_size=11, hidden_size=24, num_hidden_layers=5, num_attention_heads=4, intermediate_size=31,
    hidden_act='gelu_new', hidden_dropout_prob=0.15, attention_probs_dropout_prob=0.25, initializer_range=0.03,
    layer_norm_eps=1e-6, image_size=(48, 64), patch_size=(16, 8), num_channels=1, use_mask_token=True,
    use_absolute_position_embeddings=True, use_relative_position_bias=True, use_shared_relative_position_bias=True,
    layer_scale_init_value=1e-5, drop_path_rate=0.3, use_mean_pooling=False, pool_scales=[1, 4],
    use_auxiliary_head=False, auxiliary_loss_weight=0.7, auxiliary_channels=10, auxiliary_num_convs=2,
    auxiliary_concat_input=True, semantic_loss_ignore_index=-100, out_features=['stem', 'stage1', 'stage2', 'stage3'],
    out_indices=[0, 2, 3, 4], add_fpn=True, reshape_hidden_states=False,
)  # fmt: skip


def config(task, **options):
    options = {**TINY, **NEEDS.get(task, {}), **options}
    if 'out_features' in options:
        options.pop('out_indices', None)
    return BeitConfig(**options, architectures=[ARCHITECTURES[task]])


def contents(config):
    """What save_pretrained writes."""
    return json.loads(config.to_json_string())


def build(task, arguments):
    if task == 'segmentor':
        return build_segmentor(**arguments)
    return {'mim': BeitForMaskedImageModeling, 'backbone': BeitBackbone}.get(task, Beit)(**arguments)


def there(config):
    read = read_config(contents(config))
    return read, build(read.task, read.arguments)


def assert_round_trip(config, task):
    read, model = there(config)
    assert read.task == task
    written = json.loads(json.dumps(write_config(model, read.raw)))
    assert written == contents(config)
    assert BeitConfig(**written).to_dict() == config.to_dict()
    return read, model


def test_the_table_is_all_of_beit_config():
    common = transformers.PreTrainedConfig.__dataclass_fields__
    fields = {n.removeprefix('_'): f for n, f in BeitConfig.__dataclass_fields__.items() if n not in common}
    assert fields.keys() == ROWS.keys() == VALUES.keys() and len(ROWS) == 31
    plain = {name: list(f.default) if isinstance(f.default, tuple) else f.default for name, f in fields.items()}
    assert plain == {name: row.default for name, row in ROWS.items()}
    assert all(type(plain[name]) is type(row.default) for name, row in ROWS.items())
    assert all(VALUES[name] != plain[name] and VALUES[name] != TINY.get(name) for name in VALUES)


# what else must change for a value to be possible
WITH = {
    ('add_fpn', 'encoder'): dict(out_indices=[1, 2, 3, 4]),
    ('add_fpn', 'classifier'): dict(out_indices=[1, 2, 3, 4]),
    ('add_fpn', 'mim'): dict(out_indices=[1, 2, 3, 4]),
    ('add_fpn', 'backbone'): dict(out_indices=[1, 2, 3, 4]),
    ('out_indices', 'segmentor'): dict(num_hidden_layers=5, out_indices=[2, 3, 4, 5]),
    ('out_features', 'segmentor'): dict(num_hidden_layers=5, out_features=['stage2', 'stage3', 'stage4', 'stage5']),
}


@pytest.mark.parametrize(
    'option, task',
    # without use_mean_pooling transformers normalises twice before its MIM head, which is refused
    [(o, t) for o in VALUES for t in ARCHITECTURES if (o, t) != ('use_mean_pooling', 'mim')],
)
def test_each_option(option, task):
    others = WITH.get((option, task), {})
    wanted = config(task, **{option: VALUES[option], **others})
    read, model = assert_round_trip(wanted, task)
    before = read_config(contents(config(task, **{name: others[name] for name in others if name != option})))
    has_place = ROWS[option] in ENCODER + OF_TASK[task]
    assert (read.arguments != before.arguments) == has_place
    # without the original: the value is in the model, not only carried along
    default = contents(BeitConfig(num_hidden_layers=len(getattr(model, 'backbone', model).blocks)))
    assert write_config(model)[option] == (contents(wanted) if has_place else default)[option]


@pytest.mark.parametrize('num_labels', [1, 2, 3, 7])
@pytest.mark.parametrize('task', ARCHITECTURES)
def test_labels(task, num_labels):
    wanted = config(task, num_labels=num_labels)
    read, model = assert_round_trip(wanted, task)
    assert BeitConfig(**write_config(model, read.raw)).num_labels == num_labels
    if task in ('classifier', 'segmentor'):
        assert read.arguments['num_classes'] == model.num_classes == num_labels
        assert BeitConfig(**write_config(model)).to_dict()['id2label'] == wanted.to_dict()['id2label']


def test_names_of_labels():
    wanted = config('classifier', id2label={0: 'cat', 1: 'dog'}, label2id={'cat': 0, 'dog': 1}, dtype='bfloat16')
    read, model = assert_round_trip(wanted, 'classifier')
    assert write_config(model, read.raw)['id2label'] == {'0': 'cat', '1': 'dog'}
    assert write_config(model)['label2id'] == {'LABEL_0': 0, 'LABEL_1': 1}
    model.reset_classifier(3)
    again = write_config(model, read.raw)
    assert again['id2label'] == {'0': 'LABEL_0', '1': 'LABEL_1', '2': 'LABEL_2'} and again['dtype'] == 'bfloat16'
    assert again['label2id'] == {'LABEL_0': 0, 'LABEL_1': 1, 'LABEL_2': 2}
    counted = read_config({**TINY, 'architectures': ['BeitForImageClassification'], 'num_labels': 5})
    model = build('classifier', counted.arguments)
    assert write_config(model, counted.raw)['num_labels'] == 5
    model.reset_classifier(4)
    assert BeitConfig(**write_config(model, counted.raw)).num_labels == 4


rates = st.floats(0, 0.9, exclude_max=True)
pairs = st.integers(16, 70) | st.tuples(st.integers(16, 70), st.integers(16, 70)).map(list)


@st.composite
def configurations(draw):
    depth, heads = draw(st.integers(4, 6)), draw(st.integers(1, 3))
    task = draw(st.sampled_from(list(ARCHITECTURES)))
    stages = draw(st.sets(st.integers(0, depth), min_size=4, max_size=4).map(sorted))
    if draw(st.booleans()):
        taps = {'out_indices': [i - depth - 1 if draw(st.booleans()) else i for i in stages]}
    else:
        taps = {'out_features': [('stem', *(f'stage{i}' for i in range(1, depth + 1)))[i] for i in stages]}
    flags = (
        'use_mask_token', 'use_absolute_position_embeddings', 'use_relative_position_bias',
        'use_shared_relative_position_bias', 'use_auxiliary_head', 'auxiliary_concat_input',
    )  # fmt: skip
    maps = draw(st.sampled_from([(False, False), (False, True), (True, True)]))
    options = dict(
        vocab_size=draw(st.integers(1, 20)), hidden_size=heads * draw(st.integers(1, 5)), num_hidden_layers=depth,
        num_attention_heads=heads, intermediate_size=draw(st.integers(1, 40)),
        hidden_act=draw(st.sampled_from(list(ACTIVATIONS))), hidden_dropout_prob=draw(rates),
        attention_probs_dropout_prob=draw(rates), initializer_range=draw(st.floats(1e-3, 1)),
        layer_norm_eps=draw(st.floats(1e-12, 1e-3)), image_size=draw(pairs),
        patch_size=draw(st.sampled_from([16, 5, [16, 16], [7, 12]])), num_channels=draw(st.integers(1, 4)),
        layer_scale_init_value=draw(st.floats(0, 1)), drop_path_rate=draw(rates),
        use_mean_pooling=task == 'mim' or draw(st.booleans()),
        pool_scales=draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)),
        auxiliary_loss_weight=draw(st.floats(0, 2)), auxiliary_channels=draw(st.integers(1, 8)),
        auxiliary_num_convs=draw(st.integers(1, 3)), semantic_loss_ignore_index=draw(st.integers(-300, 300)),
        add_fpn=maps[0], reshape_hidden_states=maps[1], num_labels=draw(st.integers(1, 6)),
        **{name: draw(st.booleans()) for name in flags}, **taps,
    )  # fmt: skip
    return task, options


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configurations())
def test_any_configuration(drawn):
    task, options = drawn
    assert_round_trip(BeitConfig(**options, architectures=[ARCHITECTURES[task]]), task)


@pytest.mark.parametrize('task', ARCHITECTURES)
def test_file_folder_and_contents_are_the_same(tmp_path, task):
    wanted = config(task)
    wanted.save_pretrained(tmp_path)
    assert read_config(tmp_path) == read_config(str(tmp_path / 'config.json')) == read_config(contents(wanted))
    # and with Python's own types, as to_dict gives them
    assert read_config(wanted.to_dict())[:2] == read_config(contents(wanted))[:2]


@pytest.mark.parametrize('names', [None, [], ['ViTModel'], ['BeitModel', 'ViTModel']])
def test_without_a_known_architecture_it_is_an_encoder(names):
    read = read_config({**TINY, 'architectures': names})
    assert read.task == 'encoder' and read.arguments['num_classes'] == 0
    assert read_config({**TINY}) == ('encoder', read.arguments, TINY)


def test_a_file_of_an_old_release():
    # of 4.11 in form: defaults are left out, 'torch_dtype', indices in a classifier that has no use for them
    raw = {
        'architectures': ['BeitForImageClassification'], 'hidden_size': 16, 'num_hidden_layers': 12,
        'num_attention_heads': 2, 'intermediate_size': 64, 'id2label': {str(i): f'c{i}' for i in range(3)},
        'label2id': {f'c{i}': i for i in range(3)}, 'model_type': 'beit', 'out_indices': [3, 5, 7, 11],
        'torch_dtype': 'float32', 'transformers_version': '4.11.0.dev0', 'use_relative_position_bias': True,
        'hidden_dropout_prob': 0, 'layer_scale_init_value': 1,
    }  # fmt: skip
    read = read_config(raw)
    assert read.arguments == dict(
        embed_dim=16, depth=12, num_heads=2, mlp_ratio=4.0, act_layer='gelu', pos_drop_rate=0.0, proj_drop_rate=0.0,
        attn_drop_rate=0.0, init_std=0.02, norm_eps=1e-12, img_size=(224, 224), patch_size=(16, 16), in_chans=3,
        use_mask_token=False, use_abs_pos_emb=False, use_rel_pos_bias=True, use_shared_rel_pos_bias=False,
        init_values=1.0, drop_path_rate=0.1, global_pool='avg', num_classes=3,
    )  # fmt: skip
    written = write_config(build('classifier', read.arguments), raw)
    assert {name: written[name] for name in raw} == raw and type(written['layer_scale_init_value']) is float
    assert BeitConfig(**written).to_dict() == BeitConfig(**{**raw, 'layer_scale_init_value': 1.0}).to_dict()


def test_the_old_name_of_out_indices():
    raw = {**TINY, 'segmentation_indices': [2, 4]}
    for architecture, indices in (('BeitBackbone', ('stage2', 'stage4')), ('BeitModel', None)):
        read = read_config({**raw, 'architectures': [architecture]})
        assert read.arguments.get('out_features') == indices
        written = write_config(build(read.task, read.arguments), read.raw)
        assert written['out_indices'] == [2, 4] and written['out_features'] == ['stage2', 'stage4']
        assert 'segmentation_indices' not in written
        assert BeitConfig(**written).out_indices == BeitConfig(**raw).out_indices
    both = read_config({**raw, 'out_indices': [3], 'architectures': ['BeitBackbone']})
    assert both.arguments['out_features'] == ('stage3',)


@pytest.mark.parametrize(
    'task, options',
    [
        ('encoder', dict(image_size=[32, 32], patch_size=[16, 16])),
        ('encoder', dict(image_size=45)),  # its last 13 pixels are not seen
        ('encoder', dict(hidden_act='gelu_pytorch_tanh')),
        ('encoder', dict(hidden_act='swish', drop_path_rate=0.12345678901234567, hidden_dropout_prob=0)),
        ('encoder', dict(num_hidden_layers=1, drop_path_rate=0.3)),
        ('encoder', dict(drop_path_rate=1e-45)),  # single precision has no number between it and 0
        ('backbone', dict(out_indices=[-3, -1])),
        ('backbone', dict(out_indices=[1, -1], out_features=['stage1', 'stage4'])),
        ('segmentor', dict(out_indices=[0, 2, -2, -1])),
        ('segmentor', dict(use_auxiliary_head=False, auxiliary_channels=9, auxiliary_num_convs=3)),
    ],
)
def test_the_original_spelling_stays(task, options):
    assert_round_trip(config(task, **options), task)


def test_a_changed_model_wins_over_the_original():
    read, model = there(config('classifier', image_size=[32, 32], use_relative_position_bias=True, out_indices=[1, 3]))
    model.set_input_size(img_size=(48, 64))
    del model.blocks[2:]
    written = write_config(model, read.raw)
    assert written['image_size'] == [48, 64] and written['num_hidden_layers'] == 2
    assert written['out_indices'] == [2] and written['stage_names'] == ['stem', 'stage1', 'stage2']


def test_a_pyramid_of_another_depth_is_not_kept():
    read, model = there(config('classifier', add_fpn=True, out_indices=[1, 2, 3, 4], drop_path_rate=0.0))
    del model.blocks[2:]
    written = write_config(model, read.raw)
    assert not written['add_fpn'] and BeitConfig(**written).out_indices == [2]


def count_blocks(model):
    """Makes every token of a model the number of blocks that it has been through."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(name.endswith(('mlp.fc2.bias', 'lambda_2', 'gamma_2')))
    return model.eval()


class Record(nn.Module):
    def forward(self, maps, *args):
        self.maps = maps
        return maps


@pytest.mark.parametrize('indices', [[0, 2, 3, 4], [2, 3, 4, 5], [2, 3, 5, -1], [0, 1, 4, 5], [1, 2, 3, 6]])
def test_taps_of_the_segmentor(indices):
    wanted = config('segmentor', num_hidden_layers=6, out_indices=indices)
    theirs, (_, ours) = transformers.BeitForSemanticSegmentation(wanted), there(wanted)
    theirs.fpn, theirs.decode_head, theirs.auxiliary_head = Record(), nn.Identity(), None
    x = torch.zeros(1, 3, 32, 32)
    count_blocks(theirs)(x)
    maps = count_blocks(ours.backbone)(x)
    assert [m.unique().tolist() for m in maps] == [m.unique().tolist() for m in theirs.fpn.maps]
    assert [m.unique().tolist() for m in maps] == [[float((i - 1) % 7)] for i in indices]


def test_taps_of_the_published_segmentors():
    arguments = read_config(contents(config('segmentor', num_hidden_layers=12, out_indices=[3, 5, 7, 11]))).arguments
    assert arguments['out_indices'] == (1, 3, 5, 9) and 'out_features' not in arguments


@pytest.mark.parametrize('taps', [dict(out_indices=[0, 2, 4]), dict(out_features=['stem', 'stage3']), {}])
def test_taps_of_the_backbone(taps):
    wanted = config('backbone', **taps)
    theirs, (_, ours) = transformers.BeitBackbone(wanted), there(wanted)
    x = torch.zeros(1, 3, 32, 32)
    maps, expected = count_blocks(ours)(x), count_blocks(theirs)(x).feature_maps
    assert [m.unique().tolist() for m in maps] == [m.unique().tolist() for m in expected]
    assert len(maps) == len(wanted.out_indices)


@pytest.mark.parametrize('size, patch', [(45, 16), ((45, 70), 16)])
def test_the_grid_is_that_of_transformers(size, patch):
    wanted = config('encoder', image_size=size, patch_size=patch, use_relative_position_bias=True,
                    use_absolute_position_embeddings=True)  # fmt: skip
    theirs, (_, ours) = transformers.BeitModel(wanted), there(wanted)
    assert ours.pos_embed.shape == theirs.embeddings.position_embeddings.shape
    table = theirs.layers[0].relative_position_bias.relative_position_bias_table
    assert ours.blocks[0].attn.relative_position_bias_table.shape == table.shape


@pytest.mark.parametrize('depth', [1, 2, 5])
def test_drop_path_rates_are_those_of_transformers(depth):
    wanted = config('encoder', num_hidden_layers=depth, drop_path_rate=0.3)
    theirs, (_, ours) = transformers.BeitModel(wanted), there(wanted)
    expected = [getattr(layer.drop_path, 'drop_prob', 0.0) for layer in theirs.layers]
    assert [getattr(block.drop_path1, 'drop_prob', 0.0) for block in ours.blocks] == pytest.approx(expected, rel=1e-6)
