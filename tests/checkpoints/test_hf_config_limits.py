"""Configurations of transformers: what the other side cannot say, what is no configuration, and activations."""

import importlib.util
import math
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

if importlib.util.find_spec('transformers') is None:
    pytest.skip("needs the extra: pip install 'beit-plugin[test]'", allow_module_level=True)

from transformers import BeitConfig
from transformers.activations import ACT2FN

import beit_plugin  # noqa: F401, registers the segmentors
from beit_plugin.checkpoints.convert import CheckpointError
from beit_plugin.checkpoints.hf_config import read_config, write_config
from beit_plugin.checkpoints.hf_options import ACTIVATIONS, ROWS
from beit_plugin.models.beit import Beit
from beit_plugin.models.block import activation
from beit_plugin.models.mim import BeitForMaskedImageModeling, BeitV2ForMaskedImageModeling
from beit_plugin.segmentation.backbone import BeitBackbone
from beit_plugin.segmentation.loss import SegmentationLoss
from beit_plugin.segmentation.pyramid import FeaturePyramid
from beit_plugin.segmentation.segmentor import BeitSegmentor
from beit_plugin.segmentation.upernet import FCNHead, UPerNetHead

TINY = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24, image_size=32)
SMALL = dict(img_size=32, embed_dim=16, depth=4, num_heads=2, mlp_ratio=1.5)
segmentor = partial(timm.create_model, 'beit_plugin_tiny_patch16_640_upernet', **SMALL)


def parts(**changes):
    """A segmentor of parts that transformers has, but for the changes."""
    made = dict(
        backbone=BeitBackbone(**SMALL, out_indices=(3, 0, 1, 2)),
        pyramid=FeaturePyramid(16),
        decode_head=UPerNetHead([16] * 4, 16, 5, dropout=0.0),
        auxiliary_head=FCNHead(16, 6, 5, dropout=0.0),
    )
    return BeitSegmentor(**{**made, **changes})


def test_parts_without_changes_can_be_said():
    written = write_config(parts())
    assert BeitConfig(**written).num_labels == 5 and written['out_indices'] == [0, 2, 3, 4]
    assert written['auxiliary_channels'] == 6 and not written.keys() - BeitConfig().to_dict().keys()
    assert write_config(parts(loss=SegmentationLoss(7, 1), auxiliary_head=None))['auxiliary_loss_weight'] == 1.0


def changed(model, change):
    change(model)
    return model


def block_of(change):
    return lambda: changed(Beit(**SMALL, num_classes=0, drop_path_rate=0.3), lambda m: change(m.blocks[2]))


def setter(name, value):
    return lambda target: setattr(target, name, value)


head = partial(UPerNetHead, [16] * 4, 16, 5, dropout=0.0)
group_norm = partial(nn.GroupNorm, 2)


def fpn_norm(channels, device=None, dtype=None):
    return nn.GroupNorm(2, channels)


@pytest.mark.parametrize(
    'make, words',
    [
        (lambda: nn.Linear(2, 2), 'a Linear is none of the models'),
        (lambda: timm.create_model('beit_base_patch16_224', **SMALL), 'a Beit is none of the models'),
        (lambda: Beit(**{**SMALL, 'depth': 0}), 'without blocks'),
        (lambda: Beit(**SMALL, patch_norm=True), 'no option for patch_norm$'),
        (lambda: Beit(**SMALL, qkv_bias=False), 'no option for qkv_bias=False$'),
        (lambda: Beit(**SMALL, qkv_bias=False, patch_norm=True), 'no option for patch_norm, qkv_bias=False$'),
        (lambda: Beit(**SMALL, drop_rate=0.1), 'no option for drop_rate=0.1$'),
        (lambda: Beit(**{**SMALL, 'img_size': 40}), r'img_size=\(40, 40\), no multiple of the patch$'),
        (lambda: Beit(**SMALL, pos_drop_rate=0.1), r'hidden_dropout_prob is one value .* \[0.1, 0.0'),
        (lambda: Beit(**SMALL, proj_drop_rate=0.1), r'hidden_dropout_prob is one value .* \[0.0, 0.1'),
        (lambda: Beit(**SMALL, global_pool=''), "global_pool='', norm: True, fc_norm: False"),
        (lambda: Beit(**SMALL, use_fc_norm=False), "global_pool='avg', norm: True, fc_norm: False"),
        (lambda: Beit(**SMALL, global_pool='token', use_fc_norm=True), 'norm: False, fc_norm: True'),
        (lambda: Beit(**SMALL, global_pool='', use_fc_norm=True, num_classes=0), "global_pool='', norm: False"),
        (lambda: Beit(**SMALL, init_values=-0.1), 'layer_scale_init_value must be a number of at least 0 .*, got -0.1'),
        (lambda: Beit(**SMALL, act_layer='prelu'), 'no hidden_act for PReLU'),
        (lambda: Beit(**SMALL, act_layer='elu'), 'no hidden_act for ELU'),
        (lambda: Beit(**SMALL, act_layer=partial(F.leaky_relu, negative_slope=0.2)), 'no hidden_act for _F'),
        (block_of(lambda b: setter('p', 0.1)(b.attn.attn_drop)), r'attention_probs_dropout_prob is one value'),
        (block_of(lambda b: setter('p', 0.1)(b.attn.proj_drop)), r'hidden_dropout_prob is one value'),
        (block_of(lambda b: setter('p', 0.1)(b.mlp.drop2)), r'hidden_dropout_prob is one value'),
        (block_of(lambda b: setter('eps', 0.1)(b.norm2)), r'layer_norm_eps is one value'),
        (block_of(setter('init_values', 0.5)), r'layer_scale_init_value is one value'),
        (block_of(lambda b: setter('act', nn.ReLU())(b.mlp)), r'hidden_act is one value'),
        (block_of(lambda b: setter('relative_position_bias_table', None)(b.attn)), 'use_relative_position_bias is'),
        (block_of(lambda b: setter('num_heads', 4)(b.attn)), r'num_attention_heads is one value'),
        (block_of(lambda b: setter('fc1', nn.Linear(16, 25))(b.mlp)), r'intermediate_size is one value'),
        (block_of(lambda b: setter('drop_prob', 0.1)(b.drop_path1)), 'drop_path_rate grows linearly'),
        (block_of(lambda b: setter('drop_prob', 0.1)(b.drop_path2)), 'drop_path_rate grows linearly'),
        (lambda: changed(Beit(**SMALL), lambda m: setter('eps', 0.1)(m.fc_norm)), 'layer_norm_eps is one value'),
        (lambda: BeitForMaskedImageModeling(**SMALL, vocab_size=0), 'vocab_size must be a whole number from 1 to'),
        (lambda: BeitForMaskedImageModeling(**SMALL, drop_rate=0.1), 'no option for drop_rate=0.1$'),
        (lambda: BeitV2ForMaskedImageModeling(**SMALL), r'the \[CLS\] branch of BEiT v2$'),
        (lambda: changed(BeitForMaskedImageModeling(**SMALL), setter('norm', nn.Identity())), 'without the one norm'),
        (lambda: BeitBackbone(**SMALL, final_norm=True), 'a final norm'),
        (lambda: BeitBackbone(**SMALL, use_fc_norm=True), 'a final norm'),
        (lambda: BeitBackbone(**SMALL, num_classes=3), 'a classifier of feature maps$'),
        (lambda: BeitBackbone(**SMALL, out_indices=(2, 1)), r'in ascending order, but these are \[3, 2\]'),
        (lambda: BeitBackbone(**SMALL, out_indices=(1, 1)), r'each stage once'),
        (lambda: BeitBackbone(**{**SMALL, 'patch_size': 8}, add_fpn=True), r'a pyramid of \(2, 1, 0.5, 0.25\) times'),
        (lambda: BeitBackbone(**SMALL, add_fpn=True, fpn_norm=fpn_norm), r'another norm .* in the pyramid$'),
        (lambda: parts(backbone=BeitBackbone(**SMALL, out_indices=(0, 1, 2, 3))), 'option for block 3, the last'),
        (lambda: parts(backbone=BeitBackbone(**SMALL, out_indices=(1, 0, 2, 2))), r'in ascending order, but these are'),
        (lambda: parts(backbone=BeitBackbone(**SMALL, out_indices=(3, 0, 1, 2), final_norm=True)), 'a final norm'),
        (lambda: parts(pyramid=FeaturePyramid(16, (4, 2, 1))), r'a pyramid of \(4, 2, 1\) times'),
        (lambda: parts(pyramid=FeaturePyramid(16, norm_layer=fpn_norm)), 'another norm .* in the pyramid$'),
        (lambda: parts(decode_head=UPerNetHead([16] * 4, 12, 5, dropout=0.0)), 'channels=12 beside embed_dim=16$'),
        (lambda: parts(decode_head=UPerNetHead([16] * 3 + [8], 16, 5, dropout=0.0)), 'channels=16 beside'),
        (lambda: parts(decode_head=head(align_corners=True)), 'align_corners=True$'),
        (lambda: parts(decode_head=UPerNetHead([16] * 4, 16, 5)), 'decoder_drop_rate=0.1$'),
        (lambda: parts(auxiliary_head=FCNHead(16, 6, 5)), 'decoder_drop_rate='),
        (lambda: parts(decode_head=head(norm_layer=None)), 'another norm .* heads$'),
        (lambda: parts(decode_head=head(norm_layer=partial(nn.BatchNorm2d, eps=1e-3))), 'another norm .* heads$'),
        (lambda: parts(auxiliary_head=FCNHead(16, 6, 5, dropout=0.0, act_layer=nn.GELU)), 'another activation'),
        (lambda: parts(auxiliary_index=1), 'auxiliary_index=1$'),
        (lambda: parts(auxiliary_head=FCNHead(16, 6, 5, dropout=0.0, kernel_size=1)), 'kernels other than 3'),
        (
            lambda: parts(auxiliary_head=FCNHead(16, 16, 5, num_convs=0, concat_input=True, kernel_size=1)),
            'decoder_drop_rate=0.0, kernels other than 3',
        ),
        (lambda: parts(auxiliary_head=FCNHead(16, 6, 5, dropout=0.0, dilation=2)), 'dilation in the auxiliary head$'),
        (lambda: parts(auxiliary_head=FCNHead(16, 6, 4, dropout=0.0)), 'heads of different classes$'),
        (segmentor, 'decoder_drop_rate=0.1$'),
    ],
)
def test_what_transformers_cannot_say(make, words):
    with pytest.raises(CheckpointError, match=words):
        write_config(make())


def test_standard_segmentors_read_the_last_block_which_transformers_cannot():
    model = segmentor(decoder_drop_rate=0.0)
    assert model.backbone.stages == (1, 2, 3, 4)
    with pytest.raises(CheckpointError, match=r'option for block 3, the last, in out_indices \(its segm'):
        write_config(model)


@pytest.mark.parametrize('text', ['', '{', '{"hidden_size": 1', '\x00\x01', '[' * 100_000, 'nonsense'])
def test_broken_files(tmp_path, text):
    path = tmp_path / 'config.json'
    path.write_text(text)
    with pytest.raises(CheckpointError, match='is cut off or no JSON'):
        read_config(path)


def test_every_cut_of_a_file_is_refused(tmp_path):
    path = tmp_path / 'config.json'
    text = BeitConfig(num_labels=3).to_json_string().rstrip()
    for end in range(0, len(text), 37):
        path.write_text(text[:end])
        with pytest.raises(CheckpointError, match='is cut off or no JSON'):
            read_config(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match=r'config.json does not exist; give a config.json'):
        read_config(tmp_path)
    (tmp_path / 'x.json').write_text('[1]')
    with pytest.raises(CheckpointError, match=r'x.json holds a list'):
        read_config(tmp_path / 'x.json')
    (tmp_path / 'x.json').write_bytes(b'\xff\xfe{}')
    with pytest.raises(CheckpointError, match=r'x.json is cut off or no JSON'):
        read_config(tmp_path / 'x.json')


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(model_type='data2vec-vision'), "model_type 'data2vec-vision', not of 'beit'"),
        (dict(model_type=None), 'model_type None'),
        (dict(use_rel_pos_bias=True, hiden_size=3), 'use_rel_pos_bias, hiden_size: .* no such option'),
        (dict(pruned_heads={'1': [0]}), 'pruned_heads: '),
        ({3: 4}, '3: '),
        (dict(architectures='BeitModel'), "architectures must be a list of names, got 'BeitModel'"),
        (dict(id2label=['a']), r"id2label must name labels .* \['a'\]"),
        (dict(num_labels=-1), 'num_labels be their number, got None, -1'),
        (dict(num_labels=True), 'num_labels be their number'),
        (dict(num_labels=3, id2label={'0': 'a'}), 'num_labels is 3, but id2label has 1'),
        (dict(image_size=12), 'image_size 12 is less than a patch of 16'),
        (dict(out_features=['stage5']), r"has \['stage5'\], but stages are stem \(0\) to stage4"),
        (dict(out_indices=[5, -6, 1]), r'has \[5, -6\], but stages are'),
        (dict(out_indices=[1], out_features=['stage2']), 'are not the same stages'),
        (dict(out_indices=[2, 1]), r'in ascending order, but these are \[2, 1\]'),
        (dict(out_indices=[4, -1]), 'each stage once'),
        (dict(add_fpn=True), 'a pyramid needs exactly 4 out_indices, got None'),
        (dict(architectures=['BeitForSemanticSegmentation'], out_indices=[1, 2, 3]), r'exactly 4 out_indices, got \[1'),
        (dict(architectures=['BeitForMaskedImageModeling'], use_mean_pooling=False), 'normalises twice'),
        (
            dict(architectures=['BeitBackbone'], add_fpn=True, out_indices=[1, 2, 3, 4], patch_size=[4, 8]),
            'add_fpn with patches of 8',
        ),
    ],
)
def test_refused_by_the_reader(options, words):
    with pytest.raises(CheckpointError, match=words):
        read_config({**TINY, **options})


WHOLE, LIST = (0, -1, 2.0, True, '3', None, [1], math.nan), (3, 'stem', {'a': 1}, [None], [1.5], [True], [[1]])
WRONG = {
    **dict.fromkeys(
        ['vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'intermediate_size', 'num_channels',
         'auxiliary_channels'], WHOLE,
    ),
    'auxiliary_num_convs': (-1, 0.0, False, None), 'semantic_loss_ignore_index': (1.0, True, None, '255'),
    'hidden_act': ('gelu_10', 'GELU', '', None, 3, ['gelu'], F.gelu),
    **dict.fromkeys(['hidden_dropout_prob', 'attention_probs_dropout_prob', 'drop_path_rate'],
                    (1, 1.0, -0.1, '0.1', None, True, math.nan, math.inf)),
    **dict.fromkeys(['initializer_range', 'layer_norm_eps', 'layer_scale_init_value', 'auxiliary_loss_weight'],
                    (-0.1, '0.1', None, True, math.nan, math.inf)),
    **dict.fromkeys(['image_size', 'patch_size'], (0, -16, 16.0, True, None, '16', [16], [1, 1, 1], [16, 0], [1, 1.0])),
    **dict.fromkeys([name for name, row in ROWS.items() if isinstance(row.default, bool)], (0, 1, None, 'true', [])),
    'pool_scales': (*LIST, [0], [], None), 'out_indices': (*LIST, ['stem']), 'out_features': (*LIST, [1]),
}  # fmt: skip


def test_every_option_has_wrong_values():
    assert WRONG.keys() == ROWS.keys()


@pytest.mark.parametrize('name', WRONG)
def test_wrong_values(name):
    for value in WRONG[name]:
        with pytest.raises(CheckpointError, match=f'^{name} must be .*, got '):
            read_config({**TINY, name: value})


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    x = torch.linspace(-9, 9, 1001)
    ours = read_config({'hidden_act': name}).arguments['act_layer']
    if name == 'selu':  # documented, accepted by BeitConfig, but no longer known to its models
        assert name not in ACT2FN
        expected = F.selu(x)
    else:
        expected = ACT2FN[name](x)
    torch.testing.assert_close(activation(ours)()(x.clone()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    'layer, name',
    [
        (nn.GELU, 'gelu'), (partial(F.gelu, approximate='tanh'), 'gelu_new'), (F.gelu, 'gelu'), (torch.tanh, 'tanh'),
        (partial(F.relu, inplace=True), 'relu'), (lambda x: x * torch.sigmoid(x), 'silu'),
    ],
)  # fmt: skip
def test_activations_are_told_by_what_they_do(layer, name):
    model = Beit(img_size=32, embed_dim=16, depth=2, num_heads=2, act_layer=layer)
    assert write_config(model)['hidden_act'] == name
